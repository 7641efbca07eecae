"""Data sets as they lie in folders. Each reader yields Samples, and names the file that is missing or broken."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from ..transcription.audio import ENDINGS
from ..transcription.manifests import MANIFESTS, read_json
from .manifests import from_dataset, manifest
from .samples import Sample, recording, reference

PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}  # of GigaSpeech
NO_SPEECH = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")


def librispeech(folder: str | PathLike[str]) -> Iterator[Sample]:
    """LibriSpeech and LibriSpeech-long: in any depth of folders, NAME.trans.txt with lines of an id and its text, and
    the recording ID.flac (or .wav) beside it."""
    found = sorted(_folder(folder).rglob("*.trans.txt"))
    if not found:
        raise FileNotFoundError(f"{folder}: no *.trans.txt in it, as LibriSpeech has them")
    for lines in found:
        for number, line in enumerate(lines.read_text().splitlines(), 1):
            name, _, text = line.strip().partition(" ")
            if name:
                said = reference(text, f"{lines}, line {number}")
                yield Sample(name, recording(lines.parent / name, lines), said)


def gigaspeech(path: str | PathLike[str], subset: str = "") -> Iterator[Sample]:
    """GigaSpeech: GigaSpeech.json (or the folder that holds it), whose "audios" have a "path" and "segments" with
    "begin_time", "end_time" and "text_tn". `subset` as "DEV" or "{XS}"; "" is all. Segments without speech are
    left out."""
    path = Path(path)
    path = path / "GigaSpeech.json" if path.is_dir() else path
    wanted = "{" + subset.strip("{}") + "}" if subset else ""
    for audio in read_json(path, path.read_text())["audios"]:
        for segment in audio["segments"]:
            text = segment["text_tn"]
            if wanted and wanted not in segment.get("subsets", audio.get("subsets", [])):
                continue
            if any(tag in text for tag in NO_SPEECH):
                continue
            for tag, mark in PUNCTUATION.items():
                text = text.replace(f" {tag}", mark).replace(tag, mark)
            begin, end = float(segment["begin_time"]), float(segment["end_time"])
            yield Sample(segment["sid"], recording(path.parent / audio["path"], path), text, begin=begin, end=end)


def spoken_qa(manifest: str | PathLike[str]) -> Iterator[Sample]:
    """Spoken question answering: JSON lines of "audio" (a path, from the manifest's folder), "question" and "answers"
    (one text or several); "id" and "text" if there are any."""
    manifest = Path(manifest)
    for number, line in enumerate(manifest.read_text().splitlines(), 1):
        if not line.strip():
            continue
        given = read_json(f"{manifest}, line {number}", line)
        for field in ("audio", "question", "answers"):
            if field not in given:
                raise ValueError(f"{manifest}, line {number}: no {field!r}, which every line must have")
        answers = given["answers"]
        yield Sample(
            str(given.get("id", number)),
            recording(manifest.parent / given["audio"], manifest),
            given.get("text", ""),
            given["question"],
            (answers,) if isinstance(answers, str) else tuple(answers),
        )


def recordings(folder: str | PathLike[str]) -> Iterator[Sample]:
    """A plain folder: every recording in it, in any depth, and what is said where NAME.txt stands beside it."""
    found = sorted(path for path in _folder(folder).rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise FileNotFoundError(f"{folder}: no recording in it; known are {' '.join(sorted(ENDINGS))}")
    for path in found:
        yield _with_text(path, str(path.relative_to(folder).with_suffix("")))


def read(path: object) -> list[Sample]:
    """By what is there: a recording, a manifest (.tsv, .csv, .jsonl), GigaSpeech.json, a folder as LibriSpeech's or any
    folder of recordings; or an object of `datasets`."""
    if not isinstance(path, (str, PathLike)):
        return list(from_dataset(path))
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; check the path")
    if path.name == "GigaSpeech.json" or (path.is_dir() and (path / "GigaSpeech.json").is_file()):
        return list(gigaspeech(path))
    if path.is_dir():
        return list(librispeech(path) if any(path.rglob("*.trans.txt")) else recordings(path))
    if path.suffix.lower() not in MANIFESTS:
        return [_with_text(path, path.stem)]
    return list(spoken_qa(path) if _asks(path) else manifest(path))


def _with_text(path, name):
    text = path.with_suffix(".txt")
    return Sample(name, path, reference(text.read_text(), text) if text.is_file() else "")


def _asks(path):
    """Whether a manifest of JSON lines has questions."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        return False
    with open(path) as lines:
        first = next((line for line in lines if line.strip()), "{}")
    given = read_json(f"{path}, line 1", first)
    return isinstance(given, dict) and bool({"question", "answers"} & given.keys())


def _folder(path):
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    return path
