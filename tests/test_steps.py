"""A decode step in one call, and the encoder by our products: what comes out is what the layers one by one would give,
whatever the settings; and what is not plain is left to the layers."""

import copy
import difflib
import pickle

import pytest
import torch
from conftest import DEVICE
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

import whisperkv.steps
from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.config import FORMATS
from whisperkv.encoder import FastEncoder
from whisperkv.trim import Kept, kept_frames
from whisperkv.weights import FastLinear

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU alone")

WEIGHTS = ("model", "bfloat16", "int8")
EVICTIONS = [None, *(EvictionConfig(policy=p, recent=6, heavy=3) for p in ("heavy_hitter", "magnitude", "window"))]


@pytest.fixture
def steps(monkeypatch):
    """How many steps went by as a whole; `steps.off` leaves all to the layers."""

    class Steps(list):
        off = False

    taken = Steps()
    step = whisperkv.steps.Reading.step

    def counted(self, decoder, ids, *args):
        output = None if taken.off else step(self, decoder, ids, *args)
        if output is not None:
            taken.append(len(ids))
        return output

    monkeypatch.setattr(whisperkv.steps.Reading, "step", counted)
    return taken


@pytest.fixture
def audio(small):
    torch.manual_seed(1)
    return torch.randn(2, small.config.num_mel_bins, 2 * small.config.max_source_positions)


def widened(small):
    """One with heads of 64 channels, whose latent formats can be packed."""
    torch.manual_seed(0)
    config = copy.deepcopy(small.config)
    config.d_model, config.decoder_attention_heads, config.encoder_attention_heads = 128, 2, 2
    config.init_std = 0.15
    model = type(small)(config).eval()
    model.generation_config = small.generation_config
    return model


@torch.no_grad()
def decode(model, audio, rows=2, tokens=20, **given):
    """Logits of one token after another, after a prompt of three."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 200, (rows, tokens), generator=draw)
    states = model.model.encoder(audio).last_hidden_state.repeat_interleave(rows // len(audio), 0)
    past, logits = None, []
    for part in (ids[:, :3], *ids[:, 3:].split(1, 1)):
        output = model(encoder_outputs=(states,), decoder_input_ids=part, past_key_values=past, **given)
        past = output.past_key_values
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_a_step_is_what_the_layers_make_of_it(small, audio, steps, weights, format, eviction):
    model = widened(small)
    patch(model, eviction, CrossConfig(format=format), weights)
    whole = decode(model, audio, rows=4)
    assert steps == [4] * 17
    steps.off = True
    by_layer = decode(model, audio, rows=4)
    # A number between two codes may go to either; and of the latent formats a layer multiplies the heads in float32.
    apart = {"model": 2e-4, "bfloat16": 0.02, "int8": 0.05}[weights]
    assert (whole - by_layer).abs().mean() < apart * whole.std()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_heads_of_any_size(small, audio, steps, weights):
    patch(small, weights=weights)
    whole = decode(small, audio)
    assert steps == [2] * 17
    steps.off = True
    assert (whole - decode(small, audio)).abs().mean() < {"model": 1e-4, "bfloat16": 0.03, "int8": 0.1}[weights]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [8, 40])
def test_generate(small, audio, steps, beams, length):
    given = dict(num_beams=beams, max_new_tokens=length, do_sample=False)
    want = small.generate(audio, **given)
    patch(small)
    got = small.generate(audio, **given)
    assert torch.equal(got, want) and steps


def test_left_padding(small, audio, steps):
    ids = torch.randint(4, 200, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given = dict(decoder_input_ids=ids, decoder_attention_mask=mask, max_new_tokens=10, do_sample=False)
    want = small.generate(audio, **given)
    patch(small)
    assert torch.equal(small.generate(audio, **given), want)
    assert steps == [2] * 9


def test_the_encoder(small, audio):
    with torch.no_grad():
        want = small.model.encoder(audio).last_hidden_state
        patch(small)
        assert type(small.model.encoder) is FastEncoder and type(small.proj_out) is FastLinear
        got = small.model.encoder(audio)
        torch.testing.assert_close(got.last_hidden_state, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(small.model.encoder(audio[1:])[0][0], got[0][1])  # each audio by itself
        for weights, apart in (("bfloat16", 0.05), ("int8", 0.3)):
            patch(small, weights=weights)
            error = (small.model.encoder(audio).last_hidden_state - want).abs()
            assert 0 < error.mean() < apart
            assert stats(small).weight_bytes > 0
    unpatch(small)
    assert type(small.model.encoder) is WhisperEncoder and type(small.model.decoder) is WhisperDecoder
    assert not any(type(module) is FastLinear or "packed" in vars(module) for module in small.modules())
    with torch.no_grad():
        assert torch.equal(small.model.encoder(audio).last_hidden_state, want)


WANTED = {
    "hidden states": dict(output_hidden_states=True),
    "attentions": dict(output_attentions=True),
    "a tuple": dict(return_dict=False),
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_more_than_the_states(small, audio, steps, wanted):
    """The encoder and a step leave it to the layers, and the rest of the decode is ours again."""
    small.set_attn_implementation("eager")
    ids = torch.randint(4, 200, (2, 4))

    def run():
        heard = small.model.encoder(audio, **wanted)
        output = small(encoder_outputs=(heard[0],), decoder_input_ids=ids[:, :3], use_cache=True)
        past = output.past_key_values
        more = small(encoder_outputs=(heard[0],), decoder_input_ids=ids[:, 3:], past_key_values=past, **wanted)
        return heard, more

    with torch.no_grad():
        want = run()
        patch(small)
        got = run()
    assert not steps or "return_dict" in wanted  # the tuple is made of what comes out of the decoder
    for one, other in zip(got, want):
        assert type(one) is type(other) and len(one) == len(other)
    if "output_hidden_states" in wanted:
        torch.testing.assert_close(got[0].hidden_states, want[0].hidden_states, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got[1].decoder_hidden_states, want[1].decoder_hidden_states, rtol=1e-3, atol=1e-3)


def test_a_hook_sees_the_layers(small, audio, steps):
    patch(small)
    seen = []
    decode(small, audio)
    assert len(steps) == 17
    hook = small.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        decode(small, audio)
        assert len(steps) == 17 and len(seen) == 18
        heard = small.model.encoder.layers[0].fc2.register_forward_hook(lambda *_: seen.append(2))
        small.model.encoder(audio)
        assert seen[-1] == 2
    hook.remove(), heard.remove()
    decode(small, audio)
    assert len(steps) == 34 and len(seen) == 19


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_change_are_read_anew(small, audio, steps, weights):
    patch(small, weights=weights)
    before = decode(small, audio)
    with torch.no_grad():
        small.model.decoder.layers[0].fc1.weight.mul_(-1)
        small.model.encoder.conv2.weight.add_(0.5)
    changed = decode(small, audio)
    assert (changed - before).abs().mean() > 0.1
    fresh = patch(copy.deepcopy(unpatch(small)), weights=weights)
    torch.testing.assert_close(decode(fresh, audio), changed, rtol=0, atol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_written_past_autograd_is_read_by_the_next_patch(small, audio, weights):
    patch(small, weights=weights)
    before = decode(small, audio)
    small.model.decoder.layers[0].fc1.weight.data.mul_(-1)  # no version counts this
    small.model.encoder.conv2.weight.data.add_(0.5)
    changed = decode(patch(small, weights=weights), audio)
    assert (changed - before).abs().mean() > 0.1
    fresh = patch(copy.deepcopy(unpatch(small)), weights=weights)
    assert torch.equal(decode(fresh, audio), changed)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_copies_and_pickles(small, audio, weights, tmp_path):
    patch(small, weights=weights)
    want = decode(small, audio)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(decode(other, audio), want)
    assert not [name for name in small.state_dict() if "packed" in name]
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    for name, tensor in unpatch(small).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_gradients_and_training(small, audio):
    patch(small, weights="int8")
    ids = torch.randint(4, 200, (2, 4))
    small(audio, decoder_input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in small.proj_out.parameters())
    linear = small.model.decoder.layers[0].fc1
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("bad", ["int4", None, 8, "INT8", True])
def test_unknown_weights(small, bad):
    with pytest.raises(ValueError, match="weights must be one of 'model', 'bfloat16', 'int8'; got"):
        patch(small, weights=bad)
    assert type(small.model.decoder) is WhisperDecoder


def test_a_model_of_another_dtype(small):
    small.bfloat16()
    with pytest.raises(ValueError, match="weights='int8' is for float32 models on the CPU.*in bfloat16 on cpu"):
        patch(small, weights="int8")
    patch(small)
    assert not any(type(module) is FastLinear for module in small.modules())


def test_layers_that_cannot_be_packed(small, audio, steps):
    class Wrapped(nn.Linear):
        pass

    layer = small.model.decoder.layers[1]
    other = Wrapped(64, 64)
    other.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = other
    want = small.generate(audio, max_new_tokens=8, do_sample=False)
    patch(small, weights="bfloat16")
    small.generate(audio, max_new_tokens=8, do_sample=False)
    assert not steps and type(layer.fc1) is Wrapped
    assert "1 linear layers stay as they are (model.decoder.layers.1.fc1: a" in stats(small).note
    patch(small)
    assert torch.equal(small.generate(audio, max_new_tokens=8, do_sample=False), want)
    assert stats(small).note == ""


def test_threads_do_not_change_bits(small, audio):
    patch(small, weights="int8", cross=CrossConfig(format="int8"))
    want = decode(small, audio, rows=8)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    got = decode(small, audio, rows=8)
    torch.set_num_threads(threads)
    assert torch.equal(got, want)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_real_weights(tiny_en, speech, weights):
    model, processor = tiny_en
    features = processor(speech[0], sampling_rate=16000, return_tensors="pt").input_features
    want = model.generate(features, max_new_tokens=40)
    model = patch(copy.deepcopy(model), weights=weights)
    got = model.generate(features, max_new_tokens=40)
    if weights == "model":
        assert torch.equal(got, want)
    else:
        texts = [processor.batch_decode(tokens, skip_special_tokens=True)[0].split() for tokens in (got, want)]
        assert difflib.SequenceMatcher(None, *texts).ratio() > 0.7


@pytest.mark.parametrize("by_layers", [False, True])
@torch.no_grad()
def test_the_encoder_hears_what_is_kept(small, audio, by_layers):
    """As if each frame that is dropped were the one that stands for it, which weighs as much as all of them."""
    audio[0, :, 6:] = audio[0, 0, -1]
    audio[1, :, 30:] = 0
    encoder = small.model.encoder
    keep = kept_frames(audio, None, "padding")
    assert keep.sum(-1).tolist() == [34, 43]  # of 50
    x = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(audio)))).transpose(1, 2)
    x = x + encoder.embed_positions.weight
    x = x.gather(1, (Kept.of(keep).places.gather(1, Kept.of(keep).of_all))[..., None].expand_as(x))
    for layer in encoder.layers:
        x = layer(x, None)
    want = encoder.layer_norm(x)
    whole = encoder(audio).last_hidden_state
    patch(small, cross=CrossConfig(trim="padding"))
    seen = []
    if by_layers:
        encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    got = encoder(audio).last_hidden_state
    assert bool(seen) == by_layers and got.shape == whole.shape
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (got - whole).abs().max() > 0.01
    audio = torch.randn_like(audio)  # without padding nothing is left out
    patch(small)
    want = encoder(audio).last_hidden_state
    patch(small, cross=CrossConfig(trim="padding"))
    assert torch.equal(encoder(audio).last_hidden_state, want)
    states = encoder(audio, output_hidden_states=True)
    assert len(states.hidden_states) == 2 and states.last_hidden_state.shape == want.shape
