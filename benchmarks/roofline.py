"""What a GPU could do at best: computed from bytes and operations, not measured. Prints Markdown.

A time is the bytes that must be read over the bandwidth, or the multiplications and additions over the rate of the
matrix units, whichever is longer, both from the data sheets. The first table adds what our kernels of cross-attention
ask of a multiprocessor for a tile: instructions and accesses to shared memory as tests/ptx counted them in the PTX
(the machine's own instructions are rather fewer), and products on the matrix units. Two assumptions, in columns of
their own: for each kernel transformers spends HOST in Python and dispatch, and a kernel in a replayed graph takes
KERNEL at least. Left out: beams that change places, for which transformers copies both its caches at every step.
"""

import argparse

import models

from whisperkv import CrossConfig
from whisperkv.config import FORMATS

CARDS = {  # bytes a second, operations a second in dense bfloat16, bytes of memory
    "H200": (4.8e12, 989e12, 141e9),
    "A100 80 GB": (2.04e12, 312e12, 80e9),
    "RTX 4090": (1.01e12, 165e12, 24e9),
    "L4": (0.3e12, 121e12, 24e9),
}
PROCESSORS = {  # multiprocessors, cycles a second
    "H200": (132, 1.83e9),
    "A100 80 GB": (108, 1.41e9),
    "RTX 4090": (128, 2.52e9),
    "L4": (58, 2.04e9),
}
ISSUED, MULTIPLIED = 4, 2 * 16 * 8 * 16  # instructions of a warp a cycle; operations of one matrix product
TILES = {  # frames; before and now: instructions, wavefronts of shared memory, matrix products of one head or latent
    "model": (64, (3121, 762, 64), (760, 256, 64)),
    "int8": (64, (5246, 1146, 64), (708, 128, 68)),
    "int4": (64, (4861, 1658, 64), (636, 64, 68)),
    "latent": (16, (17840, 3904, 640), (4394, 1332, 480)),  # large-v3, one row: 20 queries, before in two lots
    "latent_int8": (16, (27744, 5824, 640), (5148, 948, 480)),
    "latent_int4": (16, (25544, 8384, 640), (4590, 788, 480)),
}
FRAMES, PADDED, HEAD_DIM, TOKENS, VOCABULARY, NUMBER = 1500, 1504, 64, 64, 51866, 2  # bytes of a number
HOST, KERNEL, KERNELS = 20e-6, 2e-6, 22  # seconds, seconds, kernels a layer: the assumptions
THEIRS = "transformers"
WAYS, ASSUMED = (THEIRS, *FORMATS), (THEIRS, "model")


def cache(way, width):
    """Bytes that one layer reads of one audio: keys and values, or the latent that is both."""
    config = CrossConfig("model" if way == THEIRS else way)
    matrices = 1 if config.is_latent else 2
    if not config.bits:
        return matrices * FRAMES * width * NUMBER
    return matrices * width * (PADDED * config.bits // 8 + 8 * -(-FRAMES // config.group))


def attention(card, way, width, audios, beams):
    """Seconds of one layer's cross-attention. Of transformers: over the keys and values of every beam."""
    bandwidth, rate, _ = CARDS[card]
    rows, is_latent = audios * beams, way.startswith("latent")
    operations = 4 * rows * FRAMES * width * (width // HEAD_DIM if is_latent else 1)
    return max(cache(way, width) * (rows if way == THEIRS else audios) / bandwidth, operations / rate)


def bounds(card, way, version, width=1280):
    """Cycles that a tile takes of a multiprocessor at least: for memory, instructions, shared memory, products."""
    bandwidth, rate, _ = CARDS[card]
    count, clock = PROCESSORS[card]
    frames, *versions = TILES[way]
    instructions, wavefronts, products = versions[version]
    size = cache(way, width) * frames / FRAMES / (1 if way.startswith("latent") else width // HEAD_DIM)
    cycles = clock * count
    return size / bandwidth * cycles, instructions / ISSUED, wavefronts, products * MULTIPLIED / rate * cycles


def step(card, way, shape, audios, beams):
    """Seconds of one token through the decoder and the output head."""
    bandwidth, rate, _ = CARDS[card]
    name, layers = models.DECODERS[shape]
    width, rows = models.SHAPES[name][0], audios * beams
    numbers = weights(way, width, layers)
    products = max(numbers * NUMBER / bandwidth, 2 * rows * numbers / rate)
    tokens = 2 * layers * rows * TOKENS * width * NUMBER * (3 if way == THEIRS else 1)  # concatenation copies them
    return products + tokens / bandwidth + layers * attention(card, way, width, audios, beams)


def weights(way, width, layers):
    """Numbers in the matrices of a step: self-attention has 4 of a width squared, cross-attention 2, the rest 8."""
    return layers * (16 if way.startswith("latent") else 14) * width**2 + VOCABULARY * width


def likely(card, way, shape, audios, beams):
    """The same with the assumptions."""
    kernels = KERNELS * models.DECODERS[shape][1]
    return max(step(card, way, shape, audios, beams), kernels * (HOST if way == THEIRS else KERNEL))


def held(way, shape, audios, beams):
    """Bytes of both caches."""
    name, layers = models.DECODERS[shape]
    width = models.SHAPES[name][0]
    cross = cache(way, width) * (1 if way.startswith("latent") else layers) * (beams if way == THEIRS else 1)
    return audios * (cross + beams * 2 * layers * TOKENS * width * NUMBER)


def largest(card, way):
    """Batch of large-v3, greedy."""
    return int((CARDS[card][2] - NUMBER * weights(way, 1280, 32)) / held(way, "large-v3", 1, 1))


def table(heading, sides, columns, lines):
    print(f"\n{heading}\n\n| {' | '.join([*sides, *columns])} |\n|{'---|' * (len(sides) + len(columns))}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")


def limits(cards):
    """What the kernels could reach: the part of the bandwidth, if what takes longest were all that takes time."""
    for card in cards:
        for way in FORMATS:
            before, now = (bounds(card, way, version) for version in range(2))
            parts = [f"{min(1, each[0] / max(each)):.2f}" for each in (before, now)]
            yield card, way, *(f"{x:.0f} / {y:.0f}" for x, y in zip(before[1:], now[1:])), f"{now[0]:.0f}", *parts


def main(cards):
    print("**Computed, not measured**: bytes and operations over the data sheets' rates; float16, 64 tokens.")
    table(
        "Cycles of a multiprocessor for a tile at least (64 frames of a head, or 16 of a latent of large-v3 with its "
        "20 queries), before / now, and the part of the bandwidth that is left at best.",
        ("card", "format"),
        ("to issue instructions", "shared memory", "products", "memory", "before", "now"),
        limits(cards),
    )
    cases = [(card, audios, beams) for card in cards for audios, beams in ((32, 1), (32, 5))]
    table(
        "Cross-attention of a layer of large-v3, µs at best; transformers: over keys and values of every beam.",
        ("card", "batch", "beams"),
        WAYS,
        ((card, *case, *(f"{1e6 * attention(card, way, 1280, *case):.0f}" for way in WAYS)) for card, *case in cases),
    )
    decodes = [("large-v3", 1, 1), ("large-v3", 32, 1), ("large-v3", 32, 5), ("turbo", 1, 1), ("small", 1, 1)]
    times = [
        [card, *case]
        + [f"{1e3 * step(card, way, *case):.2f}" for way in WAYS]
        + [f"{1e3 * likely(card, way, *case):.2f}" for way in ASSUMED]
        for card in cards
        for case in decodes
    ]
    assumed = [f"{way}, assumed" for way in ASSUMED]
    table("A step, ms at best.", ("card", "model", "batch", "beams"), (*WAYS, *assumed), times)
    print(
        f"\nAssumed: {KERNELS} kernels a layer, each {1e6 * HOST:.0f} µs of Python and dispatch in transformers or "
        f"{1e6 * KERNEL:.0f} µs in a replayed graph of ours. Beams stay in place."
    )
    sizes = [[*case, *(f"{held(way, *case) / 1e6:.0f}" for way in WAYS)] for case in (decodes[0], decodes[2])]
    table("Both caches, MB.", ("model", "batch", "beams"), WAYS, sizes)
    batches = [[card, *(largest(card, way) for way in WAYS)] for card in cards]
    table("Largest batch of large-v3, by the decoder's weights and the caches alone.", ("card",), WAYS, batches)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", metavar="CARD", help=f"of {', '.join(CARDS)} (default: all)")
    chosen = parser.parse_args().cards or list(CARDS)
    if unknown := set(chosen) - set(CARDS):
        parser.error(f"no card {', '.join(unknown)}: choose from {', '.join(CARDS)}")
    main(chosen)
