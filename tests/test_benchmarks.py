"""The parts of the benchmarks that judge, and engines.py from its workers to its table."""

import struct
import sys
from pathlib import Path

import numpy
import pytest
import transformers
from conftest import small_twin

pytest.importorskip("jiwer")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RATE = 16000


@pytest.fixture(scope="module")
def bench():
    """The folders from which the scripts import each other."""
    before = sys.path[:]
    sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "workers")]
    yield
    sys.path[:] = before


def test_settings(bench):
    from settings import OURS, unknown

    assert len(OURS) > 5 and not any(map(unknown, OURS.values()))
    assert unknown({"colour": "red"}) == "patch() has no colour="
    assert "CrossConfig.format" in unknown({"cross": {"format": "int9"}})
    assert "CrossConfig has no 'colour'" in unknown({"cross": {"colour": "red"}})


# Accuracy


def test_interval(bench):
    from accuracy import interval

    words = numpy.full(100, 20)
    assert interval(numpy.zeros(100, int), words) == [0, 0]
    assert interval(numpy.ones(100, int), words) == [5, 5]
    more = numpy.random.default_rng(1).integers(-1, 3, 100)
    low, high = interval(more, words)
    mean, error = 100 * more.mean() / 20, 100 * more.std() / 20 / 10
    assert abs(low - (mean - 1.96 * error)) < 0.1 * error and abs(high - (mean + 1.96 * error)) < 0.1 * error
    assert interval(more, words) == [low, high]


def test_errors(bench):
    from accuracy import errors
    from audio import Speech

    speeches = [Speech("a", numpy.zeros(1), "THE OLD HOUSE"), Speech("a", numpy.zeros(1), "GOOD MORNING")]
    wrong, words = errors(speeches, ["the house", "Good morning my friend."])
    assert wrong.tolist() == [1, 2] and words.sum() == 5


def test_clips(bench):
    import clips
    from audio import Speech

    made, again = clips.speechless(12), clips.speechless(12)
    assert all((one.samples == other.samples).all() for one, other in zip(made, again))
    assert {clip.speaker for clip in made} == {"noise", "pink_noise", "hum", "chord", "melody"}
    for clip in made:
        assert 2 <= clip.seconds <= 29 and clip.samples.dtype == numpy.float32
        assert 0.003 < abs(clip.samples).max() < 0.32 and numpy.isfinite(clip.samples).all()
    said = [Speech("a", numpy.sin(numpy.arange(5 * RATE, dtype=numpy.float32)), "text")]
    (piece,) = clips.short(said)
    assert 0.2 <= piece.seconds <= 1 and piece.text == ""
    (mixed,) = clips.noisy(said, decibels=15)
    added = mixed.samples - said[0].samples
    assert abs(10 * numpy.log10((said[0].samples ** 2).mean() / (added**2).mean()) - 15) < 0.1


# Other engines' weights


def test_q8_0(bench):
    from ggml import blocks

    values = numpy.random.default_rng(0).standard_normal((4, 96)).astype(numpy.float32)
    values[1, 32:64] = 0
    made = blocks(values)
    assert made.nbytes == 12 * 34
    back = (made["scale"][:, None].astype(numpy.float32) * made["codes"]).reshape(values.shape)
    limit = abs(values).reshape(-1, 32).max(1).repeat(32).reshape(values.shape) / 127
    assert (abs(back - values) <= 0.56 * limit + 1e-7).all()


@pytest.fixture(scope="module")
def folder(tiny_en, tmp_path_factory):
    """Of a small Whisper with random weights that has the vocabulary of tiny.en."""
    model, processor = tiny_en
    small = small_twin(model)
    small.generation_config = model.generation_config
    path = tmp_path_factory.mktemp("engines") / "tiny.en" / "transformers"
    small.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("form, file_type", [("f16", 1), ("q8_0", 2007)])
def test_ggml(bench, folder, tmp_path, form, file_type):
    """The file holds what whisper.cpp asks for, to its last byte."""
    import ggml

    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    processor = transformers.WhisperProcessor.from_pretrained(folder)
    ggml.write(tmp_path / "file", model, processor, form)
    with open(tmp_path / "file", "rb") as file:

        def read(form):
            return struct.unpack(form, file.read(struct.calcsize(form)))

        assert read("12i") == (ggml.MAGIC, 51864, 1500, 64, 1, 1, 448, 64, 1, 2, 80, file_type)
        mels, frequencies = read("2i")
        filters = numpy.frombuffer(file.read(4 * mels * frequencies), numpy.float32).reshape(mels, frequencies)
        assert numpy.allclose(filters, processor.feature_extractor.mel_filters.T)
        words = [file.read(*read("i")) for _ in range(*read("i"))]
        assert len(words) == 50256 and words[processor.tokenizer(" you").input_ids[2]] == b" you"
        found = {}
        while header := file.read(12):
            dimensions, length, kind = struct.unpack("3i", header)
            shape = read(f"{dimensions}i")[::-1]
            name, count = file.read(length).decode(), int(numpy.prod(shape))
            found[name] = kind, shape, file.read({0: 4 * count, 1: 2 * count, 8: count // 32 * 34}[kind])
    assert len(found) == len(model.model.state_dict())
    matrix = {"f16": 1, "q8_0": 8}[form]
    assert found["decoder.blocks.1.cross_attn.key.weight"][:2] == (matrix, (64, 64))
    assert found["decoder.token_embedding.weight"][:2] == (matrix, (51864, 64))
    assert found["encoder.conv1.weight"][:2] == (1, (64, 80, 3)) and found["encoder.conv1.bias"][:2] == (0, (64, 1))
    kind, shape, data = found["decoder.positional_embedding"]
    positions = model.model.decoder.embed_positions.weight.detach().numpy()
    assert kind == 0 and (numpy.frombuffer(data, numpy.float32).reshape(shape) == positions).all()


# engines.py


@pytest.fixture
def engines(bench, folder, monkeypatch):
    import engines
    from workers import prepare

    monkeypatch.setattr(prepare, "ROOM", folder.parents[1])
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    return engines


def test_run(engines, tmp_path, monkeypatch):
    """Two workers from samples to the table; a third has no weights and is left out."""
    monkeypatch.setattr(engines, "TOKENS", 8)
    names = [engines.REFERENCE, "whisperkv patch(model)", "whisper.cpp f16"]
    args = engines.arguments().parse_args(["--batch", "2", "--beams", "1", "--repeat", "1", "--results", str(tmp_path)])
    args.engines, args.threads = names, 1
    table = engines.tables.Table("engines", engines.COLUMNS, args)
    random = numpy.random.default_rng(0)
    speeches = [
        engines.audio.Speech("a", random.standard_normal(length).astype(numpy.float32), "some words")
        for length in (RATE, 2 * RATE)
    ]
    out = engines.measure(args, "tiny.en", 1, speeches, table)
    assert list(out) == ["whisper.cpp f16"] and "make engines" in out["whisper.cpp f16"]
    assert [row["engine"] for row in table.rows] == names[:2]
    for row in table.rows:
        assert row["mel"] > 0 and row["encoder"] > 0 and row["decoder"] > 0 and row["first"] > 0
        assert row["total"] == pytest.approx(row["mel"] + row["encoder"] + row["decoder"], rel=0.5)
        assert 0 < row["over"] < row["peak"] and row["turns"] == 1
    theirs, ours = table.rows
    assert ours["same"] == theirs["same"] == 2 and ours["wer"] == theirs["wer"]
    assert ours["nll"] == pytest.approx(theirs["nll"], abs=1e-4) and theirs["nll"] > 0
    assert str(table).count("\n") == 3


def test_an_engine_that_ends(engines, tmp_path, monkeypatch):
    """Its last words are the reason; the others go on."""
    script = tmp_path / "torch_worker.py"
    script.write_text("import sys\nsys.exit('no such instruction')\n")
    monkeypatch.setattr(engines.prepare, "__file__", str(script))
    with pytest.raises(engines.Gone, match="the process ended.*no such instruction"):
        engines.Worker(engines.REFERENCE, "tiny.en", "none.npz", 1, [0])


def test_plot(bench, tmp_path):
    pytest.importorskip("matplotlib")
    import engines_plot

    case = {"model": "base", "batch": 1, "beams": 1, "threads": 1, "total": 3.0}
    rows = [
        {**case, "engine": "whisperkv int8", "mel": 0.1, "encoder": 1.0, "decoder": 1.9},
        {**case, "engine": "another", "mel": None, "encoder": None, "decoder": None, "total": 4.0},
    ]
    engines_plot.draw(rows, tmp_path / "one.svg")
    engines_plot.draw(rows, tmp_path / "two.svg")
    text = (tmp_path / "one.svg").read_text()
    assert "whisperkv int8" in text and "4.00" in text and text == (tmp_path / "two.svg").read_text()


def test_the_first_table(bench, tmp_path, monkeypatch, capsys):
    """A row a setting, in a file and on the screen; what is measured is made up."""
    import original

    from whisperkv.evaluation import Result

    def made_up(model, audios, settings, options, on_setting, on_window):
        assert model == "tiny.en" and [audio.text for audio in audios] == ["some words"] and options.repeat == 2
        for name in ("unpatched", *settings):
            on_setting(name)
            given = {field: 4 for field in Result.__dataclass_fields__}
            given |= {"setting": name, "wer_difference_interval": (-1, 2), "signatures": {"wer": "WER|made:up"}}
            given |= {"files": [], "self_bytes": 2 * 10**6, "self_bytes_transformers": 8 * 10**6}
            yield Result(**given)

    speech = original.audio.Speech("a", numpy.zeros(RATE, numpy.float32), "some words")
    monkeypatch.setattr(original.audio, "windows", lambda data, most: [speech])
    monkeypatch.setattr(original.evaluation, "compare", lambda *given: list(made_up(*given)), raising=False)
    monkeypatch.setattr(original.tables, "pin", lambda args: None)
    arguments = ["--models", "tiny.en", "--repeat", "2", "--results", str(tmp_path)]
    original.main(original.arguments().parse_args(arguments))
    said = capsys.readouterr().out
    assert "| tiny.en | heavy 64+32 | 2.00 | 0.25 |" in said and said.count("| tiny.en |") == 5
    assert "    WER|made:up" in said and len((tmp_path / "original.jsonl").read_text().splitlines()) == 6


def test_accuracy_plot(bench, tmp_path):
    pytest.importorskip("matplotlib")
    import accuracy_plot

    names = [name for name, *_ in accuracy_plot.formats()]
    assert names[0] == "model" and "latent_int4 64" in names and not any("padding" in name for name in names)
    assert {policy: [slots for slots, _ in points] for policy, points in accuracy_plot.budgets().items()} == {
        policy: [24, 48, 96] for policy in ("heavy_hitter", "magnitude", "window")
    }
    accuracy_plot.draw(tmp_path)
    assert "latent_int8" in (tmp_path / "formats.svg").read_text()
    assert "window" in (tmp_path / "eviction.svg").read_text()
