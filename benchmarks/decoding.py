"""Decoding as the tables need it: each audio through the encoder once, and a given text through the cache."""

import hashlib
import logging
import re
import warnings
import zlib

import torch
from audio import RATE, normalized
from models import language_of
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

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


def start_tokens(model, processor):
    """What every transcript without timestamps begins with."""
    if model.generation_config.is_multilingual:
        processor.tokenizer.set_prefix_tokens(language="english", task="transcribe", predict_timestamps=False)
    return processor.tokenizer.prefix_tokens


def transcript_tokens(model, sequence):
    """What generate() returned for one window, to its end token."""
    end = model.generation_config.eos_token_id
    return [token for token in sequence.tolist() if token != end] + [end]


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def forced(model, features, prompts, transcripts):
    """Teacher forcing through the cache, as in generate(): the prompts in one pass, then token by token.

    prompts, transcripts  a list of tokens a window
    Yields, for each step, the logits [rows, vocabulary], the tokens [rows] that stand there in the transcripts, and
    which rows are not over yet [rows].
    """
    rows, start = len(prompts), max(map(len, prompts))
    end = model.generation_config.eos_token_id
    tokens = torch.full((rows, start + max(map(len, transcripts))), end)
    mask = torch.ones_like(tokens)
    for row, (prompt, transcript) in enumerate(zip(prompts, transcripts)):
        tokens[row, start - len(prompt) : start + len(transcript)] = torch.tensor(prompt + transcript)
        mask[row, : start - len(prompt)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    lengths = torch.tensor([start + len(transcript) for transcript in transcripts])
    padded = bool((mask == 0).any())

    states, cache, done = model.get_encoder()(features), None, 0
    for column in range(start, tokens.shape[1]):
        output = model(
            encoder_outputs=states,
            decoder_input_ids=tokens[:, done:column],
            decoder_attention_mask=mask[:, :column] if padded else None,
            decoder_position_ids=positions[:, done:column] if padded else None,
            past_key_values=cache,
            use_cache=True,
        )
        cache, done = output.past_key_values, column
        yield output.logits[:, -1], tokens[:, column], column < lengths


def negative_log_likelihood(model, features, prompts, transcripts):
    """(sum, tokens) of the transcripts, in nats."""
    total, count = 0.0, 0
    for logits, tokens, alive in forced(model, features, prompts, transcripts):
        losses = torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
        total += float(losses[alive].sum(dtype=torch.float64))
        count += int(alive.sum())
    return total, count


@torch.no_grad()
def negative_log_likelihood_at_once(model, features, prompts, transcripts):
    """The same in one pass of the decoder, for prompts of one length and caches that keep every token."""
    start, lengths = len(prompts[0]), [len(transcript) for transcript in transcripts]
    assert all(len(prompt) == start for prompt in prompts)
    tokens = torch.full((len(prompts), start + max(lengths)), model.generation_config.eos_token_id)
    for row, (prompt, transcript) in enumerate(zip(prompts, transcripts)):
        tokens[row, : start + len(transcript)] = torch.tensor(prompt + transcript)
    output = model(encoder_outputs=model.get_encoder()(features), decoder_input_ids=tokens[:, :-1], use_cache=True)
    alive = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = output.logits[:, start - 1 :][alive].float()  # [tokens, vocabulary]: summed exactly along the last only
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, start:][alive], reduction="none")
    return float(losses.sum(dtype=torch.float64)), sum(lengths)


LOOP = (
    "its text compresses more than 2.4 times (zlib, Whisper's own threshold), "
    "or four or more words stand three times in a row"
)


def loops(text):
    """Whether a transcript has got stuck, see LOOP."""
    data = text.encode()
    words = " ".join(normalized(text).split()) + " "
    return len(data) > 2.4 * len(zlib.compress(data)) or bool(re.search(r"(?:^| )((?:\S+ ){4,}?)\1\1", words))


def generate(model, features, **options):
    """Rows of tokens. Greedy, if nothing else is asked for."""
    with torch.no_grad():
        return model.generate(features, **{**language_of(model), **options})
