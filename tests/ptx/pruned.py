"""The kernels of pruned caches on PTX, against tests/reference.py."""

import struct

import numpy as np
import reference
import torch
from kernels import DTYPES, MANGLED, TOLERANCE, floats, program, rounded
from machine import Machine
from memory import GlobalMemory
from others import as_torch
from program import up
from structs import packed

NONE = torch.empty(0)


def view(memory, x):
    """A wkv_view of [rows, heads, tokens, dim]."""
    return struct.pack("<4q", memory.put(x), *(step // x.itemsize for step in x.strides[:3]))


def run(name, dtype, memory, parameters, blocks, dynamic_bytes=0):
    Machine(program("prune").kernel(f"{name}I{MANGLED[dtype]}E"), memory).run(parameters, blocks, 128, dynamic_bytes)


def check_gathering(dtype, dim, rows=2, kv_heads=2, tokens=50, most=11):
    """A head that is not in the cache, one that keeps a token which is none, and two sound ones."""
    draw = np.random.default_rng(dim)
    keys, values = (rounded(draw.standard_normal((rows, kv_heads, tokens, dim)), dtype) for _ in range(2))
    index = np.sort(draw.permuted(np.tile(np.arange(tokens, dtype=np.int32), (rows * kv_heads, 1)), axis=1)[:, :most])
    index = index.reshape(rows, kv_heads, most)
    starts, lengths = np.array([[20, 5], [0, 31]], np.int32), np.array([[11, 9], [4, 10]], np.int32)
    kept = np.zeros((40, dim), keys.dtype)
    index[0, 0, 3] = tokens
    wanted = [as_torch(floats(kept)) for _ in range(2)]
    used = lengths.copy()
    used[1, 1] = 0
    sound = np.where(index < tokens, index, 0)
    given = [as_torch(floats(x)) for x in (keys, values)]
    reference.gather_kept(*given, *map(as_torch, (sound, starts, used)), *wanted)
    memory = GlobalMemory()
    places = dict(kept_keys=memory.put(kept), kept_values=memory.put(kept))
    parameters = packed(
        "wkv_gathering", rows=rows, kv_heads=kv_heads, tokens=tokens, most=most, slots=40, head_dim=dim,
        dtype=DTYPES.index(dtype), keys=view(memory, keys), values=view(memory, values), index=memory.put(index),
        starts=memory.put(starts), lengths=memory.put(lengths), **places,
    )  # fmt: skip
    run("gather", dtype, memory, parameters, rows * kv_heads)
    for place, expected in zip(places.values(), wanted):
        expected[23] = 0
        assert (floats(memory.get(place, kept.shape, kept.dtype)) == expected.numpy()).all()


def check_attention(dtype, dim, group, queries, ranges, biased, rows=2, kv_heads=2, slots=200):
    """Heads of some slots, of more, of none, and one that is not in the cache."""
    draw = np.random.default_rng(dim)
    query = rounded(draw.standard_normal((rows, kv_heads * group, queries, dim)), dtype)
    keys, values = (rounded(draw.standard_normal((slots, dim)), dtype) for _ in range(2))
    starts, lengths = np.array([[100, 3], [0, 190]], np.int32), np.array([[70, 90], [0, 30]], np.int32)
    bias = draw.standard_normal(slots).astype(np.float32)
    memory, shape = GlobalMemory(), (rows, queries, kv_heads * group, dim)
    lines = ranges * rows * queries * kv_heads * group
    output = memory.put(np.ones(shape, query.dtype))
    parameters = packed(
        "wkv_ragged_attention", rows=rows, heads=kv_heads * group, kv_heads=kv_heads, queries=queries, slots=slots,
        head_dim=dim, dtype=DTYPES.index(dtype), query=view(memory, query), keys=memory.put(keys),
        values=memory.put(values), starts=memory.put(starts), lengths=memory.put(lengths),
        bias=memory.put(bias) if biased else 0, output=output, scale=dim**-0.5, ranges=ranges,
        sums=memory.put(np.full((lines, dim), np.nan, np.float32)),
        totals=memory.put(np.full((lines, 2), np.nan, np.float32)),
    )  # fmt: skip
    shared = 4 * (2 * 32 * (dim + 1) + group * (2 * dim + 32) + 3 * group)
    run("attend", dtype, memory, parameters, rows * kv_heads * queries * ranges, shared)
    run("finish", dtype, memory, parameters, rows * queries * kv_heads * group)
    lengths[1, 1] = 0
    given = [as_torch(floats(x)) for x in (query, keys, values)]
    its = as_torch(bias) if biased else NONE
    wanted = reference.ragged_attention(*given, as_torch(starts), as_torch(lengths), its, dim**-0.5)
    got = floats(memory.get(output, shape, query.dtype))
    assert np.abs(got - wanted.numpy()).max() < TOLERANCE[dtype]


def check_received(dtype, dim, group, queries, tokens, rows=2, kv_heads=2):
    """Of a mask that is part of a wider one."""
    draw = np.random.default_rng(dim)
    query = rounded(draw.standard_normal((rows, kv_heads * group, queries, dim)), dtype)
    keys = rounded(draw.standard_normal((rows, kv_heads, tokens, dim)), dtype)
    positions = np.sort(draw.integers(0, tokens, queries)).astype(np.int32)
    visible = np.zeros((rows, tokens + 9), np.uint8)
    visible[:, :tokens] = draw.random((rows, tokens)) < 0.8
    positions[-1] = tokens  # which is none
    memory, shape = GlobalMemory(), (rows, kv_heads, tokens)
    received = memory.put(np.full(shape, np.nan, np.float32))
    numbers = group * queries
    parameters = packed(
        "wkv_received", rows=rows, heads=kv_heads * group, kv_heads=kv_heads, queries=queries, tokens=tokens,
        head_dim=dim, dtype=DTYPES.index(dtype), query=view(memory, query), positions=memory.put(positions),
        keys=view(memory, keys), visible=memory.put(visible), visible_row=tokens + 9, received=received,
        scale=dim**-0.5, sums=memory.put(np.full((rows, kv_heads, numbers, 2), np.nan, np.float32)),
    )  # fmt: skip
    shared = 4 * (16 * dim + 32 * (dim + 1))
    run("measure", dtype, memory, parameters, rows * kv_heads * (up(numbers, 16) // 16), shared)
    run("add_up", dtype, memory, parameters, rows * kv_heads * (up(tokens, 32) // 32), shared)
    few = as_torch(floats(query))[:, :, :-1], as_torch(positions)[:-1]
    wanted = reference.attention_received(*few, as_torch(floats(keys)), as_torch(visible)[:, :tokens], dim**-0.5)
    assert np.abs(memory.get(received, shape, np.float32) - wanted.numpy()).max() < 1e-5
