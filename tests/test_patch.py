"""What patch() touches and what it leaves, and what it refuses."""

import copy
import pickle
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperAttention

from whisperkv import CrossConfig, EvictionConfig, eligible, ops, patch, stats, unpatch
from whisperkv.attention import SelfAttention, self_cache_layer
from whisperkv.compat import CACHE, OLD_CACHE
from whisperkv.records import Stats

EVICTION = EvictionConfig(recent=8, heavy=4)


@pytest.fixture
def audio():
    return torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3))


def generate(model, audio, **options):
    from transformers.generation.utils import GenerationMixin  # below Whisper's own, which wants real audio

    options = {"max_new_tokens": 40, "do_sample": False, **options}
    return GenerationMixin.generate(model, audio, **options)


def test_unpatch_leaves_no_trace(small):
    before = {name: dict(vars(module)) for name, module in small.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in small.named_modules()}
    assert patch(small) is small and type(small.model.decoder.layers[0].self_attn) is SelfAttention
    patch(small, EVICTION)
    assert unpatch(small) is small and unpatch(small) is small
    for name, module in small.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert len(module._forward_pre_hooks) == len(module._forward_pre_hooks_with_kwargs) == hooks[name] == 0
    assert {type(layer.self_attn) for layer in small.model.decoder.layers} == {WhisperAttention}


def test_patching_again_takes_the_new_settings(small, audio):
    for eviction, slots in ((EVICTION, 12), (None, 48), (EvictionConfig(recent=20, heavy=0), 20)):
        patch(small, eviction)
        output = generate(small, audio, return_dict_in_generate=True)
        assert self_cache_layer(output.past_key_values, 0).slots == slots
    assert len(small.model.decoder._forward_pre_hooks) == 1


@pytest.mark.parametrize("eviction", [None, EVICTION])
def test_copies_and_pickles(small, audio, eviction):
    patch(small, eviction)
    want = generate(small, audio)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(generate(other, audio), want)
        unpatch(other)
        assert type(other.model.decoder.layers[0].self_attn) is WhisperAttention
    assert type(small.model.decoder.layers[0].self_attn) is SelfAttention


def test_save_and_load(small, audio, tmp_path):
    want = generate(small, audio)
    patch(small, EVICTION)
    small.save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, audio), want)
    small.load_state_dict(loaded.state_dict())


def test_a_cache_can_be_kept_copied_and_continued(small, audio):
    patch(small, EVICTION)
    states = small.model.encoder(audio)
    ids = torch.randint(4, 200, (3, 30))
    with torch.no_grad():
        past = None
        for token in ids.split(1, 1):
            past = small(encoder_outputs=states, decoder_input_ids=token, past_key_values=past).past_key_values
        others = [copy.deepcopy(past), pickle.loads(pickle.dumps(past))]
        step = dict(encoder_outputs=states, decoder_input_ids=ids[:, :1])
        want = small(**step, past_key_values=past).logits
        for other in others:
            assert torch.equal(small(**step, past_key_values=other).logits, want)
        past.reset()
        assert past.get_seq_length() == 0
        small(**step, past_key_values=past)
    assert past.get_seq_length() == 1


@pytest.mark.parametrize("name", [OLD_CACHE, CACHE])
def test_the_cache_by_its_old_name_and_by_its_new_one(small, audio, name):
    tokens = torch.tensor([[3], [4], [5]])
    with torch.no_grad():
        states, layer = small.model.encoder(audio)[0], small.model.decoder.layers[0].self_attn
        decode = lambda past: small.model.decoder(tokens, encoder_hidden_states=states, **{name: past})  # noqa: E731
        want = decode(decode(EncoderDecoderCache(DynamicCache(), DynamicCache()))[1])[0]
        patch(small)
        past = decode(EncoderDecoderCache(DynamicCache(), DynamicCache()))[1]
        assert self_cache_layer(past, 0).seen == 1
        assert torch.allclose(decode(past)[0], want, atol=1e-5)
        hidden = torch.randn(3, 1, small.config.d_model)
        by_name, by_place = layer(hidden, **{name: past}), layer(hidden, None, past)
        assert self_cache_layer(past, 0).seen == 4 and by_name[0].shape == by_place[0].shape == hidden.shape


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_transformers(small, audio, training):
    labels = torch.randint(4, 200, (3, 20))
    gradients = []
    for prepare in (unpatch, patch, lambda model: patch(model, EVICTION)):
        prepare(small).train(training)
        small.zero_grad()
        loss = small(audio, labels=labels).loss
        loss.backward()
        gradients.append([loss.detach()] + [p.grad.clone() for p in small.parameters() if p.grad is not None])
    for patched in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], patched))
    assert "left to transformers" in stats(small).note
    small.eval()
    assert torch.equal(generate(patch(small), audio), generate(unpatch(small), audio))


def test_gradients_through_a_cache_that_evicts_are_refused(small, audio):
    patch(small, EVICTION)
    with torch.no_grad():
        past = small(audio, decoder_input_ids=torch.tensor([[3]] * 3)).past_key_values
    states = small.model.encoder(audio)
    with pytest.raises(RuntimeError, match="torch.no_grad"):
        small(encoder_outputs=states, decoder_input_ids=torch.tensor([[5]] * 3), past_key_values=past)


def test_peft(small, audio):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small, config).eval()
    want = generate(small, audio)
    assert patch(model) is model
    assert torch.equal(generate(small, audio), want)
    assert stats(model).tokens > 3
    patch(model, EVICTION)
    generate(small, audio)
    unpatch(model)
    assert type(small.model.decoder.layers[0].self_attn) is WhisperAttention


def test_quantized_linears(small, audio):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(small, {torch.nn.Linear}, torch.qint8)
    want = generate(quantized, audio)
    assert torch.equal(generate(patch(quantized), audio), want)


def test_compiled_wrapper_is_seen_through(small):
    compiled = torch.compile(small)
    patch(compiled)
    assert type(small.model.decoder.layers[0].self_attn) is SelfAttention
    unpatch(compiled)


def test_an_unusual_mask_is_left_to_transformers(small, audio):
    ids = torch.randint(4, 200, (3, 6))
    holes = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1]])
    options = dict(decoder_input_ids=ids, decoder_attention_mask=holes)
    want = generate(small, audio, **options)
    patch(small)
    assert torch.equal(generate(small, audio, **options), want)
    assert "not plain left padding" in stats(small).note
    generate(small, audio)
    assert stats(small).note == ""


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]], [[0, 1, 1, 1, 1, 1]] * 3])
@pytest.mark.parametrize("static", [False, True])
def test_left_padded_prompts(small, audio, mask, static):
    options = dict(decoder_input_ids=torch.randint(4, 200, (3, 6)), decoder_attention_mask=torch.tensor(mask))
    if static:
        options["cache_implementation"] = "static"
    want = generate(small, audio, **options)
    patch(small)
    assert torch.equal(generate(small, audio, **options), want)
    patch(small, EvictionConfig(recent=64, heavy=0))  # evicts nothing
    assert torch.equal(generate(small, audio, **options), want)


def test_reference_ops_give_the_same_tokens(small, audio, monkeypatch):
    """The whole decode with eviction, on the slow and obvious ops."""
    import reference

    cases = [
        (EvictionConfig(policy, recent=6, heavy=5), options)
        for policy in ("heavy_hitter", "magnitude", "window")
        for options in (dict(num_beams=2), dict(prompt_lookup_num_tokens=3))
    ]

    def decode():
        return [
            generate(patch(small, eviction), audio[:1], max_new_tokens=20, **options) for eviction, options in cases
        ]

    want = decode()
    monkeypatch.setattr(ops, "compact_attention", reference.compact_attention)
    monkeypatch.setattr(ops, "score_evict", reference.score_evict)
    assert all(torch.equal(a, b) for a, b in zip(decode(), want))


@pytest.mark.parametrize("eviction", [None, EVICTION, EvictionConfig(recent=500)])
@pytest.mark.parametrize("beams", [1, 3])
def test_stats_are_the_bytes_held(small, audio, eviction, beams):
    patch(small, eviction)
    assert stats(small) == Stats()
    output = generate(small, audio, num_beams=beams, return_dict_in_generate=True)
    got = stats(small)
    layers = output.past_key_values.self_attention_cache.layers
    tensors = [
        t for layer in layers for t in (layer.key_slots, layer.value_slots, layer.cursor, layer.positions, layer.scores)
    ]
    assert len({layer.sources.data_ptr() for layer in layers}) == 1  # of all layers together
    beside = layers[0].sources.nbytes + layers[0].shared.spare.nbytes
    assert (beside > 0) == (beams > 1)
    assert got.self_bytes == sum(t.nbytes for t in tensors if t is not None) + beside
    cross = output.past_key_values.cross_attention_cache.layers
    assert got.cross_bytes == sum(layer.keys_of_audios.nbytes + layer.values_of_audios.nbytes for layer in cross)
    assert got.cross_bytes * beams == got.cross_bytes_transformers
    assert (got.rows, got.tokens, got.frames, got.decodes) == (3 * beams, 40, 50, 1)
    unpatch(small)
    theirs = generate(small, audio, num_beams=beams, return_dict_in_generate=True).past_key_values
    assert got.self_bytes_transformers == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in theirs.self_attention_cache.layers
    )
    assert got.evicted == (3 * beams * (40 - 12) if eviction is EVICTION else 0)
    assert "MB" in str(got)


# Refusals


def test_other_models(small):
    classifier = WhisperForAudioClassification(small.config)
    for thing in (classifier, torch.nn.Linear(2, 2), None, "openai/whisper-tiny"):
        for call in (patch, unpatch, stats):
            with pytest.raises(TypeError, match="WhisperForConditionalGeneration"):
                call(thing)


@pytest.mark.parametrize(
    "thing, way_out",
    [
        (lambda model: (model, "processor"), r"it is the first of this tuple: patch\(model\)"),
        (lambda model: model.model.encoder, "a WhisperEncoder alone: pass the model that it is part of"),
        (lambda model: model.get_decoder(), "a WhisperDecoder alone: pass the model that it is part of"),
        (lambda model: type(model), "a class, and not a model made from it"),
        (lambda model: "whisper-tiny", r"load it first, Whisper.*.from_pretrained\('whisper-tiny'\)"),
    ],
)
def test_what_is_nearly_a_model(small, thing, way_out):
    for call in (patch, unpatch, stats):
        with pytest.raises(TypeError, match=way_out):
            call(thing(small))


def test_bad_settings_leave_the_model_alone(small, audio):
    want = generate(patch(small, EVICTION), audio)
    for bad in ("heavy_hitter", 96, {"recent": 3}, EvictionConfig, True):
        with pytest.raises(TypeError, match=r"eviction must be an EvictionConfig, .*EvictionConfig\(recent=64.*; got"):
            patch(small, bad)
        with pytest.raises(TypeError, match=r"cross must be a CrossConfig, .*CrossConfig\(format='int8'.*; got"):
            patch(small, cross=bad)
    with pytest.raises(TypeError, match=r"eviction must be .*got CrossConfig\(.*: pass it as cross="):
        patch(small, CrossConfig())
    with pytest.raises(TypeError, match=r"cross must be .*got EvictionConfig\(.*: pass it as eviction="):
        patch(small, cross=EVICTION)
    assert torch.equal(generate(small, audio), want)


def test_the_largest_settings(small, audio):
    want = generate(small, audio)
    most = 2**31 - 1
    for eviction in (EvictionConfig(recent=most, heavy=0), EvictionConfig(recent=2, heavy=most - 2)):
        assert torch.equal(generate(patch(small, eviction), audio), want)
    want = generate(patch(small, cross=CrossConfig("int8", group=256)), audio)
    assert torch.equal(generate(patch(small, cross=CrossConfig("int8", group=2**31 - 256)), audio), want)


@pytest.mark.parametrize("cross", [CrossConfig(), CrossConfig("latent_int4", "padding")])
def test_float64_is_left_to_transformers(small, audio, cross):
    small.double()
    want = generate(small, audio.double())
    assert torch.equal(generate(patch(small, EVICTION, cross), audio.double()), want)
    assert "left to transformers: the model is in float64 (whisperkv takes float32, bfloat16," in stats(small).note
    generate(small.float(), audio)
    assert stats(small).evicted > 0 and stats(small).note == ""


def test_device(small):
    with pytest.raises(ValueError, match="meta"):
        patch(small.to("meta"))
    assert type(small.model.decoder.layers[0].self_attn) is WhisperAttention


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "DataParallel"])
def test_data_parallel(small, audio, tmp_path, wrapper):
    """The model in a wrapper for several devices, which decodes as its `module`."""
    want = generate(small, audio)
    import torch.distributed as dist

    if not dist.is_gloo_available():
        pytest.skip("this torch comes without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = getattr(torch.nn.parallel, wrapper)(small)
        assert patch(wrapped, EVICTION) is wrapped
        assert stats(wrapped) == Stats()
        generate(wrapped.module, audio)
        assert stats(wrapped).evicted > 0
        assert torch.equal(generate(patch(wrapped).module, audio), want)
        ids = torch.randint(4, 200, (3, 6))
        with torch.no_grad():
            ours = wrapped(audio, decoder_input_ids=ids).logits
            assert stats(wrapped).tokens == 6 and stats(wrapped).note == ""
            theirs = unpatch(wrapped)(audio, decoder_input_ids=ids).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert type(small.model.decoder.layers[0].self_attn) is WhisperAttention
        patch(torch.compile(wrapped))
        assert type(small.model.decoder.layers[0].self_attn) is SelfAttention
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "built, capability, probed, reason",
    [
        (False, (9, 0), "", "no nvcc"),
        (True, (7, 5), "", "they need compute capability 8.0, and Tesla T4 has 7.5"),
        (True, (8, 0), "no kernel image is available", "CUDA says of Tesla T4: no kernel image is available"),
        (True, (8, 0), "", ""),
    ],
)
def test_cuda(monkeypatch, built, capability, probed, reason):
    """A GPU that the kernels do not run on is refused before the model is touched."""
    weight = SimpleNamespace(device=torch.device("cuda:1"), is_cuda=True, is_meta=False)
    decoder = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    monkeypatch.setattr(ops, "CUDA", built)
    monkeypatch.setattr(ops, "CUDA_REASON", "no nvcc")
    monkeypatch.setattr("whisperkv._cuda", SimpleNamespace(probe=lambda: probed), raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(ops, "cuda_reason", ops.cuda_reason.__wrapped__)  # which remembers what it found
    text = re.escape(f"cuda:1, and whisperkv has no CUDA kernels for it ({reason}): move it with model.to('cpu')")
    with pytest.raises(ValueError, match=text) if reason else nullcontext():
        eligible.check_device(decoder)


def test_an_unknown_attention(small):
    class Other(WhisperAttention):
        pass

    small.model.decoder.layers[1].self_attn.__class__ = Other
    with pytest.raises(TypeError, match="layer 1: self_attn is a Other"):
        patch(small)
    assert type(small.model.decoder.layers[0].self_attn) is WhisperAttention


def test_stats_of_an_unpatched_model(small):
    with pytest.raises(ValueError, match="not patched"):
        stats(small)


@pytest.mark.parametrize("change", [lambda m: patch(m, EVICTION), unpatch])
def test_not_while_generating(small, audio, change):
    from transformers import LogitsProcessor

    class Meddler(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] == 9:
                change(small)
            return scores

    want = generate(patch(small), audio)
    with pytest.raises(RuntimeError, match="while the model is generating"):
        generate(small, audio, logits_processor=[Meddler()])
    assert torch.equal(generate(small, audio), want)


def test_an_evicting_cache_outlives_unpatch_with_a_clear_error(small, audio):
    patch(small, EVICTION)
    past = generate(small, audio, return_dict_in_generate=True).past_key_values
    unpatch(small)
    with torch.no_grad(), pytest.raises(RuntimeError, match="patch the model again"):
        small(audio, decoder_input_ids=torch.tensor([[5]] * 3), past_key_values=past)
    patch(small)
    past = generate(small, audio, return_dict_in_generate=True).past_key_values
    unpatch(small)
    with torch.no_grad():
        small(audio, decoder_input_ids=torch.tensor([[5]] * 3), past_key_values=past)  # nothing was evicted


def test_missing_pieces_are_named():
    import whisperkv

    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        whisperkv.pach
    assert set(whisperkv.__all__) <= set(dir(whisperkv))
