"""generate() over our searches, against the same patched model without them: the same in every field, bit for bit."""

import copy
import pickle

import pytest
import torch
from test_generate import features_of, given  # noqa: F401
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer, GenerationMixin

from whisperkv import CrossConfig, patch, searches, unpatch


@pytest.fixture(scope="module")
def encoded(tiny_en, speech):
    """The encoder's last states of three pieces of different length, and their features."""
    model, processor = tiny_en
    samples, _ = speech
    features = processor(
        [samples[: 16000 * 3], samples[: 16000 * 20], samples[16000 * 9 : 16000 * 14]],
        sampling_rate=16000, return_tensors="pt",
    ).input_features  # fmt: skip
    with torch.no_grad():
        return features, model.model.encoder(features).last_hidden_state


@pytest.fixture
def counted(monkeypatch):
    """The names of our searches that were called."""
    calls = []
    for name in ("_sample", "_beam_search"):
        ours = getattr(searches, name)
        monkeypatch.setattr(
            searches,
            name,
            lambda *args, _name=name, _ours=ours, **options: calls.append(_name) or _ours(*args, **options),
        )
    return calls


def everything(value):
    """In an order, with tensors as their bytes; a cache by its class."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Cache):
        return type(value)
    if isinstance(value, dict):
        return {key: everything(each) for key, each in value.items()}
    return [everything(each) for each in value] if isinstance(value, (list, tuple)) else value


def both(model, audio, cross=None, **options):
    outputs = []
    for is_ours in (False, True):
        patch(model, cross=cross)
        if not is_ours:
            searches.uninstall(model)
        torch.manual_seed(0)
        made = {name: value() if callable(value) else value for name, value in options.items()}
        outputs.append(model.generate(**given(audio.clone()), **{"max_new_tokens": 14, **made}))
    unpatch(model)
    return outputs


def assert_same(model, audio, **options):
    theirs, ours = both(model, audio, **options)
    assert type(theirs) is type(ours)
    assert everything(theirs) == everything(ours)
    return ours


ALL = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
OPTIONS = {
    "greedy": ALL,
    "plain greedy": {},
    "states": dict(ALL, output_hidden_states=True, output_attentions=True),
    "penalties": dict(no_repeat_ngram_size=2, repetition_penalty=1.3, **ALL),
    "several ends": dict(eos_token_id=[2, *range(20, 60)], **ALL),
    "no end": dict(eos_token_id=None, num_beams=2, **ALL),
    "least": dict(min_new_tokens=9, eos_token_id=[2, *range(20, 90)], **ALL),
    "least length": dict(min_length=9, eos_token_id=[2, *range(20, 90)], **ALL),
    "suppressed": dict(suppress_tokens=[-1, 500, *range(3, 40)], begin_suppress_tokens=[50, 51, 52], **ALL),
    "sampling": dict(do_sample=True, temperature=0.8, **ALL),
    "the likeliest": dict(do_sample=True, top_k=20, top_p=0.9, temperature=1.5, **ALL),
    "other warpers": dict(do_sample=True, min_p=0.05, renormalize_logits=True, **ALL),
    "samples": dict(do_sample=True, num_return_sequences=3, **ALL),
    "beams": dict(num_beams=5, **ALL),
    "plain beams": dict(num_beams=5),
    "returned beams": dict(num_beams=5, num_return_sequences=4, eos_token_id=[2, *range(20, 60)], **ALL),
    "until all end": dict(num_beams=4, early_stopping=True, eos_token_id=[2, *range(20, 60)], **ALL),
    "never before": dict(num_beams=3, early_stopping="never", length_penalty=0.4, eos_token_id=[2, 30, 31], **ALL),
    "short ones": dict(num_beams=3, length_penalty=-1.0, eos_token_id=[2, *range(20, 30)], **ALL),
    "beams that end": dict(num_beams=3, eos_token_id=[2, *range(20, 90)], **ALL),
    "beams with penalties": dict(num_beams=3, no_repeat_ngram_size=2, repetition_penalty=1.3, **ALL),
    "drawn beams": dict(num_beams=3, do_sample=True, temperature=0.9, eos_token_id=[2, 30, 31], **ALL),
    "one token": dict(num_beams=4, max_new_tokens=1, **ALL),
    "one choice": dict(num_beams=3, suppress_tokens=[*range(4, 200)], num_return_sequences=3, **ALL),
    "fewer than beams": dict(num_beams=5, suppress_tokens=[*range(6, 200)], max_new_tokens=1, **ALL),
    "no choice": dict(num_beams=2, suppress_tokens=[*range(200)], max_new_tokens=2, **ALL),
    "no cache": dict(use_cache=False, num_beams=2, max_new_tokens=4),
    "a static cache": dict(cache_implementation="static", num_beams=2),
    "in time": dict(max_time=60.0, num_beams=2),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cross", [None, CrossConfig("latent_int8")])
def test_same_in_every_field(small, counted, name, cross):
    """Below Whisper's own generate(), which wants real audio."""
    audio, options, outputs = torch.randn(3, 8, 100), {"max_new_tokens": 20, **OPTIONS[name]}, []
    for custom in (None, searches.search):
        patch(small, cross=cross)
        torch.manual_seed(0)
        outputs.append(GenerationMixin.generate(small, audio, custom_generate=custom, **options))
    assert type(outputs[0]) is type(outputs[1]) and everything(outputs[0]) == everything(outputs[1])
    assert counted == ["_beam_search" if options.get("num_beams", 1) > 1 else "_sample"]


ON_REAL_WEIGHTS = {
    "greedy": ALL,
    "suppressed": dict(suppress_tokens=[-1, 5, 60000], begin_suppress_tokens=None, **ALL),
    "sampling": dict(do_sample=True, temperature=0.8, **ALL),
    "beams": dict(num_beams=5, **ALL),
    "until all end": dict(num_beams=3, early_stopping=True, eos_token_id=[50256, 13, 11], **ALL),
}


@pytest.mark.parametrize("name", ON_REAL_WEIGHTS)
def test_same_on_real_weights(tiny_en, encoded, counted, name):
    options = ON_REAL_WEIGHTS[name]
    assert_same(tiny_en[0], encoded[1], **options)
    assert counted == ["_beam_search" if options.get("num_beams", 1) > 1 else "_sample"]


FROM_FEATURES = {
    "timestamps": dict(return_timestamps=True, return_segments=True),
    "timestamps of beams": dict(return_timestamps=True, num_beams=3),
    "fallback": dict(temperature=(0.0, 0.4), logprob_threshold=-0.05),
    "no speech": dict(temperature=0.0, no_speech_threshold=0.6, logprob_threshold=-0.05),
    "token times": dict(return_token_timestamps=True, return_timestamps=True),
}


@pytest.mark.parametrize("name", FROM_FEATURES)
def test_same_from_features(tiny_en, encoded, counted, name):
    assert_same(tiny_en[0], encoded[0][:1], **FROM_FEATURES[name])
    tiny_en[0].set_attn_implementation("sdpa")
    assert counted


class Keeps(LogitsProcessor):
    """What nobody may write to afterwards."""

    def __init__(self):
        self.kept = []

    def __call__(self, input_ids, scores):
        self.kept.append((scores, scores.clone()))
        return scores


class Ends(StoppingCriteria):
    """At a length that depends on what was said."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] > 6)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_we_do_not_know_is_called(tiny_en, encoded, counted, beams):
    keeps = Keeps()
    assert_same(
        tiny_en[0], encoded[1], num_beams=beams, logits_processor=lambda: LogitsProcessorList([keeps]),
        stopping_criteria=lambda: StoppingCriteriaList([Ends()]), min_new_tokens=3, do_sample=beams == 1, **ALL,
    )  # fmt: skip
    assert counted and keeps.kept and all(torch.equal(scores, as_seen) for scores, as_seen in keeps.kept)


class Notes(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


def test_what_is_left_to_transformers(tiny_en, encoded, counted):
    model, heard = tiny_en[0], []

    def streamer():
        heard.append(Notes())
        return heard[-1]

    assert_same(model, encoded[1][:1], streamer=streamer)
    assert heard[0].heard == heard[1].heard and heard[0].heard[-1] == "end"
    assert_same(model, encoded[1][:1], prompt_lookup_num_tokens=3)
    for options, error in (
        (dict(penalty_alpha=0.6, top_k=4), ValueError),
        (dict(low_memory=True, num_beams=2), ValueError),
    ):
        texts = []
        for prepare in (unpatch, patch):
            with pytest.raises(error) as raised:
                prepare(model).generate(**given(encoded[1][:1].clone()), max_new_tokens=4, **options)
            texts.append(str(raised.value))
        assert texts[0] == texts[1]
    unpatch(model)
    assert not counted


class OwnSearch(WhisperForConditionalGeneration):
    def _sample(self, input_ids, **options):
        self.asked = True
        return super()._sample(input_ids, **options)


class OwnEnd(WhisperForConditionalGeneration):
    def _update_finished_beams(self, sequences, **options):
        self.asked = sequences.dim() == 3  # the tokens themselves
        return super()._update_finished_beams(sequences, **options)


@pytest.mark.parametrize("kind, beams", [(OwnSearch, 1), (OwnEnd, 2)])
def test_a_search_of_the_users_own_wins(tiny_en, encoded, counted, kind, beams):
    model = copy.copy(tiny_en[0])
    model.__class__ = kind
    patch(model).generate(**given(encoded[1][:1].clone()), num_beams=beams, max_new_tokens=3)
    unpatch(model)
    assert model.asked and not counted


def test_a_custom_generate_wins(tiny_en, encoded, counted):
    def mine(model, input_ids, **options):
        return GenerationMixin._sample(model, input_ids, **options)

    assert_same(tiny_en[0], encoded[1][:1], custom_generate=lambda: mine)
    assert not counted


def test_copies_have_their_own(small):
    patch(small)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        for method in (searches.Fallback, searches.Expansion):
            assert vars(other)[method.NAME].model() is other
        unpatch(other)
        assert not {searches.Fallback.NAME, searches.Expansion.NAME} & set(vars(other))
    assert vars(small)[searches.Fallback.NAME].model() is small


def test_an_attribute_of_the_users_stays(small):
    small.generate_with_fallback = mine = lambda *args, **options: None
    patch(small)
    assert small.generate_with_fallback is mine
    unpatch(small)
    assert small.generate_with_fallback is mine


@pytest.mark.parametrize("cross", [None, CrossConfig("latent"), CrossConfig("int8", share_beams=False)])
@pytest.mark.parametrize("eager", [False, True])
def test_the_encoders_output_is_not_copied_for_beams(tiny_en, encoded, cross, eager):
    """Nor is what was given changed; and what transformers decodes (here: without cache) has it for every beam."""
    model, seen = tiny_en[0], []
    hook = model.model.decoder.layers[0].encoder_attn.register_forward_pre_hook(
        lambda module, args, options: seen.append(len(options["key_value_states"])), with_kwargs=True
    )
    patch(model, cross=cross)
    audio = given(encoded[1][:2].clone())
    model.generate(**audio, num_beams=3, max_new_tokens=3, use_cache=not eager)
    hook.remove()
    shares = cross is None or cross.share_beams
    assert set(seen) == {2 if shares and not eager else 6}
    assert len(audio["encoder_outputs"].last_hidden_state) == (2 if shares else 6)
    unpatch(model)
