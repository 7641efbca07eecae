"""Files of a transcript, field by field as openai-whisper writes them. A format is one class and a line of WRITERS."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

from .results import Segment, Transcript, Word

PAUSE = 3.0  # seconds without a word, after which a subtitle does not go on
UNLIMITED = 1000


@dataclass(frozen=True)
class Layout:
    """How subtitles are cut, where there are words.

    max_line_width      characters of a line
    max_line_count      lines of a subtitle; with max_line_width, subtitles are cut without regard to the segments
    max_words_per_line  words of a line; without max_line_width
    highlight_words     underline each word as it is spoken
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None
    highlight_words: bool = False

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, or None; got {value}")

    @property
    def needs_words(self) -> bool:
        return self != Layout()


class Cue(NamedTuple):
    start: float
    end: float
    text: str


class Txt:
    """A line a segment."""

    extension: ClassVar[str] = "txt"

    def write(self, transcript: Transcript, file: IO[str], layout: Layout = Layout()) -> None:
        for segment in transcript.segments:
            print(segment.text.strip(), file=file)


class Vtt:
    """WebVTT."""

    extension: ClassVar[str] = "vtt"

    def write(self, transcript: Transcript, file: IO[str], layout: Layout = Layout()) -> None:
        print("WEBVTT\n", file=file)
        for cue in cues(transcript, layout):
            print(f"{clock(cue.start)} --> {clock(cue.end)}\n{cue.text}\n", file=file)


class Srt:
    """SubRip."""

    extension: ClassVar[str] = "srt"

    def write(self, transcript: Transcript, file: IO[str], layout: Layout = Layout()) -> None:
        for number, cue in enumerate(cues(transcript, layout), 1):
            start, end = (clock(seconds, hours=True, point=",") for seconds in cue[:2])
            print(f"{number}\n{start} --> {end}\n{cue.text}\n", file=file)


class Tsv:
    """start, end (milliseconds) and text, separated by tabs."""

    extension: ClassVar[str] = "tsv"

    def write(self, transcript: Transcript, file: IO[str], layout: Layout = Layout()) -> None:
        print("start", "end", "text", sep="\t", file=file)
        for segment in transcript.segments:
            times = (round(1000 * seconds) for seconds in (segment.start, segment.end))
            print(*times, segment.text.strip().replace("\t", " "), sep="\t", file=file)


class Json:
    """All there is."""

    extension: ClassVar[str] = "json"

    def write(self, transcript: Transcript, file: IO[str], layout: Layout = Layout()) -> None:
        json.dump(transcript.to_dict(), file)


Writer = Txt | Vtt | Srt | Tsv | Json
WRITERS: dict[str, type[Writer]] = {kind.extension: kind for kind in (Txt, Vtt, Srt, Tsv, Json)}


def formats(name: str) -> list[str]:
    """The formats that "all", or the name of one, stands for."""
    if name != "all" and name not in WRITERS:
        raise ValueError(f"output_format must be one of {', '.join(WRITERS)} or all; got {name!r}")
    return list(WRITERS) if name == "all" else [name]


def write_files(transcript: Transcript, stem: Path, wanted: list[str], layout: Layout = Layout()) -> list[Path]:
    """STEM.txt and so on. Each appears under its name when it is whole, and none before all are written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.parent / f"{stem.name}.{name}" for name in wanted]
    with ExitStack() as stack:
        files = [stack.enter_context(replacing(path)) for path in reversed(paths)]  # the first is left first
        for name, file in zip(wanted, reversed(files)):
            WRITERS[name]().write(transcript, file, layout)
            file.flush()
            os.fsync(file.fileno())
    return paths


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears under this name when it is whole, in place of one that is there; after an error, not at
    all."""
    encoding = None if "b" in mode else "utf-8"
    with tempfile.NamedTemporaryFile(
        mode, dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix, delete=False, encoding=encoding
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def clock(seconds: float, hours: bool = False, point: str = ".") -> str:
    """01:02.345, with hours if there are any or they are asked for."""
    left, milliseconds = divmod(round(seconds * 1000), 1000)
    minutes, left = divmod(left, 60)
    whole, minutes = divmod(minutes, 60)
    return (f"{whole:02d}:" if hours or whole else "") + f"{minutes:02d}:{left:02d}{point}{milliseconds:03d}"


def cues(transcript: Transcript, layout: Layout) -> Iterator[Cue]:
    """The subtitles: of words where there are any, else of segments."""
    segments = transcript.segments
    if not segments or segments[0].words is None:
        for segment in segments:
            yield Cue(segment.start, segment.end, segment.text.strip().replace("-->", "->"))
        return
    for subtitle in _subtitles(segments, layout):
        yield from _highlighted(subtitle) if layout.highlight_words else [_plain(subtitle)]


def _plain(subtitle):
    return Cue(subtitle[0].start, subtitle[-1].end, "".join(word.word for word in subtitle))


def _highlighted(subtitle):
    """A cue for each word, underlined, and one for each gap between two."""
    text, last = _plain(subtitle).text, subtitle[0].start
    for number, word in enumerate(subtitle):
        if clock(last) != clock(word.start):
            yield Cue(last, word.start, text)
        marked = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", word.word)
        yield Cue(
            word.start, word.end, "".join(marked if at == number else other.word for at, other in enumerate(subtitle))
        )
        last = word.end


def _subtitles(segments: list[Segment], layout: Layout) -> Iterator[list[Word]]:
    """Lists of words, a line break before each that begins a line."""
    by_segments = layout.max_line_count is None or layout.max_line_width is None
    width = layout.max_line_width or UNLIMITED
    size = layout.max_words_per_line or UNLIMITED
    subtitle: list[Word] = []
    length, lines = 0, 1
    first = next((word.start for segment in segments for word in segment.words or ()), segments[0].start)
    last = first or 0.0
    for segment in segments:
        for number, word in enumerate(segment.words or ()):
            pause = not by_segments and word.start - last > PAUSE
            begins = number % size == 0 and by_segments and bool(subtitle)
            text = word.word
            if length > 0 and length + len(text) <= width and not pause and not begins:
                length += len(text)
            else:
                text = text.strip()
                is_full = layout.max_line_count is not None and (pause or lines >= layout.max_line_count)
                if subtitle and is_full or begins:
                    yield subtitle
                    subtitle, lines = [], 1
                elif length > 0:
                    lines += 1
                    text = "\n" + text
                length = len(text.strip())
            subtitle.append(Word(word.start, word.end, text, word.probability))
            last = word.start
    if subtitle:
        yield subtitle


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
