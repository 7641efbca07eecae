"""Problems for the kernels of csrc/cuda, run on PTX and held against plain NumPy. As in the launches there, grids and
sizes of shared memory are worked out here once more: one that is wrong is found out as a value or a fault."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
from machine import Machine
from memory import WARP, GlobalMemory
from program import Program, up
from structs import packed

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
NVCC = shutil.which("nvcc") or (os.path.exists("/usr/local/cuda/bin/nvcc") and "/usr/local/cuda/bin/nvcc")
MANGLED = {"float32": "f", "bfloat16": "8bfloat16", "float16": "7float16"}
DTYPES = list(MANGLED)  # in the order of enum wkv_dtype
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1.5e-3}


@functools.cache
def ptx(name):
    """The text of a file of kernels."""
    command = [NVCC, "-arch=sm_90", "-std=c++17", "-O3", "-lineinfo", "-ptx", SOURCES / f"{name}.cu", "-o", "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def program(name):
    return Program(ptx(name))


# ---- numbers of a model's dtype as NumPy holds them: bfloat16 as the upper halves of floats ----


def rounded(x, dtype):
    if dtype != "bfloat16":
        return x.astype(dtype)
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (word + 0x7FFF + (word >> 16 & 1) >> 16).astype(np.uint16)


def floats(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


# ---- a packed cache ----


def make_codes(draw, audios, heads, frames, dim, bits, group):
    """Codes and scales as pack_frames makes them, and the floats that they stand for."""
    channels, tiles, groups = up(dim, 32), up(frames, 16) // 16, up(frames, group) // group
    codes = draw.integers(0, 1 << bits, (audios, heads, tiles * 16, channels), dtype=np.uint8)
    scales = draw.random((audios, heads, groups, 2, channels), np.float32) + 0.5
    scales[..., 0, :] *= 4 / (1 << bits)
    scales[..., 1, :] *= -2
    scales[..., dim:] = 0
    step, least = (np.repeat(scales[..., i, :], group, 2)[:, :, : tiles * 16] for i in range(2))
    numbers = (codes[:, :, : step.shape[2]] * step + least)[:, :, :frames, :dim]
    return layout(codes, bits), scales, numbers


def layout(codes, bits):
    """[tiles, channels / 4, 16, 4]; of 4 bits [tiles, channels / 8, 16, 4] with the next four in the high halves."""
    audios, heads, frames, channels = codes.shape
    if bits == 8:
        quads = codes.reshape(audios, heads, frames // 16, 16, channels // 4, 4)
        return np.ascontiguousarray(quads.swapaxes(3, 4))
    quads = codes.reshape(audios, heads, frames // 16, 16, channels // 8, 2, 4)
    return np.ascontiguousarray((quads[..., 0, :] | quads[..., 1, :] << 4).swapaxes(3, 4))


def make_mixed(draw, audios, heads, frames, bits, group):
    """The same of mixed bits, of each block of 32 channels so many."""
    tiles, groups, its = up(frames, 16) // 16, up(frames, group) // group, np.repeat(bits, 32)
    codes = (draw.random((audios, heads, tiles * 16, len(its))) * 2**its).astype(np.uint8)
    scales = draw.random((audios, heads, groups, 2, len(its)), np.float32) + 0.5
    scales *= np.stack([4 / 2**its, np.full(len(its), -2)]).astype(np.float32)
    step, least = (np.repeat(scales[..., i, :], group, 2)[:, :, :frames] for i in range(2))
    return layout_mixed(codes, bits), scales, codes[:, :, :frames] * step + least


def layout_mixed(codes, bits):
    """Of a tile the blocks, of a block the planes of 8, 4, 2 and 1 bits, of a plane pieces of 16 frames, each four
    bytes with the codes of so many quads of channels as fit."""
    audios, heads, frames, _ = codes.shape
    quads = codes.reshape(audios, heads, frames // 16, 16, len(bits), 8, 4)
    pieces = []
    for block, its in enumerate(bits):
        below = 0
        for plane in (8, 4, 2, 1):
            if its & plane:
                part, together = quads[..., block, :, :] >> below & (1 << plane) - 1, 8 // plane
                for first in range(0, 8, together):
                    pieces.append(sum(part[..., first + i, :] << plane * i for i in range(together)))
                below += plane
    return np.ascontiguousarray(np.stack(pieces, 3).astype(np.uint8))  # [audios, heads, tiles, pieces, 16, 4]


# ---- cross-attention ----


class Cross:
    """A problem of cross-attention, in memory. `mixed`: the bits of each block of channels of a latent cache."""

    def __init__(self, bits=0, dtype="float16", rows=5, tokens=1, heads=1, dim=64, audios=1, frames=80, lengths=None,
                 splits=1, group=64, weights=False, latent=False, owner=None, seed=0, offset=0, lots=1,
                 biased=False, mixed=()):  # fmt: skip
        draw = np.random.default_rng(seed)
        dim, bits, latent = (32 * len(mixed), -1, True) if mixed else (dim, bits, latent)
        self.sizes = dict(rows=rows, tokens=tokens, heads=heads, head_dim=dim, audios=audios, frames=frames)
        self.dtype, self.bits, self.splits, self.group, self.latent = dtype, bits, splits, group, latent
        self.biased = biased
        self.lengths = np.array(lengths or [frames] * audios, np.int32)
        self.owner = np.array(owner if owner is not None else np.arange(rows) % audios, np.int32)
        self.query = rounded(draw.standard_normal((rows, tokens, heads, dim)), dtype)
        self.memory = GlobalMemory()
        put = self.memory.put

        self.tile_bytes = 64 * sum(mixed)

        def cache():
            if mixed:
                codes, scales, numbers = make_mixed(draw, audios, heads, frames, mixed, group)
                return put(codes), put(scales), numbers
            if bits:
                codes, scales, numbers = make_codes(draw, audios, heads, frames, dim, bits, group)
                return put(codes), put(scales), numbers
            numbers = rounded(draw.standard_normal((audios, heads, frames, dim)), dtype)
            for audio, length in enumerate(self.lengths):
                numbers[audio, :, length:] = rounded(np.array(np.nan), dtype)
            return put(numbers, offset), 0, floats(numbers)

        keys, key_scales, self.keys = cache()
        values, value_scales, self.values = (keys, key_scales, self.keys) if latent else cache()
        if mixed:
            value_scales = put(np.repeat(mixed, 32).astype(np.float32))
        lines = splits * rows * tokens * heads
        self.bias = np.log(draw.integers(1, 17, (audios, frames))).astype(np.float32) * biased
        nothing = functools.partial(np.full, fill_value=np.nan, dtype=np.float32)
        is_split = splits > 1 or weights
        self.lots = lots if is_split and dim <= 64 and not mixed else 0  # of counters
        self.addresses = dict(
            query=put(self.query), keys=keys, values=values, key_scales=key_scales, value_scales=value_scales,
            owner=put(self.owner), lengths=put(self.lengths), bias=put(self.bias) if biased else 0,
            output=put(rounded(nothing(self.query.shape), dtype)),
            weights=put(nothing((rows, heads, tokens, frames))) if weights else 0,
            sums=put(nothing((lines, up(dim, 32)))) if is_split else 0,
            totals=put(nothing((lines, 2))) if is_split else 0,
            counters=put(np.zeros(audios * heads * lots, np.uint32)) if self.lots else 0,
        )  # fmt: skip
        self.struct = packed(
            "wkv_cross_attention", **self.sizes, dtype=DTYPES.index(dtype), bits=bits, group=group, scale=dim**-0.5,
            splits=splits, lots=self.lots, tile_bytes=self.tile_bytes, **self.addresses,
        )  # fmt: skip

    @property
    def queries(self):
        return -(-self.sizes["rows"] * self.sizes["tokens"] // self.sizes["audios"])  # of an audio, about

    def lots_of(self, together):
        lots = up(self.queries, together) // together
        return min(lots, self.lots) if self.lots else lots

    def launch(self):
        """Name, grid, threads, shared memory and further arguments of the kernel that the launch chooses."""
        dim, dtype, bits = self.sizes["head_dim"], self.dtype, self.bits
        blocks = self.sizes["audios"] * self.sizes["heads"] * self.splits
        mangled = f"{MANGLED[dtype]}Li{bits}E".replace("Li-", "Lin")
        if dim == 64 and dtype != "float32" and bits >= 0 and (not bits or self.group % 32 == 0):
            together = 8 if self.queries <= 8 else 16
            lots, frames = self.lots_of(together), 32 if bits else 16
            tiles = 4 * 2 * 2 * frames * 64 * (bits or 16) // 8
            shared = up(tiles + 4 * together * (68 + 2) * 4 + together * 4 + 4, 16)
            name = ("heads", "attend", f"{MANGLED[dtype]}Li{bits}ELi{together}ELb{int(self.biased)}E")
            return name, blocks * lots, 128, shared, np.int32(lots).tobytes()
        if self.latent and dtype != "float32" and (bits < 0 or 64 < dim <= 1280 and dim % 64 == 0):
            lots = self.lots_of(24)
            room = 8 * 24 * 20 * 4 + 24 * 16 * 2 + 2 * 8 * 24 * 4 + 1280 * 4 + 5 * 24 * 4 + 4
            shared = up(room, 16) + (2 * dim * (2 * bits or 32) if bits >= 0 else 16 * dim + 2 * self.tile_bytes)
            return ("latent", "attend", mangled), blocks * lots, 256, shared, np.int32(lots).tobytes()
        frames, out, warps = (16, 20, 8) if dim > 64 or bits < 0 else (64, 2, 4)
        size = 4 if dtype == "float32" else 2
        channels, pad, line = up(dim, 16), 16 // size, frames + 8
        warps = min(warps, channels // 8)
        slices, lots = max(1, min(warps // (frames // 8), channels // 16)), self.lots_of(16)
        parts = [16 * (channels + pad) * size, *[frames * (channels + pad) * size] * (1 if self.latent else 2),
                 slices * 16 * line * 4, 16 * (frames + pad) * size, 64, 64, 64, 64]  # fmt: skip
        aligned = dim * size % 16 == 0 and self.addresses["keys"] % 16 == 0
        name = ("GLOBAL", "attend", f"{mangled}Li{frames}ELi{out}E")
        arguments = np.array([lots, slices], np.int32).tobytes() + bytes([aligned])
        return name, blocks * lots, warps * WARP, sum(up(part, 16) for part in parts), arguments

    def run(self, blocks=None, kernel=None):
        """Runs attend; returns its machine."""
        name, grid, threads, shared, arguments = self.launch()
        kernel = kernel or program("cross").kernel(*name)
        return Machine(kernel, self.memory).run(self.struct + arguments, grid, threads, shared, blocks)

    def finish(self):
        mangled = MANGLED[self.dtype]
        kernel = program("cross").kernel("finishI" + mangled + "E")
        grid = self.sizes["rows"] * self.sizes["tokens"] * self.sizes["heads"]
        return Machine(kernel, self.memory).run(self.struct, grid, 128)

    def check(self):
        """Runs all of it, and holds the output and the weights against float64."""
        self.run()
        if self.lots:
            blocks = self.sizes["audios"] * self.sizes["heads"] * self.lots
            assert not self.memory.get(self.addresses["counters"], (blocks,), np.uint32).any()
        elif self.addresses["sums"]:
            self.finish()
        rows, tokens, heads, _, audios, frames = self.sizes.values()
        output = floats(self.memory.get(self.addresses["output"], self.query.shape, self.query.dtype))
        wanted, weights = np.zeros(output.shape), np.zeros((rows, heads, tokens, frames))
        for row, audio in enumerate(self.owner):
            for head in range(heads if 0 <= audio < audios else 0):
                length = self.lengths[audio]
                keys, values = (x[audio, head, :length].astype(np.float64) for x in (self.keys, self.values))
                logits = floats(self.query)[row, :, head] @ keys.T * self.sizes["head_dim"] ** -0.5
                logits += self.bias[audio, :length]
                weight = np.exp(logits - logits.max(1, keepdims=True))
                weights[row, head, :, :length] = weight = weight / weight.sum(1, keepdims=True)
                wanted[row, :, head] = weight @ values
        spread = self.values[np.isfinite(self.values)].std()
        error = np.abs(output - wanted).max() / max(spread, np.abs(wanted).max())
        assert error < TOLERANCE[self.dtype], error
        if self.addresses["weights"]:
            got = self.memory.get(self.addresses["weights"], weights.shape, np.float32)
            assert np.abs(got - weights).max() < TOLERANCE[self.dtype] / 2, np.abs(got - weights).max()


def cost_of_a_tile(few=2, more=4, frames=64, **problem):
    """Warp instructions and wavefronts of shared memory that `frames` more frames take: (instructions, divisions among
    them, wavefronts)."""
    runs = [Cross(frames=n * frames, **problem) for n in (few, more)]
    machines = [run.run(blocks=[0]) for run in runs]

    def sums(machine):
        divisions = (n for i, n in machine.counts.items() if machine.kernel.code[i].name.startswith("div."))
        instructions, wavefronts = machine.tally()
        return np.array([instructions, sum(divisions), wavefronts])

    return (sums(machines[1]) - sums(machines[0])) / (more - few)
