"""The table `ops` of gpu.py: each op alone."""

from functools import partial
from importlib.util import find_spec

import models
import torch
from device import by_turns, forget

from whisperkv import CrossConfig, ops
from whisperkv.config import FORMATS
from whisperkv.cross_cache import COUNTERS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FRAMES, HEAD_DIM = 1500, 64
PLAIN = 4 << 30  # bytes of a plain read
PEERS = ("sdpa", "sdpa_shared", "flash_attn")


def op(args):
    read = bandwidth(args)
    for shape, (name, _) in args.shapes.items():
        if shape == "turbo":
            continue  # its layers are those of large-v3
        heads = models.SHAPES[name][2]
        for dtype in DTYPES:
            for batch in args.batches if dtype != torch.float32 else args.batches[-2:-1]:
                for beams in args.beams:
                    label = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "beams": beams}
                    for case in (cross_case, self_case):
                        calls, sizes = case(batch, beams, heads, {"dtype": dtype, "device": args.device})
                        times = by_turns(calls, args.op_rounds, args.device)
                        yield from ({**label, **row} for row in op_rows(times, sizes, read))
                        del calls
                        forget()


def op_rows(times, sizes, read):
    """times: milliseconds by (op, way), of a peer by (peer, way) or for all ways by its name; sizes: bytes."""
    for (kind, way), size in sizes.items():
        us = 1e3 * times[kind, way]
        theirs = {peer: times.get((peer, way), times.get(peer)) for peer in PEERS}
        theirs = {peer: 1e3 * ms for peer, ms in theirs.items() if ms is not None and kind != "score_evict"}
        yield {
            "op": kind,
            "way": way,
            "us": us,
            **theirs,
            "folded": 1e3 * times["folded", way] if ("folded", way) in times else None,
            "gbps": size / us / 1e3,
            "read_gbps": read / 1e9,
            "share": size / us * 1e6 / read,
            "ratio": theirs["sdpa"] / us if theirs else None,
            "ratio_shared": theirs["sdpa_shared"] / us if "sdpa_shared" in theirs else None,
            "to_model": times[kind, "model"] / times[kind, way] if (kind, "model") in times else None,
        }


def bandwidth(args):
    """Bytes a second of the better of a plain read and a copy of some GB."""
    size = PLAIN >> (10 if args.quick else 0)
    source, target = torch.ones(2, size // 4, device=args.device)
    times = by_turns({"read": source.sum, "copy": partial(target.copy_, source)}, 5, args.device)
    return 1e3 * max(size / times["read"], 2 * size / times["copy"])


def cross_case(batch, beams, heads, like):
    """Calls over the cross-attention caches of one layer, and the bytes of each."""
    width, rows, device = heads * HEAD_DIM, batch * beams, like["device"]
    lengths = torch.full((batch,), FRAMES, dtype=torch.int32, device=device)
    owner = torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(beams)
    query, calls, sizes = torch.randn(rows, 1, heads, HEAD_DIM, **like), {}, {}
    for form in FORMATS:
        config = CrossConfig(form)
        sides = (1, width) if config.is_latent else (heads, HEAD_DIM)
        caches = [
            packed(torch.randn(batch, FRAMES, *sides, **like), lengths, config)
            for _ in range(1 if config.is_latent else 2)
        ]
        (keys, key_scales), (values, value_scales) = caches[0], caches[-1]
        counters = torch.zeros(batch * COUNTERS, dtype=torch.int32, device=device)
        attend = partial(attend_cache, keys, values, key_scales, value_scales, owner, lengths, counters, config.group)
        asked = torch.randn(rows, heads, 1, width, **like) if config.is_latent else query
        calls["cross_attention", form] = partial(attend, asked)
        sizes["cross_attention", form] = sum(part.nbytes for cache in caches for part in cache)
        if config.is_latent:
            calls["folded", form] = partial(folded, attend, query, torch.randn(heads, HEAD_DIM, width, **like))
    keys, values = torch.randn(2, batch, heads, FRAMES, HEAD_DIM, **like)
    shared = query.view(batch, beams, heads, HEAD_DIM)  # the beams are queries over one cache
    calls["sdpa_shared"] = partial(sdpa, shared.transpose(1, 2), keys, values)
    calls |= flash_calls("flash_attn", shared, keys, values)
    keys, values = (each.repeat_interleave(beams, 0) for each in (keys, values))
    calls["sdpa"] = partial(sdpa, query.transpose(1, 2), keys, values)
    return calls, sizes


def packed(states, lengths, config):
    """Data and scales of a cache, of states [audios, frames, heads, head_dim]."""
    if config.bits:
        return ops.pack_frames(states, lengths, config.bits, config.group)
    return states.transpose(1, 2).contiguous(), torch.empty(0, device=states.device)


def attend_cache(keys, values, key_scales, value_scales, owner, lengths, counters, group, query):
    scale, bias = query.shape[-1] ** -0.5, query.new_empty(0, dtype=torch.float32)
    return ops.cross_attention(
        query, keys, values, key_scales, value_scales, owner, lengths, bias, counters, FRAMES, group, scale, False
    )[0]  # fmt: skip


def folded(attend, query, weight):
    """The latent formats as a layer has them: the query times Wk before the op, and Wv after it."""
    rows, _, heads, _ = query.shape
    asked = (query[:, 0].transpose(0, 1) @ weight).transpose(0, 1).contiguous()  # [rows, heads, width]
    mixed = attend(asked[:, :, None]).view(rows, heads, -1)
    return mixed.transpose(0, 1) @ weight.transpose(1, 2)


def self_case(batch, beams, heads, like):
    """Over all the tokens that Whisper can hold, and over a budget of 96, whose weights an eviction reads."""
    rows, calls, sizes = batch * beams, {}, {}
    integers = {"dtype": torch.int32, "device": like["device"]}
    for way, slots, evicts in (("448 slots", 448, False), ("96 slots", 96, True)):
        keys, values = torch.randn(2, rows, heads, slots, HEAD_DIM, **like)
        query, key, value = torch.randn(3, rows, 1, heads, HEAD_DIM, **like)
        cursor = torch.tensor([[slots], [0], [slots], [0]], **integers).repeat(1, rows)  # full: slot 0 is written
        slots_of_rows = cursor.new_empty(0, 0)  # each row has its own
        attend = partial(
            ops.compact_attention, query, key, value, keys, values, cursor, slots_of_rows, HEAD_DIM**-0.5, evicts
        )
        calls["compact_attention", way] = attend
        sizes["compact_attention", way] = keys.nbytes + values.nbytes
        calls["sdpa", way] = partial(sdpa, query.transpose(1, 2), keys, values)
        calls |= flash_calls(("flash_attn", way), query, keys, values)
        if evicts:
            weights, scores = attend()[1], torch.rand(rows, slots, device=like["device"])
            positions = torch.arange(slots, **integers).repeat(rows, 1)
            calls["score_evict", way] = partial(
                ops.score_evict, weights, keys, cursor, positions, scores, 0, slots, 64, 0.95
            )
            sizes["score_evict", way] = weights.nbytes + positions.nbytes + 2 * scores.nbytes
    return calls, sizes


def sdpa(query, keys, values):
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values)


def flash_calls(key, query, keys, values):
    """flash_attn over the same, where it is installed and takes the dtype."""
    if find_spec("flash_attn") is None or query.dtype == torch.float32 or query.device.type == "cpu":
        return {}
    from flash_attn import flash_attn_with_kvcache

    keys, values = (each.transpose(1, 2).contiguous() for each in (keys, values))  # [rows, slots, heads, head_dim]
    return {key: partial(flash_attn_with_kvcache, query, keys, values)}
