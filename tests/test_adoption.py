"""Which decodes are ours, which are left to transformers, and how a cache changes hands between the two."""

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import alike
from torch import nn
from transformers import CompileConfig
from transformers.models.whisper.modeling_whisper import WhisperAttention

from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.cache import SelfCacheLayer

EVICTION = EvictionConfig(recent=8, heavy=4)
FORMATS = ("model", "int8", "latent", "latent_int4")


@pytest.fixture
def audio():
    return torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3))


def generate(model, audio, **options):
    from transformers.generation.utils import GenerationMixin  # below Whisper's own, which wants real audio

    return GenerationMixin.generate(model, audio, **{"max_new_tokens": 20, "do_sample": False, **options})


def is_ours(model):
    return stats(model).rows > 0


# Compilers and exporters


@pytest.fixture
def compiled():
    """Graphs that dynamo has made since."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values()))
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("options", [dict(), dict(fullgraph=True)], ids=["default", "fullgraph"])
def test_a_compiled_forward_is_what_it_was(small, audio, compiled, options, cache):
    want = generate(small, audio)
    plain = copy.deepcopy(small)
    plain.forward = torch.compile(plain.forward, backend="eager", **options)
    assert torch.equal(generate(plain, audio, cache_implementation=cache), want)
    graphs = compiled()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    patch(small, EVICTION).forward = torch.compile(small.forward, backend="eager", **options)
    assert torch.equal(generate(small, audio, cache_implementation=cache), want)
    assert compiled() == graphs and "compiled or exported" in stats(small).note


@pytest.mark.parametrize("dynamic", [False, None])
def test_generate_compiles_the_steps_over_a_static_cache_once(small, audio, compiled, dynamic):
    config = CompileConfig(fullgraph=True, dynamic=dynamic, backend="eager")
    config._compile_all_devices = True  # else it compiles on a GPU alone
    want = generate(small, audio)
    got = generate(patch(small), audio, cache_implementation="static", compile_config=config)
    assert torch.equal(got, want) and compiled() == (1, 0)
    assert "compiled" in stats(small).note and not is_ours(small)
    assert torch.equal(generate(small, audio, cache_implementation="static"), want)
    assert is_ours(small) and not stats(small).note  # nothing compiles it


def test_a_static_cache_is_noticed_before_the_first_step(small, audio, compiled):
    """A backend that keeps what it is given sees no tensor of ours."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    config._compile_all_devices = True
    kinds = []
    patch(small).model.decoder.register_forward_hook(
        lambda module, args, output: kinds.append(type(output.past_key_values.self_attention_cache.layers[0]).__name__)
    )
    generate(small, audio, cache_implementation="static", compile_config=config, max_new_tokens=3)
    assert set(kinds) == {"StaticLayer"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("eviction", [None, EVICTION])
def test_a_compiled_step_over_our_cache(small, audio, compiled, eviction, format):
    """One that was begun without the compiler. What matters is that it can be traced."""
    patch(small, eviction, CrossConfig(format))
    states = small.model.encoder(audio).last_hidden_state.detach()
    ids = torch.randint(4, 200, (3, 6))

    @torch.no_grad()
    def run(step):
        past = small(encoder_outputs=(states,), decoder_input_ids=ids[:, :1]).past_key_values
        for token in ids[:, 1:].split(1, 1):
            logits = step(encoder_outputs=(states,), decoder_input_ids=token, past_key_values=past).logits
        return logits

    want = run(small)
    assert alike(run(torch.compile(small.forward, backend="eager")), want) and is_ours(small)


def test_export(small, audio):
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    inputs = {"input_features": audio[:2], "decoder_input_ids": torch.tensor([[3, 5, 6]] * 2)}
    with torch.no_grad():
        want = small(**inputs).logits
    exported = exporters.DynamoExporter().export(patch(small), dict(inputs), config=exporters.DynamoConfig())
    torch.testing.assert_close(exported(**inputs).logits, want)
    assert is_ours(small) or stats(small).note


def test_export_for_generation(small, audio):
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    inputs = {"input_features": audio[:2], "decoder_input_ids": torch.tensor([[3, 5, 6]] * 2)}
    exporters.DynamoExporter().export_for_generation(patch(small), dict(inputs), config=exporters.DynamoConfig())
    assert "unpatch() before an export" in stats(small).note


# Accelerate and other owners of a forward


def dispatched(model, how, folder):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module

    if how == "hooks":
        for module in model.modules():
            add_hook_to_module(module, ModelHook())
    elif how == "one device":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "offloaded":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("how", ["hooks", "one device", "offloaded", "on disk"])
@pytest.mark.parametrize("first", ["patched", "dispatched"])
@pytest.mark.parametrize("format", ["model", "int8"])
def test_accelerate(small, audio, tmp_path, how, first, format):
    cross = CrossConfig(format)
    want, plain = generate(patch(small, cross=cross), audio), generate(unpatch(small), audio)
    if first == "patched":
        dispatched(patch(small, cross=cross), how, tmp_path)
    else:
        patch(dispatched(small, how, tmp_path), cross=cross)
    assert torch.equal(generate(small, audio), want) and is_ours(small) and not stats(small).note
    assert torch.equal(generate(small, audio, num_beams=2).cpu()[:, :1], want[:, :1])
    assert torch.equal(generate(unpatch(small), audio), plain)
    assert torch.equal(generate(patch(small, cross=cross), audio), want) and is_ours(small)


def test_hooks_taken_away_again(small, audio):
    hooks = pytest.importorskip("accelerate.hooks")
    want = generate(small, audio)
    for module in small.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    patch(small)
    hooks.remove_hook_from_module(small, recurse=True)
    assert torch.equal(generate(small, audio), want) and is_ours(small)
    unpatch(small)
    assert torch.equal(generate(small, audio), want)
    assert {type(layer.self_attn) for layer in small.model.decoder.layers} == {WhisperAttention}


def test_offloaded_weights_of_a_latent_cache(small, audio, tmp_path):
    want = generate(small, audio)
    patch(small, cross=CrossConfig("latent"))
    dispatched(small, "offloaded", tmp_path)
    assert torch.equal(generate(small, audio), want) and not is_ours(small)
    assert "offloaded the weights" in stats(small).note and "'model' works" in stats(small).note


def test_a_decoder_over_several_devices(small, audio):
    want = generate(small, audio)
    for layer, device in zip(small.model.decoder.layers, ("cpu", 0)):
        layer._hf_hook = SimpleNamespace(execution_device=device)  # what accelerate's hook would say
    assert torch.equal(generate(patch(small), audio), want) and not is_ours(small)
    assert "several devices" in stats(small).note


@pytest.mark.parametrize("name", ["self_attn", "encoder_attn"])
@pytest.mark.parametrize("first", ["patched", "set"])
def test_a_forward_that_someone_else_has_set(small, audio, name, first):
    want = generate(small, audio)
    attention = getattr(small.model.decoder.layers[1], name)
    if first == "patched":
        patch(small)
    old = attention.forward  # ours, or the original
    attention.forward = lambda *args, **kwargs: old(*args, **kwargs)
    patch(small)
    assert torch.equal(generate(small, audio), want) and not is_ours(small)
    assert f"{name} of decoder layer 1 has a forward of its own" in stats(small).note
    del attention.forward
    assert torch.equal(generate(small, audio), want) and is_ours(small)


def test_a_bound_forward_is_followed(small, audio):
    want = generate(small, audio)
    attention = small.model.decoder.layers[0].self_attn
    attention.forward = MethodType(WhisperAttention.forward, attention)
    assert torch.equal(generate(patch(small), audio), want) and is_ours(small)
    assert unpatch(small) and attention.forward.__func__ is WhisperAttention.forward


# Caches that change hands


def test_an_assistant_keeps_its_cache(small, audio):
    assistant = patch(copy.deepcopy(small))
    want = generate(small, audio[:1], max_new_tokens=30)
    kinds = []
    assistant.model.decoder.register_forward_hook(
        lambda module, args, output: kinds.append(type(output.past_key_values.self_attention_cache.layers[0]))
    )
    got = generate(patch(small), audio[:1], assistant_model=assistant, max_new_tokens=30)
    assert torch.equal(got, want) and set(kinds) == {SelfCacheLayer} and len(kinds) > 10
    assert stats(assistant).rows == 1 and stats(assistant).tokens > 20 and stats(assistant).decodes == 1


def test_an_evicting_assistant_says_so(small, audio):
    assistant = patch(copy.deepcopy(small), EVICTION)
    want = generate(small, audio[:1], max_new_tokens=30)
    assert torch.equal(generate(patch(small), audio[:1], assistant_model=assistant, max_new_tokens=30), want)
    assert "which began this cache" in stats(assistant).note


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_after_a_start_without(small, audio, format, padded):
    """Unpatched, the tokens so far are constants, and gradients flow through those that follow. So they do here."""
    states = small.model.encoder(audio).last_hidden_state.detach()
    ids = torch.randint(4, 200, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, :2] = 0

    def run(model):
        model.zero_grad()
        past, logits = None, []
        for first, last in ((0, 6), (6, 7), (7, 8)):
            with torch.set_grad_enabled(first > 0):
                output = model(
                    encoder_outputs=(states,), decoder_input_ids=ids[:, first:last], past_key_values=past,
                    decoder_attention_mask=mask[:, :last] if padded else None,
                )  # fmt: skip
            past = output.past_key_values
            logits.append(output.logits)
        (logits[1].square().sum() + logits[2].square().sum()).backward()
        return [logits[2].detach()] + [p.grad for p in model.model.decoder.parameters() if p.grad is not None]

    want = run(small)
    got = run(patch(small, cross=CrossConfig(format)))
    assert "gradients are on" in stats(small).note and len(got) == len(want)
    if format in ("model", "latent"):
        for ours, theirs in zip(got, want):
            assert (ours - theirs).abs().mean() <= 1e-4 * theirs.abs().mean() + 1e-5


def test_a_cache_that_transformers_began(small, audio):
    states = small.model.encoder(audio).last_hidden_state.detach()
    with torch.no_grad():
        past = small(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[3]] * 3)).past_key_values
        patch(small)(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[5]] * 3), past_key_values=past)
    assert "which began this cache" in stats(small).note


# Numbers of another kind


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("eviction", [None, EVICTION])
def test_autocast(small, audio, format, eviction):
    patch(small, eviction, CrossConfig(format))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = generate(small, audio, num_beams=2)
        states = small.model.encoder(audio).last_hidden_state.detach()
    assert tokens.shape[1] > 10 and is_ours(small)
    step = dict(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[7], [8], [9]]))
    with torch.no_grad():
        for first, second in ((True, False), (False, True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=first):
                past = small(**step).past_key_values
            with torch.autocast("cpu", torch.bfloat16, enabled=second):
                several = small(**{**step, "decoder_input_ids": torch.tensor([[7, 8]] * 3)}, past_key_values=past)
                logits = small(**step, past_key_values=past).logits
            assert logits.isfinite().all() and several.logits.isfinite().all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = small(**step).logits
        theirs = unpatch(small)(**step).logits
    if format in ("model", "latent"):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.6, rtol=0.05)


class Quantized(torch.Tensor):
    """A weight of another kind, in a plain nn.Linear."""


@pytest.mark.parametrize("before", [True, False])
def test_quantized_weights_in_plain_layers(small, audio, before):
    def quantize():
        for layer in small.model.decoder.layers:
            linear = layer.encoder_attn.v_proj
            linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized), requires_grad=False)

    want = generate(small, audio)
    if before:
        quantize()
        with pytest.raises(ValueError, match="v_proj of decoder layer 0 has a float32 weight of .*Quantized.*'model'"):
            patch(small, cross=CrossConfig("latent"))
        assert torch.equal(generate(small, audio), want)
    else:
        patch(small, cross=CrossConfig("latent"))
        quantize()
        with pytest.raises(ValueError, match="v_proj of decoder layer 0 has a float32 weight of .*Quantized.*'model'"):
            generate(small, audio)
    assert torch.equal(generate(patch(small), audio), want)


# Masks


def test_a_prompt_that_holds_the_padding_token(small, audio):
    """What generate() makes of it is no plain padding, and is left to transformers."""
    ids = torch.tensor([[3, 5, 0, 6], [3, 5, 7, 6], [0, 3, 5, 6]])
    options = dict(decoder_input_ids=ids, decoder_attention_mask=(ids != 0).long())
    want = generate(small, audio, **options)
    assert torch.equal(generate(patch(small), audio, **options), want)
    assert "holds the padding token itself" in stats(small).note
