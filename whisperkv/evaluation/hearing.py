"""Recordings in memory, in the windows that Whisper hears."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..transcription.audio import RATE
from .samples import Sample

WINDOW = 30  # seconds that Whisper hears at once
LOOK_BACK = 5  # seconds before the end of a window in which the quietest place is looked for
STEP = RATE // 50  # samples of 20 ms


@dataclass
class Audio:
    """A recording with what is said in it, if that is known."""

    name: str
    text: str
    windows: list[NDArray[np.float32]]

    @property
    def seconds(self) -> float:
        return sum(map(len, self.windows)) / RATE


def windows_of(samples: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """A recording in windows of up to 30 s, cut where the last 5 s of a window are quietest."""
    found, longest = [], WINDOW * RATE
    while len(samples) > longest:
        tail = samples[longest - LOOK_BACK * RATE : longest].reshape(-1, STEP)
        power = np.convolve(np.square(tail, dtype=np.float64).mean(1), np.ones(11) / 11, "same")
        cut = longest - LOOK_BACK * RATE + (int(power[5:-5].argmin()) + 5) * STEP + STEP // 2
        found.append(samples[:cut])
        samples = samples[cut:]
    return [*found, samples]


def heard(samples: Iterable[Sample], on_bad: Callable[[Sample, Exception], None] | None = None) -> list[Audio]:
    """All of them in memory. One that cannot be read raises, or is given to on_bad with the reason and left out."""
    found = []
    for sample in samples:
        try:
            found.append(Audio(sample.name, sample.text, windows_of(sample.samples())))
        except (OSError, ValueError) as error:
            if on_bad is None:
                raise
            on_bad(sample, error)
    return found
