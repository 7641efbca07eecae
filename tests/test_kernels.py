"""The C kernels through NumPy, held against reference.py in every instruction set that this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import given, settings, st
from reference import LIVE, PINNED, SEEN, SLOT
from reference import compact_attention as reference_attention
from reference import score_evict as reference_evict

from whisperkv import _numpy

POLICIES = [name for name, *_ in _numpy.POLICIES]
TOLERANCE = {np.float32: {"rtol": 1e-5, "atol": 2e-6}, np.float16: {"rtol": 2e-2, "atol": 2e-3}}
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])


def in_process(code, **environment):
    """Run code in another interpreter, with this whisperkv."""
    environment = {**os.environ, "PYTHONPATH": str(Path(_numpy.__file__).parents[1]), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


class Step:
    """The arguments of one compact_attention call, random but for the cursor."""

    def __init__(self, rows, tokens, heads, slots, dim, dtype=np.float32, seed=0):
        random = np.random.default_rng([seed, rows, tokens, heads, slots, dim])
        self.new = [random.standard_normal((rows, tokens, heads, dim)).astype(dtype) for _ in range(3)]
        self.cache = [random.standard_normal((rows, heads, slots, dim)).astype(dtype) for _ in range(2)]
        self.cursor = np.zeros((4, rows), np.int32)
        self.cursor[LIVE] = self.cursor[SLOT] = self.cursor[SEEN] = slots - tokens
        self.scale = dim**-0.5

    def run(self, want_weights=True):
        self.cache = [x.copy() for x in self.cache]
        return _numpy.compact_attention(*self.new, *self.cache, self.cursor, self.scale, want_weights)

    def compare(self):
        """Run the kernel and the reference, and hold one against the other."""
        cache, dtype = [torch.from_numpy(x.copy()) for x in self.cache], self.new[0].dtype.type
        no_sources = torch.empty(0, 0, dtype=torch.int32)
        arguments = [torch.from_numpy(x) for x in self.new] + cache + [torch.from_numpy(self.cursor), no_sources]
        want_output, want_weights = (x.numpy() for x in reference_attention(*arguments, self.scale, True))
        output, weights = self.run()
        assert (output.dtype, weights.dtype) == (dtype, np.float32)
        np.testing.assert_allclose(output, want_output, **TOLERANCE[dtype])
        np.testing.assert_allclose(weights, want_weights, **TOLERANCE[np.float32])
        for got, want in zip(self.cache, cache):
            np.testing.assert_array_equal(got, want.numpy())
        return output, weights


# Attention


@both_dtypes
@pytest.mark.parametrize("dim", [64, 1, 3, 17, 63, 65, 80, 257, 600])
def test_head_sizes(dim, dtype):
    Step(2, 1, 3, 37, dim, dtype).compare()


@pytest.mark.parametrize("start", range(1, 449, 64))
def test_every_number_of_slots(start):
    for slots in range(start, start + 64):
        Step(1, 1, 2, slots, 64).compare()


@both_dtypes
@pytest.mark.parametrize("slots", [512, 513, 1100])
def test_more_slots_than_one_block(slots, dtype):
    step = Step(2, 3, 1, slots, 64, dtype)
    step.new[0] *= 3  # sharp enough for later blocks to outweigh earlier ones
    step.compare()


@both_dtypes
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 160])
def test_rows_stand_at_different_places(rows, dtype):
    step = Step(rows, 1, 2, 48, 64, dtype)
    random = np.random.default_rng(rows)
    step.cursor[LIVE] = random.integers(0, 48, rows)
    step.cursor[SLOT] = np.where(
        random.random(rows) < 0.5, random.integers(0, step.cursor[LIVE] + 1), step.cursor[LIVE]
    )
    step.cursor[SEEN] = random.integers(-1, 500, rows)  # -1: padding, which enters no slot
    step.compare()


@both_dtypes
@pytest.mark.parametrize("tokens", [2, 5, 33, 120])
def test_several_tokens_with_left_padding(tokens, dtype):
    step = Step(4, tokens, 2, 130, 17, dtype)
    step.cursor[LIVE] = step.cursor[SLOT] = [0, 0, 10, 0]
    step.cursor[SEEN] = [0, -tokens // 2, 10, -tokens - 1]
    output, weights = step.compare()
    assert not output[3].any() and not weights[3].any()


def test_tokens_together_are_tokens_one_by_one():
    together = Step(2, 20, 3, 32, 64)
    together.cursor[LIVE] = together.cursor[SLOT] = together.cursor[SEEN] = 4
    output, weights = together.run()
    one = Step(2, 20, 3, 32, 64)
    for token in range(20):
        cursor = np.full((4, 2), 4 + token, np.int32)
        new = [np.ascontiguousarray(x[:, token : token + 1]) for x in one.new]
        got, got_weights = _numpy.compact_attention(*new, *one.cache, cursor, one.scale, True)
        np.testing.assert_array_equal(got[:, 0], output[:, token])
        np.testing.assert_array_equal(got_weights[:, :, 0], weights[:, :, token])


@both_dtypes
def test_weights_may_be_left_out(dtype):
    for slots in (40, 600):
        step = Step(2, 3, 2, slots, 64, dtype)
        output, _ = step.run()
        bare, weights = step.run(want_weights=False)
        assert weights.shape == (0,)
        np.testing.assert_array_equal(bare, output)


@both_dtypes
def test_bits_do_not_depend_on_how_items_are_shared_out(dtype):
    step = Step(6, 1, 4, 100, 64, dtype)
    output, weights = step.run()
    for row in range(6):
        for head in range(4):
            new = [x[row : row + 1, :, head : head + 1].copy() for x in step.new]
            cache = [x[row : row + 1, head : head + 1].copy() for x in step.cache]
            alone, alone_weights = _numpy.compact_attention(
                *new, *cache, step.cursor[:, row : row + 1].copy(), step.scale, True
            )
            np.testing.assert_array_equal(alone[0, :, 0], output[row, :, head])
            np.testing.assert_array_equal(alone_weights[0, 0], weights[row, head])


@both_dtypes
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
def test_a_broken_row_breaks_no_other(poison, which, dtype):
    step, healthy = (Step(3, 1, 2, 50, 64, dtype) for _ in range(2))
    step.cache[which][1, 0, 20, 5] = poison
    with np.errstate(invalid="ignore"):
        output, weights = step.compare()  # PyTorch agrees on what the row itself becomes
    want, want_weights = healthy.run()
    assert not np.isfinite(output[1, 0, 0]).all() or poison == -np.inf or which == 0
    for row, head in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
        np.testing.assert_array_equal(output[row, 0, head], want[row, 0, head])
        np.testing.assert_array_equal(weights[row, head], want_weights[row, head])


def test_logits_of_minus_infinity():
    for slots in (20, 600):
        step = Step(2, 1, 1, slots, 8)
        step.new[0][:], step.new[1][:] = 1, -np.inf
        step.cache[0][0] = -np.inf  # all of row 0: NaN, as in PyTorch
        step.cache[0][1, 0, :550] = -np.inf  # the whole of a block of row 1, if there is more
        output, _ = step.compare()
        assert np.isnan(output[0]).all() and np.isnan(output[1]).any() == (slots == 20)


def test_large_logits():
    step = Step(2, 1, 2, 70, 64)
    step.scale = 1e4
    step.compare()
    step.scale = 0.0
    step.compare()


def test_all_float16_numbers_are_read_exactly():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(64, 1, 1024, 1)
    cache = [np.zeros((64, 1024, 1, 1), np.float16) for _ in range(2)]
    zeros = np.zeros_like(halves)
    output, _ = _numpy.compact_attention(zeros, zeros, halves, *cache, np.zeros((4, 64), np.int32), 1.0, False)
    np.testing.assert_array_equal(output, halves)


def test_float16_is_rounded_to_nearest_even():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    below = halves[np.isfinite(halves)]
    with np.errstate(over="ignore"):
        above = np.nextafter(below, np.float16(np.inf))  # the mean of two neighbours is a tie
    below, above = (np.resize(x, (64, 1, 1024, 1)) for x in (below, above))
    zeros = np.zeros_like(below)
    cache = [np.zeros((64, 1024, 2, 1), np.float16), np.zeros((64, 1024, 2, 1), np.float16)]
    cache[1][:, :, 0] = below[:, 0]
    cursor = np.ones((4, 64), np.int32)
    output, _ = _numpy.compact_attention(zeros, zeros, above, *cache, cursor, 1.0, False)
    with np.errstate(over="ignore"):
        want = ((below.astype(np.float32) + above.astype(np.float32)) / 2).astype(np.float16)
    np.testing.assert_array_equal(output, want)


def placed(array, offset, fence):
    """A copy that starts so many elements into a buffer, with fences on both sides."""
    buffer = np.full(array.size + 2 * 64, fence, array.dtype)
    view = buffer[64 - offset : 64 - offset + array.size].reshape(array.shape)
    view[:] = array
    return view, buffer


@both_dtypes
@pytest.mark.parametrize("offset", [1, 3, 7, 31])
@pytest.mark.parametrize("dim", [64, 19])
def test_any_alignment_and_nothing_read_outside(dim, offset, dtype):
    step = Step(2, 1, 2, 21, dim, dtype)
    output, weights = step.run()
    step = Step(2, 1, 2, 21, dim, dtype)
    fenced = [placed(x, offset, np.nan) for x in step.new + step.cache]
    got, got_weights = _numpy.compact_attention(*(x for x, _ in fenced), step.cursor, step.scale, True)
    np.testing.assert_array_equal(got, output)
    np.testing.assert_array_equal(got_weights, weights)
    for view, buffer in fenced:
        assert np.isnan(buffer).sum() == buffer.size - view.size


# Eviction


class Cache:
    """One layer's cache, decoding random tokens."""

    def __init__(self, rows, heads, slots, dim, dtype=np.float32, seed=0, pinned=0, seen=0):
        self.random = np.random.default_rng(seed)
        self.shape, self.dtype = (rows, heads, slots, dim), dtype
        self.slots = [np.zeros(self.shape, dtype) for _ in range(2)]
        self.cursor = np.zeros((4, rows), np.int32)
        self.cursor[PINNED], self.cursor[SEEN] = pinned, seen
        self.positions = np.zeros((rows, slots), np.int32)
        self.scores = np.zeros((rows, slots), np.float32)

    def step(self, policy, budget, recent, decay=0.98, tokens=1):
        """One pass; returns the state before it, and the weights."""
        rows, heads, _, dim = self.shape
        new = [self.random.standard_normal((rows, tokens, heads, dim)).astype(self.dtype) for _ in range(3)]
        _, weights = _numpy.compact_attention(*new, *self.slots, self.cursor, dim**-0.5, True)
        before = [torch.from_numpy(x.copy()) for x in (self.cursor, self.positions, self.scores)]
        _numpy.score_evict(
            weights, self.slots[0], self.cursor, self.positions, self.scores, policy, budget, recent, decay
        )
        return before, weights

    def compare(self, policy, budget, recent, decay=0.98, tokens=1):
        before, weights = self.step(policy, budget, recent, decay, tokens)
        reference_evict(
            torch.from_numpy(weights), torch.from_numpy(self.slots[0]), *before, policy, budget, recent, decay
        )
        cursor, positions, scores = (x.numpy() for x in before)
        np.testing.assert_array_equal(self.cursor, cursor)
        np.testing.assert_array_equal(self.positions, positions)
        np.testing.assert_allclose(self.scores, scores, rtol=1e-5, atol=1e-6)


@both_dtypes
@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
def test_a_long_run(policy, dtype):
    cache = Cache(3, 2, 12, 16, dtype, seed=policy, pinned=[0, 3, 5], seen=[0, -2, 0])
    cache.compare(policy, 12, 4, tokens=6)
    for _ in range(60):
        cache.compare(policy, 12, 4)
    assert (cache.cursor[SEEN] == [66, 64, 66]).all() and (cache.cursor[LIVE] == 12).all()


@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
def test_more_slots_than_the_budget_or_fewer(policy):
    short = Cache(2, 1, 20, 8)
    for _ in range(30):
        short.compare(policy, 10, 3)
    assert (short.cursor[LIVE] == 10).all()
    endless = Cache(2, 1, 20, 8)
    for _ in range(20):
        endless.compare(policy, 1000, 3)
    assert (endless.cursor[SLOT] == 20).all()
    with pytest.raises(ValueError, match="cursor of row 0: the new tokens do not fit"):
        endless.step(policy, 1000, 3)


@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
@pytest.mark.parametrize("dim", [64, 19])
def test_scores_of_many_heads_and_slots(policy, dim):
    cache = Cache(2, 9, 530, dim)
    cache.cursor[[LIVE, SLOT, SEEN]] = 528
    cache.positions[:] = np.arange(530)
    cache.scores[:] = cache.random.random((2, 530))
    for _ in range(4):
        cache.compare(policy, 530, 4)


@settings(max_examples=60, deadline=None)
@given(
    policy=st.integers(0, len(POLICIES) - 1),
    budget=st.integers(1, 12),
    recent=st.integers(1, 14),
    pinned=st.integers(0, 14),
    padding=st.integers(0, 3),
    decay=st.floats(0, 1, width=32),
    steps=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_protected_stays(policy, budget, recent, pinned, padding, decay, steps, seed):
    cache = Cache(2, 2, budget, 8, seed=seed, pinned=[0, pinned], seen=[0, -padding])
    before = [set(), set()]
    for _ in range(steps):
        cache.compare(policy, budget, recent, decay)
        for row in range(2):
            live, slot, seen, pin = cache.cursor[:, row].tolist()
            held = cache.positions[row, :live].tolist()
            assert live <= budget and slot <= live and len(set(held)) == live
            assert not held or (min(held) >= 0 and max(held) == seen - 1)
            lost = before[row] - set(held)
            before[row] = set(held)
            evictable = {p for p in lost if p >= pin and p <= seen - 1 - recent}
            if lost - evictable:  # then nothing else could have gone
                rest = [p for p in held if p != seen - 1]
                assert all(p < pin or p > seen - 1 - recent for p in rest)
                assert all(p >= pin for p in lost) or all(p < pin for p in rest)


def test_nan_scores_lose_to_numbers_and_ties_go_to_the_oldest():
    def next_slot(scores, positions, recent=1):
        slots = len(scores)
        cursor = np.array([[slots], [0], [-1], [0]], np.int32)  # a padding token: nothing is scored
        cursor[SEEN] = -1
        positions = np.array([positions], np.int32) - slots  # all older than position 0
        cursor[PINNED] = -slots
        scores = np.array([scores], np.float32)
        weights, keys = np.zeros((1, 1, 1, slots), np.float32), np.zeros((1, 1, slots, 1), np.float32)
        _numpy.score_evict(weights, keys, cursor, positions, scores, 0, slots, recent, 1.0)
        return cursor[SLOT, 0]

    nan, inf = np.nan, np.inf
    assert next_slot([3, 1, 2], [0, 1, 2]) == 1
    assert next_slot([1, 1, 2], [1, 0, 2]) == 1
    assert next_slot([0.0, -0.0, 2], [1, 0, 2]) == 1
    assert next_slot([nan, 5, nan], [0, 1, 2]) == 1
    assert next_slot([nan, inf, nan], [0, 1, 2]) == 1
    assert next_slot([nan, -inf, -inf], [0, 2, 1]) == 2
    assert next_slot([nan, nan, nan], [2, 0, 1]) == 1
    assert next_slot([1, 2, 0], [0, 1, 2], recent=2) == 0


def test_a_broken_row_evicts_in_no_other():
    cache, healthy = (Cache(2, 2, 8, 16) for _ in range(2))
    for step in range(20):
        if step == 3:
            cache.slots[0][0, :, 1] = np.nan
        cache.step(0, 8, 2)
        healthy.step(0, 8, 2)
        np.testing.assert_array_equal(cache.positions[1], healthy.positions[1])
        np.testing.assert_array_equal(cache.scores[1], healthy.scores[1])
        assert len(set(cache.positions[0, : cache.cursor[LIVE, 0]])) == cache.cursor[LIVE, 0]


def test_eviction_of_rows_alone_and_together():
    together = Cache(5, 3, 10, 16, pinned=2)
    for _ in range(25):
        (cursor, positions, scores), weights = together.step(0, 10, 3)
        for row in range(5):
            alone = [x.numpy()[..., row : row + 1].copy() for x in (cursor,)]
            alone += [x.numpy()[row : row + 1].copy() for x in (positions, scores)]
            _numpy.score_evict(weights[row : row + 1], together.slots[0][row : row + 1], *alone, 0, 10, 3, 0.98)
            np.testing.assert_array_equal(alone[0][:, 0], together.cursor[:, row])
            np.testing.assert_array_equal(alone[1][0], together.positions[row])
            np.testing.assert_array_equal(alone[2][0], together.scores[row])


@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
def test_what_a_policy_does_not_read_need_not_exist(policy):
    _, reads_attention, reads_key_norm = _numpy.POLICIES[policy]
    weights, keys = (np.broadcast_to(np.float32(0), (1, 2, 1, 4)), np.broadcast_to(np.float32(0), (1, 2, 4, 8)))
    arguments = [weights.copy() if reads_attention else weights, keys.copy() if reads_key_norm else keys]
    cursor, positions, scores = np.zeros((4, 1), np.int32), np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32)
    _numpy.score_evict(*arguments, cursor, positions, scores, policy, 4, 1, 0.98)
    assert cursor[:, 0].tolist() == [1, 1, 1, 0]


# Arguments


def attention_arguments():
    step = Step(2, 1, 3, 5, 8)
    names = ("query", "key", "value", "keys", "values", "cursor", "scale", "want_weights")
    return dict(zip(names, [*step.new, *step.cache, np.zeros_like(step.cursor), 0.5, True]))


def eviction_arguments():
    arguments = {"weights": np.zeros((2, 3, 1, 5), np.float32), "keys": np.zeros((2, 3, 5, 8), np.float32)}
    arguments |= {"cursor": np.zeros((4, 2), np.int32), "positions": np.zeros((2, 5), np.int32)}
    return arguments | {"scores": np.zeros((2, 5), np.float32), "policy": 0, "budget": 5, "recent": 2, "decay": 0.98}


def read_only(array):
    array.flags.writeable = False
    return array


def shifted(array):
    """At an address that is no multiple of the element size."""
    return np.frombuffer(bytearray(array.nbytes + 1), array.dtype, array.size, 1).reshape(array.shape)


FUNCTIONS = {"compact_attention": attention_arguments, "score_evict": eviction_arguments}
ARRAYS = {
    "compact_attention": ["query", "key", "value", "keys", "values", "cursor"],
    "score_evict": ["weights", "keys", "cursor", "positions", "scores"],
}
IN_PLACE = {"keys", "values", "positions", "scores"}
WRONG_ARRAYS = {
    "list": (TypeError, "must be a NumPy array, not <class 'list'>", lambda x: x.tolist()),
    "float64": (TypeError, "must be (float32|float16|int32).*, not float64", lambda x: x.astype(np.float64)),
    "byte order": (TypeError, "must be (float32|float16|int32)", lambda x: x.astype(x.dtype.newbyteorder())),
    "dimensions": (ValueError, r"must have shape \[.*\] and no empty side, not \[1, ", lambda x: x[None]),
    "size": (ValueError, r"must have shape \[", lambda x: np.concatenate([x, x, x])[: len(x) + 1]),
    "empty": (ValueError, "no empty side", lambda x: x[..., :0]),
    "strided": (ValueError, "must be C-contiguous", lambda x: np.repeat(x, 2, -1)[..., ::2]),
    "shifted": (ValueError, "C-contiguous and aligned, not strided or shifted", shifted),
}
NAMED = [(function, name) for function, names in ARRAYS.items() for name in names]


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
@pytest.mark.parametrize(("function", "name"), NAMED)
def test_wrong_arrays_are_named(function, name, wrong):
    error, text, change = WRONG_ARRAYS[wrong]
    if wrong == "size" and name in ("query", "weights"):
        name = {"query": "key", "weights": "keys"}[name]  # the first array sets the sizes of the others
    arguments = FUNCTIONS[function]() | ({"policy": 1} if name == "keys" and function == "score_evict" else {})
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=f"^{name} .*{text}"):
        getattr(_numpy, function)(**arguments)


@pytest.mark.parametrize(("function", "name"), [p for p in NAMED if p[1] in IN_PLACE or p == ("score_evict", "cursor")])
def test_arrays_changed_in_place_must_be_writable(function, name):
    arguments = FUNCTIONS[function]()
    arguments[name] = read_only(arguments[name])
    if (function, name) == ("score_evict", "keys"):  # only read here
        return getattr(_numpy, function)(**arguments)
    with pytest.raises(ValueError, match=f"^{name} must be writable, not read-only"):
        getattr(_numpy, function)(**arguments)


def test_read_only_inputs_are_welcome():
    arguments = attention_arguments()
    for name in ("query", "key", "value", "cursor"):
        arguments[name] = read_only(arguments[name])
    _numpy.compact_attention(**arguments)


@pytest.mark.parametrize(
    ("function", "name", "value", "error", "text"),
    [
        ("compact_attention", "scale", "x", TypeError, "scale must be a number, not 'x'"),
        ("compact_attention", "scale", float("nan"), ValueError, "scale must be finite, not nan"),
        ("compact_attention", "scale", 1e300, ValueError, "scale must be finite"),
        ("compact_attention", "key", np.zeros((2, 1, 3, 8), np.float16), TypeError, "key must be float32, not float16"),
        ("score_evict", "policy", 3, ValueError, r"policy must be in 0\.\.2, a place in POLICIES, not 3"),
        ("score_evict", "policy", -1, ValueError, "policy must be in 0"),
        ("score_evict", "policy", "window", TypeError, "policy must be an integer, not 'window'"),
        ("score_evict", "budget", 0, ValueError, "budget must be in 1"),
        ("score_evict", "budget", 2.5, TypeError, "budget must be an integer, not 2.5"),
        ("score_evict", "recent", 0, ValueError, "recent must be in 1"),
        ("score_evict", "recent", 2**70, TypeError, "recent must be an integer"),
        ("score_evict", "decay", None, TypeError, "decay must be a number, not None"),
        ("score_evict", "decay", float("inf"), ValueError, "decay must be finite, not inf"),
    ],
)
def test_wrong_numbers_are_named(function, name, value, error, text):
    with pytest.raises(error, match=f"^{text}"):
        getattr(_numpy, function)(**FUNCTIONS[function]() | {name: value})


@pytest.mark.parametrize(
    ("function", "written", "other"),
    [
        ("compact_attention", "keys", "key"),
        ("compact_attention", "values", "keys"),
        ("compact_attention", "keys", "cursor"),
        ("score_evict", "cursor", "positions"),
        ("score_evict", "scores", "weights"),
    ],
)
def test_memory_that_is_written_is_not_shared(function, written, other):
    arguments = FUNCTIONS[function]()
    memory = np.zeros(sum(arguments[name].nbytes for name in (written, other)) - 4, np.uint8)
    for name, place in ((written, memory), (other, memory[arguments[written].nbytes - 4 :])):
        array = arguments[name]
        arguments[name] = place[: array.nbytes].view(array.dtype).reshape(array.shape)
        arguments[name][:] = array
    with pytest.raises(ValueError, match="must have memory of its own, as it is written to, and shares some") as error:
        getattr(_numpy, function)(**arguments)
    assert written in str(error.value) and other in str(error.value)


def test_sides_whose_product_is_too_large():
    arguments = eviction_arguments() | {"policy": 2}
    huge = np.broadcast_to(np.float32(0), (2, 1 << 30, 1 << 25, 5))
    with pytest.raises(ValueError, match="^weights must have 2.48 numbers at most"):
        _numpy.score_evict(**arguments | {"weights": huge})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("live", "slot", "seen", "tokens", "text"),
    [
        (-1, 0, 0, 1, "live must be in 0..slots"),
        (6, 0, 0, 1, "live must be in 0..slots"),
        (3, 4, 0, 1, "slot must be in 0..live"),
        (3, -1, 0, 1, "slot must be in 0..live"),
        (5, 5, 5, 1, "the new tokens do not fit"),
        (3, 2, 5, 2, "slot must be live for more than one token"),
        (4, 4, 4, 2, "the new tokens do not fit"),
        (4, 4, -1, 3, "the new tokens do not fit"),
        (2**31 - 1, 0, 0, 1, "live must be in 0..slots"),
        (0, 0, -(2**31), 1, None),
        (5, 5, -1, 1, None),
        (4, 4, -1, 2, None),
    ],
)
def test_wrong_cursors_are_explained(function, live, slot, seen, tokens, text):
    arguments = FUNCTIONS[function]()
    for name in ("query", "key", "value"):
        if name in arguments:
            arguments[name] = np.repeat(arguments[name], tokens, 1)
    if "weights" in arguments:
        arguments["weights"] = np.repeat(arguments["weights"], tokens, 2)
    arguments["cursor"][:, 1] = [live, slot, seen, 0]
    if text is None:
        getattr(_numpy, function)(**arguments)
        return
    with pytest.raises(ValueError, match=f"^cursor of row 1: {text} .live {live}, slot {slot}, seen {seen}, tokens "):
        getattr(_numpy, function)(**arguments)


def test_several_tokens_may_not_pass_the_budget():
    cache = Cache(1, 1, 10, 4)
    with pytest.raises(ValueError, match="the new tokens do not fit .*tokens 6, slots 5"):
        cache.step(0, budget=5, recent=1, tokens=6)
    cache.step(0, budget=6, recent=1, tokens=6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_number_of_arguments(function):
    with pytest.raises(TypeError, match=function):
        getattr(_numpy, function)()


# Instruction sets


def test_an_unknown_instruction_set_is_explained():
    result = in_process("import whisperkv._numpy", WHISPERKV_ISA="mmx")
    assert result.returncode and 'ImportError: environment variable WHISPERKV_ISA: "mmx" is not' in result.stderr
    assert "portable" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_instruction_set(isa):
    if isa == _numpy.ISA:
        pytest.skip("the one that all other tests here run in")
    probe = in_process("from whisperkv import _numpy; print(_numpy.ISA)", WHISPERKV_ISA=isa)
    if probe.returncode:
        assert f'"{isa}" is not an instruction set that runs here' in probe.stderr
        pytest.skip("not on this machine")
    assert probe.stdout.strip() == isa
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        [*command, "-k", "not instruction_set"],
        capture_output=True,
        text=True,
        env={**os.environ, "WHISPERKV_ISA": isa},
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stdout[-4000:]
