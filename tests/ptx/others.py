"""The kernels of self-attention, eviction and packing on PTX, against tests/reference.py."""

import numpy as np
import reference
import torch
from kernels import DTYPES, MANGLED, TOLERANCE, floats, program, rounded
from machine import Machine
from memory import GlobalMemory
from program import up
from structs import packed


def as_torch(x):
    return torch.from_numpy(x.copy())


def check_packing(frames, dim, group, length, bits, heads=2, dtype="float16"):
    draw = np.random.default_rng(frames)
    states, lengths = rounded(draw.standard_normal((1, frames, heads, dim)), dtype), np.array([length], np.int32)
    channels, tiles, groups = up(dim, 32), up(frames, 16) // 16, up(frames, group) // group
    memory, shape = GlobalMemory(), ((1, heads, tiles, 2 * bits, channels), (1, heads, groups, 2, channels))
    codes = memory.put(np.full(shape[0], 255, np.uint8))
    scales = memory.put(np.full(shape[1], np.nan, np.float32))
    struct = packed(
        "wkv_packing", audios=1, heads=heads, frames=frames, head_dim=dim, dtype=DTYPES.index(dtype), bits=bits,
        group=group, states=memory.put(states), lengths=memory.put(lengths), codes=codes, scales=scales,
    )  # fmt: skip
    kernel = program("pack").kernel(f"packI{MANGLED[dtype]}Li{bits}E")
    Machine(kernel, memory).run(struct, heads * groups * channels // 32, 256)
    wanted = reference.pack_frames(as_torch(floats(states)), as_torch(lengths), bits, group)
    assert (memory.get(codes, shape[0], np.uint8) == wanted[0].numpy()).all()
    assert (memory.get(scales, shape[1], np.float32) == wanted[1].numpy()).all()


def check_self_attention(dtype, dim, by_table=False, rows=2, tokens=1, heads=2, slots=40):
    """A row that appends and one that overwrites; by table, what either sees of another row's slots."""
    draw = np.random.default_rng(dim)
    normal = lambda *shape: rounded(draw.standard_normal(shape), dtype)  # noqa: E731
    query, key, value = (normal(rows, tokens, heads, dim) for _ in range(3))
    keys, values = normal(rows, heads, slots, dim), normal(rows, heads, slots, dim)
    cursor = np.array([[33, 37], [33, 5], [33, 90], [0, 0]], np.int32)
    sources = np.repeat(np.arange(rows, dtype=np.int32)[:, None], slots, 1)
    if by_table:
        sources[0, 7:20] = 1
    memory, table = GlobalMemory(), {}
    places = dict(keys=memory.put(keys), values=memory.put(values), output=memory.put(np.zeros_like(query)),
                  weights=memory.put(np.full((rows, heads, tokens, slots), np.nan, np.float32)))  # fmt: skip
    if by_table:
        table["sources"] = memory.put(sources)
    struct = packed(
        "wkv_attention", rows=rows, tokens=tokens, heads=heads, kv_heads=heads, slots=slots, head_dim=dim,
        dtype=DTYPES.index(dtype), query=memory.put(query), key=memory.put(key), value=memory.put(value),
        cursor=memory.put(cursor), scale=dim**-0.5, **places, **table,
    )  # fmt: skip
    kernel = program("self").kernel(f"attendI{MANGLED[dtype]}Lb{int(by_table)}E")
    shared = 4 * (slots + dim + 16 * 64) + (4 * slots if by_table else 0)
    aligned = dim * query.itemsize % 16 == 0
    Machine(kernel, memory).run(struct + bytes([aligned]), rows * heads, 128, shared)

    given = [*(as_torch(floats(x)) for x in (query, key, value, keys, values)), as_torch(cursor)]
    wanted, weights = reference.compact_attention(*given, as_torch(sources), dim**-0.5, True)
    output = floats(memory.get(places["output"], query.shape, query.dtype))
    assert np.abs(output - wanted.numpy()).max() < TOLERANCE[dtype]
    got = memory.get(places["weights"], weights.shape, np.float32)
    assert np.abs(got - weights.numpy()).max() < 1e-5
    for row in range(rows):  # the new token is in its slot
        slot = cursor[reference.LIVE + 1, row]
        held = memory.get(places["keys"], keys.shape, keys.dtype)[row, :, slot]
        assert (held == key[row, 0]).all()


def check_eviction(policy, rows=2, heads=2, slots=96, dim=20, budget=70, dtype="float16"):
    """Rows under the budget and at it."""
    draw = np.random.default_rng(policy)
    weights = draw.random((rows, heads, 1, slots), np.float32)
    keys = rounded(draw.standard_normal((rows, heads, slots, dim)), dtype)
    scores = draw.random((rows, slots), np.float32)
    cursor = np.array([[69, 70], [69, 12], [69, 200], [3, 3]], np.int32)
    positions = np.stack([draw.permutation(slots) for _ in range(rows)]).astype(np.int32)
    memory = GlobalMemory()
    places = dict(cursor=memory.put(cursor), positions=memory.put(positions), scores=memory.put(scores))
    struct = packed(
        "wkv_eviction", rows=rows, tokens=1, heads=heads, slots=slots, head_dim=dim, dtype=DTYPES.index(dtype),
        weights=memory.put(weights), keys=memory.put(keys), policy=policy, budget=budget, recent=8, decay=0.95,
        **places,
    )  # fmt: skip
    Machine(program("self").kernel(f"evictI{MANGLED[dtype]}E"), memory).run(struct, rows, 128)
    wanted = [as_torch(x) for x in (cursor, positions, scores)]
    reference.score_evict(as_torch(weights), as_torch(floats(keys)), *wanted, policy, budget, 8, 0.95)
    for (name, place), expected, before in zip(places.items(), wanted, (cursor, positions, scores)):
        got = memory.get(place, before.shape, before.dtype)
        assert np.allclose(got[..., :69], expected.numpy()[..., :69], rtol=1e-5), name
