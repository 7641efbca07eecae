"""The ops of pruned caches against their slow twins in reference.py, and all that can go wrong around them."""

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import torch
from conftest import DEVICE
from test_ops import (
    DTYPES,
    ISAS,
    ON_CUDA,
    assert_same_bits,
    check_transform_is_refused,
    check_values_on,
    copy,
    counts_bytes,
    grows,
    memory_of,
    of_cuda,
    of_the_cpu,
    on_device,
    resized,
    run,
    settings,
    sharing,
    st,
    strided,
    unchecked,
)  # fmt: skip
from test_ops import given as drawn
from torch._subclasses import FakeTensorMode

from whisperkv import ops

GATHERING = ("keys", "values", "index", "starts", "lengths", "kept_keys", "kept_values")
RAGGED = ("query", "keys", "values", "starts", "lengths", "bias", "scale")
RECEIVED = ("query", "positions", "keys", "visible", "scale")
ARGUMENTS = {"gather_kept": GATHERING, "ragged_attention": RAGGED, "attention_received": RECEIVED}
all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


class Draw:
    """Random numbers and tensors that repeat."""

    def __init__(self, seed, dtype=torch.float32):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def integers(self, low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=self.generator).int()

    def view(self, is_turned, *shape):
        """[rows, heads, tokens, dim]; turned, as projections give it: heads lie next to each other in a token."""
        rows, heads, tokens, dim = shape
        return self.normal(rows, tokens, heads, dim).transpose(1, 2) if is_turned else self.normal(*shape)

    def places(self, lengths):
        """Starts that give each head slots of its own, in any order and with room behind, and all slots there are."""
        flat, starts, slots = lengths.flatten().tolist(), torch.zeros(lengths.numel(), dtype=torch.int32), 0
        for head in torch.randperm(len(flat), generator=self.generator).tolist():
            starts[head] = slots
            slots += flat[head] + int(self.integers(0, 3))
        return starts.view(lengths.shape), slots + 1


def gathering(rows=2, kv_heads=3, tokens=40, most=17, dim=64, dtype=torch.float32, turned=True, seed=0):
    """All arguments by name. What no head owns is NaN, and behind the tokens of a head stand wild ones."""
    draw = Draw(seed, dtype)
    most = min(most, tokens)
    lengths = draw.integers(0, most, rows, kv_heads)
    index = torch.full((rows, kv_heads, most), -99, dtype=torch.int32)
    for row, head in torch.cartesian_prod(*map(torch.arange, lengths.shape)).tolist():
        some = torch.randperm(tokens, generator=draw.generator)[: int(lengths[row, head])]
        index[row, head, : len(some)] = some.sort().values.int()
    starts, slots = draw.places(lengths)
    keys, values = (draw.view(turned, rows, kv_heads, tokens, dim) for _ in range(2))
    kept = [torch.full((slots, dim), torch.nan, dtype=dtype) for _ in range(2)]
    return dict(zip(GATHERING, (keys, values, index, starts, lengths, *kept)))


def ragged(
    rows=2, kv_heads=2, group=3, queries=1, most=70, dim=64, dtype=torch.float32, bias=True, turned=True, seed=0
):
    """All arguments by name. What no head owns is NaN, so that whoever reads it is found out."""
    draw = Draw(seed, dtype)
    lengths = draw.integers(0, most, rows, kv_heads)
    if rows:
        lengths[rows - 1, 0] = most
    starts, slots = draw.places(lengths)
    keys, values = (torch.full((slots, dim), torch.nan, dtype=dtype) for _ in range(2))
    biases = torch.full((slots,), torch.nan)
    for start, length in zip(starts.flatten().tolist(), lengths.flatten().tolist()):
        for x in (keys, values, biases):
            x[start : start + length] = draw.normal(length, *x.shape[1:])
    return dict(
        query=draw.view(turned, rows, kv_heads * group, queries, dim), keys=keys, values=values, starts=starts,
        lengths=lengths, bias=biases if bias else torch.empty(0), scale=dim**-0.5,
    )  # fmt: skip


def received(
    rows=2, kv_heads=2, group=3, queries=10, tokens=70, dim=64, dtype=torch.float32, turned=True, padded=True, seed=0
):
    """All arguments by name. Keys that are hidden are NaN, so that whoever counts them is found out."""
    draw = Draw(seed, dtype)
    visible = torch.ones(rows, tokens, dtype=torch.uint8)
    keys = draw.view(turned, rows, kv_heads, tokens, dim)
    for row in range(rows if padded else 0):
        left = int(draw.integers(0, tokens - 1))
        visible[row, :left] = 0
        visible[row, draw.integers(0, tokens - 1, tokens // 10).long()] = 0
        keys[row, :, visible[row] == 0] = torch.nan
    return dict(
        query=draw.view(turned, rows, kv_heads * group, queries, dim),
        positions=draw.integers(0, tokens - 1, queries).sort().values, keys=keys, visible=visible, scale=dim**-0.5,
    )  # fmt: skip


def call(op, given, functions=ops):
    return run(getattr(functions, op), [given[name] for name in ARGUMENTS[op]])


def gather(given, functions=ops):
    """The given, with what was written."""
    given = copy(given)
    assert call("gather_kept", given, functions) is None
    return given


def attend(given, functions=ops):
    return call("ragged_attention", given, functions)


def receive(given, functions=ops):
    return call("attention_received", given, functions)


def check_gathered(given):
    ours, theirs = gather(given), gather(given, reference)
    for name in GATHERING:
        assert_same_bits(ours[name], theirs[name])


# Of an output, in parts of the largest value of its head; measured over 3 x 1000 random problems: 7e-7, 4.8e-3 and
# 4.5e-4, of which rounding the result is 2e-3 and 2.4e-4.
APART = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_near(given, output, wanted):
    rows, heads, queries, dim = given["query"].shape
    assert output.is_contiguous() and output.shape == (rows, queries, heads, dim) and output.dtype == wanted.dtype
    group = heads // max(given["starts"].shape[1], 1)
    for row in range(rows):
        for head in range(heads):
            start, length = (int(given[name][row, head // group]) for name in ("starts", "lengths"))
            values = given["values"][start : start + length].float()
            scale = float(values.abs().max()) if length else 1.0
            got, want = output[row, :, head].float(), wanted[row, :, head].float()
            torch.testing.assert_close(got, want, rtol=0, atol=APART[output.dtype] * scale)


def check_attended(given):
    before = copy(given)
    output = attend(given)
    for name in RAGGED[:6]:
        assert_same_bits(given[name], before[name])
    assert_near(given, output, attend(given, reference))


def assert_received(given, got, wanted):
    """Sums of weights: those of bfloat16 and float16 are as exact, as products are added up in float32."""
    rows, kv_heads, tokens, _ = given["keys"].shape
    assert got.is_contiguous() and got.shape == (rows, kv_heads, tokens) and got.dtype == torch.float32
    most = given["query"].shape[1] // kv_heads * given["query"].shape[2]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-7 * most**0.5 + 1e-6)
    assert not got.transpose(1, 2)[given["visible"] == 0].any()


def check_received(given):
    before = copy(given)
    got = receive(given)
    for name in RECEIVED[:4]:
        assert_same_bits(given[name], before[name])
    assert_received(given, got, receive(given, reference))


# rows, kv_heads, tokens, most, dim
GATHERED = {
    "one": (1, 1, 1, 1, 1),
    "some": (2, 3, 40, 17, 64),
    "all": (1, 2, 30, 30, 128),
    "blocks": (2, 2, 900, 700, 8),
    "odd": (3, 1, 11, 5, 7),
    "no rows": (0, 2, 4, 3, 8),
}
# rows, kv_heads, group, queries, most, dim
ATTENDED = {
    "one": (1, 1, 1, 1, 1, 1),
    "a step": (1, 2, 4, 1, 1300, 128),
    "rows": (5, 2, 2, 1, 90, 64),
    "nothing kept": (2, 2, 2, 2, 0, 16),
    "a range": (1, 1, 4, 1, 512, 64),
    "over a range": (1, 2, 3, 1, 513, 64),
    "under a block": (1, 1, 2, 1, 255, 128),
    "seven share": (1, 2, 7, 1, 300, 128),
    "eight share": (2, 1, 8, 1, 300, 80),
    "forty share": (1, 1, 40, 1, 300, 32),
    "a few tokens": (2, 2, 3, 5, 60, 64),
    "more queries than slots": (2, 2, 2, 40, 20, 64),
    "many queries": (1, 2, 3, 70, 600, 64),
    "a prompt": (1, 1, 1, 300, 330, 32),
    "lots of ranges": (1, 1, 6, 20, 4500, 16),
    "dim 7": (2, 2, 2, 2, 40, 7),
    "dim 33": (2, 2, 2, 1, 40, 33),
    "dim 130": (1, 2, 2, 2, 40, 130),
    "dim 256": (1, 2, 2, 3, 200, 256),
    "no rows": (0, 2, 2, 1, 3, 8),
}
# rows, kv_heads, group, queries, tokens, dim
ATTENTIVE = {
    "one": (1, 1, 1, 1, 1, 1),
    "a vector": (1, 1, 1, 1, 16, 64),
    "and one": (1, 1, 1, 2, 17, 64),
    "a panel": (1, 2, 2, 3, 64, 64),
    "over a panel": (2, 1, 4, 5, 65, 128),
    "a block": (1, 1, 2, 4, 256, 32),
    "over a block": (1, 1, 2, 4, 257, 32),
    "a chunk": (1, 1, 4, 6, 100, 64),
    "over a chunk": (1, 1, 5, 5, 100, 64),
    "over a lot": (2, 2, 7, 40, 90, 16),
    "many lots": (1, 1, 8, 130, 150, 16),
    "many tokens": (1, 1, 2, 9, 2000, 32),
    "dim 7": (2, 2, 3, 5, 50, 7),
    "dim 33": (1, 2, 3, 5, 50, 33),
    "dim 130": (1, 2, 1, 5, 50, 130),
    "no rows": (0, 2, 2, 3, 8, 8),
}
numbers = st.integers
dtypes = st.sampled_from(list(DTYPES.values()))


class TestValues:
    """The numbers. Run again for every instruction set by test_every_instruction_set."""

    @all_dtypes
    @pytest.mark.parametrize("turned", [True, False], ids=["turned", "plain"])
    @pytest.mark.parametrize("shape", GATHERED.values(), ids=GATHERED)
    def test_gathered(self, shape, turned, dtype):
        check_gathered(gathering(*shape, dtype, turned, seed=sum(shape)))

    @all_dtypes
    @pytest.mark.parametrize("shape", ATTENDED.values(), ids=ATTENDED)
    def test_attended(self, shape, dtype):
        check_attended(ragged(*shape, dtype, bias=sum(shape) % 2 > 0, turned=sum(shape) % 3 > 0, seed=sum(shape)))

    @all_dtypes
    @pytest.mark.parametrize("shape", ATTENTIVE.values(), ids=ATTENTIVE)
    def test_received(self, shape, dtype):
        for padded in (False, True):
            check_received(received(*shape, dtype, turned=sum(shape) % 3 > 0, padded=padded, seed=sum(shape)))

    @settings(max_examples=60, deadline=None)
    @drawn(
        rows=numbers(0, 3), kv_heads=numbers(1, 4), tokens=numbers(1, 60), most=numbers(1, 60), dim=numbers(1, 90),
        dtype=dtypes, turned=st.booleans(), seed=numbers(0, 2**30),
    )  # fmt: skip
    def test_any_gathering(self, **problem):
        check_gathered(gathering(**problem))

    @settings(max_examples=60, deadline=None)
    @drawn(
        rows=numbers(0, 3), kv_heads=numbers(1, 3), group=numbers(1, 9), queries=numbers(1, 9), most=numbers(0, 90),
        dim=numbers(1, 140), dtype=dtypes, bias=st.booleans(), turned=st.booleans(), seed=numbers(0, 2**30),
    )  # fmt: skip
    def test_any_attention(self, **problem):
        check_attended(ragged(**problem))

    @settings(max_examples=60, deadline=None)
    @drawn(
        rows=numbers(0, 3), kv_heads=numbers(1, 3), group=numbers(1, 6), queries=numbers(1, 30),
        tokens=numbers(1, 90), dim=numbers(1, 140), dtype=dtypes, turned=st.booleans(), padded=st.booleans(),
        seed=numbers(0, 2**30),
    )  # fmt: skip
    def test_any_received(self, **problem):
        check_received(received(**problem))

    def test_as_exact_as_torch(self):
        """In float32, from what float64 gives; without pruning it is attention as torch has it."""
        draw, (kv_heads, group, tokens, dim) = Draw(1), (2, 3, 700, 64)
        for queries in (1, 50):
            keys, values = (draw.normal(1, kv_heads, tokens, dim) for _ in range(2))
            query = draw.normal(1, kv_heads * group, queries, dim)
            lengths = torch.full((1, kv_heads), tokens, dtype=torch.int32)
            starts = torch.arange(kv_heads, dtype=torch.int32)[None] * tokens
            flat = [x.reshape(-1, dim) for x in (keys, values)]
            given = dict(zip(RAGGED, (query, *flat, starts, lengths, torch.empty(0), dim**-0.5)))
            whole = [x.repeat_interleave(group, 1) for x in (keys, values)]
            mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            wanted = sdpa(query.double(), *(x.double() for x in whole), attn_mask=mask).transpose(1, 2)
            theirs = sdpa(query, *whole, attn_mask=mask).transpose(1, 2)
            ours, torchs = ((x - wanted).square().mean() for x in (attend(given), theirs))
            assert ours < 3 * torchs

    def test_received_is_all_there_was_to_give(self):
        given = received(3, 2, 3, 60, 90, padded=False)
        torch.testing.assert_close(receive(given).sum(2), torch.full((3, 2), 180.0))
        given["visible"][1, given["positions"][30:].long()] = 0
        given["visible"][2] = 0
        last = given["positions"][30]
        queries = int((given["positions"] < last).sum())
        torch.testing.assert_close(receive(given).sum(2)[1], torch.full((2,), 3.0 * queries))
        assert not receive(given)[2].any()

    def test_a_bool_hides_as_a_byte_does(self):
        given = received()
        assert_same_bits(receive(given), receive(given | dict(visible=given["visible"].bool())))
        assert_same_bits(receive(given), receive(given | dict(visible=given["visible"] * 200)))

    @all_dtypes
    def test_positions_in_any_order(self, dtype):
        """And some of them twice."""
        given = received(2, 2, 3, 50, 300, dtype=dtype)
        given["positions"] = Draw(3).integers(0, 299, 50)
        given["positions"][10:20] = given["positions"][0]
        check_received(given)

    @all_dtypes
    def test_enormous_logits_and_a_scale_of_nothing(self, dtype):
        attention, attentive = ragged(queries=3, dtype=dtype), received(dtype=dtype, padded=False)
        for scale in (1e6, -1e6):
            assert attend(attention | dict(scale=scale)).isfinite().all()
            got = receive(attentive | dict(scale=scale))
            torch.testing.assert_close(got.sum(2), torch.full((2, 2), 30.0))
        check_attended(attention | dict(scale=0.0))
        check_received(attentive | dict(scale=0.0))

    def test_a_bias_of_minus_infinity_hides_a_slot(self):
        given = ragged(1, 1, 3, 1, 600, bias=False)
        given["bias"] = torch.zeros(len(given["keys"]))
        given["bias"][int(given["starts"]) + 50 :] = -torch.inf
        short = given | dict(lengths=torch.tensor([[50]], dtype=torch.int32))
        torch.testing.assert_close(attend(given), attend(short))
        given["bias"][:] = -torch.inf
        assert attend(given).isnan().all()  # as softmax has it

    @all_dtypes
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
    def test_what_is_broken(self, poison, dtype):
        """What a query does not see does not touch it, bit for bit; what it sees is what softmax has."""
        given = ragged(2, 2, 2, 4, 80, dtype=dtype)
        given["lengths"][:] = torch.tensor([[80, 60], [70, 75]]).clamp(max=given["lengths"])
        given["lengths"][1, 0] = 70
        start, sound = int(given["starts"][1, 0]), attend(given)
        for name in ("keys", "values"):
            for slot in (20, 68):
                broken = copy(given)
                broken[name][start + slot, 5] = poison
                output, wanted = attend(broken), attend(broken, reference)
                assert (output.isfinite() == wanted.isfinite()).all()
                output[1, max(slot - 66, 0) :, :2] = sound[1, max(slot - 66, 0) :, :2]
                assert_same_bits(output, sound)
        broken = copy(given)
        broken["query"][1, 3, 2, 5] = poison
        output = attend(broken)
        assert not output[1, 2, 3].isfinite().any()
        output[1, 2, 3] = sound[1, 2, 3]
        assert_same_bits(output, sound)

    @all_dtypes
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
    def test_what_gives_no_attention(self, poison, dtype):
        """A broken query breaks what it sees, a broken key what its queries see, and nothing else changes a bit."""
        given = received(2, 2, 2, 8, 400, dtype=dtype)
        sound, (position, row) = receive(given), (int(given["positions"][5]), 1)
        assert given["visible"][row].any()
        given["visible"][row, position] = 1
        given["keys"][row, :, position] = 1
        sound = receive(given)
        broken = copy(given)
        broken["query"][row, 3, 5, 2] = poison
        got, sees = receive(broken), given["visible"][row, : position + 1].bool()
        assert got[row, 1, : position + 1][sees].isnan().all()
        got[row, 1, : position + 1][sees] = sound[row, 1, : position + 1][sees]
        assert_same_bits(got, sound)
        broken = copy(given)
        broken["keys"][row, 0, position, 2] = poison
        got, wanted = receive(broken), receive(broken, reference)
        assert (got.isfinite() == wanted.isfinite()).all()
        got[row, 0] = sound[row, 0]
        assert_same_bits(got, sound)

    @of_the_cpu
    @all_dtypes
    def test_a_row_alone_has_the_output_that_it_has_among_others(self, dtype):
        """To the bit. CUDA splits it the more, the fewer there are."""
        given = ragged(3, 2, 3, 2, 1200, dtype=dtype)
        together = attend(given)
        for row in range(3):
            alone = {name: given[name][row : row + 1] for name in ("query", "starts", "lengths")}
            assert_same_bits(attend(given | alone)[0], together[row])

    @all_dtypes
    def test_a_row_alone_receives_what_it_does_among_others(self, dtype):
        given = received(3, 2, 3, 50, 300, dtype=dtype)
        together = receive(given)
        for row in range(3):
            alone = {name: given[name][row : row + 1] for name in ("query", "keys", "visible")}
            assert_same_bits(receive(given | alone)[0], together[row])

    @all_dtypes
    def test_strides_do_not_matter(self, dtype):
        """Nor what lies between, nor at which number memory begins."""

        def spread(x):
            memory = torch.full((x.numel() * 8 + 3,), torch.nan, dtype=x.dtype)
            rows, heads, tokens, dim = x.shape
            place = (heads * (tokens + 1) * (dim + 5), (tokens + 1) * (dim + 5), dim + 5, 1)
            return memory.as_strided(x.shape, place, 1).copy_(x)

        attention, attentive, gathered = ragged(queries=3, dtype=dtype), received(dtype=dtype), gathering(dtype=dtype)
        assert_same_bits(attend(attention), attend(attention | dict(query=spread(attention["query"]))))
        many = {name: spread(attentive[name]) for name in ("query", "keys")}
        assert_same_bits(receive(attentive), receive(attentive | many))
        wider = torch.ones(2, 99, dtype=torch.bool)
        wider[:, 7:77] = attentive["visible"]
        assert_same_bits(receive(attentive), receive(attentive | dict(visible=wider[:, 7:77])))
        many = {name: spread(gathered[name]) for name in ("keys", "values")}
        for name in GATHERING[5:]:
            assert_same_bits(gather(gathered)[name], gather(gathered | many)[name])
        one = {name: attentive[name][:1] for name in ("query", "keys", "visible")}
        many = {name: x.expand(3, *x.shape[1:]) for name, x in one.items()} | dict(visible=one["visible"].repeat(3, 1))
        for row in receive(attentive | many):
            assert_same_bits(row, receive(attentive | one)[0])

    @all_dtypes
    def test_same_bits_whatever_the_threads(self, dtype):
        """And from run to run."""
        before = torch.get_num_threads()
        attentions = [ragged(1, 2, 4, 1, 6000, dtype=dtype), ragged(3, 2, 2, 40, 900, dtype=dtype)]
        attentive, gathered = received(2, 3, 2, 400, 300, dtype=dtype), gathering(3, 4, 900, 800, dtype=dtype)
        results = []
        try:
            for threads in (1, 1) if ON_CUDA else (1, 2, 3, 1):
                torch.set_num_threads(threads)
                written = [gather(gathered)[name] for name in GATHERING[5:]]
                results.append([*map(attend, attentions), receive(attentive), *written])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for one, another in zip(results[0], other):
                assert_same_bits(one, another)

    def test_what_is_gathered_is_attended(self):
        """A whole cache, pruned, and what the queries would have seen of it under a mask."""
        gathered = gathering(2, 3, 80, 50, seed=4)
        given = gather(gathered)
        query = Draw(9).normal(2, 6, 1, 64)
        output = attend(dict(zip(RAGGED, (query, *(given[name] for name in ("kept_keys", "kept_values", "starts",
                        "lengths")), torch.empty(0), 0.125))))  # fmt: skip
        mask = torch.zeros(2, 3, 1, 80, dtype=torch.bool)
        for row in range(2):
            for head in range(3):
                mask[row, head, 0, given["index"][row, head, : int(given["lengths"][row, head])].long()] = True
        whole = [given[name].repeat_interleave(2, 1) for name in ("keys", "values")]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, *whole, attn_mask=mask.repeat_interleave(2, 1)
        ).transpose(1, 2)
        assert given["lengths"].min() > 0
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


@of_the_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


@of_cuda
class TestOfCuda:
    """What the kernels for CUDA do otherwise. Run on fibers too."""

    def test_heads_that_are_not_in_the_cache_are_ignored(self):
        """They write nothing and have nothing, and the others are what they were."""
        for name, value in (("starts", -1), ("starts", 2**31 - 1), ("lengths", -1), ("lengths", 2**31 - 1)):
            given = ragged(2, 2, 3, 2)
            sound, broken = attend(given), copy(given)
            broken[name][0, 1] = value
            output = attend(broken)
            assert not output[0, :, 3:].any()
            output[0, :, 3:] = sound[0, :, 3:]
            assert_same_bits(output, sound)
            given = gathering()
            broken = copy(given)
            broken[name][0, 1] = value
            others = copy(given)
            others["lengths"][0, 1] = 0
            assert_same_bits(gather(broken)["kept_keys"], gather(others)["kept_keys"])

    def test_tokens_that_are_none_are_ignored(self):
        given = gathering()
        row, head = (given["lengths"] > 0).nonzero()[0].tolist()
        slot = int(given["starts"][row, head])
        for token in (-1, 40, 2**31 - 1, -(2**31)):
            broken = copy(given)
            broken["index"][row, head, 0] = token
            for name in ("kept_keys", "kept_values"):
                wanted = gather(given)[name]
                wanted[slot] = torch.nan
                assert_same_bits(gather(broken)[name], wanted)

    def test_queries_of_no_token_do_not_count(self):
        given = received(padded=False)
        few = given | {"query": given["query"][:, :, :7], "positions": given["positions"][:7].contiguous()}
        for position in (-1, 70, 2**31 - 1, -(2**31)):
            broken = copy(given)
            broken["positions"][7:] = position
            assert_same_bits(receive(broken), receive(few))

    def test_what_does_not_fit_is_named(self):
        """Heads too wide for shared memory: refused by name, and the next call works."""
        for op, given in (
            ("ragged_attention", ragged(1, 1, 1, 1, 2, 100_000)),
            ("attention_received", received(1, 1, 1, 1, 2, 100_000)),
        ):
            with pytest.raises(RuntimeError, match=f"whisperkv::{op}: "):
                call(op, given)
            CHECKS[op](PROBLEMS[op]())


# What keeps the bounds honest


@all_dtypes
@pytest.mark.parametrize("wrong", ["scale", "bias", "lengths", "values", "group"])
def test_the_bounds_are_tight_enough(wrong, dtype):
    given = ragged(queries=2, dtype=dtype)
    change = {
        "scale": lambda: dict(scale=given["scale"] * 1.1),
        "bias": lambda: dict(bias=torch.zeros_like(given["bias"])),
        "lengths": lambda: dict(lengths=given["lengths"] - 1),
        "values": lambda: dict(values=given["values"].roll(1, 1)),
        "group": lambda: dict(query=given["query"].roll(1, 1)),
    }[wrong]()
    with pytest.raises(AssertionError):
        assert_near(given, attend(given | change, reference), attend(given, reference))


# Calls


def shifted(tensor):
    memory = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=1).view(tensor.shape)


def set_one(place, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def unlike(x):
    return x.mT.contiguous().mT


PROBLEMS = {"gather_kept": gathering, "ragged_attention": ragged, "attention_received": received}
CHECKS = {"gather_kept": check_gathered, "ragged_attention": check_attended, "attention_received": check_received}
NO_SCALE = [("scale", lambda _, x=x: x, "scale must be finite") for x in (float("nan"), float("inf"), 1e300)]
BAD = {
    "gather_kept": [
        ("keys", torch.Tensor.double, "keys must be float32, bfloat16 or float16, got float64"),
        ("keys", lambda t: t[0], r"\[rows, kv_heads, tokens, dim\], got \[3, 40, 64\]"),
        ("keys", lambda t: t[:, :, :0], r"no side but rows empty, got \[2, 3, 0, 64\]"),
        ("keys", unlike, "keys must have rows whose numbers lie side by side, .* contiguous()"),
        ("keys", shifted, "keys must begin at a multiple of 4 bytes"),
        ("values", torch.Tensor.half, "values must be float32, got float16"),
        ("values", resized(2), r"tokens=40, dim=64\], got \[2, 3, 41, 64\]"),
        ("values", unlike, "values must have rows whose numbers lie side by side"),
        ("index", torch.Tensor.long, "index must be int32, got int64"),
        ("index", resized(1), r"\[rows=2, kv_heads=3, most\], got \[2, 4, 17\]"),
        ("index", strided, "index must be contiguous"),
        *(
            ("index", set_one((1, 2, 0), n), rf"index 0 of row 1, head 2 must be one of 40 tokens, got {n}")
            for n in (40, -1, 2**31 - 1, -(2**31))
        ),
        ("starts", torch.Tensor.long, "starts must be int32, got int64"),
        ("starts", resized(0), r"\[rows=2, kv_heads=3\], got \[3, 3\]"),
        ("starts", set_one((1, 0), -1), r"start of row 1, head 0 must be in 0\.\.\d+ to leave room .* got -1"),
        ("starts", set_one((0, 1), 2**31 - 1), r"start of row 0, head 1 must be in 0\.\.\d+ to leave room .* got 21"),
        ("starts", torch.zeros_like, "starts give slot 0 to row ., head . and to row ., head .: each must have slots"),
        ("lengths", torch.Tensor.float, "lengths must be int32, got float32"),
        ("lengths", set_one((1, 1), 18), r"length of row 1, head 1 must be in 0\.\.17, got 18"),
        ("lengths", set_one((0, 0), -1), r"length of row 0, head 0 must be in 0\.\.17, got -1"),
        ("kept_keys", resized(1), r"\[slots, dim=64\], got \[\d+, 65\]"),
        ("kept_keys", torch.Tensor.bfloat16, "kept_keys must be float32, got bfloat16"),
        ("kept_keys", strided, "kept_keys must be contiguous"),
        ("kept_values", resized(0), r"\[slots=\d+, dim=64\], got \[\d+, 64\]"),
        ("kept_values", shifted, "kept_values must begin at a multiple of 4 bytes"),
    ],
    "ragged_attention": [
        ("query", torch.Tensor.double, "query must be float32, bfloat16 or float16, got float64"),
        ("query", lambda t: t[0], r"\[rows, heads, queries, dim\], got \[6, 1, 64\]"),
        ("query", lambda t: t[:, :5], "query must have heads that are a multiple of 2 kv_heads, got 5"),
        ("query", lambda t: t[:, :1], r"kv_heads must be in 1\.\.1, got 2"),
        ("query", lambda t: t.expand(2, 6, 5000, 64).transpose(1, 2), r"heads must be in 1\.\.4096, got 5000"),
        ("query", lambda t: t.expand(2, 6, 70000, 64), r"queries must be in 1\.\.65536, got 70000"),
        ("query", strided, "query must have rows whose numbers lie side by side"),
        ("query", shifted, "query must begin at a multiple of 4 bytes"),
        ("keys", torch.Tensor.half, "keys must be float32, got float16"),
        ("keys", resized(1), r"\[slots, dim=64\], got \[\d+, 65\]"),
        ("keys", strided, "keys must be contiguous"),
        ("values", resized(0), r"\[slots=\d+, dim=64\], got \[\d+, 64\]"),
        ("values", unlike, "values must be contiguous"),
        ("starts", resized(0), r"\[rows=2, kv_heads\], got \[3, 2\]"),
        ("starts", torch.Tensor.long, "starts must be int32, got int64"),
        ("starts", set_one((1, 1), 2**31 - 1), r"start of row 1, head 1 must be in 0\.\.\d+ to leave room"),
        ("starts", set_one((0, 0), -(2**31)), r"start of row 0, head 0 must be in 0\.\.\d+ to leave room"),
        ("lengths", resized(1), r"\[rows=2, kv_heads=2\], got \[2, 3\]"),
        ("lengths", set_one((1, 0), 2**31 - 1), r"length of row 1, head 0 must be in 0\.\.\d+, got 2147483647"),
        ("lengths", set_one((0, 1), -1), r"length of row 0, head 1 must be in 0\.\.\d+, got -1"),
        ("bias", torch.Tensor.double, "bias must be float32, got float64"),
        ("bias", resized(0), r"bias must be \[slots=\d+\], got"),
        ("bias", strided, "bias must be contiguous"),
        *NO_SCALE,
    ],
    "attention_received": [
        ("query", torch.Tensor.int, "query must be float32, bfloat16 or float16, got int32"),
        ("query", lambda t: t[:, :, :0], r"no side but rows empty, got \[2, 6, 0, 64\]"),
        ("query", lambda t: t[:, :3], "query must have heads that are a multiple of 2 kv_heads, got 3"),
        ("query", lambda t: t[:, :1].expand(2, 5000, 10, 64), r"heads must be in 1\.\.4096, got 5000"),
        ("query", strided, "query must have rows whose numbers lie side by side"),
        ("query", shifted, "query must begin at a multiple of 4 bytes"),
        ("positions", torch.Tensor.long, "positions must be int32, got int64"),
        ("positions", resized(0), r"\[queries=10\], got \[11\]"),
        ("positions", strided, "positions must be contiguous"),
        *(
            ("positions", set_one(3, n), rf"positions of query 3 must be one of 70 tokens, got {n}")
            for n in (70, -1, 2**31 - 1, -(2**31))
        ),
        ("keys", torch.Tensor.bfloat16, "keys must be float32, got bfloat16"),
        ("keys", resized(0), r"\[rows=2, kv_heads, tokens, dim=64\], got \[3, 2, 70, 64\]"),
        ("keys", unlike, "keys must have rows whose numbers lie side by side"),
        ("visible", torch.Tensor.int, "visible must be uint8, got int32"),
        ("visible", resized(1), r"\[rows=2, tokens=70\], got \[2, 71\]"),
        ("visible", lambda t: unlike(t.bool()), "visible must have rows whose numbers lie side by side"),
        *NO_SCALE,
    ],
}


@pytest.mark.parametrize("op, argument, change, text", [(op, *bad) for op in BAD for bad in BAD[op]])
def test_bad_input(op, argument, change, text):
    """Named, refused, nothing written, and the next call works."""
    if ON_CUDA and re.search("of row|of query|starts give", text):
        pytest.skip(unchecked.kwargs["reason"])
    if DEVICE == "cuda" and change is shifted:
        pytest.skip("memory that is not torch's own")
    given = PROBLEMS[op]()
    for name in ("lengths", "starts"):
        if name in given and op == "gather_kept":
            given["lengths"].clamp_(min=1)
            given["starts"][:] = torch.arange(6).view(2, 3) * 17
            given["kept_keys"], given["kept_values"] = torch.zeros(2, 6 * 17, 64)
            given["index"].clamp_(min=0)
    bad = copy(given)
    bad[argument] = change(bad[argument])
    before = copy(bad)
    with pytest.raises(RuntimeError, match=text) as error:
        call(op, bad)
    assert f"whisperkv::{op}: " in str(error.value)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(bad[name], value)
    CHECKS[op](given)


@unchecked
def test_slots_of_two_heads_overlap_by_one():
    given = gathering(1, 2, 40, 10)
    given["lengths"][:] = 10
    given["index"][:] = torch.arange(10)
    given["kept_keys"], given["kept_values"] = torch.zeros(2, 30, 64)
    for starts, slot in (((5, 14), 14), ((14, 5), 14), ((3, 3), 3)):
        given["starts"][:] = torch.tensor(starts)
        with pytest.raises(RuntimeError, match=f"starts give slot {slot} to row 0, head . and to row 0, head ."):
            gather(given)
    given["starts"][:] = torch.tensor([5, 15])
    check_gathered(given)
    given["starts"][:], given["lengths"][0, 1] = torch.tensor([5, 7]), 0  # which owns nothing
    check_gathered(given)


@pytest.mark.parametrize("written, other", [("kept_keys", "kept_values"), ("kept_values", "index"),
                                            ("kept_keys", "starts"), ("kept_values", "lengths")])  # fmt: skip
def test_memory_that_is_written_is_not_shared(written, other):
    if DEVICE == "cuda":
        pytest.skip("views of bytes, moved one by one")
    given = gathering()
    given[written], given[other] = sharing(given[written], given[other], 4)
    with pytest.raises(RuntimeError, match="must have memory of its own, as it is written to, and shares") as error:
        call("gather_kept", given)
    assert written in str(error.value) and other in str(error.value)


def test_a_cache_is_not_gathered_into_itself():
    memory = torch.zeros(2, 40, 3, 64)
    given = gathering()
    given["keys"] = memory.transpose(1, 2)
    for kept in (memory.view(-1, 64)[-len(given["kept_keys"]) :], memory.view(-1, 64)[: len(given["kept_keys"])]):
        with pytest.raises(RuntimeError, match="kept_values must have memory of its own.*shares some with keys"):
            call("gather_kept", given | dict(kept_values=kept))


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("change", [lambda t: t.to("meta"), torch.Tensor.to_sparse], ids=["meta", "sparse"])
def test_not_a_plain_cpu_tensor(op, change):
    for name in ARGUMENTS[op]:
        given = PROBLEMS[op]()
        if isinstance(given[name], torch.Tensor):
            with pytest.raises((RuntimeError, NotImplementedError), match=op):
                call(op, given | {name: change(given[name].nan_to_num())})


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_gradients_are_refused(op, leaf):
    for name in ARGUMENTS[op]:
        given = PROBLEMS[op]()
        if not isinstance(given[name], torch.Tensor) or not given[name].is_floating_point():
            continue
        tensor = given[name].nan_to_num().requires_grad_()
        bad = given | {name: tensor if leaf else tensor * 2}
        with pytest.raises(RuntimeError, match=rf"{name} requires grad.*torch\.no_grad\(\)"):
            call(op, bad)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                call(op, copy(bad))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("op", ["ragged_attention", "attention_received"])
def test_functional_transforms_are_refused(op, transform):
    given = on_device(PROBLEMS[op]())
    total = lambda x: call(op, given | dict(query=x)).sum()  # noqa: E731
    check_transform_is_refused(transform, total, given["query"])


def test_many_threads_at_once():
    attentions = [ragged(2, 2, 3, 1 + seed, 800, seed=seed) for seed in range(6)]
    attentive = [received(2, 2, 2, 30, 100, seed=seed) for seed in range(6)]

    def repeated(number):
        for _ in range(10):
            results = attend(attentions[number]), receive(attentive[number])
        return results

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(repeated, range(6)))
    for pair, other in zip(together, map(repeated, range(6))):
        for one, another in zip(pair, other):
            assert_same_bits(one, another)


@unchecked
def test_another_thread_writes_what_is_checked():
    """Each call is refused or sees what is sound; and whatever stands in the index by the time that tokens are moved,
    nothing is written where it does not belong."""
    gathered, attention, attentive = gathering(20, 4, 300, 200), ragged(20, 2, 2, 3, 200), received(20, 2, 2, 20, 100)
    guard = 1 << 16
    for name in GATHERING[5:]:
        memory = torch.full((gathered[name].numel() + 2 * guard,), 77.0)
        gathered[name] = memory[guard:-guard].view(gathered[name].shape)
    problems = [(gathered, GATHERING[2:5]), (attention, RAGGED[3:5]), (attentive, RECEIVED[1:2])]
    sound = [{name: given[name].clone() for name in names} for given, names in problems]
    outputs, done, calls = (attend(attention), receive(attentive)), threading.Event(), [0, 0, 0]

    def scribble():
        while not done.is_set():
            for spread in (2**31, 300, None):
                for (given, names), state in zip(problems, sound):
                    for name in names:
                        wild = state[name] if spread is None else torch.randint(-spread, spread, state[name].shape)
                        given[name].copy_(wild)
                time.sleep(0.002)  # so that some calls find all sound

    with ThreadPoolExecutor(1) as pool:
        pool.submit(scribble)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for number, op in enumerate(ARGUMENTS):
                try:
                    result = run(getattr(ops, op), [problems[number][0][name] for name in ARGUMENTS[op]])
                except RuntimeError as error:
                    assert re.search("of row|of query|starts give", str(error))
                    continue
                calls[number] += 1
                if number:
                    assert result.shape == outputs[number - 1].shape
        done.set()
    assert min(calls) > 0
    for name in GATHERING[5:]:
        memory = memory_of(gathered[name])
        assert (memory[:guard] == 77).all() and (memory[-guard:] == 77).all()


@counts_bytes
@torch.no_grad()
def test_no_leak():
    small = {
        "gather_kept": (gathering(1, 1, 3, 2, 8), "index", 9),
        "ragged_attention": (ragged(1, 1, 1, 1, 3, 8), "starts", -9),
        "attention_received": (received(1, 1, 1, 1, 3, 8), "positions", 9),
    }
    for op, (good, name, wrong) in small.items():
        if op == "gather_kept":
            good["lengths"].fill_(1)
            good["index"].clamp_(min=0)
            good["kept_keys"], good["kept_values"] = torch.zeros(2, 9, 8)
        good = on_device(good)
        bad = good | {name: torch.full_like(good[name], wrong)}
        if ON_CUDA:  # which cannot check those
            bad = good | dict(zip(ARGUMENTS[op], [good[ARGUMENTS[op][0]].double()]))

        def refused(op=op, bad=bad):
            with pytest.raises(RuntimeError):
                call(op, bad)

        for each in (lambda op=op, good=good: call(op, good), refused):
            assert not grows(each)


@of_the_cpu
def test_the_times_of_the_ops_are_taken():
    script = Path(__file__).parents[1] / "benchmarks" / "prune_ops.py"
    few = "--rounds 2 --tokens 50 --layers 2 --heads 4 --kv-heads 2 --dim 8 --queries 9 --threads 1".split()
    ran = subprocess.run([sys.executable, str(script), *few], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("\n| float32 | 1 |") == ran.stdout.count("\n| bfloat16 | 1 |") == 3


# Compilers


def finite(given):
    """Without NaN, which opcheck would not find equal to itself."""
    return {name: x.nan_to_num() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize(
    "op, changes",
    [
        ("gather_kept", dict()), ("gather_kept", dict(dtype=torch.bfloat16, turned=False)),
        ("ragged_attention", dict()), ("ragged_attention", dict(bias=False, queries=4)),
        ("ragged_attention", dict(dtype=torch.float16, group=1)),
        ("attention_received", dict()), ("attention_received", dict(dtype=torch.bfloat16, turned=False)),
    ],
    ids=str,
)  # fmt: skip
def test_opcheck_compile(op, changes):
    given = on_device(finite(PROBLEMS[op](**changes)))
    torch.library.opcheck(getattr(ops, op), [given[name] for name in ARGUMENTS[op]])


def test_opcheck_compile_of_bools():
    given = on_device(finite(received()))
    given["visible"] = given["visible"].bool()
    torch.library.opcheck(ops.attention_received, [given[name] for name in RECEIVED])


def pruned(given, attentive, query):
    """A prefill's scores, what is kept, and a step over it, with something between for a compiler to move."""
    scores = ops.attention_received(*(attentive[name] for name in RECEIVED))
    ops.gather_kept(*(given[name] for name in GATHERING))
    output = ops.ragged_attention(
        query * 2, given["kept_keys"], given["kept_values"], given["starts"], given["lengths"], torch.empty(0), 0.1
    )
    return scores * 2, output + 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_compile(dynamic):
    """With the backend that works out every shape, but writes no code."""
    torch._dynamo.reset()
    compiled = torch.compile(pruned, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (50, 70):
        given, attentive = finite(gathering(tokens=tokens)), finite(received(tokens=tokens))
        query, mine = torch.randn(2, 6, 1, 64), copy(given)
        torch.testing.assert_close(compiled(given, attentive, query), pruned(mine, attentive, query))
        assert_same_bits(given["kept_keys"], mine["kept_keys"])


@torch.no_grad()
def test_export_compile():
    class Step(torch.nn.Module):
        def forward(self, given, attentive, query):
            return pruned(given, attentive, query)

    given, attentive, query = finite(gathering()), finite(received()), torch.randn(2, 6, 1, 64)
    exported = torch.export.export(Step(), (given, attentive, query))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert all(f"whisperkv.{op}.default" in targets for op in ARGUMENTS)
    torch.testing.assert_close(exported.module()(given, attentive, query), pruned(copy(given), attentive, query))


@pytest.mark.parametrize(
    "op, argument, change, text",
    [
        ("gather_kept", "keys", lambda t: t[0], r"keys must be .*\[rows, kv_heads, tokens, dim\] on cpu, got"),
        ("gather_kept", "index", torch.Tensor.long, "index must be torch.int32 .* got torch.int64"),
        ("gather_kept", "kept_values", resized(1), r"kept_values must be .* with dim=64, got"),
        ("ragged_attention", "query", torch.Tensor.half, "keys must be torch.float16 .* got torch.float32"),
        ("ragged_attention", "lengths", resized(1), "lengths must be .* with kv_heads=2, got"),
        ("ragged_attention", "bias", resized(0), r"bias must be .* with slots=\d+, got"),
        ("ragged_attention", "query", lambda t: t[:, :5], "query must have heads that are a multiple of 2 kv_heads"),
        ("attention_received", "positions", resized(0), "positions must be .* with queries=10, got"),
        ("attention_received", "visible", torch.Tensor.int, "visible must be torch.uint8 .* got torch.int32"),
        ("attention_received", "keys", resized(3), "keys must be .* with dim=64, got"),
        ("attention_received", "query", lambda t: t[:, :3], "query must have heads that are a multiple of 2 kv_heads"),
    ],
)
def test_a_compiler_is_told_what_is_wrong(op, argument, change, text):
    real = PROBLEMS[op]()
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in real.items()}
        given[argument] = change(given[argument])
        with pytest.raises(RuntimeError, match=text):
            call(op, given)


@pytest.mark.parametrize("op", ["ragged_attention", "attention_received"])
@all_dtypes
def test_fakes_have_the_sizes_of_the_real(op, dtype):
    real = PROBLEMS[op](dtype=dtype)
    with FakeTensorMode() as mode:
        faked = call(op, {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in real.items()})
        shape = faked.shape, faked.dtype, faked.stride()
    output = call(op, real)
    assert shape == (output.shape, output.dtype, output.stride())
