"""A recording as it is read: what came last is at hand, what nobody needs any more is forgotten."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from .audio import Samples


class Tape:
    """Samples are named by their place in the recording. Only those from `begin` on are held."""

    def __init__(self, blocks: Iterable[Samples]) -> None:
        self._blocks = iter(blocks)
        self._held: deque[Samples] = deque()
        self.begin = self.end = 0  # of what is held
        self.has_ended = False

    def reaches(self, place: int) -> bool:
        """Whether there are so many samples; it is read as far as that takes."""
        while self.end < place and not self.has_ended:
            block = next(self._blocks, None)
            if block is None:
                self.has_ended = True
            else:
                self._held.append(block)
                self.end += len(block)
        return self.end >= place

    def cut(self, begin: int, end: int) -> Samples:
        """A copy of these samples, or of as many of them as there are."""
        self.reaches(end)
        if begin < self.begin:
            raise IndexError(f"samples from {begin} on are forgotten; {self.begin} is the first")
        end = min(end, self.end)
        piece, at = np.empty(max(end - begin, 0), np.float32), self.begin
        for block in self._held:
            first, last = max(begin - at, 0), min(end - at, len(block))
            if first < last:
                piece[at + first - begin : at + last - begin] = block[first:last]
            at += len(block)
        return piece

    def forget(self, before: int) -> None:
        """Of what is before this place, all blocks that no later sample is in."""
        while self._held and self.begin + len(self._held[0]) <= before:
            self.begin += len(self._held.popleft())
