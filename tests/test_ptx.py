"""The kernels for CUDA as nvcc compiles them: their PTX in an interpreter (tests/ptx), which sees what the fibers of
test_cuda_on_cpu.py cannot: the tensor cores' own layouts, races, copies that nobody awaited, and what a tile costs."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "ptx"))
import kernels  # noqa: E402
import others  # noqa: E402
import pruned  # noqa: E402
import structs  # noqa: E402
from memory import GLOBAL, Fault  # noqa: E402
from program import Program  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not kernels.NVCC, reason="nvcc is not installed"),
    pytest.mark.skipif(not structs.COMPILER, reason="no C compiler, to ask for the layout of structs"),
]
all_of_it = pytest.mark.skipif(not os.environ.get("WHISPERKV_PTX"), reason="long: WHISPERKV_PTX=all, or make ptx")
BITS = pytest.mark.parametrize("bits", [0, 8, 4], ids=["model", "int8", "int4"])
DTYPES = pytest.mark.parametrize("dtype", kernels.DTYPES)
FEW, MANY = dict(rows=3, heads=2, frames=75, audios=2, lengths=[75, 41]), dict(rows=12, frames=40)
CROSS = {
    "few queries": FEW,
    "many queries": MANY,
    "split, with weights": dict(rows=2, frames=150, splits=2, weights=True),
    "a split for another kernel": dict(rows=2, frames=150, splits=2, weights=True, lots=0),
    "more queries than lots": dict(rows=40, heads=2, audios=2, frames=70, splits=3),
    "groups": dict(rows=1, frames=200, group=32),
    "small groups": dict(rows=2, frames=70, group=16),
    "frames that stand for several": dict(rows=3, frames=75, audios=2, lengths=[75, 41], weights=True, biased=True),
    "rows of no audio": dict(rows=3, frames=20, owner=[0, 9, -1]),
    "an odd width": dict(rows=2, frames=70, dim=40, group=64),
}


@BITS
@pytest.mark.parametrize("problem", CROSS.values(), ids=CROSS)
def test_cross_attention(problem, bits):
    kernels.Cross(bits, **problem).check()


@BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_attention_in_other_dtypes(dtype, bits):
    kernels.Cross(bits, dtype, rows=2, frames=70, biased=bits == 8).check()


@BITS
@pytest.mark.parametrize("dim", [384, 1280])
def test_latent(bits, dim):
    kernels.Cross(bits, rows=1, tokens=dim // 64, dim=dim, frames=36, latent=True, biased=dim == 384).check()


MIXED = {
    "one of each": dict(mixed=(8, 7, 6, 5, 4, 3, 2, 1), rows=2, tokens=4, frames=36, weights=True),
    "more than a warp's": dict(mixed=(5, 4, 4, 3, 3, 3, 2, 2, 1, 1), rows=3, frames=40, audios=2, lengths=[40, 17]),
    "one block, split": dict(mixed=(3,), rows=2, frames=70, splits=2, biased=True),
    "groups of mixed bits": dict(mixed=(6, 2), rows=2, frames=70, group=32),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("problem", MIXED.values(), ids=MIXED)
def test_mixed_bits(problem, dtype):
    kernels.Cross(dtype=dtype, **problem).check()


@all_of_it
@DTYPES
@BITS
@pytest.mark.parametrize("rows", [1, 8, 17])
@pytest.mark.parametrize("frames, group, splits", [(1, 16, 1), (64, 32, 1), (257, 64, 3), (520, 256, 2)])
def test_any_cross_attention(frames, group, splits, rows, bits, dtype):
    draw = np.random.default_rng(frames + rows)
    for dim, latent in ((64, False), (draw.integers(1, 100), False), (512, True)):
        if dim * rows > 5000:
            continue
        kernels.Cross(
            bits, dtype, rows=rows, frames=frames, group=group, splits=splits, dim=int(dim), latent=latent,
            weights=bool(rows % 2), audios=2, lengths=[frames, int(draw.integers(1, frames + 1))],
        ).check()  # fmt: skip


@all_of_it
@BITS
def test_thirty_seconds(bits):
    kernels.Cross(bits, rows=5, heads=2, frames=1500, group=256, splits=3).check()
    kernels.Cross(bits, tokens=20, rows=1, dim=1280, frames=200, group=256, splits=2, latent=True).check()


def test_keys_that_are_not_aligned():
    problem = kernels.Cross(dtype="float32", rows=1, frames=20, offset=4)
    assert problem.addresses["keys"] % 16 == 4
    problem.check()


# Instructions of a warp and wavefronts of shared memory that 64 frames (latent: 16) take in one block, some 5 % above
# what they are. A change that makes them more must be worth it.
LARGE = dict(frames=16, group=256, rows=1, tokens=20, dim=1280, latent=True)
BUDGETS = {
    "model": (dict(bits=0, frames=64), 800, 256),
    "int8": (dict(bits=8, frames=64, group=256), 745, 128),
    "int4": (dict(bits=4, frames=64, group=256), 670, 64),
    "latent": (dict(bits=0, **LARGE), 4620, 1340),
    "latent_int8": (dict(bits=8, **LARGE), 5410, 960),
    "latent_int4": (dict(bits=4, **LARGE), 4820, 800),
    "mixed bits": (dict(mixed=(6, 4, 4, 3, 3, 3, 2, 2) * 5, frames=16, group=256, rows=1, tokens=20), 7420, 1320),
}


@pytest.mark.parametrize("problem, instructions, wavefronts", BUDGETS.values(), ids=BUDGETS)
def test_what_a_tile_costs(problem, instructions, wavefronts):
    got, divisions, waves = kernels.cost_of_a_tile(4, 8, **problem)
    assert got <= instructions and waves <= wavefronts, (got, waves)
    assert divisions <= 8, "of a warp, to know whether a group ends"


# The watching is watched: what is taken out of a kernel must be missed.
FAULTS = {
    "a barrier of a block": (r"bar\.sync\s+0;", "race|before it is written|awaited"),
    "a barrier of a warp": (r"bar\.warp\.sync[^;]*;", "race|awaited"),
    "a wait for copies": (r"cp\.async\.wait_group \d+;", "awaited"),
    "a fence": (r"membar\.gl;|fence\.\S+;", "without a fence"),
}


@pytest.mark.parametrize("what, complaint", FAULTS.values(), ids=FAULTS)
def test_faults_are_found(what, complaint):
    problem = kernels.Cross(rows=2, frames=200, splits=2)
    name = problem.launch()[0]
    text = kernels.ptx("cross")
    entry = next(e for e in re.finditer(r"\.entry (\S+)\(.*?^\}", text, re.S | re.M) if all(n in e[1] for n in name))
    places = [entry.start() + place.start() for place in re.finditer(what, entry[0])]
    assert places
    missed = []
    for place in places:
        spoilt = text[:place] + re.sub(what, "", text[place:], count=1)
        try:
            kernels.Cross(rows=2, frames=200, splits=2).run(kernel=Program(spoilt).kernel(*name))
        except Fault as fault:
            assert re.search(complaint, str(fault))
        else:
            missed.append(place)
    assert len(missed) <= (0 if "fence" in complaint else len(places) // 2), "most of them must be found"


def test_what_is_out_of_bounds_is_found():
    problem = kernels.Cross(rows=2, frames=200)
    problem.struct = problem.struct.replace((200).to_bytes(8, "little"), (300).to_bytes(8, "little"), 1)
    problem.memory.bytes[problem.addresses["lengths"] - GLOBAL :][:4] = np.array([300], np.int32).view(np.uint8)
    with pytest.raises(Fault, match="out of bounds"):
        problem.run()


# ---- the other kernels ----


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("frames, dim, group, length", [(70, 64, 64, 70), (40, 20, 16, 25)])
def test_pack_frames(frames, dim, group, length, bits):
    others.check_packing(frames, dim, group, length, bits)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dim", [64, 20])
def test_compact_attention(dim, dtype):
    others.check_self_attention(dtype, dim)


def test_compact_attention_by_table():
    others.check_self_attention("float16", 64, by_table=True)


@pytest.mark.parametrize("policy", range(3))
def test_score_evict(policy):
    others.check_eviction(policy)


@DTYPES
@pytest.mark.parametrize("dim", [64, 20])
def test_gather_kept(dim, dtype):
    pruned.check_gathering(dtype, dim)


@DTYPES
@pytest.mark.parametrize("dim, group, queries, ranges, biased", [(64, 4, 1, 3, True), (20, 7, 3, 1, False)])
def test_ragged_attention(dim, group, queries, ranges, biased, dtype):
    pruned.check_attention(dtype, dim, group, queries, ranges, biased)


@DTYPES
@pytest.mark.parametrize("dim, group, queries, tokens", [(32, 4, 5, 40), (20, 3, 9, 33)])
def test_attention_received(dim, group, queries, tokens, dtype):
    pruned.check_received(dtype, dim, group, queries, tokens)
