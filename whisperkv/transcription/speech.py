"""Where there is speech in a recording, by Silero VAD, and the windows that it is cut into for Whisper."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np

from ..voice import SILENT
from .audio import RATE, Samples
from .silero import CHUNK, Silero
from .tape import Tape

# In chunks of 32 ms.
SECOND = RATE / CHUNK
VOICED = 0.5  # speech begins at this probability, and ends below SILENT
LONGEST = int(30 * SECOND)  # of a window
CLOSES = int(0.3 * SECOND)  # silence that ends a stretch of speech
LEAST = 3  # of speech; less is a click
PAD = int(0.5 * SECOND)  # what is around speech is heard with it: with 0.3 s words are lost

Stretch = tuple[int, int]


@dataclass
class Cut:
    """What Whisper hears at once: pieces of a recording, put together without the silence between them."""

    samples: Samples = field(default_factory=lambda: np.zeros(0, np.float32))
    pieces: list[tuple[int, int]] = field(default_factory=list)  # where each begins in `samples`, in the recording
    spoken: list[Stretch] = field(default_factory=list)  # in `samples`

    @property
    def begin(self) -> int:
        """Its place in the recording."""
        return self.pieces[0][1]

    def add(self, samples: Samples, begin: int, spoken: Stretch) -> None:
        """A piece that begins there in the recording, where somebody speaks there."""
        at = len(self.samples)
        if not self.pieces or begin - at != self.pieces[-1][1] - self.pieces[-1][0]:
            self.pieces.append((at, begin))
        self.samples = np.concatenate([self.samples, samples])
        self.spoken.append((spoken[0] - begin + at, spoken[1] - begin + at))

    def after(self, at: int) -> "Cut":
        """What comes after so many samples."""
        first = self._piece(at)
        pieces = [(max(start - at, 0), place + max(at - start, 0)) for start, place in self.pieces[first:]]
        return Cut(self.samples[at:], pieces, [(max(a - at, 0), b - at) for a, b in self.spoken if b > at])

    def phrase_places(self, begin: int, end: int) -> Stretch:
        """Where samples of a phrase stand in the recording. What is around the speech of a piece may be given to the
        next one's phrase, or the last one's, but does not make it as long as the silence between them."""
        first, last = self._piece(begin + PAD * CHUNK), max(self._piece(end - PAD * CHUNK - 1), 0)
        from_ = self._place(first, max(begin, self.pieces[first][0]))
        return from_, max(from_, self._place(last, min(end, self._end(last))))

    def word_places(self, begin: int, end: int) -> Stretch:
        """The same of a word, which is in one piece alone."""
        piece = self._piece((begin + end) // 2)
        start, stop = self.pieces[piece][0], self._end(piece)
        return tuple(self._place(piece, min(max(at, start), stop)) for at in (begin, end))  # type: ignore[return-value]

    def _piece(self, at):
        """The number of the piece that holds a sample."""
        return bisect_right(self.pieces, at, key=lambda piece: piece[0]) - 1

    def _end(self, piece):
        return self.pieces[piece + 1][0] if piece + 1 < len(self.pieces) else len(self.samples)

    def _place(self, piece, at):
        start, place = self.pieces[piece]
        return place + at - start


def cuts(tape: Tape) -> Iterator[Cut]:
    """Of a recording, up to 30 s of speech at a time. One of up to 30 s stays whole."""
    stretches = _stretches(_probabilities(tape))
    if not tape.reaches(LONGEST * CHUNK + 1):
        whole = [(a * CHUNK, b * CHUNK) for a, b in stretches if a < b]
        if whole:
            yield Cut(tape.cut(0, tape.end), [(0, 0)], whole)
        return
    cut = Cut()
    for (first, last), (begin, end) in _padded(stretches):
        if cut.pieces and (begin == end or len(cut.samples) + (last - first) * CHUNK > LONGEST * CHUNK):
            yield cut
            cut = Cut()
        if begin < end:
            cut.add(tape.cut(first * CHUNK, last * CHUNK), first * CHUNK, (begin * CHUNK, end * CHUNK))
        tape.forget(last * CHUNK)
    if cut.pieces:
        yield cut


def _probabilities(tape: Tape) -> Iterator[float]:
    """Of speech in each chunk."""
    silero, place = Silero(), 0
    while tape.reaches(place + 1):
        piece = tape.cut(place, place + LONGEST * CHUNK)
        place += len(piece)
        yield from silero.probabilities(piece)


def _stretches(probabilities: Iterable[float]) -> Iterator[Stretch]:
    """Where somebody speaks. What is too long for a window is parted where it is least likely to be speech. In silence,
    an empty stretch now and then."""
    longest = LONGEST - 2 * PAD
    begin, heard = None, 0  # of this stretch; its last chunk of speech is before `heard`
    seen: list[float] = []
    for now, probability in enumerate(probabilities):
        if begin is None:
            if probability < VOICED:
                if now - heard >= LONGEST:
                    heard = now
                    yield now, now
                continue
            begin, seen = now, []
        seen.append(probability)
        if probability >= SILENT:
            heard = now + 1
        elif now + 1 - heard >= CLOSES:
            if heard - begin >= LEAST:
                yield begin, heard
            begin = None
            continue
        if len(seen) >= longest:
            part = longest // 2 + int(np.argmin(seen[longest // 2 :]))
            yield begin, begin + part
            begin, seen = begin + part, seen[part:]
    if begin is not None and heard - begin >= LEAST:
        yield begin, heard


def _padded(stretches: Iterable[Stretch]) -> Iterator[tuple[Stretch, Stretch]]:
    """Each stretch after what is heard with it. Neighbours share what is between them."""
    free = 0  # nobody has been given what comes from here on
    for stretch, following in pairwise(chain(stretches, [(0, 0)])):
        begin, end = stretch
        if begin == end:
            free = max(free, end - PAD)
            yield (free, free), stretch
            continue
        stop = end + PAD
        if following[0] < following[1]:
            stop = min(stop, (end + following[0]) // 2)
        yield (max(begin - PAD, free), stop), stretch
        free = stop
