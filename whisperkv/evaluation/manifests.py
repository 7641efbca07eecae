"""Lists of recordings: tables, JSON lines, and objects of `datasets`."""

import functools
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..transcription.audio import RATE, read_audio
from ..transcription.manifests import entries, listed
from .samples import Sample, recording, reference


def manifest(path: str | PathLike[str]) -> Iterator[Sample]:
    """Recordings and what is said in them, one a line: a table (.tsv, .csv) whose first line names the columns, or JSON
    lines. "audio" is a path from the manifest's folder, "text" what is said, if that is known; "id", "begin" and "end"
    in seconds if a part of a recording is meant. Names that Common Voice, NeMo and audiofolder use do as well."""
    path = Path(path)
    for each in entries(path):
        yield Sample(
            each.id or Path(each.audio).stem,
            recording(path.parent / each.audio, each.place),
            "" if each.text is None else reference(each.text, each.place),
            begin=each.begin or 0.0,
            end=each.end,
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
            had = listed(row) if isinstance(row, dict) else type(row).__name__
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
