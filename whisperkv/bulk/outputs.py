"""The folder of results. The driver alone writes it; each file appears when it is whole, and says what is done."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..transcription.files import Job, placed
from ..transcription.results import Transcript
from ..transcription.writers import WRITERS, Layout, formats, replacing, write_files
from .items import Item

TABLES = ("parquet", "jsonl")
ROWS = 1000  # of a part
RUN, FAILED, LOCK = "_run.json", "_failed.jsonl", ".lock"  # hidden from what reads folders of Parquet

Done = list[tuple[Item, Transcript]]


class Texts:
    """txt, vtt, srt, tsv and json, as transcribe() of one process writes them, and _failed.jsonl."""

    def __init__(self, folder: Path, found: Sequence[Item], wanted: list[str], layout: Layout) -> None:
        jobs = placed([(item.audio, item.place) for item in found], folder)
        self._jobs: dict[str, Job] = {item.key: job for item, job in zip(found, jobs)}
        self._wanted, self._layout, self._list = wanted, layout, folder / FAILED
        self._failed: dict[str, Any] = {}
        if self._list.exists():
            lines = self._list.read_text(encoding="utf-8").splitlines()
            self._failed = {each["key"]: each for each in map(json.loads, lines)}

    def done(self) -> tuple[set[str], set[str]]:
        """The keys of what is written, and of what has failed."""
        written = {key for key, job in self._jobs.items() if job.is_written(self._wanted)}
        return written, set(self._failed) - written

    def forget(self, keys: set[str]) -> None:
        """What has failed is to be tried again."""
        self._failed = {key: each for key, each in self._failed.items() if key not in keys}
        self._save()

    def add(self, done: Done) -> None:
        has_failed = False
        for item, transcript in done:
            stem = self._jobs[item.key].stem
            if transcript.error is None:
                assert stem is not None
                write_files(transcript, stem, self._wanted, self._layout)
            else:
                self._failed[item.key] = {"key": item.key, "audio": item.audio, "error": reason(transcript.error)}
                has_failed = True
        if has_failed:
            self._save()

    def _save(self):
        with replacing(self._list) as file:
            for each in self._failed.values():
                print(json.dumps(each, ensure_ascii=False), file=file)


class Table:
    """part-00000.parquet (or .jsonl) and so on, a row a recording. A part grows until it is full: the whole file is
    written anew, and takes the old one's place."""

    def __init__(self, folder: Path, format: str) -> None:
        self._folder, self._format = folder, format
        self._parts = sorted(folder.glob(f"part-*.{format}"))
        last = int(self._parts[-1].stem.removeprefix("part-")) if self._parts else -1
        self._number = last + 1
        self._rows: list[dict[str, Any]] = []
        for left in folder.glob(f".part-*.{format}"):  # of a driver that was killed
            left.unlink()

    def done(self) -> tuple[set[str], set[str]]:
        written: set[str] = set()
        failed: set[str] = set()
        for part in self._parts:
            for key, error in self._keys(part):
                (written if error is None else failed).add(key)
        return written, failed

    def forget(self, keys: set[str]) -> None:
        for part in self._parts:
            if any(key in keys for key, _ in self._keys(part)):
                self._write(part, [row for row in self._read(part) if row["key"] not in keys])

    def add(self, done: Done) -> None:
        self._rows += [record(item, transcript) for item, transcript in done]
        self._write(self._folder / f"part-{self._number:05d}.{self._format}", self._rows)
        if len(self._rows) >= ROWS:
            self._number, self._rows = self._number + 1, []

    def _keys(self, part):
        if self._format == "jsonl":
            return [(row["key"], row["error"]) for row in self._read(part)]
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(part, columns=["key", "error"])
        return list(zip(table["key"].to_pylist(), table["error"].to_pylist()))

    def _read(self, part):
        if self._format == "jsonl":
            return [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(part).read().to_pylist()

    def _write(self, part, rows):
        if self._format == "jsonl":
            with replacing(part) as file:
                for row in rows:
                    print(json.dumps(row, ensure_ascii=False), file=file)
            return
        import pyarrow
        import pyarrow.parquet

        with replacing(part, "wb") as file:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema()), file)


def output_of(folder: Path, found: Sequence[Item], format: str, layout: Layout) -> Texts | Table:
    return Table(folder, format) if format in TABLES else Texts(folder, found, formats(format), layout)


def check_format(name: str) -> None:
    if name not in TABLES and name != "all" and name not in WRITERS:
        raise ValueError(f"output_format must be one of {', '.join((*TABLES, *WRITERS))} or all; got {name!r}")


@contextmanager
def folder_of(path: Path, run: dict[str, str]) -> Iterator[Path]:
    """The folder, made if need be, and this process's alone. run: what the texts depend on, the same in every run."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another run writes into it; wait for its end, or name another") from None
        except OSError:
            pass  # a file system without locks
        about = path / RUN
        before = json.loads(about.read_text()) if about.exists() else run
        for name in run:
            if before.get(name) != run[name]:
                raise ValueError(
                    f"{path}: what is in this folder was made with {name}={before.get(name)}, and now it is "
                    f"{run[name]}: name another folder"
                )
        with replacing(about) as file:
            json.dump(run, file, indent=1)
        yield path


def record(item: Item, transcript: Transcript) -> dict[str, Any]:
    """A row."""
    error = transcript.error and reason(transcript.error)
    return {
        "key": item.key,
        "audio": item.audio,
        "text": transcript.text if error is None else None,
        "language": transcript.language or None,
        "language_probability": transcript.language_probability,
        "duration": transcript.duration,
        "segments": [asdict(segment) for segment in transcript.segments],
        "error": error,
    }


def reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def schema() -> Any:
    """Of Parquet: the columns of record()."""
    from pyarrow import field, float64, int32, int64, list_, string, struct
    from pyarrow import schema as of

    word = struct([("start", float64()), ("end", float64()), ("word", string()), ("probability", float64())])
    segment = struct([
        ("id", int32()), ("seek", int64()), ("start", float64()), ("end", float64()), ("text", string()),
        ("tokens", list_(int32())), ("temperature", float64()), ("avg_logprob", float64()),
        ("compression_ratio", float64()), ("no_speech_prob", float64()), ("words", list_(word)),
    ])  # fmt: skip
    return of([
        field("key", string(), nullable=False), ("audio", string()), ("text", string()), ("language", string()),
        ("language_probability", float64()), ("duration", float64()), ("segments", list_(segment)), ("error", string()),
    ])  # fmt: skip
