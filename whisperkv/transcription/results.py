"""What a transcription is: segments and words, with the names that openai-whisper and faster-whisper give them."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

REPEATED = r"(?:^| )((?:\S+ ){4,}?)\1\1"  # four or more words three times in a row, each with a blank behind it


@dataclass
class Word:
    """A word with the blank before it, in seconds from the beginning of the recording."""

    start: float
    end: float
    word: str
    probability: float


@dataclass
class Segment:
    """A phrase.

    id                 0, 1, ... in the recording
    seek               where the window began that it was heard in, in hundredths of a second
    start, end         seconds from the beginning of the recording
    text, tokens       what was said; the tokens include the timestamps
    temperature        at which it was decoded: above 0 if an attempt below it went wrong
    avg_logprob        of the tokens of its window
    compression_ratio  of the text of its window: above 2.4 it repeats itself
    no_speech_prob     how likely the model holds it that nobody speaks in its window
    words              None where no word timestamps were asked for
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None = None


@dataclass
class Transcript:
    """All of a recording.

    name                  the path as it was given; "" for an array
    language              "en", say; of a multilingual model, heard in the first window if none was given
    language_probability  1.0 if it was given
    duration              seconds of audio
    error                 why there is no transcript; None if there is one
    """

    name: str
    language: str
    language_probability: float
    duration: float
    segments: list[Segment] = field(default_factory=list)
    error: Exception | None = None

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()

    @property
    def words(self) -> list[Word]:
        return [word for segment in self.segments for word in segment.words or ()]

    def to_dict(self) -> dict[str, Any]:
        """What openai-whisper's transcribe() returns."""
        segments = [asdict(segment) for segment in self.segments]
        for segment in segments:
            if segment["words"] is None:
                del segment["words"]
        return {"text": "".join(one.text for one in self.segments), "segments": segments, "language": self.language}


def compression_ratio(text: str) -> float:
    """How much shorter zlib makes a text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
