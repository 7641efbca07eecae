"""What is to be transcribed: recordings of folders, lists, manifests and Parquet, each under a key of its own."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..transcription.audio import RATE, Samples, read_audio, read_bytes, seconds_of
from ..transcription.files import STDIN, sources
from ..transcription.manifests import MANIFESTS, NAMES, entries, listed

PARQUET = ".parquet"
BYTES_A_SECOND = 16_000  # of a file whose header does not tell how long it is
MOST_SECONDS = 1200.0  # of audio that are given to a worker at once
READERS = 16  # files whose headers are read at once


@dataclass(frozen=True)
class Row:
    """Where the bytes of a recording lie in a Parquet file."""

    file: str
    column: str
    group: int
    row: int  # of its group


@dataclass(frozen=True)
class Item:
    """A recording, or a part of it."""

    key: str  # the same in every run
    audio: str  # its path, or what it is called
    place: Path  # of its files below the output folder
    begin: float = 0.0  # seconds
    end: float | None = None
    seconds: float | None = None  # about how long it is
    row: Row | None = None

    @property
    def is_whole(self) -> bool:
        return not self.begin and self.end is None


def items(source: Any) -> list[Item]:
    """The recordings of a folder, a manifest (.tsv, .csv, .jsonl), Parquet (a file, or a folder of them), a path of a
    recording, or a list of these; see transcribe_dataset()."""
    if isinstance(source, (str, PathLike)):
        source = [source]
    if not isinstance(source, Sequence) or not all(isinstance(one, (str, PathLike)) for one in source):
        raise TypeError(f"source must be a path or a list of paths; got {type(source).__name__}")
    found: dict[str, Item] = {}
    for each in (item for one in source for item in _items(str(one))):
        if found.setdefault(each.key, each) != each:
            raise ValueError(
                f"{found[each.key].audio} and {each.audio} have the same key, {each.key!r}: give each an 'id' in a "
                "manifest, or transcribe them into two folders"
            )
    if not found:
        raise ValueError(f"{source[0] if len(source) == 1 else 'source'}: there is no recording in it")
    return list(found.values())


def measured(found: Sequence[Item]) -> list[Item]:
    """The same with their seconds: by their headers, or else by their sizes."""

    def one(item):
        if item.seconds is not None:
            return item
        seconds = seconds_of(item.audio)
        if seconds is None:
            seconds = os.path.getsize(item.audio) / BYTES_A_SECOND if os.path.isfile(item.audio) else 0.0
        if not item.is_whole:
            seconds = max(0.0, min(seconds, seconds if item.end is None else item.end) - item.begin)
        return replace(item, seconds=seconds)

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(one, found))


def groups(found: Sequence[Item], workers: int, batch_size: int, ahead: int) -> list[list[Item]]:
    """What workers are given at once: recordings of like length, the longest first; of Parquet, neighbours.

    So many that their windows fill batches, and so few that all workers are busy to the end.
    """
    count = min(max(-(-len(found) // (4 * workers)), min(batch_size, -(-len(found) // workers))), ahead * batch_size)
    plain = sorted((item for item in found if item.row is None), key=lambda item: -(item.seconds or 0.0))
    parted: list[list[Item]] = []
    seconds, before = 0.0, None
    for item in (*plain, *(item for item in found if item.row)):
        length, home = item.seconds or 0.0, item.row and (item.row.file, item.row.group)
        if not parted or len(parted[-1]) >= count or seconds + length > MOST_SECONDS or home != before:
            parted.append([])
            seconds = 0.0
        parted[-1].append(item)
        seconds, before = seconds + length, home
    return parted


def audios(group: Sequence[Item]) -> list[str | Samples | Exception]:
    """What engine.run() takes for each: the path of a whole recording, samples of others, or why there are none."""
    tables: dict[tuple[str, int, str], Any] = {}

    def one(item):
        if item.row is None and item.is_whole:
            return item.audio
        samples = read_audio(item.audio) if item.row is None else _in_parquet(item, tables)
        if item.is_whole:
            return samples
        part = samples[round(RATE * item.begin) : None if item.end is None else round(RATE * item.end)]
        if len(part) == 0:
            raise ValueError(f"{item.audio}: there is no sound from {item.begin} s to {item.end} s of it")
        return part

    def tried(item):
        try:
            return one(item)
        except (OSError, ValueError, RuntimeError) as error:
            return error

    return [tried(item) for item in group]


def _items(source) -> Iterator[Item]:
    path = Path(source)
    suffix = path.suffix.lower()
    if source == STDIN:
        raise ValueError("standard input is one recording: transcribe it without Ray, or write it into a file")
    if path.is_dir():
        tables = sorted(path.rglob(f"*{PARQUET}"))
        if tables and not _has_recordings(source):
            yield from (item for table in tables for item in _of_parquet(table, path))
        else:
            for audio, place in sources(source):
                yield Item(place.as_posix(), os.path.abspath(audio), place)
    elif suffix == PARQUET:
        yield from _of_parquet(path, path.parent)
    elif suffix in MANIFESTS:
        for entry in entries(path):
            audio = os.path.abspath(path.parent / entry.audio)
            key = entry.id or entry.audio
            length = entry.duration if entry.end is None else entry.end - (entry.begin or 0.0)
            yield Item(key, audio, _place(key), entry.begin or 0.0, entry.end, length)
    else:
        yield Item(source, os.path.abspath(source), Path(path.name))


def _has_recordings(folder):
    try:
        return bool(sources(folder))
    except ValueError:
        return False


def _place(key):
    """Below the output folder, whatever the key is."""
    path = Path(key)
    return Path(path.name) if path.is_absolute() or ".." in path.parts else path


def _of_parquet(path, folder) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    column = next((name for name in NAMES["audio"] if name in names), None)
    if column is None:
        known = listed(NAMES["audio"])
        raise ValueError(f"{path}: no recordings; the column is called one of {known}, and it has {listed(names)}")
    kind = file.schema_arrow.field(column).type
    kinds = pyarrow.types
    is_path = kinds.is_string(kind) or kinds.is_large_string(kind)
    is_struct = kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (is_path or is_struct or kinds.is_binary(kind) or kinds.is_large_binary(kind)):
        raise ValueError(
            f"{path}: column {column!r} must hold paths, or the bytes of files, or both, as of datasets; got {kind}"
        )
    called = column if is_path else f"{column}.path" if is_struct and kind.get_field_index("path") >= 0 else None
    ids = [name for name in NAMES["id"] if name in names][:1]
    number = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=[*ids, *([called] if called else [])])
        given = table.column(ids[0]).to_pylist() if ids else [None] * len(table)
        paths = _column(table, called) if called else [None] * len(table)
        seconds = None if is_path else _bytes_of(file, group, column) / max(len(table), 1) / BYTES_A_SECOND
        for row in range(file.metadata.row_group(group).num_rows):
            at = f"{path.relative_to(folder).as_posix()}#{number}"
            key = str(given[row]) if ids and given[row] is not None else paths[row] or at
            if is_path:
                audio = os.path.abspath(path.parent / (paths[row] or ""))
                yield Item(key, audio, _place(key))
            else:
                where = Row(os.path.abspath(path), column, group, row)
                yield Item(key, f"{path}, row {number}", _place(key), seconds=seconds, row=where)
            number += 1


def _column(table, name):
    """The values of a column, or of a field in one."""
    outer, _, inner = name.partition(".")
    values = table.column(outer).to_pylist()
    return [value and value[inner] for value in values] if inner else values


def _bytes_of(file, group, column):
    about = file.metadata.row_group(group)
    columns = (about.column(number) for number in range(about.num_columns))
    return sum(one.total_compressed_size for one in columns if one.path_in_schema.split(".")[0] == column)


def _in_parquet(item, tables):
    """The samples of a row. tables: what has been read already."""
    import pyarrow.parquet

    where = item.row
    home = (where.file, where.group, where.column)
    if home not in tables:
        tables.clear()
        tables[home] = pyarrow.parquet.ParquetFile(where.file).read_row_group(where.group, columns=[where.column])
    held = tables[home].column(where.column)[where.row].as_py()
    data, path = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, None)
    if data is None and path:
        return read_audio(Path(where.file).parent / path)
    if not data:
        raise ValueError(f"{item.audio}: there is no sound in it")
    return read_bytes(data, item.audio)
