"""The op of a decoder's step against its slow twin in reference.py, and all that can go wrong around it."""

import re

import pytest
import reference
import test_cross_ops
import test_ops
import torch
from reference import LIVE, PINNED, SEEN, SLOT
from test_ops import ISAS, ON_CUDA, POLICIES, assert_same_bits, check_values_on, copy, resized, row_of_cursor, strided
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from whisperkv import ops

pytestmark = pytest.mark.skipif(ON_CUDA, reason="the op is the CPU's alone")

NONE = torch.empty(0)
FORMATS = {"float32": reference.AS_FLOAT32, "bfloat16": reference.AS_BFLOAT16, "int8": reference.AS_FINE_INT8}
STEP = (
    "x", "sources", "owner", "lengths", "bias", "caches", "heard", "weights", "format", "heads", "hidden", "frames",
    "group", "is_latent", "policy", "budget", "recent", "decay", "epsilon", "scale",
)  # fmt: skip
# Where the lists have what, of the first layer.
KEYS, VALUES, CURSOR, POSITIONS, SCORES = range(5)
OF_KEYS = 7  # the weights of the audio's keys are this one of fourteen
QUERY, CROSS_KEY, CROSS_VALUE, FIRST = 2, 2 * OF_KEYS, 16, 22


def problem(
    rows=2, layers=2, width=64, heads=2, hidden=96, slots=12, format=reference.AS_FLOAT32, policy=-1, table=False,
    hears=True, frames=40, audios=2, bits=0, latent=False, biased=False, seed=0,
):  # fmt: skip
    """All arguments of the op by name; the weights are the model's own. No two layers have the same numbers."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    own = test_ops.problem(rows, 1, heads, slots, width // heads, seed=seed, table=table)
    dim, parts = (width, 1) if latent else (width // heads, heads)
    audio = test_cross_ops.problem(
        rows, 1, parts, frames, dim, audios, bits, 32, latent=latent, seed=seed, biased=biased
    )
    none = torch.empty(0, dtype=torch.int32)
    caches, heard, weights = [], [], []
    for layer in range(layers):
        louder = 1 + layer / 4
        caches += own["keys"] * louder, own["values"] * louder, own["cursor"].clone()
        caches += (NONE, NONE) if policy < 0 else (own["positions"].clone(), own["scores"] * louder)
        named = "key_scales", "value_scales"
        data, scales = audio["keys"] * (1 if bits else louder), [audio[name] * louder for name in named]
        heard += data, data if latent else audio["values"] * (1 if bits else louder), *scales
        square = width, width
        for part, sides in enumerate((
            (width,), square, square, square, square,
            (width,), square, (heads * width, width // heads) if latent else square, square, square,
            (width,), (hidden, width), (width, hidden),
        )):  # fmt: skip
            weights.append(normal(*sides) / sides[1] ** 0.5 if len(sides) > 1 else 1 + normal(*sides) / 8)
            weights.append(NONE if part == OF_KEYS and latent else normal(sides[0]) / 4)
        weights += NONE, NONE  # what makes keys of latents
    return dict(
        x=normal(rows, width), sources=own["sources"], owner=audio["owner"] if hears else none,
        lengths=audio["lengths"] if hears else none, bias=audio["bias"] if hears else NONE, caches=caches,
        heard=heard if hears else [], weights=[*weights, 1 + normal(width) / 8, normal(width) / 4], format=format,
        heads=heads, hidden=hidden, frames=frames, group=32, is_latent=latent, policy=policy, budget=own["budget"],
        recent=own["recent"], decay=0.9, epsilon=1e-5, scale=0.125,
    )  # fmt: skip


def packed(given):
    """As the op takes the weights."""
    weights = [ops.pack_matrix(w, given["format"]) if w.dim() == 2 else w for w in given["weights"]]
    return given | dict(weights=weights)


@torch.no_grad()
def step(given, op=ops.decoder_step):
    return op(*(given[name] for name in STEP))


# Of the standard deviation, on average. In the other formats a number between two codes may go to either.
APART = {reference.AS_FLOAT32: 2e-6, reference.AS_BFLOAT16: 2e-3, reference.AS_INT8: 2e-2, reference.AS_FINE_INT8: 2e-2}


def check(given, in_place=False):
    ours, theirs = copy(given if in_place else packed(given)), copy(given)
    before = copy(ours)
    output, wanted = step(ours), step(theirs, reference.decoder_step)
    assert_same_reading(ours, before)
    assert_near(ours, output, theirs, wanted)


def assert_near(ours, output, theirs, wanted):
    """What comes out, and what has become of the caches."""
    assert output.is_contiguous() and output.shape == wanted.shape and output.dtype == torch.float32
    if not output.numel():
        return
    is_packed = ours["heard"] and ours["heard"][0].dtype == torch.uint8
    apart = APART[ours["format"]] + (test_cross_ops.FLIPPED_ON_AVERAGE if is_packed else 0)
    assert (output - wanted).abs().mean() < apart * wanted.std()
    for one, other in zip(ours["caches"], theirs["caches"]):
        if one.dtype == torch.int32:
            settled = [LIVE, SEEN, PINNED] if len(one) == 4 and ours["format"] != reference.AS_FLOAT32 else ...
            assert torch.equal(one[settled], other[settled])  # the next slot is one of scores that are nearly equal
        elif one.numel():
            live = other.isfinite()
            assert torch.equal(one.isfinite(), live)
            assert not live.any() or (one - other)[live].abs().mean() <= apart * (1 + other[live].abs().mean())


def assert_same_reading(given, before):
    """Nothing but caches has been written to."""
    for name in STEP[:5]:
        assert_same_bits(given[name], before[name])
    for name in ("heard", "weights"):
        for one, other in zip(given[name], before[name]):
            assert_same_bits(one, other)


SIZES = {
    "one row": dict(rows=1),
    "no rows": dict(rows=0),
    "many rows": dict(rows=40, slots=5),
    "one layer": dict(layers=1),
    "one slot": dict(slots=1),
    "one head": dict(heads=1),
    "narrow heads": dict(heads=16),
    "wide": dict(width=160, heads=5, hidden=64),
    "a table": dict(rows=5, table=True),
    "no audio": dict(hears=False),
    "one audio": dict(rows=5, audios=1),
    "weighted frames": dict(biased=True),
}


class TestValues:
    """The numbers. Run again for every instruction set by test_every_instruction_set."""

    @pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_sizes(self, sizes, format):
        check(problem(**sizes, format=format))

    @pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
    @pytest.mark.parametrize("bits", [0, 8, 4])
    @pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
    @pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
    def test_audio(self, biased, latent, bits, format):
        check(problem(5, format=format, bits=bits, latent=latent, biased=biased, frames=300))

    @pytest.mark.parametrize("policy", range(-1, len(POLICIES)))
    @pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
    def test_policies(self, policy, format):
        for seed in range(4):
            check(problem(4, policy=policy, format=format, seed=seed))

    @pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
    @pytest.mark.parametrize("heads", [1, 2, 4, 16])
    def test_weights_where_they_are(self, heads, latent):
        check(problem(heads=heads, latent=latent), in_place=True)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


def at(name, index, change):
    """That change of one tensor of a list."""

    def changed(given):
        given[name] = [change(each) if i == index else each for i, each in enumerate(given[name])]

    return changed


def put(**values):
    return lambda given: given.update(values)


LATENT = dict(latent=True)
BAD = {
    "x: dtype": ({}, lambda g: put(x=g["x"].double())(g), "x must be float32, got float64"),
    "x: width": ({}, put(x=torch.zeros(2, 48)), "width must be a multiple of 32 in 1..65793, got 48"),
    "heads": ({}, put(heads=3), "width must be a multiple of 3 in 1..65793, got 64"),
    "no heads": ({}, put(heads=0), "heads must be in 1..1024, got 0"),
    "hidden": ({}, put(hidden=2**40), "hidden must be a multiple of 32 in 1..65793, got 1099511627776"),
    "format": ({}, put(format=4), "format must be in 0..3, got 4"),
    "policy": ({}, put(policy=9), "policy must be in -1..2, got 9"),
    "budget": (dict(policy=0), put(budget=13), "budget must be in 1..12, got 13"),
    "recent": (dict(policy=0), put(recent=0), "recent must be in 1..2147483647, got 0"),
    "decay": ({}, put(decay=torch.nan), "decay must be finite, got nan"),
    "frames": ({}, put(frames=2**62), "frames must be in 1..2147483647"),
    "other frames": ({}, put(frames=41), "audio keys must be [audios=2, audio heads=2, frames=41, channels=32]"),
    "group": ({}, put(group=24), "group must be 16, 32, 64, 128 or a multiple of 256 frames, got 24"),
    "keys: dtype": ({}, at("caches", KEYS, torch.Tensor.half), "keys must be float32, got float16"),
    "values: slots": ({}, at("caches", VALUES, resized(2)), "values must be [rows=2, heads=2, slots=12, head=32]"),
    "of layer 1": ({}, at("caches", 5 + KEYS, resized(3)), "keys must be [rows=2, heads=2, slots=12, head=32]"),
    "strided": ({}, at("caches", VALUES, strided), "values must be contiguous, got a strided view"),
    "cursor": ({}, at("caches", 5 + CURSOR, row_of_cursor(SLOT, 99)), "cursor of row 0: slot must be in 0..live"),
    "full": ({}, at("caches", 5 + CURSOR, row_of_cursor(LIVE, -1)), "cursor of row 0: live must be in 0..slots"),
    "seen": ({}, at("caches", CURSOR, row_of_cursor(SEEN, 2**31 - 1)), "the positions of the new tokens must be below"),
    "no scores": (dict(policy=0), at("caches", SCORES, lambda t: NONE), "scores must be [rows=2, slots=12]"),
    "sources": (dict(table=True), lambda g: g["sources"].fill_(7), "must be one of the rows, got 7"),
    "owner": ({}, put(owner=torch.tensor([0, 2]).int()), "owner of row 1 must be one of 2 audios, got 2"),
    "length": ({}, put(lengths=torch.tensor([41, 40]).int()), "length of audio 0 must be in 1..40 frames, got 41"),
    "bias": ({}, put(bias=torch.zeros(2, 41)), "bias must be [audios=2, frames=40], got [2, 41]"),
    "audio: heads": ({}, at("heard", VALUES, resized(1)), "audio values must be [audios=2, audio heads=2"),
    "audio: scales": (dict(bits=8), at("heard", 2, resized(2)), "key scales must be [audios=2, audio heads=2, gro"),
    "audio: strip": (
        dict(bits=8), lambda g: put(heard=[h[:, :, :, :12].contiguous() if h.dtype == torch.uint8 else h
                                           for h in g["heard"]])(g),
        "audio keys must have 16 or 8 bytes a tile and channel, got 12",
    ),
    "weight: inputs": ({}, at("weights", QUERY, resized(1)), "a weight must be [outputs=64, inputs=64], got [64, 65]"),
    "weight: dtype": ({}, at("weights", QUERY, torch.Tensor.double), "a weight must be float32, got float64"),
    "weight: not packed": ({}, put(format=2), "weights must come from pack_matrix for this format"),
    "weight: panels": ({}, at("weights", FIRST, lambda w: ops.pack_matrix(w, 2)), "a weight must be [panels=3, words="),
    "bias: short": ({}, at("weights", FIRST + 1, resized(0, -1)), "a bias or norm must be [outputs=96], got [95]"),
    "norm": ({}, at("weights", 0, lambda t: NONE), "a bias or norm must be [outputs=64]"),
    "keys with a bias": (
        LATENT, at("weights", CROSS_KEY + 1, lambda t: torch.zeros(64)), "the audio's keys must come without a bias",
    ),
    "panels of half a head": (
        LATENT | dict(heads=4), at("weights", CROSS_VALUE, lambda w: ops.pack_matrix(w, 0)),
        "a head of packed weights must be a multiple of 32 in 1..65793, got 16",
    ),
    "a layer less": ({}, lambda g: put(caches=g["caches"][5:])(g), "be of the same layers, got 5, 8 and"),
    "a tensor more": ({}, lambda g: g["weights"].append(NONE), "be of the same layers, got 10, 8 and 59"),
    "nothing": ({}, put(caches=[], heard=[], weights=[]), "the lists must be of the same layers, got 0, 0 and 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    """Refused, and no cache has been written to by then."""
    sizes, change, message = case
    given = problem(**sizes)
    change(given)
    before = copy(given)
    with pytest.raises(RuntimeError, match="whisperkv::decoder_step: .*" + re.escape(message)):
        step(given)
    assert_same_reading(given, before)
    for one, other in zip(given["caches"], before["caches"]):
        assert_same_bits(one, other)


# Where another tensor is put than its own, and in the memory of which cache
SHARED = {
    "another layer's": ("caches", 5 + KEYS, KEYS),
    "keys and values": ("caches", VALUES, KEYS),
    "what the audio has": ("heard", 0, VALUES),
    "a weight": ("weights", QUERY, KEYS),
    "a bias": ("weights", QUERY + 1, SCORES),
    "the last norm": ("weights", -1, 5 + VALUES),
    "x": ("x", None, KEYS),
    "a table": ("sources", None, POSITIONS),
    "lengths": ("lengths", None, CURSOR),
    "what frames count for": ("bias", None, VALUES),
}


@pytest.mark.parametrize("name, index, cache", SHARED.values(), ids=SHARED)
def test_memory_that_is_written_is_not_shared(name, index, cache):
    given = problem(rows=2, slots=400, policy=0, table=True, biased=True)
    tensor = given[name] if index is None else given[name][index]
    room = given["caches"][cache].view(-1).view(tensor.dtype)
    inside = room[: tensor.numel()].view(tensor.shape)
    if index is None:
        given[name] = inside
    else:
        given[name][index] = inside
    with pytest.raises(RuntimeError, match="must have memory of its own, as it is written to, and shares some with"):
        step(given)


def test_no_gradients_pass():
    given = problem()
    with pytest.raises(RuntimeError, match=r"decoder_step: has no gradients: call under torch.no_grad\(\)"):
        ops.decoder_step(*(given[name] for name in STEP))


def in_numbers(given):
    """Without NaN, which opcheck would not find equal to itself."""
    return tree_map_only(torch.Tensor, lambda t: t.nan_to_num() if t.is_floating_point() else t, given)


OPCHECKS = {
    "plain": dict(),
    "bytes": dict(format=2, bits=8),
    "latent": dict(format=1, bits=4, latent=True, biased=True),
    "latent, as it is": dict(latent=True, heads=4),
    "policy": dict(policy=0, table=True),
    "no audio": dict(hears=False),
}


@pytest.mark.parametrize("sizes", OPCHECKS.values(), ids=OPCHECKS)
@torch.no_grad()
def test_opcheck_compile(sizes):
    given = in_numbers(problem(**sizes))
    given = packed(given) if given["format"] else given
    torch.library.opcheck(ops.decoder_step, tuple(given[name] for name in STEP))


# What only the numbers of a tensor show, or where it stands in memory, a compiler cannot be told.
IN_NUMBERS = {"strided", "cursor", "full", "seen", "sources", "owner", "length"}


@pytest.mark.parametrize("name", [name for name in BAD if name not in IN_NUMBERS])
@torch.no_grad()
def test_a_compiler_is_told_what_is_wrong(name):
    sizes, change, _ = BAD[name]
    given = problem(**sizes)
    change(given)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="whisperkv::decoder_step: "):
        step(tree_map_only(torch.Tensor, mode.from_tensor, given))


def test_a_compiler_refuses_gradients():
    given = problem()
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="decoder_step: has no gradients"):
        given = tree_map_only(torch.Tensor, mode.from_tensor, given)
        ops.decoder_step(*(given[name] for name in STEP))
