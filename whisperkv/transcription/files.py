"""Which recordings are to be transcribed into which files, and doing it: each file is written as soon as it can be."""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .audio import ENDINGS, STDIN
from .engine import News, run
from .settings import Settings
from .writers import WRITERS, Layout, write_files

STDOUT = "-"


@dataclass(frozen=True)
class Job:
    """A recording, and the path of its files without their endings; None is standard output."""

    source: str
    stem: Path | None

    def is_written(self, formats: Sequence[str]) -> bool:
        return self.stem is not None and all(Path(f"{self.stem}.{name}").exists() for name in formats)


def plan(audios: Iterable[str | PathLike[str]], output_dir: str | PathLike[str]) -> list[Job]:
    """The jobs of files, folders (with all folders in them) and "-", in order.

    A file of a folder keeps its place: FOLDER/talks/a.mp3 becomes OUTPUT_DIR/talks/a.txt. Where two would be written to
    one file, they keep their endings: a.mp3.txt and a.wav.txt.
    """
    found = list(dict.fromkeys(pair for audio in audios for pair in sources(str(audio))))
    if str(output_dir) == STDOUT:
        return [Job(source, None) for source, _ in found]
    return placed(found, output_dir)


def placed(found: Sequence[tuple[str, Path]], output_dir: str | PathLike[str]) -> list[Job]:
    """The jobs of recordings by their places below the output folder."""
    whole = [Path(output_dir, place) for _, place in found]
    short = [path.with_suffix("") if path.suffix.lower() in ENDINGS else path for path in whole]
    counts = Counter(short)
    stems = [path if counts[stem] > 1 else stem for path, stem in zip(whole, short)]
    first: dict[Path, str] = {}
    for stem, (source, _) in zip(stems, found):
        if first.setdefault(stem, source) != source:
            raise ValueError(
                f"{first[stem]} and {source} would be written to the same {stem}.*: name the folder that holds both, "
                "or run them one after the other with another output_dir"
            )
    return [Job(source, stem) for (source, _), stem in zip(found, stems)]


def sources(audio: str) -> list[tuple[str, Path]]:
    """(source, place below the output folder) of a file, or of all recordings in a folder."""
    path = Path(audio)
    if audio == STDIN:
        return [(STDIN, Path("stdin"))]
    if not path.is_dir():
        return [(audio, Path(path.name))]
    found = [
        (str(file), file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in ENDINGS and file.is_file() and not file.name.startswith(".")
    ]
    if not found:
        raise ValueError(f"{audio}: no recordings in this folder; known are {' '.join(sorted(ENDINGS))}")
    return found


def check_writable(jobs: Iterable[Job]) -> None:
    """Make the folders of the jobs' files, and raise if nothing can be written there: before hours are decoded."""
    for folder in dict.fromkeys(job.stem.parent for job in jobs if job.stem is not None):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            why = f"{folder}: {error.strerror}, so nothing can be written there; name another output_dir"
            raise OSError(why) from error


def transcribe_files(
    jobs: Sequence[Job],
    model: Any,
    processor: Any,
    settings: Settings,
    formats: Sequence[str],
    layout: Layout = Layout(),
) -> Iterator[News]:
    """The news of jobs, the files of each written before it is told that it is done."""
    for news in run(model, processor, [job.source for job in jobs], settings):
        transcript, stem = news.transcript, jobs[news.number].stem
        if transcript is not None and transcript.error is None:
            if stem is not None:
                write_files(transcript, stem, list(formats), layout)
            else:
                for name in formats:
                    WRITERS[name]().write(transcript, sys.stdout, layout)
                sys.stdout.flush()
        yield news
