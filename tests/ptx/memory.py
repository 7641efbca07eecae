"""Memory that watches: bounds, alignment, races, copies on their way, banks. What is wrong raises Fault."""

from collections import Counter

import numpy as np

WARP, BANKS, WORD = 32, 32, 4
SHARED, GLOBAL = 0x7000_0000_0000, 0x7F00_0000_0000  # where generic addresses of either begin
NOBODY = -1


class Fault(Exception):
    pass


class GlobalMemory:
    """Of the device: arrays with gaps between them. What one block writes another may use once it is passed on: by a
    fence, of the thread that wrote or of another after a barrier, before the one block counts itself; and by a fence
    after the other has counted itself."""

    def __init__(self, size=1 << 24):
        self.bytes = np.zeros(size, np.uint8)
        self.exists = np.zeros(size, bool)
        self.top = 4096

    def start(self):
        """A launch begins, after all that was before."""
        size = self.top
        self.writer, self.thread, self.phase = (np.full(size, NOBODY, np.int32) for _ in range(3))
        self.is_passed_on, self.is_fenced = np.zeros(size, bool), np.zeros(size, bool)

    def enter(self, block, threads):
        """Another block runs."""
        self.block, self.barriers = block, 0
        self.has_counted, self.knows = np.zeros(threads, bool), np.zeros(threads, bool)  # what others have passed on

    def barrier(self):
        self.barriers += 1
        self.has_counted[:] = self.has_counted.any()
        self.knows[:] = self.knows.any()

    def note_write(self, threads, cells):
        self.writer[cells], self.thread[cells] = self.block, threads[:, None]
        self.phase[cells] = self.barriers
        self.is_fenced[cells] = self.is_passed_on[cells] = False

    def fence(self, threads):
        mine = self.writer == self.block
        self.is_fenced |= mine & ((self.phase < self.barriers) | np.isin(self.thread, threads))
        self.knows[threads] |= self.has_counted[threads]

    def count(self, threads):
        self.is_passed_on |= self.is_fenced & (self.writer == self.block)
        self.has_counted[threads] = True

    def check_read(self, threads, cells, instruction):
        others = (self.writer[cells] != NOBODY) & (self.writer[cells] != self.block)
        if (others & ~(self.is_passed_on[cells] & self.knows[threads][:, None])).any():
            raise Fault(f"global memory of another block used without a fence: {instruction}")

    def put(self, array, offset=0):
        """The address of a copy; offset: bytes past where it would be aligned."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        start = self.top + offset
        while start + data.size + 512 > self.bytes.size:
            self.bytes, self.exists = (np.concatenate([x, np.zeros_like(x)]) for x in (self.bytes, self.exists))
        self.bytes[start : start + data.size] = data
        self.exists[start : start + data.size] = True
        self.top = -(-(start + data.size + 256) // 256) * 256
        return GLOBAL + start

    def get(self, address, shape, dtype):
        start, size = address - GLOBAL, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[start : start + size].view(dtype).reshape(shape).copy()

    def cells(self, addresses, size, instruction):
        """Indices of the bytes, [threads, size]."""
        start = addresses - GLOBAL
        cells = start[:, None] + np.arange(size)
        if (start < 0).any() or (cells >= self.bytes.size).any() or not self.exists[cells].all():
            raise Fault(f"global memory out of bounds: {instruction}")
        if (start % size).any():
            raise Fault(f"global memory misaligned: {instruction}")
        return cells


class SharedMemory:
    """Of one block. A race is a byte that one thread writes and another uses, with no barrier of the block in between,
    nor one of the warp if they are of the same warp."""

    def __init__(self, size, threads):
        self.size = size
        self.bytes = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        self.is_set, self.on_their_way = np.zeros(size, bool), np.zeros(size, np.int16)
        self.writer, self.reader = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.written_at, self.read_at = (np.zeros(size, np.int64) for _ in range(2))  # the epoch of the thread's warp
        self.has_more_readers = np.zeros(size, bool)
        self.epoch = np.zeros(-(-threads // WARP), np.int64)  # of each warp: grows at its barriers
        self.wavefronts = Counter()

    def barrier(self):
        self.writer[:] = self.reader[:] = NOBODY
        self.has_more_readers[:] = False

    def barrier_of_warps(self, warps):
        self.epoch[warps] += 1

    def cells(self, threads, offsets, size, is_write, instruction, number):
        """Indices of the bytes, [threads, size], once they are found to be sound."""
        if (offsets < 0).any() or (offsets + size > self.size).any():
            raise Fault(f"shared memory out of bounds: {instruction}")
        if (offsets % size).any():
            raise Fault(f"shared memory misaligned: {instruction}")
        cells = offsets[:, None] + np.arange(size)
        self.check_races(threads, cells, is_write, instruction)
        if self.on_their_way[cells].any():
            raise Fault(f"shared memory used before a copy to it was awaited: {instruction}")
        if is_write:
            self.note_write(threads, cells)
        else:
            if not self.is_set[cells].all():
                raise Fault(f"shared memory read before it is written: {instruction}")
            self.note_read(threads, cells)
        self.count_wavefronts(threads, offsets, size, number)
        return cells

    def check_races(self, threads, cells, is_write, instruction):
        mine = threads[:, None]
        warp, epoch = mine // WARP, self.epoch[mine // WARP]

        def others(who, when):
            who = who[cells]
            return (who != NOBODY) & (who != mine) & ((who // WARP != warp) | (when[cells] == epoch))

        racing = others(self.writer, self.written_at)
        if is_write:
            racing |= others(self.reader, self.read_at)
            racing |= self.has_more_readers[cells]
        if racing.any():
            raise Fault(f"race in shared memory: {instruction}")

    def note_write(self, threads, cells):
        self.is_set[cells] = True
        self.writer[cells] = threads[:, None]
        self.written_at[cells] = self.epoch[threads // WARP][:, None]

    def note_read(self, threads, cells):
        before, mine = self.reader[cells], threads[:, None]
        # Readers of other warps must not be forgotten, and those of this one until its next barrier.
        self.has_more_readers[cells] |= (before != NOBODY) & (before // WARP != mine // WARP)
        self.reader[cells] = mine
        self.read_at[cells] = self.epoch[threads // WARP][:, None]

    def count_wavefronts(self, threads, offsets, size, number):
        """How often shared memory must be asked: the most words that one bank has for the lanes served together."""
        together = WARP if size <= WORD else BANKS * WORD // size
        for warp in np.unique(threads // WARP):
            mine = threads // WARP == warp
            words, lanes = offsets[mine] // WORD, threads[mine] % WARP
            for first in range(0, WARP, together):
                some = words[(lanes >= first) & (lanes < first + together)]
                if len(some):
                    distinct = np.unique(some[:, None] + np.arange(max(size // WORD, 1)))
                    self.wavefronts[number] += int(np.bincount(distinct % BANKS).max())
