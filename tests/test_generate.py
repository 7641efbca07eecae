"""patch() on real weights: whatever generate() can do, it still does, with the same tokens."""

import copy
import threading

import numpy as np
import pytest
import torch
from conftest import DEVICE
from transformers import pipeline
from transformers.modeling_outputs import BaseModelOutput

from whisperkv import CrossConfig, EvictionConfig, adoption, patch, stats, unpatch
from whisperkv.attention import self_cache_layer
from whisperkv.compat import CACHE
from whisperkv.views import View

EVICTION = EvictionConfig(recent=32, heavy=16)


def on_device(pair):
    """(model, processor) where these tests run, and back to where the others find it."""
    yield pair[0].to(DEVICE), pair[1]
    pair[0].to("cpu")


@pytest.fixture(scope="module")
def tiny_en(tiny_en):
    yield from on_device(tiny_en)


@pytest.fixture(scope="module")
def base(base):
    yield from on_device(base)


def features_of(processor, samples):
    return processor(samples, sampling_rate=16000, return_tensors="pt").input_features.to(DEVICE)


@pytest.fixture(scope="module")
def clip(tiny_en, speech):
    """Features of the clip's first 30 s."""
    return features_of(tiny_en[1], speech[0])


@pytest.fixture(scope="module")
def batch(tiny_en, speech):
    """Three pieces of different length: rows that finish at different times."""
    samples, _ = speech
    pieces = [samples[: 16000 * 6], samples, samples[16000 * 9 : 16000 * 20]]
    return features_of(tiny_en[1], pieces)


@pytest.fixture(scope="module")
def encoded(tiny_en, batch):
    """The encoder's last states of the three pieces; the encoder is half the work of a test."""
    with torch.no_grad():
        return tiny_en[0].model.encoder(batch).last_hidden_state


@pytest.fixture(scope="module")
def long_audio(tiny_en, speech):
    """Features of two recordings of 46 and 39 s, with their mask."""
    samples, _ = speech
    silence = np.zeros(16000 * 2, np.float32)
    pieces = [[samples, silence, samples[: 16000 * 15]], [samples[: 16000 * 8], silence, samples]]
    pieces = [np.concatenate(piece) for piece in pieces]
    return tiny_en[1](
        pieces,
        sampling_rate=16000,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    ).to(DEVICE)


def plain(output):
    """Everything in what generate() returned that should be the same, as a list."""
    if isinstance(output, torch.Tensor):
        return output.tolist()
    if isinstance(output, dict):
        return {
            key: plain(value)
            for key, value in output.items()
            if key in ("sequences", "segments", "tokens", "start", "end")
        }
    if isinstance(output, (list, tuple)):
        return [plain(value) for value in output]
    return output


def both(model, audio, cross=None, **options):
    """generate() unpatched and patched, each from the same seed. audio: features, or an encoder's last states."""
    outputs = []
    for prepare in (unpatch, lambda model: patch(model, cross=cross)):
        prepare(model)
        torch.manual_seed(0)
        outputs.append(model.generate(**given(audio), **options))
    unpatch(model)
    return outputs


def given(audio):
    """An argument for generate(): states are wrapped afresh each time, as generate() writes to the wrapping."""
    if audio.shape[1] == 1500:
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=audio)}
    return {"input_features": audio}


def assert_same(model, features, **options):
    unpatched, patched = both(model, features, **options)
    assert plain(unpatched) == plain(patched)
    return patched


MODES = {
    "greedy": {},
    "beams": dict(num_beams=5, max_new_tokens=30),
    "returned sequences": dict(num_beams=3, num_return_sequences=2),
    "sampling": dict(do_sample=True, temperature=0.8),
    "samples": dict(do_sample=True, temperature=0.8, num_return_sequences=2),
    "timestamps": dict(return_timestamps=True),
    "segments": dict(return_timestamps=True, return_segments=True),
    "static cache": dict(cache_implementation="static"),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "no cache": dict(use_cache=False, max_new_tokens=12),
    "fallback": dict(temperature=(0.0, 0.4, 0.8), logprob_threshold=-0.05, compression_ratio_threshold=1.35),
    "no speech": dict(temperature=(0.0, 0.4), no_speech_threshold=0.6, logprob_threshold=-1.0),
}


FROM_FEATURES = ("returned sequences", "samples", "timestamps", "segments", "fallback", "no speech")  # in transformers
SEVERAL = ("greedy", "sampling", "static cache", "no cache", "fallback")


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_and_eviction(tiny_en, batch, encoded, mode):
    model, _ = tiny_en
    options = {"max_new_tokens": 40, **MODES[mode]}
    audio = batch if mode in FROM_FEATURES else encoded
    audio = audio if mode in SEVERAL else audio[2:]
    assert_same(model, audio, **options)
    patch(model, EvictionConfig(recent=8, heavy=8))
    model.generate(**given(audio), **options)
    assert mode == "no cache" or stats(model).evicted > 0
    unpatch(model)


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt lookup"])
def test_same_tokens_with_eager_attention(tiny_en, encoded, mode):
    model, _ = tiny_en
    model.set_attn_implementation("eager")
    assert_same(model, encoded[:1], **{"max_new_tokens": 40, **MODES[mode]})
    model.set_attn_implementation("sdpa")


LATENT = CrossConfig("latent")


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt lookup", "fallback"])
def test_same_tokens_of_a_latent_cache(tiny_en, batch, encoded, mode):
    model, _ = tiny_en
    audio = batch if mode in FROM_FEATURES else encoded
    audio = audio if mode == "greedy" else audio[2:]
    assert_same(model, audio, cross=LATENT, **{"max_new_tokens": 40, **MODES[mode]})


@pytest.mark.parametrize("policy", ["magnitude", "window", lambda s, p, k, v: s + p.float()])
def test_policies(tiny_en, encoded, policy):
    model, _ = tiny_en
    patch(model, EvictionConfig(policy, recent=16, heavy=8))
    model.generate(**given(encoded[:2]), max_new_tokens=40, num_beams=2)
    assert stats(model).evicted > 0
    unpatch(model)


def test_prompt(tiny_en, clip):
    model, processor = tiny_en
    prompt = processor.get_prompt_ids("A talk about lighthouses and harbours.", return_tensors="pt").to(DEVICE)
    assert_same(model, clip, prompt_ids=prompt)
    patch(model, EVICTION)
    model.generate(clip, prompt_ids=prompt)
    with pytest.raises(ValueError, match="raise heavy"):
        patch(model, EvictionConfig(recent=4, heavy=4))
        model.generate(clip, prompt_ids=prompt)
    unpatch(model)
    assert_same(model, clip, prompt_ids=prompt)  # none the worse


@pytest.mark.parametrize("condition", [False, True])
def test_long_form(tiny_en, long_audio, condition):
    model, _ = tiny_en
    output = assert_same(
        model,
        long_audio.input_features,
        attention_mask=long_audio.attention_mask,
        return_timestamps=True,
        return_segments=True,
        condition_on_prev_tokens=condition,
        temperature=(0.0, 0.4),
        logprob_threshold=-0.3,
        compression_ratio_threshold=1.6,
    )
    assert len(output["segments"][0]) > 1
    patch(model, EvictionConfig(recent=64, heavy=32, pin_prompt=False))
    model.generate(
        long_audio.input_features, attention_mask=long_audio.attention_mask,
        return_timestamps=True, condition_on_prev_tokens=condition,
    )  # fmt: skip
    assert stats(model).decodes >= 2
    unpatch(model)


def test_long_form_with_prompts_of_different_length(tiny_en, speech, monkeypatch):
    """Each row has its own transcript so far behind the same prompt: left padding that we follow."""
    model, processor = tiny_en
    samples, silence = speech[0], np.zeros(16000 * 31, np.float32)
    pieces = [np.concatenate([samples, samples[: 16000 * 20]]), np.concatenate([silence, samples[: 16000 * 15]])]
    audio = processor(
        pieces, sampling_rate=16000, return_tensors="pt", truncation=False, padding="longest",
        return_attention_mask=True,
    ).to(DEVICE)  # fmt: skip
    prompt = processor.get_prompt_ids("A talk about lighthouses and harbours.", return_tensors="pt").to(DEVICE)
    paddings, original = [], adoption._left_padding

    def noted(*args):
        paddings.append(original(*args))
        return paddings[-1]

    monkeypatch.setattr(adoption, "_left_padding", noted)
    assert_same(
        model, audio.input_features, attention_mask=audio.attention_mask, return_timestamps=True,
        return_segments=True, condition_on_prev_tokens=True, prompt_ids=prompt, max_new_tokens=24,
    )  # fmt: skip
    assert {note for _, note in paddings} == {""} and any(padding is not None for padding, _ in paddings)


@pytest.mark.parametrize("options", [{}, dict(return_token_timestamps=True)], ids=["", "times"])
def test_a_returned_cache_stays_small(tiny_en, batch, monkeypatch, options):
    """generate() takes it apart and copies it; nobody turns it back into floats unless they look."""
    model, _ = tiny_en
    looked, floats = [], View.floats
    monkeypatch.setattr(View, "floats", lambda view: looked.append(view) or floats(view))
    patch(model, cross=CrossConfig("latent"))
    output = model.generate(batch[:2], return_dict_in_generate=True, max_new_tokens=8, **options)
    assert not looked
    layer = output[CACHE].cross_attention_cache.layers[1]
    assert layer.keys.shape == (2, 6, 1500, 64) and isinstance(layer.values, View)
    ours = layer.keys.clone()
    assert len(looked) == 1
    unpatch(model)
    output = model.generate(batch[:2], return_dict_in_generate=True, max_new_tokens=8, **options)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(
        ours, output[CACHE].cross_attention_cache.layers[1].keys, atol=1e-4, rtol=1e-3
    )


def test_long_form_of_a_latent_cache(tiny_en, long_audio):
    """One recording, with attempts at a temperature."""
    output = assert_same(
        tiny_en[0], long_audio.input_features[1:], cross=LATENT, attention_mask=long_audio.attention_mask[1:],
        return_timestamps=True, return_segments=True, temperature=(0.0, 0.4), logprob_threshold=-0.3,
        compression_ratio_threshold=1.6,
    )  # fmt: skip
    assert len(output["segments"][0]) > 1


def test_token_timestamps_of_a_latent_cache(tiny_en, batch):
    model, _ = tiny_en
    options = dict(return_token_timestamps=True, return_timestamps=True)
    unpatched, patched = both(model, batch[:1], cross=LATENT, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(unpatched["sequences"], patched["sequences"])
    assert torch.equal(unpatched["token_timestamps"], patched["token_timestamps"])


@pytest.mark.filterwarnings("ignore:CrossConfig:UserWarning")
def test_all_that_saves_memory_at_once(tiny_en, speech, long_audio):
    model, processor = tiny_en
    patch(model, EvictionConfig(), CrossConfig("latent_int4", trim="padding"))
    output = model.generate(
        long_audio.input_features[1:], attention_mask=long_audio.attention_mask[1:], num_beams=2,
        return_timestamps=True, return_segments=True, return_token_timestamps=True,
    )  # fmt: skip
    held = stats(model)
    unpatch(model)
    model.set_attn_implementation("sdpa")
    assert held.decodes >= 2 and held.frames_kept < held.frames and held.note == ""  # the last chunk is padded
    assert held.cross_bytes < held.cross_bytes_transformers / 50
    segments = output["segments"][0]
    said = processor.decode(torch.cat([each["tokens"] for each in segments]), skip_special_tokens=True)
    said, text = (set(words.lower().replace(",", "").replace(".", "").split()) for words in (said, speech[1]))
    assert len(said & text) > 0.8 * len(text)
    times = torch.cat([each["token_timestamps"] for each in segments])
    assert times.min() >= 0 and 30 < times.max() <= 40


def test_token_timestamps(tiny_en, batch):
    model, _ = tiny_en
    unpatched, patched = both(model, batch, return_token_timestamps=True, return_timestamps=True)
    assert torch.equal(unpatched["sequences"], patched["sequences"])
    assert torch.equal(unpatched["token_timestamps"], patched["token_timestamps"])
    patch(model, EVICTION)
    assert model.generate(batch, return_token_timestamps=True)["token_timestamps"].shape[0] == 3
    unpatch(model)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "options", [dict(return_timestamps="word"), dict(return_timestamps=True), dict(chunk_length_s=20)]
)
def test_pipeline(tiny_en, speech, options):
    model, processor = tiny_en
    pipe = pipeline(
        "automatic-speech-recognition", model=model, tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor, device=DEVICE,
    )  # fmt: skip
    samples = {"raw": speech[0], "sampling_rate": 16000}
    unpatched = pipe(dict(samples), **options)
    assert patch(pipe) is pipe
    patched = pipe(dict(samples), **options)
    assert stats(pipe).tokens > 10
    unpatch(pipe)
    model.set_attn_implementation("sdpa")
    assert patched == unpatched


def test_returned_dictionary(tiny_en, encoded):
    model, _ = tiny_en
    model.set_attn_implementation("eager")
    options = dict(
        return_dict_in_generate=True, output_attentions=True, output_scores=True, output_logits=True,
        output_hidden_states=True, num_beams=2, max_new_tokens=20,
    )  # fmt: skip
    unpatched, patched = both(model, encoded[:2], **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(unpatched.sequences, patched.sequences)
    for name in ("logits", "decoder_attentions", "cross_attentions", "decoder_hidden_states"):
        theirs, ours = getattr(unpatched, name), getattr(patched, name)
        assert len(theirs) == len(ours) > 0
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    for a, b in zip(
        unpatched.past_key_values.self_attention_cache.layers, patched.past_key_values.self_attention_cache.layers
    ):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-3)


def test_attentions_of_an_evicting_cache_are_of_full_width(tiny_en, clip):
    model, _ = tiny_en
    model.set_attn_implementation("eager")
    patch(model, EVICTION)
    output = model.generate(clip, return_dict_in_generate=True, output_attentions=True)
    last = output.decoder_attentions[-1][0]
    unpatch(model)
    model.set_attn_implementation("sdpa")
    assert last.shape[-1] == output.sequences.shape[1] - 1 > EVICTION.budget
    torch.testing.assert_close(last.sum(-1), torch.ones_like(last.sum(-1)))
    assert ((last[0] > 0).any(0).any(0)).sum() == EVICTION.budget


def test_language_and_task(base, speech):
    model, processor = base
    features = features_of(processor, speech[0])
    assert_same(model, features)  # the language is detected
    tokens = assert_same(model, features, language="en", task="transcribe")
    assert "language" not in processor.batch_decode(tokens, skip_special_tokens=True)[0]
    patch(model, EVICTION)
    before = processor.batch_decode(tokens, skip_special_tokens=True)[0].split()
    after = processor.batch_decode(model.generate(features, language="en"), skip_special_tokens=True)[0].split()
    unpatch(model)
    assert len(set(before) & set(after)) > 0.9 * len(set(before))


def test_assisted_decoding(tiny_en, clip):
    model, _ = tiny_en
    assistant = copy.deepcopy(model)
    for patched in (model, assistant):
        unpatch(model), unpatch(assistant)
        want = model.generate(clip)
        patch(patched)
        assert torch.equal(model.generate(clip, assistant_model=assistant), want)
        patch(patched, EVICTION)
        model.generate(clip, assistant_model=assistant)
    unpatch(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_en, clip, dtype):
    """The roundings differ from those of torch, so the tokens may too; the logits stay within the format."""
    model = copy.deepcopy(tiny_en[0]).to(dtype)
    ids = tiny_en[0].generate(clip)[:, :-1]
    logits = []
    for prepare in (unpatch, patch):
        prepare(model)
        with torch.no_grad():
            states = model.model.encoder(clip.to(dtype))
            past, steps = None, []
            for t in range(ids.shape[1]):
                output = model(encoder_outputs=states, decoder_input_ids=ids[:, t : t + 1], past_key_values=past)
                past = output.past_key_values
                steps.append(output.logits)
        logits.append(torch.cat(steps, 1).float())
    assert stats(model).tokens == ids.shape[1]
    spread = logits[0].std()
    assert (logits[0] - logits[1]).abs().max() < (0.2 if dtype == torch.bfloat16 else 0.03) * spread
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.97
    patch(model, EVICTION)
    assert model.generate(clip.to(dtype)).shape[1] > 40


def test_logits_of_a_manual_loop(tiny_en, clip):
    model, _ = tiny_en
    ids = model.generate(clip)[:, :-1]
    logits = []
    for prepare in (unpatch, patch):
        prepare(model)
        with torch.inference_mode():
            states = model.model.encoder(clip)
            past, steps = None, []
            for token in ids.split(1, 1):
                output = model(encoder_outputs=states, decoder_input_ids=token, past_key_values=past, use_cache=True)
                past = output.past_key_values
                steps.append(output.logits)
        logits.append(torch.cat(steps, 1))
    assert self_cache_layer(past, 0).seen == ids.shape[1]
    unpatch(model)
    assert (logits[0] - logits[1]).abs().max() < 2e-4  # of some 30: float32, added up in another order


def test_the_decoder_alone(tiny_en, clip):
    """WhisperModel, and WhisperForCausalLM with and without an audio."""
    from transformers import WhisperForCausalLM

    full = tiny_en[0]
    causal = WhisperForCausalLM(copy.deepcopy(full.config)).eval().to(DEVICE)
    causal.model.decoder.load_state_dict(full.model.decoder.state_dict())
    causal.proj_out.weight = causal.model.decoder.embed_tokens.weight
    with torch.no_grad():
        states = full.model.encoder(clip)
    prompt = torch.tensor([[50257, 50362, 464]], device=DEVICE)
    for options in (dict(encoder_outputs=states), {}):
        outputs = []
        for prepare in (unpatch, patch):
            prepare(causal)
            past, ids = None, prompt
            with torch.no_grad():
                for _ in range(12):
                    output = causal(
                        ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True, **options
                    )
                    past = output.past_key_values
                    ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
            outputs.append(ids)
        assert torch.equal(*outputs)
        assert stats(causal).tokens == prompt.shape[1] + 11
    inner = full.model
    with torch.no_grad():
        want = inner(clip, decoder_input_ids=prompt).last_hidden_state
        got = patch(inner)(clip, decoder_input_ids=prompt).last_hidden_state
    assert stats(inner).tokens == 3
    unpatch(inner)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_streamer(tiny_en, clip):
    from transformers import TextStreamer

    class Collect(TextStreamer):
        pieces = ()

        def on_finalized_text(self, text, stream_end=False):
            self.pieces += (text,)

    model, processor = tiny_en
    texts = []
    for prepare in (unpatch, patch):
        prepare(model)
        streamer = Collect(processor.tokenizer, skip_special_tokens=True)
        model.generate(clip, streamer=streamer)
        texts.append("".join(streamer.pieces))
    unpatch(model)
    assert texts[0] == texts[1] != ""


def test_threads(tiny_en, encoded):
    """Several threads decode with one model, each its own audio."""
    model, _ = tiny_en
    want = [model.generate(**given(encoded[i : i + 1]), max_new_tokens=50) for i in range(3)]
    patch(model)
    got = [None] * 3

    def work(i):
        for _ in range(2):
            got[i] = model.generate(**given(encoded[i : i + 1]), max_new_tokens=50)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("eviction", [None, EVICTION])
def test_same_bits_from_run_to_run(tiny_en, encoded, eviction):
    model, _ = tiny_en
    patch(model, eviction)
    options = dict(max_new_tokens=70, return_dict_in_generate=True, output_scores=True)
    runs = [model.generate(**given(encoded), **options) for _ in range(2)]
    unpatch(model)
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].scores, runs[1].scores))


def test_jfk(tiny_en, recordings):
    soundfile = pytest.importorskip("soundfile")
    model, processor = tiny_en
    samples, rate = soundfile.read(recordings / "jfk.wav", dtype="float32")
    assert rate == 16000
    features = features_of(processor, samples)
    patch(model, EvictionConfig())
    text = processor.batch_decode(model.generate(features), skip_special_tokens=True)[0]
    unpatch(model)
    assert "ask not what your country can do for you" in text
