"""Codes of mixed bits: frames in a basis where some channels say much and others little, each with bits to match.

csrc/packed.h has the layout: blocks of 32 channels, of 1 to 8 bits a code, as planes of 8, 4, 2 and 1 bits. Steps and
leasts are the same for all audios, and so nothing but codes belongs to an audio.
"""

from itertools import groupby

import torch

from .ops import CHANNELS, TILE

_PLANES = (8, 4, 2, 1)
STEP, LEAST, BITS = range(3)  # rows of the scales, float32 [3, channels]


def tile_bytes(scales):
    """Of 16 frames: what a tile takes."""
    return int(scales[BITS].sum()) * TILE // 8


def pack_mixed(frames, lengths, scales):
    """uint8 [audios, 1, tiles, bytes], of frames float32 [audios, frames, channels]; lengths int32 [audios]."""
    audios, count, channels = frames.shape
    levels = 2 ** scales[BITS] - 1
    codes = ((frames - scales[LEAST]) / scales[STEP]).nan_to_num(0).add(0.5).clamp(min=0).minimum(levels + 0.5)
    heard = torch.arange(count, device=frames.device) < lengths[:, None]
    codes = torch.nn.functional.pad(codes.to(torch.uint8) * heard[..., None], (0, 0, 0, -count % TILE))
    quads = codes.view(audios, -1, TILE, channels // 4, 4).transpose(2, 3)  # 16 frames of 4 channels
    parts = []
    for first, blocks, bits in _runs(scales):
        some = quads[:, :, first // 4 : first // 4 + 8 * blocks].unflatten(2, (blocks, 8))
        below, planes = 0, []
        for plane in _PLANES:
            if bits & plane:
                together = (some >> below & (1 << plane) - 1).unflatten(3, (plane, 8 // plane))
                pieces = together[:, :, :, :, 0]
                for i in range(1, 8 // plane):
                    pieces = pieces | together[:, :, :, :, i] << plane * i
                planes.append(pieces.flatten(3))
                below += plane
        parts.append(torch.cat(planes, -1).flatten(2))
    return torch.cat(parts, -1)[:, None]


def unpack_mixed(data, scales, frames):
    """float32 [audios, frames, channels]"""
    audios, _, tiles, _ = data.shape
    parts, start = [], 0
    for _, blocks, bits in _runs(scales):
        some = data[:, 0, :, start : start + blocks * bits * TILE * 4].unflatten(2, (blocks, -1))
        start += blocks * bits * TILE * 4
        codes, below, place = 0, 0, 0
        for plane in _PLANES:
            if bits & plane:
                pieces = some[..., place : place + plane * TILE * 4].unflatten(-1, (plane, 1, TILE, 4))
                shifts = torch.arange(0, 8, plane, device=data.device)[:, None, None]
                quads = (pieces >> shifts & (1 << plane) - 1).flatten(3, 4)  # [.., 8, 16, 4]
                codes = codes + (quads << below)
                below, place = below + plane, place + plane * TILE * 4
        parts.append(codes.permute(0, 1, 4, 2, 3, 5).flatten(3))  # [audios, tiles, 16, 32 * blocks]
    codes = torch.cat(parts, -1).flatten(1, 2)[:, :frames]
    return codes * scales[STEP] + scales[LEAST]


def _runs(scales):
    """(first channel, blocks, bits) of blocks side by side that have the same number of bits."""
    first = 0
    for bits, some in groupby(scales[BITS, ::CHANNELS].int().tolist()):
        blocks = len(list(some))
        yield first, blocks, bits
        first += blocks * CHANNELS
