"""The files of a transcript, held to openai-whisper's own writers on the same segments."""

import importlib.util
import io
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from whisperkv.transcription import writers
from whisperkv.transcription.results import Segment, Transcript, Word
from whisperkv.transcription.writers import WRITERS, Layout, clock, formats, write_files


@pytest.fixture(scope="module")
def theirs():
    """openai-whisper's utils.py, loaded by itself: the package would import numba and more."""
    spec = importlib.util.find_spec("whisper")
    file = spec and spec.submodule_search_locations and Path(spec.submodule_search_locations[0]) / "utils.py"
    if not file or not file.exists():
        pytest.skip("openai-whisper is not installed (pip install --no-deps openai-whisper)")
    spec = importlib.util.spec_from_file_location("openai_whisper_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def transcript(segments):
    return Transcript("talk.wav", "en", 1.0, 100.0, segments)


def drawn(seed, with_words=True, start=0.0):
    """Segments with words, punctuation, pauses, tabs, arrows and times of any fraction."""
    draw, now, found = random.Random(seed), start, []
    for number in range(draw.randrange(1, 8)):
        words = []
        now += draw.choice([0, 0.004, 0.5, 4.2])
        for _ in range(draw.randrange(1, 25)):
            end = now + draw.choice([0, 0.123, 0.38, 1.1])
            text = draw.choice([" a", " fishing", " boat,", " über", " -->", "日本", " x\ty", " irreproachably."])
            words.append(Word(round(now, 3), round(end, 3), text, draw.random()))
            now = end + draw.choice([0, 0, 0.01, 3.5])
        text = "".join(word.word for word in words)
        said = words if with_words else None
        found.append(Segment(number, 0, words[0].start, words[-1].end, text, [1, 2], 0.0, -0.3, 1.2, 0.01, said))
    return transcript(found)


def written(kind, given, layout=Layout()):
    file = io.StringIO()
    WRITERS[kind]().write(given, file, layout)
    return file.getvalue()


def written_by_them(theirs, kind, given, **options):
    file = io.StringIO()
    theirs.get_writer(kind, ".").write_result(given.to_dict(), file, options)
    return file.getvalue()


@pytest.mark.parametrize("kind", WRITERS)
def test_segments(theirs, kind):
    for seed in range(20):
        given = drawn(seed, with_words=False, start=3590.0 if seed % 2 else 0.0)
        assert written(kind, given) == written_by_them(theirs, kind, given)


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_said(theirs, kind):
    assert written(kind, transcript([])) == written_by_them(theirs, kind, transcript([]))


@pytest.mark.parametrize("kind", WRITERS)
def test_words_in_every_layout(theirs, kind):
    layouts = list(itertools.product((None, 1, 16, 42), (None, 1, 2), (None, 1, 4), (False, True)))
    assert len(layouts) == 72
    for seed, (width, count, words, highlight) in enumerate(layouts):
        given = drawn(seed)
        options = {"max_line_width": width, "max_line_count": count, "max_words_per_line": words}
        ours = written(kind, given, Layout(**options, highlight_words=highlight))
        assert ours == written_by_them(theirs, kind, given, **options, highlight_words=highlight), (options, highlight)


def test_layouts_differ():
    """What is compared above is not all alike."""
    given = drawn(3)
    layouts = (Layout(), Layout(16, 2), Layout(max_words_per_line=2), Layout(highlight_words=True))
    found = {written("srt", given, layout) for layout in layouts}
    assert len(found) == 4


def test_json_is_all_there_is():
    given = drawn(1)
    found = json.loads(written("json", given))
    assert found["language"] == "en" and found["text"] == "".join(one.text for one in given.segments)
    assert set(found["segments"][0]) == {
        "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
        "no_speech_prob", "words",
    }  # fmt: skip
    assert "words" not in json.loads(written("json", drawn(1, with_words=False)))["segments"][0]


def test_clock():
    assert clock(0) == "00:00.000" and clock(3599.9996) == "01:00:00.000"
    assert clock(61.5, hours=True, point=",") == "00:01:01,500"


def test_formats():
    assert formats("all") == ["txt", "vtt", "srt", "tsv", "json"] and formats("vtt") == ["vtt"]
    with pytest.raises(ValueError, match="txt, vtt, srt, tsv, json or all; got 'pdf'"):
        formats("pdf")
    with pytest.raises(ValueError, match="max_line_width must be 1 or more"):
        Layout(max_line_width=0)


def test_files_appear_whole(tmp_path, monkeypatch):
    """None of the files is there before all of them are, and a failure leaves nothing behind."""
    seen = []
    replace = os.replace

    def spying(part, whole):
        seen.append(sorted(file.name for file in tmp_path.iterdir() if not file.name.startswith(".")))
        assert Path(part).read_text()
        replace(part, whole)

    monkeypatch.setattr(writers.os, "replace", spying)
    paths = write_files(drawn(0), tmp_path / "talk", ["txt", "json"])
    assert [path.name for path in paths] == ["talk.txt", "talk.json"] and seen == [[], ["talk.txt"]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["talk.json", "talk.txt"]
    before = paths[1].read_text()

    def full(self, given, file, layout):
        raise OSError("No space left on device")

    monkeypatch.setattr(writers.Json, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_files(drawn(5), tmp_path / "talk", ["txt", "json"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["talk.json", "talk.txt"]
    assert paths[1].read_text() == before and paths[0].read_text() == written("txt", drawn(0))
