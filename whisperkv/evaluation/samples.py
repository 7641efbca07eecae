"""A recording with what is said in it, and what every reader of data sets needs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..transcription.audio import RATE, read_audio

AUDIO = (".flac", ".wav", ".mp3", ".ogg", ".opus")


@dataclass(frozen=True)
class Sample:
    """A recording, or a part of it, and what is said or answered."""

    name: str
    audio: Path | Callable[[], NDArray[np.float32]]  # its path, or what gives its samples: mono, at 16 kHz
    text: str = ""  # what is said; nothing where that is not known
    question: str = ""  # what is asked about it
    answers: tuple[str, ...] = ()  # any of which is right
    begin: float = 0.0  # seconds
    end: float | None = None

    def samples(self) -> NDArray[np.float32]:
        """The part of the recording that is meant, mono at 16 kHz."""
        whole = self.audio() if callable(self.audio) else read_audio(self.audio)
        part = whole[round(RATE * self.begin) : None if self.end is None else round(RATE * self.end)]
        if len(part) == 0:
            raise ValueError(f"{self.name}: there is no sound from {self.begin} s to {self.end} s of {self.audio}")
        return part


def recording(path: Path, named_by: object) -> Path:
    """The recording of that path, with an ending of its own or any of AUDIO."""
    for each in (path, *(Path(f"{path}{ending}") for ending in AUDIO)):
        if each.is_file():
            return each
    raise FileNotFoundError(f"{path}: no such recording, though {named_by} names it")


def reference(text: str, place: object) -> str:
    """What is said, as it is written at that place."""
    if not text.strip():
        raise ValueError(
            f"{place}: the text is empty. Write what is said; where that is not known, leave out the text of all "
            "recordings, and they are held against the unpatched model's"
        )
    return " ".join(text.split())
