"""Where there is speech in a recording, by Silero VAD, and the windows that it is cut into for Whisper."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

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
PAD = int(0.3 * SECOND)  # what is around speech is heard with it

Stretch = tuple[int, int]


@dataclass
class Cut:
    """A part of a recording: samples from the place `begin` on. `spoken` are the places of speech in it."""

    begin: int
    samples: Samples
    spoken: list[Stretch] = field(default_factory=list)


def cuts(tape: Tape) -> Iterator[Cut]:
    """The windows of up to 30 s of a recording in which somebody speaks. One of up to 30 s stays whole."""
    stretches = _stretches(_probabilities(tape))
    if not tape.reaches(LONGEST * CHUNK + 1):
        whole = [(a * CHUNK, b * CHUNK) for a, b in stretches if a < b]
        if whole:
            yield Cut(0, tape.cut(0, tape.end), whole)
        return
    last = 0
    for window, following in _windows(stretches):
        if not window:
            tape.forget(((following or 0) - PAD) * CHUNK)
            continue
        begin, end = max(window[0][0] - PAD, last), window[-1][1] + PAD
        if following is not None:  # no two windows overlap
            end = min(end, (window[-1][1] + following) // 2)
        tape.forget(last * CHUNK)
        yield Cut(begin * CHUNK, tape.cut(begin * CHUNK, end * CHUNK), [(a * CHUNK, b * CHUNK) for a, b in window])
        last = end


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


def _windows(stretches: Iterable[Stretch]) -> Iterator[tuple[list[Stretch], int | None]]:
    """Neighbouring stretches that fit into a window, and where the next window's begin. Now and then, in silence, no
    stretches and the place where it has come to."""
    window: list[Stretch] = []
    for begin, end in stretches:
        if begin == end:
            if window:
                yield window, begin
            window = []
            yield window, begin
            continue
        if window and end - window[0][0] > LONGEST - 2 * PAD:
            yield window, begin
            window = []
        window.append((begin, end))
    if window:
        yield window, None
