"""The ops over latents: cross-attention over codes of mixed bits, self-attention whose heads share keys that are values
too, and a decoder's step over both. Each against its slow twin in reference.py."""

import re

import pytest
import reference
import test_cross_ops
import test_ops
import test_step_ops
import torch
from drawn import given as drawn
from drawn import settings, st
from test_cross_ops import FLIPPED, FLIPPED_ON_AVERAGE, ROUNDED, UNPACKED, attend
from test_ops import (
    DTYPES,
    ISAS,
    ON_CUDA,
    TOLERANCE,
    assert_same_bits,
    check_values_on,
    copy,
    of_cuda,
    of_the_cpu,
)
from torch._subclasses import FakeTensorMode

from whisperkv import mixed, ops
from whisperkv.mixed import pack_mixed, tile_bytes, unpack_mixed

BITS = {
    "one of each": (8, 7, 6, 5, 4, 3, 2, 1),
    "tiny.en at 3": (7, 6, 5, 4, 3, 3, 2, 2, 2, 1, 1),
    "one block": (3,),
    "out of order": (1, 8, 2),
}


def drawn_frames(bits, draw, audios, frames):
    """(frames, bits of each channel): it has so many bits because it varies so much, so steps are much alike."""
    bits = torch.tensor(bits).repeat_interleave(ops.CHANNELS).float()
    spread = (0.1 + 0.1 * torch.rand(len(bits), generator=draw)) * (2**bits - 1) / 5
    middle = 0.2 * torch.randn(len(bits), generator=draw)
    return torch.randn(audios, frames, len(bits), generator=draw) * spread + middle, bits


def mixed_problem(bits, rows=4, tokens=6, frames=90, audios=2, dtype=torch.float32, seed=0, biased=False, group=256):
    """As test_cross_ops has it, over codes of mixed bits that say the same."""
    channels = ops.CHANNELS * len(bits)
    given = test_cross_ops.problem(
        rows, tokens, 1, frames, channels, audios, 8, group, dtype, latent=True, seed=seed, biased=biased
    )
    states, its = drawn_frames(bits, torch.Generator().manual_seed(seed + 1), audios, frames)
    for audio, length in enumerate(given["lengths"]):
        states[audio, length:] = torch.nan  # whoever reads it is found out
    scales = mixed.scales_of(states, given["lengths"], its, group)
    codes = pack_mixed(states, given["lengths"], its, scales, group)
    return given | dict(keys=codes, values=codes, key_scales=scales, value_scales=its, states=states)


def spread_of(given):
    """The deviation of each channel's numbers, nearly."""
    step = given["key_scales"][:, 0, :, 0].amax((0, 1))
    return (step * (2 ** given["value_scales"] - 1) / 5).clamp(min=0.02)


def check(given):
    before = copy(given)
    output, weights = attend(given)
    for name in test_cross_ops.CROSS[:9]:
        assert_same_bits(given[name], before[name])
    spread = spread_of(given)
    if ON_CUDA:
        wanted, wanted_weights = attend(given, reference.cross_attention)
        tolerance = 2 * UNPACKED[output.dtype]  # channels of 8 bits vary by 8, so logits are large
        error = (output.float() - wanted.float()).abs() / spread
        assert (error <= tolerance * (1 + wanted.float().abs() / spread)).all()
        assert (weights - wanted_weights).abs().max() < tolerance
        return
    wanted, wanted_weights = attend(given, reference.cross_attention_in_bytes)
    error = (output.float() - wanted.float()).abs() / spread
    rounding = 0 if output.dtype == torch.float32 else torch.finfo(output.dtype).eps * (wanted.abs() / spread).max()
    assert error.max() < FLIPPED + rounding and error.mean() < FLIPPED_ON_AVERAGE + rounding / 4
    assert (weights - wanted_weights).abs().mean() < 1e-5
    exact = (output.float() - attend(given, reference.cross_attention)[0].float()).abs() / spread
    assert exact.max() < ROUNDED + rounding


class TestValues:
    """The numbers. Run again for every instruction set by test_every_instruction_set, and on fibers."""

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
    def test_mixed_bits(self, bits, dtype):
        check(mixed_problem(bits, dtype=dtype))

    @pytest.mark.parametrize("rows, tokens, frames", [(1, 1, 1), (2, 6, 16), (9, 6, 257), (1, 40, 700), (3, 20, 1500)])
    def test_shapes(self, rows, tokens, frames):
        check(mixed_problem((6, 3, 1), rows, tokens, frames, seed=rows))

    @pytest.mark.parametrize("group", [16, 64, 512])
    def test_groups(self, group):
        check(mixed_problem((6, 3, 1), frames=700, group=group))

    def test_frames_that_stand_for_several(self):
        check(mixed_problem((5, 3, 2), biased=True, frames=300))

    @settings(max_examples=15, deadline=None)
    @drawn(
        st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 9), st.integers(1, 400),
        st.integers(1, 3), st.sampled_from(list(DTYPES.values())), st.integers(0, 2**30), st.booleans(),
    )  # fmt: skip
    def test_any_problem(self, bits, rows, tokens, frames, audios, dtype, seed, biased):
        check(mixed_problem(tuple(bits), rows, tokens, frames, audios, dtype, seed, biased))

    @pytest.mark.parametrize("bits", [8, 4])
    def test_the_same_bits_everywhere_are_the_layout_of_those_bits(self, bits):
        given = mixed_problem((bits,) * 3, frames=200)
        codes = given["keys"].view(*given["keys"].shape[:3], 2 * bits, -1)
        unpacked = reference.unpack_codes(codes, 200)
        assert torch.equal(unpacked, reference.unpack_mixed(given["keys"], given["value_scales"], 200))

    def test_all_channels_of_a_model(self):
        check(mixed_problem(tuple(range(8, 0, -1)) * 5, 1, 20, 70, 1, torch.bfloat16))

    @of_the_cpu
    @pytest.mark.parametrize("format", test_step_ops.FORMATS.values(), ids=test_step_ops.FORMATS)
    @pytest.mark.parametrize(
        "sizes", [dict(), dict(rows=5, table=True), dict(policy=0), dict(rows=9, frames=300)], ids=str
    )
    def test_a_step(self, sizes, format):
        test_step_ops.check(step_problem((5, 2), 32, format=format, **sizes))

    @of_the_cpu
    def test_a_step_whose_cache_holds_keys_and_values(self):
        test_step_ops.check(step_problem((5, 2), 0))


def latent_problem(**sizes):
    """As test_ops has it, with one KV head of latents."""
    given = test_ops.problem(**sizes)
    none = given["keys"].new_empty(*given["keys"].shape[:1], 1, given["keys"].shape[2], 0)
    one = {name: given[name][:, :1].clone() for name in ("keys",)}
    return given | one | dict(key=given["key"][:, :, :1].clone(), value=given["value"][:, :, :1, :0], values=none)


class TestValuesOfLatents:
    """Of self-attention."""

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize(
        "sizes",
        [dict(), dict(dim=192), dict(dim=300, slots=40), dict(rows=5, table=True, dim=48), dict(tokens=4, padded=True)],
        ids=str,
    )
    def test_values(self, sizes, dtype):
        given = latent_problem(dtype=dtype, **sizes)
        ours, theirs = copy(given), copy(given)
        output, weights = test_ops.attend(ours)
        wanted, wanted_weights = test_ops.attend(theirs, reference.compact_attention)
        torch.testing.assert_close(output, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours["keys"].nan_to_num(-1), theirs["keys"].nan_to_num(-1))

    def test_they_are_keys_and_values_in_one(self):
        """The bits are those of heads that each have a copy."""
        given = latent_problem(dim=64, slots=70)
        heads = given["query"].shape[2]
        keys = given["keys"].expand(-1, heads, -1, -1)
        key = given["key"].expand(-1, -1, heads, -1).contiguous()
        whole = given | dict(key=key, value=key.clone(), keys=keys.clone(), values=keys.clone())
        for ours, theirs in zip(test_ops.attend(copy(given)), test_ops.attend(copy(whole))):
            assert_same_bits(ours, theirs)

    def test_heads_that_do_not_share_them_evenly(self):
        given = latent_problem(heads=3)
        two = given | dict(keys=given["keys"].repeat(1, 2, 1, 1), key=given["key"].repeat(1, 1, 2, 1))
        two["values"] = two["keys"][..., :0]
        with pytest.raises(RuntimeError, match="heads that are a multiple of 2 kv_heads, got 3"):
            test_ops.attend(two)


def step_problem(bits, rank, **sizes):
    """As test_step_ops has it, over an audio of mixed bits, and with latents of that rank in the cache, if any."""
    given = test_step_ops.problem(latent=True, bits=8, **sizes)
    heads, width, parts = given["heads"], given["x"].shape[1], 2 * ops._STEP_PARTS
    draw = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(shape, generator=draw) / shape[-1] ** 0.5  # noqa: E731
    channels, layers = ops.CHANNELS * len(bits), len(given["weights"]) // parts
    frames, its = drawn_frames(bits, draw, len(given["lengths"]), given["frames"])
    scales = mixed.scales_of(frames, given["lengths"], its, given["group"])
    codes = pack_mixed(frames, given["lengths"], its, scales, given["group"])
    weights, caches = list(given["weights"]), list(given["caches"])
    for layer in range(layers):
        at, own = parts * layer, 5 * layer
        weights[at + test_step_ops.CROSS_KEY] = normal(heads * channels, width // heads)
        weights[at + test_step_ops.CROSS_VALUE] = normal(width, channels)
        if rank:
            weights[at + 4 : at + 8] = normal(rank, width), normal(rank), normal(width, rank), normal(width)
            weights[at + parts - 2] = normal(heads * rank, width // heads)
            rows, _, slots, _ = caches[own].shape
            live = caches[own].isfinite()[:, :1, :, :1].expand(-1, -1, -1, rank)
            keys = torch.randn(rows, 1, slots, rank, generator=draw).masked_fill(~live, torch.nan)
            caches[own : own + 2] = keys, keys.new_empty(rows, 1, slots, 0)
    return given | dict(heard=[codes, codes, scales, its] * layers, weights=weights, caches=caches)


@of_the_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


# Packing


def test_packing_is_what_the_twin_unpacks():
    frames, bits = drawn_frames((8, 7, 6, 5, 4, 3, 2, 1, 3), torch.Generator().manual_seed(0), 2, 37)
    lengths = torch.tensor([37, 20]).int()
    scales = mixed.scales_of(frames, lengths, bits, 32)
    codes = pack_mixed(frames, lengths, bits, scales, 32)
    assert codes.shape == (2, 1, 3, tile_bytes(bits)) and codes.nbytes == 2 * 3 * 16 * 32 * 39 // 8
    got = reference.unpack_mixed(codes, bits, 37)[:, 0]
    assert not got[1, 20:].any() and (got.amax((0, 1)) <= 2**bits - 1).all() and not got[0, :, bits == 1].gt(1).any()
    step, low = reference.of_frames(scales, 37, 32)
    unpacked = unpack_mixed(codes, scales, bits, 32, 37)
    assert torch.equal(unpacked, got * step[:, 0] + low[:, 0])
    near = frames.clamp(low[:, 0], low[:, 0] + step[:, 0] * (2**bits - 1))
    apart = (unpacked - near).abs() / step[:, 0].clamp(min=1e-9)
    assert apart[0].max() < 0.51 and apart[1, :20].max() < 0.51
    assert not scales[1, :, 1:].any()  # of no frames
    for x, scale in ((frames[0, :32], scales[0, 0, 0]), (frames[1, :20], scales[1, 0, 0])):
        torch.testing.assert_close(scale, best_scale(x.double(), bits).float())


def best_scale(x, bits):
    """Step and least [2, channels] of a group of frames, of three widths those that lose least in the eighth power."""
    low, high, tried = x.amin(0), x.amax(0), []
    for width in (1, 0.75, 0.5):
        half = width * (high - low) / 2
        scale = torch.stack([2 * half / (2**bits - 1), (low + high) / 2 - half])
        codes = ((x - scale[1]) / scale[0]).round().clamp(min=0).minimum(2**bits - 1)
        tried.append(((codes * scale[0] + scale[1] - x) ** 8, scale))
    lost = torch.stack([each.sum(0) for each, _ in tried])
    assert set(lost.argmin(0).tolist()) == {0, 1, 2}
    return torch.stack([scale for _, scale in tried])[lost.argmin(0), :, torch.arange(len(bits))].T


def test_a_frame_that_is_no_number_spoils_no_other():
    frames, bits = drawn_frames((3, 2), torch.Generator().manual_seed(0), 1, 20)
    spoilt = frames.clone()
    spoilt[0, 3, 5], spoilt[0, 7, 40] = torch.nan, torch.inf
    lengths = torch.tensor([20]).int()
    scales = mixed.scales_of(spoilt, lengths, bits, 256)
    one, other = (
        unpack_mixed(pack_mixed(x, lengths, bits, scales, 256), scales, bits, 256, 20) for x in (frames, spoilt)
    )
    assert scales.isfinite().all() and other.isfinite().all() and (one != other).sum() <= 2


# What is refused


def with_bits(bits):
    def change(given):
        its = given["value_scales"].clone()
        its[: len(bits)] = torch.tensor(bits)
        return given | dict(value_scales=its)

    return change


BAD = {
    "no bits": (with_bits([0.0]), "bits of channel 0 must be one of 1..8 and the same for 32 channels, got 0"),
    "nine bits": (with_bits([9.0]), "bits of channel 0 must be one of 1..8"),
    "half a bit": (with_bits([2.5] * 32), "must be one of 1..8 .* got 2.5"),
    "no number": (with_bits([float("nan")]), "must be one of 1..8"),
    "bits that differ in a block": (with_bits([3.0, 4.0]), "bits of channel 0 must be|bits of channel 1 must be"),
    "other bits": (with_bits([4.0] * 32), "keys must have .* bytes a tile for these bits, got"),
    "keys and values that differ": (
        lambda given: given | dict(values=given["keys"].clone()), "keys and values of mixed bits must be the same"
    ),
    "too few tiles": (
        lambda given: given | dict.fromkeys(("keys", "values"), given["keys"][:, :, 1:].clone()), "tiles"
    ),
    "a query of other channels": (
        lambda given: given | dict(query=given["query"][..., :32].contiguous()), "keys must have 32 channels"
    ),
}  # fmt: skip


@of_cuda
class TestOfCuda:
    """Scales are not looked at before the launch: that would mean waiting for them."""

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("bits", [[0.0], [9.0] * 32, [float("nan")], [8.0] * 64], ids=str)
    def test_bits_that_are_not_sound(self, bits, dtype):
        """They read nothing that is not there."""
        given = with_bits(bits)(mixed_problem((3, 2), dtype=dtype))
        output, weights = attend(given)
        assert output.isfinite().all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-5, atol=1e-5)

    def test_what_is_refused(self):
        given = mixed_problem((3, 2))
        codes = given["keys"][..., :-32].contiguous()
        with pytest.raises(RuntimeError, match="keys must have a multiple of 64 bytes a tile, got 288"):
            attend(given | dict(keys=codes, values=codes))
        with pytest.raises(RuntimeError, match="keys and values of mixed bits must be the same"):
            attend(given | dict(values=given["keys"].clone()))


@of_the_cpu
@pytest.mark.parametrize("change, error", BAD.values(), ids=BAD)
def test_what_is_refused(change, error):
    given = change(mixed_problem((3, 2)))
    with pytest.raises(RuntimeError, match=error):
        attend(given)


@of_the_cpu
def test_fake_tensors():
    given = mixed_problem((3, 2))
    output, weights = attend(given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [
            mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in map(given.get, test_cross_ops.CROSS)
        ]
        fake, fake_weights = ops.cross_attention(*fakes)
    assert (fake.shape, fake.dtype, fake_weights.shape) == (output.shape, output.dtype, weights.shape)


@of_the_cpu
def test_threads_do_not_change_the_bits():
    given, threads = mixed_problem((5, 3, 2), rows=9, frames=1500), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attend(given)
        torch.set_num_threads(3)
        for ours, theirs in zip(attend(given), alone):
            assert_same_bits(ours, theirs)
    finally:
        torch.set_num_threads(threads)


@of_the_cpu
@pytest.mark.parametrize(
    "change, error",
    {
        "latents in one layer alone": (
            lambda g: g["caches"].__setitem__(slice(5, 7), [torch.zeros(2, 2, 12, 32)] * 2),
            "the layers must all hold latents, or none",
        ),
        "another audio in a layer": (
            lambda g: g["heard"].__setitem__(4, g["heard"][4].clone()), "the same tensor in all layers"
        ),
        "no way to keys": (lambda g: g["weights"].__setitem__(26, torch.zeros(5, 32)), re.escape("a weight must be")),
    }.values(),
)  # fmt: skip
def test_a_step_refuses(change, error):
    given = step_problem((3, 2), 32)
    change(given)
    with torch.no_grad(), pytest.raises(RuntimeError, match=error):
        test_step_ops.step(given)
