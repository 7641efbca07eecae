"""Many recordings through one model: windows of all of them in batches, those of like length together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .alignment import Aligner
from .audio import RATE, blocks_of, read_blocks
from .decoding import Decoder
from .recording import Recording, Sequential, Spoken, Window
from .results import Segment, Transcript
from .settings import Settings
from .tape import Tape

AHEAD = 4  # batches of windows that are ready, for windows of one length to be found among them


@dataclass
class News:
    """Segments of a recording that are known by now; and its transcript, once it is done or has failed."""

    number: int  # of the recording
    name: str
    segments: list[Segment]
    seconds: float  # of audio that has been read of it
    transcript: Transcript | None = None


def run(model: Any, processor: Any, audios: Iterable[Any], settings: Settings) -> Iterator[News]:
    """Paths and arrays, in any number; they are opened as their turn comes."""
    return _Engine(model, processor, settings).run(audios)


class _Engine:
    def __init__(self, model, processor, settings):
        self.settings = settings
        self.decoder = Decoder(model, processor, settings)
        self.aligner = Aligner(self.decoder) if settings.word_timestamps else None
        self.active: list[Recording] = []

    def run(self, audios):
        coming = enumerate(audios)
        while True:
            yield from self._fill(coming)
            windows = self._batch()
            if not windows:
                return
            heard = self.decoder.hear(
                [window.samples for window in windows],
                [window.prompt for window in windows],
                [window.recording.language for window in windows],
            )
            for row, (window, attempt) in enumerate(zip(windows, heard.attempts)):
                owner, words = window.recording, None
                if self.aligner:
                    words = self.aligner.words(heard.states[row], attempt, window.seconds)
                segments = owner.take(window, attempt, words)
                if segments:
                    yield News(owner.number, owner.transcript.name, segments, owner.tape.end / RATE)

    def _fill(self, coming):
        """Let enough windows be ready, of recordings that have begun and of those to come. Yields what is over."""
        wanted = AHEAD * self.settings.batch_size
        for owner in list(self.active):
            yield from self._filled(owner, wanted)
        while sum(len(owner.ready) for owner in self.active) < wanted and (following := next(coming, None)):
            owner = self._opened(*following)
            self.active.append(owner)
            yield from self._filled(owner, wanted)

    def _filled(self, owner, wanted):
        others = sum(len(one.ready) for one in self.active if one is not owner)
        try:
            owner.fill(wanted - others)
        except (OSError, ValueError, RuntimeError) as error:
            owner.transcript.error = error
            owner.transcript.segments.clear()
            owner.ready.clear()
        if owner.transcript.error or owner.is_done:
            self.active.remove(owner)
            yield News(owner.number, owner.transcript.name, [], owner.tape.end / RATE, owner.transcript)

    def _opened(self, number, audio):
        is_array = isinstance(audio, np.ndarray)
        blocks = blocks_of(audio) if is_array else read_blocks(audio)
        kind = Spoken if self.settings.vad else Sequential
        return kind(number, "" if is_array else str(audio), Tape(blocks), self.decoder)

    def _batch(self) -> list[Window]:
        """The oldest window, and of all that are ready those nearest to it in length."""
        ready = [window for owner in self.active for window in owner.ready]
        if not ready:
            return []
        oldest = min(ready, key=lambda one: (one.recording.number, one.begin))
        ready.sort(key=lambda one: (abs(len(one.samples) - len(oldest.samples)), one.recording.number, one.begin))
        chosen = ready[: self.settings.batch_size]
        for window in chosen:
            window.recording.ready.remove(window)
        return chosen
