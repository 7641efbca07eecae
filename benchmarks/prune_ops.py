"""The ops of pruned caches, each alone: a decode step's attention over what is kept against torch's over all, the
attention that keys receive, and how fast kept tokens are gathered. Prints Markdown; medians, in turns.

A step reads the caches of several layers one after the other, so that none is in a processor's cache when it is read.
"""

import argparse
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch.nn.functional import scaled_dot_product_attention

from whisperkv import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NONE = torch.empty(0)


def in_turns(calls, rounds):
    """Median seconds of each, called one after the other and the other way round the next time."""
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = perf_counter()
            calls[name]()
            if turn:  # the first warms up
                times[name].append(perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def whole_caches(args, dtype):
    """Keys and values of each layer, [1, kv_heads, tokens, dim]."""
    shape = 1, args.kv_heads, args.tokens, args.dim
    return [tuple(torch.randn(shape).to(dtype) for _ in range(2)) for _ in range(args.layers)]


def choice(args, seed):
    """Which tokens a layer keeps: each head others, and some heads more than others."""
    draw = torch.Generator().manual_seed(seed)
    share = args.kept * (0.6 + 0.8 * torch.rand(args.kv_heads, generator=draw))
    lengths = (share / share.mean() * args.kept * args.tokens).int().clamp(1, args.tokens)[None]
    index = torch.zeros(1, args.kv_heads, int(lengths.max()), dtype=torch.int32)
    for head, length in enumerate(lengths[0].tolist()):
        index[0, head, :length] = torch.randperm(args.tokens, generator=draw)[:length].sort().values
    starts = (lengths.cumsum(1) - lengths).int()
    return index, starts, lengths


def kept_caches(args, caches):
    kept = []
    for layer, (keys, values) in enumerate(caches):
        index, starts, lengths = choice(args, layer)
        flat = [keys.new_empty(int(lengths.sum()), args.dim) for _ in range(2)]
        ops.gather_kept(keys, values, index, starts, lengths, *flat)
        kept.append((*flat, starts, lengths))
    return kept


def step(args, dtype):
    caches = whole_caches(args, dtype)
    kept = kept_caches(args, caches)
    group, scale = args.heads // args.kv_heads, args.dim**-0.5
    query = torch.randn(1, args.heads, 1, args.dim).to(dtype)
    repeated = [tuple(x.repeat_interleave(group, 1) for x in layer) for layer in caches[:2]]

    def ours():
        for keys, values, starts, lengths in kept:
            ops.ragged_attention(query, keys, values, starts, lengths, NONE, scale)

    def shared():
        for keys, values in caches:
            scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def of_repeated():  # already repeated, which transformers would do at every step
        for layer in range(args.layers):
            scaled_dot_product_attention(query, *repeated[layer % 2])

    def plain_read():
        for layer in kept:
            for x in layer[:2]:
                x.view(torch.float32).sum()

    times = in_turns({"ours": ours, "gqa": shared, "repeated": of_repeated, "read": plain_read}, args.rounds)
    best = min(times["gqa"], times["repeated"])
    size = sum(x.nbytes for layer in kept for x in layer[:2])
    return (
        f"| {1e3 * times['ours']:.2f} | {1e3 * times['gqa']:.2f} | {1e3 * times['repeated']:.2f} "
        f"| {best / times['ours']:.2f} | {size / times['ours'] / 1e9:.1f} | {size / times['read'] / 1e9:.1f} |"
    )


def gathering(args, dtype):
    (keys, values), (index, starts, lengths) = whole_caches(args, dtype)[0], choice(args, 0)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]  # as projections give them
    flat = [keys.new_empty(int(lengths.sum()), args.dim) for _ in range(2)]

    def indexed():
        for head, length in enumerate(lengths[0].tolist()):
            for x in turned:
                x[0, head].index_select(0, index[0, head, :length])

    times = in_turns(
        {
            "whole": lambda: ops.gather_kept(keys, values, index, starts, lengths, *flat),
            "turned": lambda: ops.gather_kept(*turned, index, starts, lengths, *flat),
            "torch": indexed,
        },
        args.rounds,
    )
    size = 2 * sum(x.nbytes for x in flat)
    return (
        f"| {1e3 * times['whole']:.2f} | {1e3 * times['turned']:.2f} | {1e3 * times['torch']:.2f} "
        f"| {size / times['turned'] / 1e9:.1f} |"
    )


def receiving(args, dtype):
    keys = whole_caches(args, dtype)[0][0]
    query = torch.randn(1, args.heads, args.queries, args.dim).to(dtype)
    positions = torch.linspace(0, args.tokens - 1, args.queries).int()
    visible = torch.ones(1, args.tokens, dtype=torch.bool)
    products = args.heads * args.dim * int((positions.long() + 1).sum())
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    call = partial(ops.attention_received, query, positions, keys, visible, args.dim**-0.5)
    times = in_turns({"ours": call, "matmul": lambda: a @ b}, max(args.rounds // 4, 2))
    rates = products / times["ours"] / 1e9, 2048**3 / times["matmul"] / 1e9
    return f"| {1e3 * times['ours']:.0f} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[0] / rates[1]:.2f} |"


TABLES = {
    "step": (step, ("ms", "SDPA, enable_gqa", "SDPA, repeated heads", "times as fast", "GB/s", "of a plain read")),
    "gather": (gathering, ("ms", "of transposed views", "torch, these", "GB/s read and written")),
    "received": (receiving, ("ms", "G products/s", "torch's matmul", "ratio")),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=15_000)
    parser.add_argument("--kept", type=float, default=0.3, help="share of the tokens")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=256, help="of which the attention received is summed")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{ops.ISA}, torch {torch.__version__}: {args.heads} heads, {args.kv_heads} KV heads of {args.dim}, ", end="")
    print(f"{args.tokens} tokens of which {args.kept:.0%} are kept, {args.layers} layers, {args.queries} queries")
    for table in args.tables:
        measure, columns = TABLES[table]
        print(f"\n| {table} | threads | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
        for dtype in args.dtypes:
            for threads in args.threads:
                torch.set_num_threads(threads)
                with torch.no_grad():
                    print(f"| {dtype} | {threads} {measure(args, DTYPES[dtype])}", flush=True)


if __name__ == "__main__":
    main()
