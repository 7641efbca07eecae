"""Lists of recordings: tables, JSON lines, and objects of `datasets`."""

import csv
import functools
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..transcription.audio import RATE, read_audio
from .samples import Sample, read_json, recording, reference

MANIFESTS = (".tsv", ".csv", ".jsonl", ".json")
NAMES = {  # of a field: those that it goes by, here and elsewhere
    "audio": ("audio", "path", "file", "file_name", "audio_filepath"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "id": ("id",),
    "begin": ("begin", "offset"),
    "end": ("end",),
    "duration": ("duration",),
}


def manifest(path: str | PathLike[str]) -> Iterator[Sample]:
    """Recordings and what is said in them, one a line: a table (.tsv, .csv) whose first line names the columns, or JSON
    lines. "audio" is a path from the manifest's folder, "text" what is said, if that is known; "id", "begin" and "end"
    in seconds if a part of a recording is meant. Names that Common Voice, NeMo and audiofolder use do as well."""
    path = Path(path)
    for number, given in _lines(path):
        place = f"{path}, line {number}"
        audio, text = _field(given, "audio"), _field(given, "text")
        if not audio:
            known = ", ".join(map(repr, NAMES["audio"]))
            raise ValueError(f"{place}: no audio; the field is called one of {known}, and this line has {_had(given)}")
        begin, end, duration = (_seconds(given, field, place) for field in ("begin", "end", "duration"))
        if end is None and begin is not None and duration is not None:
            end = begin + duration
        yield Sample(
            str(_field(given, "id") or Path(audio).stem),
            recording(path.parent / audio, place),
            "" if text is None else reference(str(text), place),
            begin=begin or 0.0,
            end=end,
        )


def from_dataset(rows: Any, audio: str = "audio", text: str = "text") -> Iterator[Sample]:
    """The rows of a `datasets.Dataset` or IterableDataset, or any rows like its own; `audio` and `text` name the
    columns. Nothing is decoded before it is needed."""
    if not hasattr(rows, "__iter__"):
        raise TypeError(f"data must be a path or rows of a dataset; got {type(rows).__name__}")
    if hasattr(rows, "cast_column"):
        import datasets

        rows = rows.cast_column(audio, datasets.Audio(decode=False))
    for number, row in enumerate(rows, 1):
        place = f"row {number} of the dataset"
        if not isinstance(row, dict) or row.get(audio) is None:
            had = _had(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{place}: no {audio!r}, and it has {had}: name the column by audio=")
        said = row.get(text)
        yield Sample(
            str(row.get("id", number)),
            functools.partial(_decoded, row[audio], place),
            "" if said is None else reference(said, place),
        )


def _decoded(held, place):
    """The samples of what `datasets` holds of an audio: a file's bytes, its path, or the samples themselves."""
    if isinstance(held, dict) and held.get("bytes"):
        with tempfile.NamedTemporaryFile(suffix=Path(held.get("path") or "").suffix) as file:
            file.write(held["bytes"])
            file.flush()
            return read_audio(file.name)
    if isinstance(held, dict) and "array" not in held:
        return read_audio(held["path"])
    if isinstance(held, (str, PathLike)):
        return read_audio(held)
    samples, rate = np.asarray(held["array"], np.float32), held["sampling_rate"]
    samples = samples.mean(axis=0) if samples.ndim > 1 else samples
    if rate != RATE:
        import soxr

        samples = soxr.resample(samples, rate, RATE)
    if len(samples) == 0:
        raise ValueError(f"{place}: there is no sound in it")
    return samples


def _lines(path):
    """(number, {name: value}) of each line that is not empty."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() in (".tsv", ".csv"):
            plain: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
            table = csv.DictReader(file, restkey="", **plain)
            _check_columns(path, table.fieldnames or [])
            for row in table:
                if "" in row:
                    raise ValueError(f"{path}, line {table.line_num}: more cells than the first line has columns")
                yield table.line_num, {name: value for name, value in row.items() if value is not None}
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                given = read_json(f"{path}, line {number}", line)
                if not isinstance(given, dict):
                    raise ValueError(f'{path}, line {number}: not an object, as {{"audio": "a.wav", "text": "Hello."}}')
                yield number, given


def _check_columns(path, names):
    if not set(names) & set(NAMES["audio"]):
        known = ", ".join(map(repr, NAMES["audio"]))
        raise ValueError(f"{path}: its first line must name the columns, one of them {known}; it has {names}")


def _field(given, field):
    return next((given[name] for name in NAMES[field] if given.get(name) is not None), None)


def _seconds(given, field, place):
    value = _field(given, field)
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{place}: {field} must be seconds; got {value!r}") from None


def _had(given):
    return ", ".join(map(repr, given)) or "nothing"
