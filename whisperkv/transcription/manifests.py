"""Lists of recordings as they lie on disk: tables and JSON lines, by the names that others give their fields, too."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

MANIFESTS = (".tsv", ".csv", ".jsonl", ".json")
NAMES = {  # of a field: those that it goes by, here and elsewhere
    "audio": ("audio", "path", "file", "file_name", "audio_filepath"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "id": ("id",),
    "begin": ("begin", "offset"),
    "end": ("end",),
    "duration": ("duration",),
}


@dataclass(frozen=True)
class Entry:
    """A line of a manifest."""

    place: str  # "list.tsv, line 3", for what is said of it
    audio: str  # a path from the manifest's folder
    id: str | None
    text: str | None
    begin: float | None  # seconds, if a part of the recording is meant
    end: float | None
    duration: float | None


def entries(path: str | PathLike[str]) -> Iterator[Entry]:
    """The lines of a table (.tsv, .csv) whose first line names the columns, or of a file of JSON lines."""
    path = Path(path)
    for number, given in _lines(path):
        place = f"{path}, line {number}"
        audio, id, text = (_field(given, name) for name in ("audio", "id", "text"))
        if not audio:
            known = ", ".join(map(repr, NAMES["audio"]))
            raise ValueError(
                f"{place}: no audio; the field is called one of {known}, and this line has {listed(given)}"
            )
        begin, end, duration = (_seconds(given, field, place) for field in ("begin", "end", "duration"))
        if end is None and begin is not None and duration is not None:
            end = begin + duration
        yield Entry(
            place, str(audio), str(id) if id else None, None if text is None else str(text), begin, end, duration
        )


def read_json(place: object, text: str):  # type: ignore[no-untyped-def]  # any JSON
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: this is no JSON ({error})") from error


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


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
