"""The torch ops against their slow twins in reference.py, and everything that can go wrong around them."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from conftest import DEVICE
from drawn import given, settings, st
from reference import LIVE, PINNED, SEEN, SLOT
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from whisperkv import ops

ON_CUDA = DEVICE == "cuda" or ops.ISA == "cuda_on_cpu"  # on fibers, see test_cuda_on_cpu.py
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3 if ON_CUDA else 2e-2}
POLICIES = [name for name, *_ in ops.POLICIES]
ATTENTION = ("query", "key", "value", "keys", "values", "cursor", "sources", "scale", "want_weights")
EVICTION = ("weights", "keys", "cursor", "positions", "scores", "policy", "budget", "recent", "decay")


def problem(rows=2, tokens=1, heads=3, slots=24, dim=64, dtype=torch.float32, padded=False, seed=0, table=False):
    """A cache in a random but possible state, and new tokens for it: all arguments of both ops by name. What is in no
    live slot is NaN, so that whoever reads it is found out. One token may overwrite; if padded, rows begin late; with a
    table, slots are in any row that has them."""
    draw = torch.Generator().manual_seed(seed)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))  # noqa: E731
    normal = lambda *shape: torch.randn(shape, generator=draw).to(dtype)  # noqa: E731
    cursor = torch.zeros(4, rows, dtype=torch.int32)
    keys, values = (torch.full((rows, heads, slots, dim), torch.nan, dtype=dtype) for _ in range(2))
    positions = torch.full((rows, slots), -7, dtype=torch.int32)
    scores = torch.full((rows, slots), torch.nan)
    for row in range(rows):
        live = 0 if padded else integer(0, slots - tokens if tokens > 1 else slots)
        overwrites = tokens == 1 and live > 0 and (live == slots or integer(0, 1))
        seen = -integer(0, tokens) if padded else live + integer(0, 9)
        slot = integer(0, live - 1) if overwrites else live
        cursor[:, row] = torch.tensor([live, slot, seen, integer(0, 3)])
        keys[row, :, :live], values[row, :, :live] = normal(heads, live, dim), normal(heads, live, dim)
        if live:
            positions[row, :live] = torch.randperm(seen, generator=draw)[:live].int()
        scores[row, :live] = torch.rand(live, generator=draw)
    sources = torch.empty(0, 0, dtype=torch.int32)
    if table:
        sources = torch.full((rows, slots), -99, dtype=torch.int32)  # where the call writes, and of dead slots: ignored
        settled = [set(range(live)) - set(range(slot, slot + tokens)) for live, slot, *_ in cursor.T.tolist()]
        for row in range(rows):
            for slot in settled[row]:
                holders = [other for other in range(rows) if slot in settled[other]]
                sources[row, slot] = holders[integer(0, len(holders) - 1)]
    query, key, value = (normal(rows, tokens, heads, dim) for _ in range(3))
    weights = torch.rand(rows, heads, tokens, slots, generator=draw)
    return dict(
        query=query, key=key, value=value, keys=keys, values=values, cursor=cursor, sources=sources,
        scale=dim**-0.5, want_weights=True, weights=weights, positions=positions, scores=scores, policy=0,
        budget=integer(min(tokens, slots), slots) if tokens == 1 else slots, recent=integer(1, 8), decay=0.9,
    )  # fmt: skip


def copy(given, **changes):
    """What is one tensor stays one."""
    copies = {}
    return tree_map_only(torch.Tensor, lambda tensor: copies.setdefault(id(tensor), tensor.clone()), given | changes)


def memory_of(tensor):
    """All that stands behind a view, as one row of numbers."""
    return tensor.new_empty(0).set_(tensor.untyped_storage())


def on_device(arguments):
    """Tensors of the CPU on the device under test, with the strides that they have and the memory that they share."""
    memories = {}

    def moved(tensor):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) is not torch.Tensor:
            return tensor
        if tensor.requires_grad:
            return tensor.to(DEVICE)
        memory = memory_of(tensor)
        there = memories.setdefault((memory.data_ptr(), memory.dtype), memory.to(DEVICE))
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return arguments if DEVICE == "cpu" else tree_map_only(torch.Tensor, moved, arguments)


def run(op, arguments):
    """One of our ops on the device under test, or its twin here. What it wrote in place, and all results come back."""
    if DEVICE == "cpu" or not isinstance(op, torch._ops.OpOverload):
        return op(*arguments)
    there = on_device(arguments)
    try:
        results = op(*there)
    finally:
        for here, moved in zip(arguments, there):
            if moved is not here:
                memory_of(here).copy_(memory_of(moved))
    is_moved = any(moved is not here for here, moved in zip(arguments, there))
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, results) if is_moved else results


def attend(given, op=ops.compact_attention):
    return run(op, [given[name] for name in ATTENTION])


def evict(given, op=ops.score_evict):
    return run(op, [given[name] for name in EVICTION])


def moved(given):
    """The same cache without a table: every row has its slots itself."""
    places = (given["sources"] >= 0).nonzero().T
    sources, given = given["sources"], copy(given, sources=torch.empty(0, 0, dtype=torch.int32))
    row, slot = places
    for name in ("keys", "values"):
        given[name][row, :, slot] = given[name][sources[row, slot].long(), :, slot]
    return given


def check_transform_is_refused(transform, total, given):
    """No transform of torch.func, "grad", "vmap" or "jvp", enters the op in total, a function of the tensor given."""
    transformed = {
        "grad": lambda x: torch.func.grad(total)(x),
        "vmap": lambda x: torch.func.vmap(total)(x[None]),
        "jvp": lambda x: torch.func.jvp(total, (x,), (x,)),
    }[transform]
    with pytest.raises(RuntimeError, match=f"torch.func transforms .*{transform}"):
        transformed(given)


def assert_same_bits(one, other):
    one, other = one.contiguous(), other.contiguous()
    assert one.shape == other.shape and one.dtype == other.dtype
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same_cache(one, other):
    for name in ("keys", "values", "cursor", "positions"):
        assert_same_bits(one[name], other[name])
    torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-5, atol=1e-6, equal_nan=True)


def check(given):
    """Both ops, one after the other, against the reference."""
    ours, theirs = copy(given), copy(given)
    output, weights = attend(ours)
    wanted, wanted_weights = attend(theirs, reference.compact_attention)
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)
    for policy in range(len(POLICIES)):
        a = copy(ours, weights=weights, policy=policy)
        b = copy(theirs, weights=weights, policy=policy)
        evict(a)
        evict(b, reference.score_evict)
        assert_same_cache(a, b)


class TestValues:
    """The numbers. Run again for every instruction set by test_every_instruction_set, and on fibers."""

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("dim", [64, 1, 7, 80, 33])
    @pytest.mark.parametrize("slots", [1, 2, 17, 64, 448])
    def test_shapes(self, dtype, dim, slots):
        check(problem(rows=1 + (slots < 64), heads=2, slots=slots, dim=dim, dtype=dtype, seed=slots * dim))

    @pytest.mark.parametrize("rows", [1, 3, 160])
    def test_rows(self, rows):
        check(problem(rows=rows, heads=2, slots=5, dim=64))

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
    def test_several_tokens(self, dtype, padded):
        check(problem(rows=5, tokens=6, slots=20, dtype=dtype, padded=padded))

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 60), st.integers(1, 90),
        st.sampled_from(list(DTYPES.values())), st.booleans(), st.integers(0, 2**30),
    )  # fmt: skip
    def test_any_problem(self, rows, tokens, heads, more_slots, dim, dtype, padded, seed):
        check(problem(rows, tokens, heads, tokens + more_slots, dim, dtype, padded, seed))

    def test_a_long_decode(self):
        """Token after token through both ops, the budget filling and then overflowing."""
        rows, heads, slots, dim, steps = 3, 2, 8, 16, 24
        start = problem(rows, 1, heads, slots, dim) | dict(budget=slots - 1, recent=3, decay=0.95)
        start["cursor"][:] = torch.tensor([[0] * 3, [0] * 3, [0, -2, -5], [1, 2, 0]])
        ours, theirs = copy(start), copy(start)
        for step in range(steps):
            for name in ("query", "key", "value"):
                ours[name] = theirs[name] = torch.randn(rows, 1, heads, dim)
            output, ours["weights"] = attend(ours)
            wanted, theirs["weights"] = attend(theirs, reference.compact_attention)
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
            evict(ours)
            evict(theirs, reference.score_evict)
            assert_same_cache(ours, theirs)
        assert ours["cursor"][LIVE].tolist() == [slots - 1] * 3
        assert ours["cursor"][SEEN].tolist() == [steps, steps - 2, steps - 5]

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("tokens, slots, dim", [(1, 24, 64), (1, 17, 7), (1, 530, 33), (5, 40, 64), (1, 9, 300)])
    def test_table(self, dtype, tokens, slots, dim):
        """Slots in any row are read as if they had been moved, to the bit, and stay where they are."""
        given = problem(6, tokens, 2, slots, dim, dtype, seed=slots, table=True)
        check(given)
        one, other = copy(given), moved(given)
        for ours, theirs in zip(attend(one), attend(other)):
            assert_same_bits(ours, theirs)
        assert_same_bits(one["sources"], given["sources"])
        for row, (_, slot, *_) in enumerate(given["cursor"].T.tolist()):
            for name in ("keys", "values"):
                assert_same_bits(one[name][row, :, slot : slot + tokens], other[name][row, :, slot : slot + tokens])
                given[name][row, :, slot : slot + tokens] = one[name][row, :, slot : slot + tokens]
        assert_same_bits(one["keys"], given["keys"])
        assert_same_bits(one["values"], given["values"])

    def test_a_table_of_each_its_own(self):
        given = problem(rows=3)
        sources = torch.arange(3, dtype=torch.int32)[:, None].repeat(1, 24)
        for ours, theirs in zip(attend(copy(given)), attend(copy(given, sources=sources))):
            assert_same_bits(ours, theirs)

    def test_beams(self):
        """Beams that trade places at every token: by a table, and by moving their slots."""
        rows, steps = 5, 12
        ours = problem(rows, heads=2, slots=steps) | dict(sources=torch.zeros(rows, steps, dtype=torch.int32))
        ours["cursor"].zero_()
        theirs = copy(ours, sources=torch.empty(0, 0, dtype=torch.int32))
        for step in range(steps):
            ours["sources"][:, step] = torch.arange(rows)
            for name in ("query", "key", "value"):
                ours[name] = theirs[name] = torch.randn(rows, 1, 2, 64)
            for one, other in zip(attend(ours), attend(theirs)):
                assert_same_bits(one, other)
            parents = torch.randint(rows, (rows,))
            ours["sources"] = ours["sources"][parents]
            theirs["keys"], theirs["values"] = theirs["keys"][parents], theirs["values"][parents]
            for each in (ours, theirs):
                each["cursor"][:PINNED] += 1

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_large_logits(self, dtype):
        given = problem(slots=50, dtype=dtype) | dict(scale=30.0)
        output, weights = attend(copy(given))
        wanted, wanted_weights = attend(copy(given), reference.compact_attention)
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-3, atol=1e-4)
        assert output.isfinite().all()

    def test_nan_scores_lose(self):
        given = problem(rows=1, slots=6)
        given["cursor"][:, 0] = torch.tensor([6, 0, 20, 0])
        given["positions"][0], given["scores"][0] = torch.arange(6).int(), torch.tensor([9, 8, torch.nan, 1, 7, 7])
        given |= dict(budget=6, recent=2, policy=POLICIES.index("heavy_hitter"))
        given["weights"].zero_()
        ours, theirs = copy(given), copy(given)
        evict(ours)
        evict(theirs, reference.score_evict)
        assert_same_cache(ours, theirs)
        assert ours["cursor"][SLOT, 0] == 3

    @pytest.mark.parametrize("pinned, recent, chosen", [(3, 1, 3), (0, 6, 0), (3, 6, 3), (99, 1, 5)])
    def test_protection(self, pinned, recent, chosen):
        """Unpinned before recent before pinned, in a cache of positions 0..5 where position is worth."""
        given = problem(rows=1, slots=6)
        given["cursor"][:, 0] = torch.tensor([6, 5, 5, pinned])
        given["positions"][0] = torch.arange(6).int()
        given |= dict(budget=6, recent=recent, policy=POLICIES.index("window"))
        evict(given)
        assert given["cursor"][:, 0].tolist() == [6, chosen, 6, pinned]

    @pytest.mark.parametrize("tokens, table", [(1, False), (4, False), (1, True)])
    def test_thread_count_does_not_matter(self, tokens, table):
        """And the bits are the same from run to run."""
        given = problem(rows=7, tokens=tokens, heads=8, slots=448, seed=3, table=table)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                mine = copy(given)
                mine["output"], mine["weights"] = attend(mine)
                evict(mine)
                results.append(mine)
        finally:
            torch.set_num_threads(before)
        for name in ("output", "weights", "keys", "values", "cursor", "positions", "scores"):
            for other in results[1:]:
                assert_same_bits(results[0][name], other[name])


of_the_cpu = pytest.mark.skipif(ON_CUDA, reason="about the CPU's instruction sets")
unchecked = pytest.mark.skipif(ON_CUDA, reason="CUDA ignores bad rows: checking them would mean waiting for the device")
of_cuda = pytest.mark.skipif(not ON_CUDA, reason="about the kernels for CUDA")
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU and WHISPERKV_TEST_DEVICE=cuda")


ISAS = ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]


def check_values_on(isa, file):
    """TestValues of a file, in a process that is forced to this instruction set."""
    env = os.environ | {"WHISPERKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    code = "from whisperkv import _torch; print(_torch.ISA)"
    probe = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if "not an instruction set that runs here" in probe.stderr:
        pytest.skip(probe.stderr.splitlines()[-1])
    assert probe.stdout == f"{isa}\n", probe.stderr
    if isa == ops.ISA:
        return  # TestValues has just run on it
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", "TestValues"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@of_the_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


def test_policies_are_those_of_the_reference():
    assert POLICIES == [policy.__name__ for policy in reference.POLICIES]
    assert all(isinstance(flag, bool) for _, *flags in ops.POLICIES for flag in flags)


def test_no_weights_wanted():
    given = problem()
    output, weights = attend(copy(given, want_weights=False))
    assert weights.shape == (0,) and weights.dtype == torch.float32
    assert_same_bits(output, attend(copy(given))[0])


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_do_nothing(rows):
    given = problem(rows=rows)
    output, weights = attend(given)
    assert output.shape == (rows, 1, 3, 64) and weights.shape == (rows, 3, 1, 24)
    assert evict(given) is None


@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
def test_what_a_policy_does_not_read_lends_its_shape(policy):
    """So that no weights need be computed for it: zeros(()).expand(...) will do."""
    _, reads_attention, reads_key_norm = ops.POLICIES[policy]
    given = copy(problem(), policy=policy)
    full = copy(given)
    if not reads_attention:
        given["weights"] = torch.zeros(()).expand(given["weights"].shape)
    if not reads_key_norm:
        given["keys"] = torch.zeros(()).expand(given["keys"].shape)
    evict(given)
    evict(full)
    for name in ("cursor", "positions", "scores"):
        assert_same_bits(given[name], full[name])


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def resized(dim, by=1):
    return lambda tensor: torch.ones(
        [size + by * (d == dim) for d, size in enumerate(tensor.shape)], dtype=tensor.dtype
    )


def row_of_cursor(which, value):
    def change(cursor):
        cursor = cursor.clone()
        cursor[which, 0] = value
        return cursor

    return change


BAD_ATTENTION = [
    ("query", torch.Tensor.double, "float32, bfloat16 or float16, got float64"),
    ("query", torch.Tensor.int, "float32, bfloat16 or float16, got int32"),
    ("query", torch.Tensor.cfloat, "got another dtype"),
    ("query", lambda t: t[0], r"\[rows, tokens, heads, dim\], got \[1, 3, 64\]"),
    ("query", lambda t: t[:, :0], r"no side but rows empty, got \[2, 0, 3, 64\]"),
    ("key", torch.Tensor.bfloat16, "float32, got bfloat16"),
    ("key", resized(1), r"\[rows=2, tokens=1, kv_heads=3, dim=64\], got \[2, 2, 3, 64\]"),
    ("value", resized(0), r"\[rows=2, tokens=1, kv_heads=3, dim=64\], got \[3, 1, 3, 64\]"),
    ("keys", resized(3), r"\[rows=2, kv_heads=3, slots, dim=64\], got \[2, 3, 24, 65\]"),
    ("keys", torch.Tensor.half, "float32, got float16"),
    ("values", resized(2), r"\[rows=2, kv_heads=3, slots=24, dim=64\], got \[2, 3, 25, 64\]"),
    ("values", lambda t: t[None], r"got \[1, 2, 3, 24, 64\]"),
    ("cursor", torch.Tensor.long, "int32, got int64"),
    ("cursor", lambda t: t[:3].contiguous(), r"\[cursors=4, rows=2\], got \[3, 2\]"),
    ("cursor", row_of_cursor(LIVE, 25), "cursor of row 0: live"),
    ("cursor", row_of_cursor(LIVE, -1), "cursor of row 0: live"),
    ("cursor", row_of_cursor(SLOT, 24), "cursor of row 0: slot"),
    ("cursor", row_of_cursor(SLOT, -1), "cursor of row 0: slot"),
    ("sources", lambda _: torch.zeros(2, 24, dtype=torch.int64), "int32, got int64"),
    ("sources", lambda _: torch.zeros(2, 25, dtype=torch.int32), r"\[rows=2, slots=24\], got \[2, 25\]"),
    ("sources", lambda _: strided(torch.zeros(2, 24, dtype=torch.int32)), "sources must be contiguous"),
    ("sources", lambda _: torch.full((2, 24), 2, dtype=torch.int32), r"of row 0, slot 0: must be one of .* got 2"),
    ("sources", lambda _: torch.full((2, 24), -1, dtype=torch.int32), r"of row 0, slot 0: must be one of .* got -1"),
    ("scale", lambda _: float("nan"), "scale must be finite, got nan"),
    *((name, strided, f"{name} must be contiguous") for name in ATTENTION[:6]),
]
BAD_EVICTION = [
    ("weights", torch.Tensor.half, "float32, got float16"),
    ("weights", lambda t: t[0], r"\[rows, heads, tokens, slots\], got \[3, 1, 24\]"),
    ("keys", torch.Tensor.double, "float32, bfloat16 or float16, got float64"),
    ("keys", resized(2), r"\[rows=2, heads=3, slots=24, dim\], got \[2, 3, 25, 64\]"),
    ("cursor", resized(1), r"\[cursors=4, rows=2\], got \[4, 3\]"),
    ("cursor", row_of_cursor(SLOT, 24), "cursor of row 0: slot"),
    ("positions", torch.Tensor.long, "int32, got int64"),
    ("positions", resized(1), r"\[rows=2, slots=24\], got \[2, 25\]"),
    ("scores", torch.Tensor.double, "float32, got float64"),
    ("scores", resized(0), r"\[rows=2, slots=24\], got \[3, 24\]"),
    ("policy", lambda _: len(POLICIES), r"policy must be in 0\.\.2, got 3"),
    ("policy", lambda _: -1, r"policy must be in 0\.\.2, got -1"),
    ("budget", lambda _: 0, r"budget must be in 1\.\.24, got 0"),
    ("budget", lambda _: 25, r"budget must be in 1\.\.24, got 25"),
    ("recent", lambda _: 0, r"recent must be in 1\.\.\d+, got 0"),
    ("decay", lambda _: float("inf"), "decay must be finite, got inf"),
    *((name, strided, f"{name} must be contiguous") for name in ("weights", "cursor", "positions", "scores")),
]


@pytest.mark.parametrize(
    "run, op, argument, change, text",
    [(attend, "compact_attention", *bad) for bad in BAD_ATTENTION]
    + [(evict, "score_evict", *bad) for bad in BAD_EVICTION],
)
def test_bad_input(run, op, argument, change, text):
    """Named, refused, nothing written, and the next call works."""
    if ON_CUDA and "of row" in text:
        pytest.skip(unchecked.kwargs["reason"])
    given = problem(seed=1)
    bad = copy(given)
    bad[argument] = change(bad[argument])
    before = copy(bad)
    with pytest.raises(RuntimeError, match=text) as error:
        run(bad)
    assert f"whisperkv::{op}: " in str(error.value) and argument in str(error.value)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(bad[name], value)
    check(given)


@unchecked
@pytest.mark.parametrize("tokens, live", [(3, 22), (25, 0)])
def test_tokens_that_do_not_fit(tokens, live):
    given = problem(rows=1, tokens=tokens, slots=max(24, tokens))
    given["cursor"][:, 0] = torch.tensor([live, live, live, 0])
    given["keys"], given["values"] = given["keys"][:, :, :24].contiguous(), given["values"][:, :, :24].contiguous()
    with pytest.raises(RuntimeError, match="cursor of row 0: the new tokens do not fit"):
        attend(given)


@unchecked
def test_several_tokens_may_not_overwrite():
    given = problem(rows=1, tokens=2)
    given["cursor"][:, 0] = torch.tensor([9, 3, 9, 0])
    with pytest.raises(RuntimeError, match="slot must be live for more than one token"):
        attend(given)
    given["cursor"][SLOT] = 9
    with pytest.raises(RuntimeError, match="the new tokens do not fit"):
        evict(given | dict(budget=10))  # the second token should have overwritten, but was appended


@unchecked
def test_a_slot_that_another_row_is_writing():
    """Which of the two comes first would be a matter of threads."""
    given = problem(rows=2)
    given["cursor"][:, 0], given["cursor"][:, 1] = torch.tensor([9, 9, 9, 0]), torch.tensor([9, 4, 9, 0])
    given["sources"] = torch.arange(2, dtype=torch.int32)[:, None].repeat(1, 24)
    attend(copy(given))
    given["sources"][0, 4] = 1
    with pytest.raises(RuntimeError, match="sources of row 0, slot 4: row 1 is just writing that slot"):
        attend(given)


def sharing(one, other, overlap):
    """Copies of two tensors, in memory where the second begins before the first ends."""
    memory = torch.zeros(one.nbytes + other.nbytes - overlap, dtype=torch.uint8)
    copies = []
    for tensor, start in ((one, 0), (other, one.nbytes - overlap)):
        copies.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return copies


@pytest.mark.parametrize(
    "run, written, other",
    [
        (attend, "keys", "key"), (attend, "keys", "values"), (attend, "values", "query"), (attend, "keys", "cursor"),
        (attend, "values", "sources"), (evict, "cursor", "positions"), (evict, "positions", "scores"),
        (evict, "scores", "weights"), (evict, "scores", "keys"),
    ],
)  # fmt: skip
def test_memory_that_is_written_is_not_shared(run, written, other):
    if DEVICE == "cuda":
        pytest.skip("views of bytes, moved one by one")
    given = problem(table=True) | dict(policy=POLICIES.index("heavy_hitter" if other == "weights" else "magnitude"))
    for overlap in (4, 8):
        shared = copy(given)
        shared[written], shared[other] = sharing(given[written], given[other], overlap)
        with pytest.raises(RuntimeError, match="must have memory of its own, as it is written to, and shares") as error:
            run(shared)
        assert written in str(error.value) and other in str(error.value)
    beside = copy(given)
    beside[written], beside[other] = sharing(given[written], given[other], 0)
    if other != "weights":  # whose last ones are not read by the op
        run(beside)


@pytest.mark.parametrize("run, names", [(attend, ATTENTION[:7]), (evict, EVICTION[:5])])
def test_memory_at_odd_addresses(run, names):
    """Which torch itself does not make, but torch.frombuffer does."""
    if DEVICE == "cuda":
        pytest.skip("memory that is not torch's own")
    for name in names:
        given = copy(problem(table=True), policy=POLICIES.index("magnitude" if name == "keys" else "heavy_hitter"))
        tensor = given[name]
        memory = bytearray(tensor.nbytes + 1)
        given[name] = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)
        with pytest.raises(RuntimeError, match=f"{name} must begin at a multiple of 4 bytes"):
            run(given)


def test_sides_whose_product_is_too_large():
    given = problem() | dict(policy=POLICIES.index("window"))
    for heads, tokens in ((1 << 30, 1 << 25), (1 << 57, 1), (1, 1 << 44)):
        with pytest.raises(RuntimeError, match="weights must have 2.48 numbers at most"):
            evict(given | dict(weights=torch.zeros(()).expand(2, heads, tokens, 24)))


@unchecked
def test_tokens_beyond_32_bits():
    given = problem(rows=1) | dict(policy=POLICIES.index("window"))
    given["cursor"][:, 0] = torch.tensor([9, 9, 9, 0])
    scalar = torch.zeros(())
    given |= dict(weights=scalar.expand(1, 3, 1 << 40, 24), keys=scalar.expand(1, 3, 24, 64))
    with pytest.raises(RuntimeError, match="cursor of row 0: the new tokens do not fit"):
        evict(given)
    given["cursor"][SEEN] = -(2**31)
    with pytest.raises(RuntimeError, match="cursor of row 0: the new tokens do not fit"):
        evict(given)
    given = problem(rows=1)
    given["cursor"][:, 0] = torch.tensor([9, 9, 2**31 - 1, 0])
    for run in (attend, evict):
        with pytest.raises(RuntimeError, match="positions of the new tokens must be below"):
            run(given)


@unchecked
def test_another_thread_writes_what_is_checked():
    """Whatever stands in cursor and table by the time a row is worked on, nothing is written where it does not
    belong: each call is refused, or its rows get what they get."""
    given = problem(rows=400, heads=4, slots=32, table=True) | dict(budget=32)
    sound = {name: given[name].clone() for name in ("cursor", "sources")}
    guard = 1 << 16  # numbers around the caches, which stay what they are
    for name in ("keys", "values", "scores", "positions"):
        tensor = given[name]
        memory = torch.full((tensor.numel() + 2 * guard,), 77, dtype=tensor.dtype)
        given[name] = memory[guard:-guard].view(tensor.shape).copy_(tensor.nan_to_num())
    done, calls = threading.Event(), [0, 0]

    def scribble():
        wild = {name: torch.randint(-(2**31), 2**31, x.shape).int() for name, x in sound.items()}
        near = {name: torch.randint(-2, 40, x.shape).int() for name, x in sound.items()}
        while not done.is_set():
            for state in (wild, sound, near, sound):
                for name in sound:
                    given[name].copy_(state[name])
                time.sleep(0.001)  # so that some calls find all sound at first

    with ThreadPoolExecutor(1) as pool:
        pool.submit(scribble)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for number, op in enumerate((attend, evict)):
                try:
                    op(given)
                    calls[number] += 1
                except RuntimeError as error:
                    assert "of row" in str(error)
        done.set()
    assert min(calls) > 0
    for name in ("keys", "values", "scores", "positions"):
        memory = memory_of(given[name])
        assert (memory[:guard] == 77).all() and (memory[-guard:] == 77).all()


@pytest.mark.parametrize("name", ATTENTION[:6])
@pytest.mark.parametrize("change", [lambda t: t.to("meta"), torch.Tensor.to_sparse], ids=["meta", "sparse"])
def test_not_a_plain_cpu_tensor(name, change):
    given = problem()
    with pytest.raises((RuntimeError, NotImplementedError), match="compact_attention"):
        attend(given | {name: change(given[name].nan_to_num())})


@pytest.mark.parametrize("name", ["query", "key", "value", "keys", "values"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_attention_refuses_gradients(name, leaf):
    given = problem()
    tensor = given[name].nan_to_num().requires_grad_()
    bad = copy(given) | {name: tensor if leaf else tensor * 2}
    with pytest.raises(RuntimeError, match=rf"{name} requires grad.*torch\.no_grad\(\)"):
        attend(bad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not attend(bad)[0].requires_grad
    check(given)


@pytest.mark.parametrize("name", ["weights", "keys", "scores"])
def test_eviction_refuses_gradients(name):
    given = problem()
    bad = copy(given) | {name: given[name].nan_to_num().requires_grad_()}
    with pytest.raises(RuntimeError, match=rf"{name} requires grad.*torch\.no_grad\(\)"):
        evict(bad)
    with torch.no_grad():
        evict(bad)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_refuses_functional_transforms(transform):
    given = on_device(problem())

    def total(query):
        return attend(given | dict(query=query))[0].sum()

    check_transform_is_refused(transform, total, given["query"])


def test_inference_mode():
    given = problem()
    outside = copy(given)
    output, outside["weights"] = attend(outside)
    evict(outside)
    with torch.inference_mode():
        inside = copy(given)
        inferred, inside["weights"] = attend(inside)
        evict(inside)
    assert inferred.is_inference()
    assert_same_bits(inferred.clone(), output)
    assert_same_cache(inside, outside)


def test_many_threads_at_once():
    given = [problem(rows=3, heads=8, slots=120, seed=seed) for seed in range(6)]

    def run(start):
        for _ in range(10):
            mine = copy(start)
            mine["output"], mine["weights"] = attend(mine)
            evict(mine)
        return mine

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, given))
    for one, other in zip(together, map(run, given)):
        for name in ("output", "weights", "keys", "values", "cursor", "positions", "scores"):
            assert_same_bits(one[name], other[name])


class MallInfo(ctypes.Structure):
    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if mallinfo:
    mallinfo.restype = MallInfo
counts_bytes = pytest.mark.skipif(not mallinfo, reason="needs glibc's mallinfo2")


def held():
    """Bytes that this process has allocated and not freed, and on its GPU. What the system has given it would also
    depend on what an allocator keeps at hand."""
    info = mallinfo()
    return info.uordblks + info.hblkhd + (0 if DEVICE == "cpu" else torch.cuda.memory_allocated())


LEAST_LEAK = 16  # bytes a call: a lost handle takes 32


def grows(call, calls=2_000):
    """Whether ever more memory is held. A library may once take some for itself: a leak does so every time."""
    for _ in range(calls):
        call()
    for _ in range(3):
        gc.collect()
        before = held()
        for _ in range(calls):
            call()
        gc.collect()
        if held() - before < LEAST_LEAK * calls:
            return False
    return True


@counts_bytes
def test_a_leak_is_seen():
    malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    assert grows(lambda: malloc(8))
    assert not grows(lambda: free(malloc(8)))


@counts_bytes
@torch.no_grad()
def test_no_leak():
    good = problem(rows=1, heads=1, slots=4, dim=8)
    good["cursor"][:, 0] = torch.tensor([4, 1, 9, 0])
    good = on_device(good | dict(budget=4))
    bad_late = good | (dict(scale=torch.nan, decay=torch.nan) if ON_CUDA else dict(cursor=good["cursor"] + 99))

    def refused(run, given):
        try:
            run(given)
        except RuntimeError:
            return
        raise AssertionError("accepted")

    calls = (
        lambda: attend(good),
        lambda: evict(good),
        lambda: refused(attend, bad_late),
        lambda: refused(evict, bad_late),
    )
    for call in calls:
        assert not grows(call)


OPCHECKS = [
    (ops.compact_attention, ATTENTION, dict()),
    (ops.compact_attention, ATTENTION, dict(want_weights=False)),
    (ops.compact_attention, ATTENTION, dict(tokens=3)),
    (ops.compact_attention, ATTENTION, dict(table=True)),
    (ops.compact_attention, ATTENTION, dict(dtype=torch.bfloat16)),
    (ops.score_evict, EVICTION, dict()),
    (ops.score_evict, EVICTION, dict(tokens=3, dtype=torch.float16)),
]


def checkable(**changes):
    """A problem without NaN, which opcheck would not find equal to itself."""
    shape = {name: value for name, value in changes.items() if name in ("tokens", "dtype", "table")}
    given = problem(**shape) | {name: value for name, value in changes.items() if name not in shape}
    return {name: v.nan_to_num() if isinstance(v, torch.Tensor) else v for name, v in given.items()}


@pytest.mark.parametrize("op, names, changes", OPCHECKS)
def test_opcheck_compile(op, names, changes):
    given = on_device(checkable(**changes))
    torch.library.opcheck(op, [given[name] for name in names])


def step(given, attention=ops.compact_attention, eviction=ops.score_evict):
    """A decoder layer's share of a step, with something before, between and after for a compiler to move."""
    given = dict(given, query=given["query"] * 2)
    output, weights = attention(*(given[name] for name in ATTENTION))
    given["weights"] = weights
    eviction(*(given[name] for name in EVICTION))
    return output + 1, weights.sum(-1)


def check_step(stepped, seed, rows):
    """Three tokens through a compiled step, and through its twin."""
    ours, theirs = on_device(problem(rows=rows, seed=seed)), problem(rows=rows, seed=seed)
    for _ in range(3):
        for name in ("query", "key", "value"):
            theirs[name] = torch.randn_like(theirs[name])
            ours[name] = theirs[name].to(DEVICE)
        results = stepped(ours)
        wanted = step(theirs, reference.compact_attention, reference.score_evict)
        torch.testing.assert_close(results, wanted, rtol=1e-5, atol=1e-5, check_device=False)
        assert_same_cache(tree_map_only(torch.Tensor, torch.Tensor.cpu, ours), theirs)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
@torch.no_grad()
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (2, 3):
        check_step(compiled, 0, rows)


def test_compile_refuses_gradients():
    torch._dynamo.reset()
    given = on_device(problem())
    given["query"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"query requires grad.*torch\.no_grad\(\)"):
        torch.compile(step, fullgraph=True)(given)


@pytest.mark.parametrize(
    "run, argument, change, text",
    [
        (attend, "query", lambda t: t[0], r"\[rows, tokens, heads, dim\] on cpu, got torch.float32 \[1, 3, 64\]"),
        (attend, "keys", resized(3), r"with dim=64, got \[2, 3, 24, 65\]"),
        (attend, "value", torch.Tensor.half, "float32 .* got torch.float16"),
        (attend, "sources", lambda t: t.new_empty(2, 25), r"with slots=24, got \[2, 25\]"),
        (evict, "scores", resized(1), r"with slots=24, got \[2, 25\]"),
        (evict, "positions", torch.Tensor.long, "int32 .* got torch.int64"),
    ],
)
def test_a_compiler_is_told_what_is_wrong(run, argument, change, text):
    real = problem()
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in real.items()}
        given[argument] = change(given[argument])
        with pytest.raises(RuntimeError, match=f"{argument} must be .*{text}"):
            run(given)


@torch.no_grad()
def test_export_compile():
    class Step(torch.nn.Module):
        def forward(self, given):
            return step(given)

    torch._dynamo.reset()
    exported = torch.export.export(Step(), (on_device(problem(seed=5)),))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "whisperkv.compact_attention.default" in targets and "whisperkv.score_evict.default" in targets
    check_step(exported.module(), 5, 2)


def test_cursor_rows_have_the_numbers_of_the_reference():
    assert (LIVE, SLOT, SEEN, PINNED) == (0, 1, 2, 3)


# With the kernels for CUDA


def in_turn(given, calls=20):
    """The results of so many calls, each from the same start."""
    for _ in range(calls):
        mine = copy(given)
        mine["output"], mine["weights"] = attend(mine)
        evict(mine)
        yield mine


RESULTS = ("output", "weights", "keys", "values", "cursor", "positions", "scores")


@of_cuda
class TestOfCuda:
    """What the kernels for CUDA do otherwise. Run on fibers too."""

    def test_bad_rows_are_ignored(self):
        """They write nothing, and the others are what they were."""
        given = problem(rows=4)
        broken = copy(given)
        broken["cursor"][LIVE, 0], broken["cursor"][SLOT, 2] = 99, -1
        (sound,), (spoilt,) = in_turn(given, calls=1), in_turn(broken, calls=1)
        for name in RESULTS:
            rows = 1 if name == "cursor" else 0
            assert_same_bits(*(each[name].movedim(rows, 0)[1::2] for each in (sound, spoilt)))
            if name in broken and name != "weights":
                assert_same_bits(*(each[name].movedim(rows, 0)[0::2] for each in (broken, spoilt)))
        assert not spoilt["output"][0::2].any()

    def test_what_does_not_fit_is_named(self):
        """Heads too wide for shared memory: refused by name, and the next call works."""
        with pytest.raises(RuntimeError, match="whisperkv::compact_attention: "):
            attend(problem(rows=1, heads=1, slots=2, dim=100_000))
        check(problem())


@gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_same_bits_from_run_to_run_on_cuda(tokens):
    first, *others = in_turn(on_device(problem(rows=7, tokens=tokens, heads=8, slots=448)))
    for other in others:
        for name in RESULTS:
            assert_same_bits(first[name], other[name])


@gpu
def test_a_stream_of_its_own():
    """The ops run in the current stream, after what is there."""
    given = on_device(problem(rows=3))
    (wanted,) = in_turn(given | dict(query=given["query"] * 3), calls=1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        query = given["query"].clone()
        torch.cuda._sleep(100_000_000)
        query *= 3
        (got,) = in_turn(given | dict(query=query), calls=1)
    torch.cuda.synchronize()
    for name in RESULTS:
        assert_same_bits(got[name], wanted[name])


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    given = on_device(problem(rows=3))
    (wanted,) = in_turn(given, calls=1)
    (got,) = in_turn({name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in given.items()}, calls=1)
    for name in RESULTS:
        assert got[name].device.index == 1
        assert_same_bits(got[name].to(DEVICE), wanted[name])
    with pytest.raises(RuntimeError, match="compact_attention"):
        attend(given | dict(keys=given["keys"].to("cuda:1")))


@gpu
@pytest.mark.parametrize("name", ATTENTION[:6])
def test_devices_are_not_mixed(name):
    given, here = on_device(problem()), problem()
    with pytest.raises((RuntimeError, NotImplementedError), match="compact_attention"):
        ops.compact_attention(*({**given, name: here[name]}[each] for each in ATTENTION))
    check(problem())


@gpu
def test_a_graph_reads_the_cursor_when_it_is_replayed():
    """Token after token through one captured step has the bits of the step itself."""
    start = problem(rows=3, slots=12) | dict(budget=9, recent=3)
    start["cursor"][:] = torch.tensor([[0] * 3, [0] * 3, [0, -2, -5], [1, 2, 0]])
    ours, theirs = on_device(start), on_device(start)
    step(ours)  # loads the kernels; what it did to the cache is undone below
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(ours)
    for name, tensor in on_device(start).items():
        if isinstance(tensor, torch.Tensor):
            ours[name].copy_(tensor)
    for _ in range(20):
        for name in ("query", "key", "value"):
            ours[name].copy_(torch.randn_like(ours[name]))
            theirs[name].copy_(ours[name])
        graph.replay()
        for got, wanted in zip(results, step(theirs)):
            assert_same_bits(got, wanted)
        for name in RESULTS[2:]:
            assert_same_bits(ours[name], theirs[name])
