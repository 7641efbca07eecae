"""How many slots a cache takes, where its rows stand in them, and what its layers have together."""

from dataclasses import dataclass, field

import torch

from .beams import Tables
from .views import Onlookers

LIVE, SLOT, SEEN, PINNED = range(4)  # rows of the cursor, as in whisperkv.h


def slots_for(tokens, most, is_captured=False):
    """Slots to allocate for so many tokens, of which a row holds `most`: few at first. A captured step has one graph
    for each number of slots, and so fewer numbers."""
    step = 64 if is_captured or tokens > 128 else 16
    return max(min(-(-tokens // step) * step, most), tokens)


def picked(slots, order):
    """Slots [rows, heads, slots, head_dim] in the order [rows, kept]."""
    return slots.gather(2, order[:, None, :, None].expand(-1, slots.shape[1], -1, slots.shape[3]))


def advance(cursor, tokens, is_padded):
    """Without eviction every token takes the next slot. Cursors [..., 4, rows] of any number of layers."""
    if not is_padded:
        cursor[..., :PINNED, :].add_(tokens)  # live, slot and seen are the same number
        return
    seen = cursor[..., SEEN, :].add_(tokens)
    cursor[..., LIVE, :] = cursor[..., SLOT, :] = seen.clamp(min=0)


class SpareBuffer:
    """The buffer that the last reordering read from, which the next one writes to: one serves all layers."""

    def __init__(self):
        self._spare = None

    def reordered(self, slots, rows):
        """slots[rows], in the spare buffer; the old one becomes the spare."""
        spare, self._spare = self._spare, slots
        shape = (len(rows), *slots.shape[1:])
        if spare is None or spare.shape != shape or spare.dtype != slots.dtype or spare.device != slots.device:
            spare = slots.new_empty(shape)
        return torch.index_select(slots, 0, rows, out=spare)

    def __reduce__(self):
        return SpareBuffer, ()

    @property
    def nbytes(self):
        return 0 if self._spare is None else self._spare.nbytes


@dataclass
class Shared:
    """What the layers of a cache have together."""

    record: object = None  # for stats()
    is_captured: bool = False  # whether graphs are to be captured over it
    tables: Tables = field(default_factory=Tables)
    spare: SpareBuffer = field(default_factory=SpareBuffer)
    views: Onlookers = field(default_factory=Onlookers)
    reading: object = None  # what steps on the CPU read, once there was one
