"""Readers of data sets, on small ones made of real recordings where they are, and the metrics."""

import json

import numpy as np
import pytest

from whisperkv.evaluation import (
    exact_match,
    gigaspeech,
    interval,
    librispeech,
    normalized,
    read,
    spoken_qa,
    word_errors,
)
from whisperkv.transcription.audio import read_audio

soundfile = pytest.importorskip("soundfile")


@pytest.fixture
def recording(tmp_path):
    def make(name, seconds=0.5):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(int(16000 * seconds), np.float32), 16000)
        return path

    return make


def test_librispeech(tmp_path, recording):
    for name in ("0000", "0001"):
        recording(f"test-other/1/2/1-2-{name}.flac")
    recording("test-other/3/4/3-4_0.flac")
    (tmp_path / "test-other/1/2/1-2.trans.txt").write_text("1-2-0000 HELLO THERE\n1-2-0001 BYE\n")
    (tmp_path / "test-other/3/4/3-4_0.trans.txt").write_text("3-4_0 A LONG TEXT\n")
    samples = list(librispeech(tmp_path))
    assert [(one.name, one.text) for one in samples] == [
        ("1-2-0000", "HELLO THERE"),
        ("1-2-0001", "BYE"),
        ("3-4_0", "A LONG TEXT"),
    ]
    assert all(one.audio.is_file() for one in samples) and read(tmp_path) == samples


def test_real_recordings_in_that_layout(tmp_path, recordings):
    lines = [line.split("\t") for line in (recordings / "librispeech/transcripts.tsv").read_text().splitlines()]
    for path in sorted((recordings / "librispeech/test-other").glob("*.flac"))[:6]:
        text = next(line[-1] for line in lines if any(path.stem in cell for cell in line))
        speaker, chapter, _ = path.stem.split("-")
        folder = tmp_path / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
        with open(folder / f"{speaker}-{chapter}.trans.txt", "a") as transcripts:
            transcripts.write(f"{path.stem} {text}\n")
    samples = read(tmp_path)
    assert len(samples) == 6 and all(len(one.text.split()) > 2 for one in samples)
    assert all(len(read_audio(one.audio)) > 8000 for one in samples)


def test_gigaspeech(tmp_path, recording):
    recording("audio/youtube/Y1.opus.wav")
    recording("audio/podcast/P1.wav")
    segments = [
        dict(sid="Y1_0", begin_time=1.5, end_time=3.25, text_tn="HELLO <COMMA> YOU <PERIOD>", subsets=["{XS}", "{L}"]),
        dict(sid="Y1_1", begin_time=4, end_time=5, text_tn="<MUSIC>", subsets=["{XS}"]),
    ]
    other = [dict(sid="P1_0", begin_time=0, end_time=1, text_tn="WHAT <QUESTIONMARK>", subsets=["{DEV}"])]
    audios = [dict(path="audio/youtube/Y1.opus", segments=segments), dict(path="audio/podcast/P1.wav", segments=other)]
    (tmp_path / "GigaSpeech.json").write_text(json.dumps({"audios": audios}))
    first, second = gigaspeech(tmp_path)
    assert (first.name, first.text, first.begin, first.end) == ("Y1_0", "HELLO, YOU.", 1.5, 3.25)
    assert second.text == "WHAT?" and [one.name for one in gigaspeech(tmp_path, "DEV")] == ["P1_0"]
    assert len(read(tmp_path)) == 2


def test_spoken_qa(tmp_path, recording):
    recording("a/1.wav")
    lines = [
        {"audio": "a/1.wav", "question": "Who?", "answers": ["Ann", "The Ann"], "id": "q7"},
        {"audio": "a/1", "question": "When?", "answers": "today"},
    ]
    manifest = tmp_path / "qa.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = spoken_qa(manifest)
    assert (first.name, first.question, first.answers) == ("q7", "Who?", ("Ann", "The Ann"))
    assert (second.name, second.answers) == ("2", ("today",)) and len(read(manifest)) == 2


def test_what_is_missing_or_broken_is_named(tmp_path, recording):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="trans.txt"):
        read(tmp_path)
    (tmp_path / "x.trans.txt").write_text("x-1 TEXT\n")
    with pytest.raises(FileNotFoundError, match="x-1.*x.trans.txt names it"):
        read(tmp_path)
    manifest = tmp_path / "qa.jsonl"
    manifest.write_text('{"audio": "a.wav"}\n')
    with pytest.raises(ValueError, match="line 1: no 'question'"):
        read(manifest)
    manifest.write_text("{nonsense\n")
    with pytest.raises(ValueError, match="line 1: this is no JSON"):
        read(manifest)


def test_metrics():
    pytest.importorskip("jiwer")
    assert normalized("The  Cat's, out!") == "cat's out"
    assert exact_match("the cat.", ["Dog", "Cat"]) and not exact_match("cats", ["cat"])
    assert word_errors("a b d", "a b c") == (1, 3) and word_errors("x y", "") == (2, 0)
    low, high = interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.5 < high < 0.65 and interval([2.0] * 5) == (2.0, 2.0)
    assert interval([1.0, 0.0], [2.0, 2.0])[1] <= 0.5
    with pytest.raises(ValueError, match="one number"):
        interval([])
