"""Data sets as they lie in folders. Each reader yields Samples, and names the file that is missing or broken."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}  # of GigaSpeech
NO_SPEECH = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
AUDIO = (".flac", ".wav", ".mp3", ".ogg", ".opus")


@dataclass(frozen=True)
class Sample:
    """A recording, or a part of it, and what is said or answered."""

    name: str
    audio: Path
    text: str = ""  # what is said
    question: str = ""  # what is asked about it
    answers: tuple[str, ...] = ()  # any of which is right
    begin: float = 0.0  # seconds
    end: float | None = None


def librispeech(folder: str | PathLike[str]) -> Iterator[Sample]:
    """LibriSpeech and LibriSpeech-long: in any depth of folders, NAME.trans.txt with lines of an id and its text, and
    the recording ID.flac (or .wav) beside it."""
    found = sorted(_folder(folder).rglob("*.trans.txt"))
    if not found:
        raise FileNotFoundError(f"{folder}: no *.trans.txt in it, as LibriSpeech has them")
    for lines in found:
        for line in lines.read_text().splitlines():
            name, _, text = line.strip().partition(" ")
            if name:
                yield Sample(name, _audio(lines.parent / name, lines), text.strip())


def gigaspeech(path: str | PathLike[str], subset: str = "") -> Iterator[Sample]:
    """GigaSpeech: GigaSpeech.json (or the folder that holds it), whose "audios" have a "path" and "segments" with
    "begin_time", "end_time" and "text_tn". `subset` as "DEV" or "{XS}"; "" is all. Segments without speech are
    left out."""
    path = Path(path)
    path = path / "GigaSpeech.json" if path.is_dir() else path
    wanted = "{" + subset.strip("{}") + "}" if subset else ""
    for audio in _json(path, path.read_text())["audios"]:
        for segment in audio["segments"]:
            text = segment["text_tn"]
            if wanted and wanted not in segment.get("subsets", audio.get("subsets", [])):
                continue
            if any(tag in text for tag in NO_SPEECH):
                continue
            for tag, mark in PUNCTUATION.items():
                text = text.replace(f" {tag}", mark).replace(tag, mark)
            begin, end = float(segment["begin_time"]), float(segment["end_time"])
            yield Sample(segment["sid"], _audio(path.parent / audio["path"], path), text, begin=begin, end=end)


def spoken_qa(manifest: str | PathLike[str]) -> Iterator[Sample]:
    """Spoken question answering: JSON lines of "audio" (a path, from the manifest's folder), "question" and "answers"
    (one text or several); "id" and "text" if there are any."""
    manifest = Path(manifest)
    for number, line in enumerate(manifest.read_text().splitlines(), 1):
        if not line.strip():
            continue
        given = _json(f"{manifest}, line {number}", line)
        for field in ("audio", "question", "answers"):
            if field not in given:
                raise ValueError(f"{manifest}, line {number}: no {field!r}, which every line must have")
        answers = given["answers"]
        yield Sample(
            str(given.get("id", number)),
            _audio(manifest.parent / given["audio"], manifest),
            given.get("text", ""),
            given["question"],
            (answers,) if isinstance(answers, str) else tuple(answers),
        )


def read(path: str | PathLike[str]) -> list[Sample]:
    """By what is there: GigaSpeech.json, a manifest of JSON lines, or a folder as LibriSpeech's."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.name == "GigaSpeech.json" or (path.is_dir() and (path / "GigaSpeech.json").is_file()):
        return list(gigaspeech(path))
    return list(spoken_qa(path) if path.is_file() else librispeech(path))


def _folder(path):
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    return path


def _audio(path, named_by):
    """The recording of that path, with an ending of its own or any of AUDIO."""
    for each in (path, *(Path(f"{path}{ending}") for ending in AUDIO)):
        if each.is_file():
            return each
    raise FileNotFoundError(f"{path}: no such recording, though {named_by} names it")


def _json(place, text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: this is no JSON ({error})") from error
