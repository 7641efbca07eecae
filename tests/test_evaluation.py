"""Readers of data sets, on small ones made of real recordings where they are, and the metrics."""

import json

import numpy as np
import pytest

from whisperkv.evaluation import (
    exact_match,
    from_dataset,
    gigaspeech,
    interval,
    librispeech,
    loops,
    normalized,
    normalizer,
    parsed,
    read,
    spoken_qa,
    word_counts,
    word_diff,
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
        list(librispeech(tmp_path))
    (tmp_path / "x.trans.txt").write_text("x-1 TEXT\n")
    with pytest.raises(FileNotFoundError, match="x-1.*x.trans.txt names it"):
        read(tmp_path)
    manifest = tmp_path / "qa.jsonl"
    manifest.write_text('{"audio": "a.wav", "answers": "Ann"}\n')
    with pytest.raises(ValueError, match="line 1: no 'question'"):
        read(manifest)
    manifest.write_text("{nonsense\n")
    with pytest.raises(ValueError, match="line 1: this is no JSON"):
        read(manifest)


NAMES = {"a.tsv": "\t", "a.csv": ","}


@pytest.mark.parametrize("name", [*NAMES, "a.jsonl"])
def test_manifest(tmp_path, recording, name):
    recording("one.wav"), recording("deep/two.flac", 2)
    rows = [{"audio": "one.wav", "text": 'It\'s "fine"  here.'}, {"audio": "deep/two", "text": "Bye", "end": 1.5}]
    path = tmp_path / name
    if name in NAMES:
        quoted = rows[0]["text"].replace('"', '""') if name == "a.csv" else rows[0]["text"]
        first = f'"{quoted}"' if name == "a.csv" else quoted
        lines = ["audio,text,begin,end", f"one.wav,{first},,", "deep/two,Bye,0.5,1.5"]
        path.write_text("\n".join(line.replace(",", NAMES[name]) for line in lines) + "\n")
    else:
        path.write_text("\n".join(json.dumps({**row, "begin": 0.5 * bool(row.get("end"))}) for row in rows) + "\n\n")
    one, two = read(path)
    assert (one.name, one.text) == ("one", 'It\'s "fine" here.') and len(one.samples()) == 8000
    assert (two.name, two.text, two.begin, two.end) == ("two", "Bye", 0.5, 1.5) and len(two.samples()) == 16000


def test_the_names_of_others(tmp_path, recording):
    recording("clips/x.wav", 3)
    (tmp_path / "common_voice.tsv").write_text("client_id\tpath\tsentence\n7\tclips/x.wav\tHello\n")
    nemo = {"audio_filepath": "clips/x.wav", "offset": 1, "duration": 0.5, "text": "Hello"}
    (tmp_path / "nemo.json").write_text(json.dumps(nemo) + "\n")
    (voice,), (other,) = read(tmp_path / "common_voice.tsv"), read(tmp_path / "nemo.json")
    assert voice.text == other.text == "Hello" and len(voice.samples()) == 48000 and len(other.samples()) == 8000


def test_plain_folders_and_files(tmp_path, recording):
    recording("b.wav"), recording("deep/a.ogg"), recording("c.flac")
    (tmp_path / "b.txt").write_text("What is\nsaid.\n")
    (tmp_path / "notes.md").write_text("no recording")
    assert [(one.name, one.text) for one in read(tmp_path)] == [("b", "What is said."), ("c", ""), ("deep/a", "")]
    (one,) = read(tmp_path / "b.wav")
    assert (one.name, one.text) == ("b", "What is said.")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match="b.txt: the text is empty. .*leave out the text of all"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no recording in it"):
        read(tmp_path / "empty")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"text": "Hello"}', "line 1: no audio; the field is called one of 'audio', .* has 'text'"),
        ("a.jsonl", '{"audio": "x.wav", "text": " "}', "line 1: the text is empty"),
        ("a.jsonl", '{"audio": "gone.wav"}', "gone.wav: no such recording, though .*line 1 names it"),
        ("a.jsonl", '{"audio": "x.wav", "begin": "soon"}', "line 1: begin must be seconds; got 'soon'"),
        ("a.jsonl", "{nonsense", "line 1: this is no JSON"),
        ("a.jsonl", "[1]", "line 1: not an object"),
        ("a.tsv", "id\ttext\n1\tHello", "its first line must name the columns, one of them 'audio'"),
        ("a.tsv", "audio\ttext\nx.wav\t", "line 2: the text is empty"),
        ("a.tsv", "audio\ttext\n\tHello", "line 2: no audio"),
        ("a.csv", "audio,text\nx.wav,one,two", "line 2: more cells than the first line has columns"),
        ("a.csv", "", "its first line must name the columns"),
    ],
)
def test_bad_lines_of_manifests(tmp_path, recording, name, text, message):
    recording("x.wav")
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path / name)


def test_datasets(tmp_path, recording):
    datasets = pytest.importorskip("datasets")
    soundfile.write(tmp_path / "stereo.wav", np.zeros((8000, 2), np.float32), 8000)
    table = {"audio": [str(recording("a.flac")), str(tmp_path / "stereo.wav")], "text": ["Hello", "Bye"]}
    rows = datasets.Dataset.from_dict(table).cast_column("audio", datasets.Audio())
    for each in (rows, rows.to_iterable_dataset()):
        one, two = read(each)
        assert (one.text, two.text) == ("Hello", "Bye") and [len(one.samples()), len(two.samples())] == [8000, 16000]
    with pytest.raises(ValueError, match="row 1 of the dataset: no 'sound'.* has 'audio', 'text'"):
        list(from_dataset([{"audio": 1, "text": "a"}], audio="sound"))


def test_rows_like_those_of_datasets(tmp_path, recording):
    held = [
        {"bytes": recording("a.flac").read_bytes(), "path": None},
        {"bytes": None, "path": str(recording("b.wav"))},
        {"array": np.zeros(4000), "sampling_rate": 8000},
        {"array": np.zeros((2, 8000)), "sampling_rate": 16000},
    ]
    samples = read([{"audio": each, "text": None} for each in held])
    assert [len(one.samples()) for one in samples] == [8000] * 4 and not any(one.text for one in samples)
    with pytest.raises(TypeError, match="data must be a path or rows of a dataset; got int"):
        read(3)


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
    assert word_counts("a b b d", "a b c") == (1, 0, 1, 3) and word_counts("a b b d", "a b c").errors == 2
    assert word_diff("a b b d", "a b c") == [
        ("equal", "a b", "a b"), ("insert", "", "b"), ("substitute", "c", "d"),
    ]  # fmt: skip
    assert word_diff("", "a b") == [("delete", "a b", "")] and word_diff("", "") == []


def test_normalizers():
    """Those of Whisper: of English, with its spellings, and of all others."""
    pytest.importorskip("transformers")
    assert normalizer()("Mr. Colour isn't, uh, 20 cm!") == "mister colour is not 20 cm"
    assert normalizer("en", {"colour": "color"})("Colour") == "color"
    assert normalizer("de")("Schön, Herr Müller!") == "schön herr müller "
    assert normalizer("zh")("你好").split() == ["你", "好"]


def test_loops():
    said = "so it was and so it is and will be"
    assert not loops(said) and not loops("no no no no no")
    assert loops(f"{said} {said} {said}") and loops("we go there now. We go there now, we go there now")
    assert loops("ha" * 60)


@pytest.mark.parametrize(
    "text, python, options",
    [
        ("lossless", "patch(model)", "--weights model --cross model --trim off"),
        (
            "fastest",
            "patch(model, cross=CrossConfig(format='latent_int8', trim='padding'), weights='int8')",
            "--weights int8 --cross latent_int8 --trim padding",
        ),
        (
            "smallest,weights=bfloat16",
            "patch(model, EvictionConfig(recent=32, heavy=16), "
            "cross=CrossConfig(format='latent_int4', trim='padding'), weights='bfloat16')",
            "--weights bfloat16 --cross latent_int4 --trim padding --policy heavy_hitter --recent 32 --heavy 16",
        ),
        (
            " policy=window , recent=48,heavy=0,pin_prompt=no",
            "patch(model, EvictionConfig(policy='window', recent=48, heavy=0, pin_prompt=False))",
            None,
        ),
        ("merge=0.5", "patch(model, cross=CrossConfig(merge=0.5))", None),
        ("unpatched", "unpatch(model)", None),
    ],
)
def test_settings(text, python, options):
    """A text, the line of Python, and the options of a command say the same."""
    setting = parsed(text)
    assert setting.python == python and setting.options == options
    again = parsed(setting.text)
    assert (again.eviction, again.cross, again.weights) == (setting.eviction, setting.cross, setting.weights)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "fastst",
            "'fastst' is no setting; a setting is one of unpatched, lossless, fastest, smallest, or FIELD=VALUE",
        ),
        ("colour=3", "'colour' is no field; .* with the fields policy, recent, heavy, decay, .*cross, trim"),
        ("recent=a", "recent must be a whole number; got 'a'"),
        ("decay=a", "decay must be a number; got 'a'"),
        ("pin_prompt=maybe", "pin_prompt must be true or false; got 'maybe'"),
        ("weights=int9", "weights must be one of model, bfloat16, int8; got 'int9'"),
        ("cross=int9", "CrossConfig.format must be one of 'model', 'int8'"),
        ("recent=0", "EvictionConfig.recent must be a whole number of tokens, 1 or more"),
        ("unpatched,recent=3", "unpatched takes no changes"),
        ("", "setting '' is empty"),
    ],
)
def test_settings_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parsed(text)
