"""Memory whose addresses outlive a cache, so that a graph captured over it serves the caches that come after."""

import itertools
import math
import threading
from queue import SimpleQueue
from typing import NamedTuple

import torch

from .beams import reordered
from .config import EvictionConfig

ALIGNMENT = 256  # bytes, as of torch's own allocations
FREE = 4  # pieces of memory that a pool keeps for caches to come
SPARE = 1 << 28  # bytes that reordering takes beside, or those of one layer if that is more

_numbers = itertools.count()


def apart(tensor):
    """The same tensor, in memory of its own."""
    shares = tensor is not None and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if shares else tensor


class Pool:
    """Memory for caches of one kind on one device and stream: what one of them gives back, the next one takes."""

    def __init__(self, device):
        self._device = device
        self._free = []
        self._returned = SimpleQueue()  # the garbage collector may put something in at any moment
        self._lock = threading.Lock()

    def lease(self, layout, partner=None):
        """Memory for the layout: that which had it beside the same partner before (a Lease's key), if that is free."""
        size = sum(_size(*tensor) for tensor in layout.tensors().values())
        with self._lock:
            while not self._returned.empty():
                self._free.append(self._returned.get())
            self._free = self._free[-FREE:]
            large = [memory for memory in self._free if memory.size >= size]
            if large:
                memory = min(large, key=lambda memory: ((layout, partner) not in memory.uses, memory.size))
                self._free.remove(memory)
            else:
                self._free = self._free[1:]  # one that is too small makes way
                memory = _Memory(size, self._device)
        memory.uses.add((layout, partner))
        return Lease(memory, layout, self._returned)


class _Memory:
    """One piece: lent to one cache at a time, and laid out as that one needs it."""

    def __init__(self, size, device):
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.size, self.number = size, next(_numbers)
        self.uses = set()  # layouts that it has had, with their partners: there may be graphs over them


class Lease:
    """Memory laid out for a cache, for as long as anything holds on to this.

    tensors  by name, as the layout has them
    key      what their addresses depend on
    """

    def __init__(self, memory, layout, returned):
        self._memory, self._returned = memory, returned
        self.layout, self.key = layout, (memory.number, layout)
        self.tensors, start = {}, 0
        for name, (shape, dtype) in layout.tensors().items():
            used = memory.bytes[start : start + math.prod(shape) * dtype.itemsize]
            self.tensors[name] = used.view(dtype).view(shape)
            start += _size(shape, dtype)

    def __del__(self):
        self._returned.put(self._memory)


def _size(shape, dtype):
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


# What belongs to the rows; cross_cache.py has what belongs to the audios


class SelfLayout(NamedTuple):
    """What decides the addresses and kernels of a step over the self-attention cache."""

    layers: int
    rows: int
    heads: int
    slots: int
    head_dim: int
    dtype: torch.dtype
    eviction: EvictionConfig | None
    padded: bool
    has_sources: bool

    def tensors(self):
        layers, rows, heads, slots, head_dim, dtype, eviction, _, has_sources = self
        tensors = {
            "slots": ((layers, 2, rows, heads, slots, head_dim), dtype),  # keys, values
            "cursors": ((layers, 4, rows), torch.int32),
            "owner": ((rows,), torch.int32),
            "ids": ((rows, 1), torch.int64),
            "places": ((rows, 1), torch.int64),
            "hidden": ((rows, 1, heads * head_dim), dtype),
        }
        if eviction is not None:
            tensors["positions"] = ((layers, rows, slots), torch.int32)
            tensors["scores"] = ((layers, rows, slots), torch.float32)
        if has_sources:
            tensors["sources"] = ((rows, slots), torch.int32)
        return tensors


class SelfHome:
    """Where the buffers of all layers are while graphs are replayed over them.

    of_layer  for each layer its keys, values, cursor, positions and scores
    cursors   those of all layers, int32 [layers, 4, rows]
    state     what a step changes beside the slots that it writes
    owner     of the cross-attention cache
    sources   which row holds each slot, the same for all layers, see beams.py; None if each has its own
    ids, places, hidden  tokens of a step, their positions, and what comes out
    replay    the graph of the last step with what it takes for granted, see graphs.py
    captures  whether a step is being captured: the cursors of all layers are then moved at its end, by one op
    joined    projections that it uses in the place of each layer's own three, see snapshot.py
    """

    replay = joined = None
    captures = False

    def __init__(self, lease):
        self.lease, self.key = lease, lease.key
        for name in ("cursors", "owner", "ids", "places", "hidden"):
            setattr(self, name, lease.tensors[name])
        self._slots, self.sources = lease.tensors["slots"], lease.tensors.get("sources")
        self._scored = [lease.tensors[name] for name in ("positions", "scores") if name in lease.tensors]
        self.state = [self.cursors, *self._scored]
        nothing = [[None] * len(self._slots)] * 2
        self.of_layer = list(zip(*self._slots.unbind(1), self.cursors, *(self._scored or nothing)))
        self._slots_moved, self._owner_moved = _Sweep(), _Sweep()

    def reorder_slots(self, layer, rows, live):
        """`live` slots are in use."""
        if not self._slots_moved.begins(layer, rows):
            return
        rows = rows.to(self._slots.device)
        if self.sources is not None:
            self.sources.copy_(reordered(self.sources, rows, live))
            return
        for slots in self._slots.split(max(SPARE // self._slots[0].nbytes, 1)):
            slots.copy_(slots.index_select(2, rows))
        self.cursors.copy_(self.cursors.index_select(2, rows))
        for tensor in self._scored:
            tensor.copy_(tensor.index_select(1, rows))

    def reorder_owner(self, layer, rows):
        if self._owner_moved.begins(layer, rows):
            self.owner.copy_(self.owner.index_select(0, rows.to(self.owner.device)))


class _Sweep:
    """transformers reorders a cache layer by layer with the same rows. The first of them moves all."""

    def __init__(self):
        self._rows, self._layers = None, set()

    def begins(self, layer, rows):
        begins = rows is not self._rows or layer in self._layers
        if begins:
            self._rows, self._layers = rows, set()
        self._layers.add(layer)
        return begins
