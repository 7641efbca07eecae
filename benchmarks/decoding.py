"""Decoding as the tables need it: each audio through the encoder once, and a given text through the cache."""

import hashlib
import logging
import warnings

import torch
from audio import RATE, normalized
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from whisperkv import evaluation
from whisperkv.evaluation.decoding import (  # noqa: F401  # as decoding.forced, ...
    batches,
    forced,
    language_options,
    nats_of_each,
    nats_of_each_at_once,
    start_tokens,
    transcript_tokens,
)
from whisperkv.evaluation.metrics import LOOP  # noqa: F401

transformers_logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="transformers")


def remember_encoder(model):
    """Let the encoder answer from memory whatever it has heard before: every cache is given the same states, and
    their comparison takes a fraction of the time."""
    encoder, memory = model.get_encoder(), {}
    forward = encoder.forward

    def remembered(input_features, *args, **kwargs):
        states = []
        for features in input_features:  # one by one, so that any batch of them finds its states again
            key = hashlib.sha1(features.float().numpy().tobytes()).digest()
            if key not in memory:
                memory[key] = forward(features[None], return_dict=True).last_hidden_state
            states.append(memory[key])
        return BaseModelOutput(last_hidden_state=torch.cat(states))

    encoder.forward = remembered


def features_of(processor, speeches, dtype=torch.float32):
    """[windows, mels, 3000]"""
    samples = [speech.samples for speech in speeches]
    return processor(samples, sampling_rate=RATE, return_tensors="pt").input_features.to(dtype)


def long_features_of(processor, speeches, dtype=torch.float32):
    """Of recordings of different lengths: what generate() takes."""
    samples = [speech.samples for speech in speeches]
    inputs = processor(
        samples,
        sampling_rate=RATE,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    return {"input_features": inputs.input_features.to(dtype), "attention_mask": inputs.attention_mask}


def negative_log_likelihood(model, features, prompts, transcripts):
    """(sum, tokens) of the transcripts, in nats."""
    return float(nats_of_each(model, features, prompts, transcripts).sum()), sum(map(len, transcripts))


def negative_log_likelihood_at_once(model, features, prompts, transcripts):
    """The same in one pass of the decoder, for prompts of one length and caches that keep every token."""
    return float(nats_of_each_at_once(model, features, prompts, transcripts).sum()), sum(map(len, transcripts))


def loops(text):
    """Whether a transcript has got stuck, see LOOP."""
    return evaluation.loops(text, normalized)


def generate(model, features, **options):
    """Rows of tokens. Greedy, if nothing else is asked for."""
    with torch.no_grad():
        return model.generate(features, **{**language_options(model), **options})
