"""Codes of mixed bits: frames in a basis where some channels say much and others little, each with bits to match.

csrc/packed.h has the layout: blocks of 32 channels, of 1 to 8 bits a code, as planes of 8, 4, 2 and 1 bits. Each group
of frames has steps and leasts of its own, as in the other formats of codes. Bits are float32 [channels].
"""

from itertools import groupby

import torch

from .ops import CHANNELS, TILE

_PLANES = (8, 4, 2, 1)
_WIDTHS = (1.0, 0.75, 0.5)  # of the range that codes reach over


def tile_bytes(bits):
    """Of 16 frames: what a tile takes."""
    return int(bits.sum()) * TILE // 8


def scales_of(frames, lengths, bits, group):
    """float32 [audios, 1, groups, 2, channels], of frames as below: step and least of each channel in each group. They
    reach over the group's range, or over the middle of it: whichever loses least, in the eighth power, for a model
    leans on the few frames that stand out. What is no number has no say."""
    heard = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
    heard = heard[..., None] & frames.isfinite()
    frames, heard = (
        torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % group)).unflatten(1, (-1, group)) for x in (frames, heard)
    )
    low, high = frames.where(heard, torch.inf).amin(2), frames.where(heard, -torch.inf).amax(2)
    middle, half = (x.where(low <= high, 0) for x in ((low + high) / 2, (high - low) / 2))
    inverse = (1 / half).where(half > 0, 0)
    frames = ((frames - middle[:, :, None]) * inverse[:, :, None]).where(heard, 0)  # from -1 to 1
    levels, lost = 2**bits - 1, []
    for width in _WIDTHS:
        scale = levels / (2 * width)
        codes = (frames * scale).add_((levels + 1) / 2).clamp_(min=0).minimum(levels + 0.5).floor_()
        errors = codes.sub_(levels / 2).div_(scale).sub_(frames).mul_(heard)
        lost.append(errors.square_().square_().square_().sum(2))
    half = half * torch.tensor(_WIDTHS, device=half.device)[torch.stack(lost).argmin(0)]
    return torch.stack([2 * half / levels, middle - half], 2)[:, None]


def pack_mixed(frames, lengths, bits, scales, group):
    """uint8 [audios, 1, tiles, bytes], of frames float32 [audios, frames, channels]; lengths int32 [audios]."""
    audios, count, channels = frames.shape
    codes = _codes_of(frames, bits, *_of_frames(scales, count, group))
    heard = torch.arange(count, device=frames.device) < lengths[:, None]
    codes = torch.nn.functional.pad(codes.to(torch.uint8) * heard[..., None], (0, 0, 0, -count % TILE))
    quads = codes.view(audios, -1, TILE, channels // 4, 4).transpose(2, 3)  # 16 frames of 4 channels
    parts = []
    for first, blocks, bits in _runs(bits):
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


def rounded(frames, bits, scales, group):
    """What frames [audios, frames, channels] are once they were packed and unpacked."""
    step, least = _of_frames(scales, frames.shape[1], group)
    return _codes_of(frames, bits, step, least).floor() * step + least


def _codes_of(frames, bits, step, least):
    """Before they are cut to whole numbers."""
    codes = (frames - least) * (1 / step).where(step > 0, 0)
    return codes.nan_to_num(0).add(0.5).clamp(min=0).minimum(2**bits - 0.5)


def unpack_mixed(data, scales, bits, group, frames):
    """float32 [audios, frames, channels]"""
    parts, start = [], 0
    for _, blocks, bits in _runs(bits):
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
    step, least = _of_frames(scales, frames, group)
    return codes * step + least


def _of_frames(scales, frames, group):
    """Steps and leasts of each frame, [audios, frames, channels]."""
    return scales[:, 0].repeat_interleave(group, 1)[:, :frames].unbind(2)


def _runs(bits):
    """(first channel, blocks, bits) of blocks side by side that have the same number of bits."""
    first = 0
    for bits, some in groupby(bits[::CHANNELS].int().tolist()):
        blocks = len(list(some))
        yield first, blocks, bits
        first += blocks * CHANNELS
