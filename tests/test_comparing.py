"""Comparisons: figures against their definitions, child processes, what is written, and the two commands."""

import csv
import json
import os
import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import small_twin

import whisperkv
from whisperkv import cli
from whisperkv.evaluation import (
    Audio,
    Options,
    children,
    compare,
    comparing,
    decoding,
    heard,
    markdown,
    measure,
    normalizer,
    parsed,
    read,
    read_json,
    results,
    write_csv,
    write_json,
    write_report,
)
from whisperkv.evaluation.hearing import windows_of
from whisperkv.features import log_mel
from whisperkv.transcription.loading import load

jiwer, soundfile = pytest.importorskip("jiwer"), pytest.importorskip("soundfile")
for package in ("typer", "rich", "matplotlib", "jinja2"):
    pytest.importorskip(package)

SMALL = "recent=4,heavy=2,pin_prompt=no"


@pytest.fixture(scope="module")
def audios(recordings):
    """The three shortest utterances, with what is said in them."""
    lines = (recordings / "librispeech/transcripts.tsv").read_text().splitlines()[1:]
    said = dict(line.split("\t") for line in lines)
    samples = read(recordings / "librispeech/test-other")
    samples.sort(key=lambda sample: sample.audio.stat().st_size)
    return heard(replace(sample, text=said[sample.name]) for sample in samples[:3])


@pytest.fixture(scope="module")
def compared(tiny_en, audios):
    return compare(tiny_en, audios, ["lossless", SMALL, "fastest"], Options(batch=4))


def test_the_unpatched_model_comes_first(compared, audios):
    first, lossless, small, fastest = compared
    assert [each.setting for each in compared] == ["unpatched", "lossless", SMALL, "fastest"]
    assert first.wer_difference == 0 and first.wer_difference_interval == (0, 0) and first.nll_difference == 0
    assert lossless.same_texts == 3 and lossless.wer == first.wer and abs(lossless.nll_difference) < 1e-4
    assert small.nll_difference > 0.01 and small.evicted > 0
    low, high = small.nll_difference_interval
    assert low < small.nll_difference < high
    assert fastest.cross_bytes < lossless.cross_bytes / 10 and fastest.frames_share < 1
    assert fastest.weight_bytes > 10e6 and fastest.rtfx > 1 and first.peak_memory > first.memory_before > 1e8
    for each in compared:
        assert each.seconds == pytest.approx(sum(audio.seconds for audio in audios), abs=0.1)
        assert each.rtfx == pytest.approx(each.seconds / each.seconds_taken, rel=1e-3)
        assert each.audios == len(each.files) == 3 and not each.note


def test_caches_of_transformers_are_known_without_patching(compared):
    first, lossless, *_ = compared
    assert first.self_bytes == first.self_bytes_transformers == lossless.self_bytes_transformers
    assert first.cross_bytes == lossless.cross_bytes == lossless.cross_bytes_transformers
    assert first.cache_bytes == first.self_bytes + first.cross_bytes == first.cache_bytes_transformers


def test_word_error_rate(compared, audios):
    normalize = normalizer("en")
    for each in compared:
        texts = [file.text for file in each.files]
        rate = jiwer.wer([normalize(audio.text) for audio in audios], [normalize(text) for text in texts])
        assert each.wer == pytest.approx(100 * rate) and each.wer < 40
        assert each.substitutions + each.deletions + each.insertions == sum(file.errors for file in each.files)
        assert each.words == sum(file.words for file in each.files) > 10


def test_likelihood(tiny_en, compared, audios):
    """Of the unpatched model's own text, by one pass over an audio alone."""
    model, processor = tiny_en
    features = processor(audios[1].windows[0], sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        tokens = decoding.transcript_tokens(model, model.generate(features)[0])
        ids = torch.tensor([[*processor.tokenizer.prefix_tokens, *tokens]])
        logits = model(features, decoder_input_ids=ids[:, :-1]).logits[0, -len(tokens) :]
    nats = -float(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())
    for each in compared[:2]:
        assert each.files[1].tokens == len(tokens) and each.files[1].nats == pytest.approx(nats, abs=1e-3)
    for each in compared:
        assert each.nll == pytest.approx(sum(file.nats for file in each.files) / each.tokens)


def test_both_ways_of_forcing(folder):
    """Token by token through the cache, and at once."""
    model, processor = load(str(folder))
    features = log_mel([np.ones(16000, np.float32)] * 2, processor)
    start = decoding.start_tokens(model, processor)
    given = [start] * 2, [[1400, 318, 257, 50256], [1400, 50256]]
    one = decoding.nats_of_each(model, features, *given)
    assert torch.allclose(one, decoding.nats_of_each_at_once(model, features, *given), atol=1e-3) and one.min() > 1


def test_without_references_the_unpatched_text_counts(folder):
    random, model = np.random.default_rng(0), load(str(folder))
    silent = [Audio(name, "", [random.standard_normal(16000).astype(np.float32)]) for name in "ab"]
    first, other = compare(model, silent, [SMALL])
    assert first.wer == 0 and first.words == sum(len(normalizer()(file.text).split()) for file in first.files)
    assert first.signatures["wer"].startswith("WER|reference:unpatched|norm:whisper english without spellings|jiwer:")
    assert other.files[0].wanted == first.files[0].text and other.audios == 2
    (first,) = compare(model, [replace(silent[0], text="some words"), silent[1]], [])
    assert first.files[1].errors is None and first.words == first.files[0].words
    assert first.wer_interval is None, "one recording says nothing about others"


def test_what_is_written(compared, tmp_path):
    write_json(compared, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == compared
    write_csv(compared, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["setting"] for row in rows] == ["unpatched", "lossless", SMALL, "fastest"]
    assert float(rows[2]["nll_difference_interval_low"]) == compared[2].nll_difference_interval[0]
    assert json.loads(compared[0].to_json())[0]["files"][0]["name"] and compared[0].to_csv().count("\n") == 2
    text = markdown(compared)
    lines = text.splitlines()
    assert len(lines) == 2 + 4 + 1 + 5 and len({line.count("|") for line in lines[:6]}) == 1
    for figure in ("WER|reference:given", "NLL|", "RTFx|", "caches|", "memory|"):
        assert any(line.strip().startswith(figure) for line in lines[7:])
    aligned = results.beside(compared).splitlines()
    assert len({len(line) for line in aligned}) == 1 and aligned[0].split("|")[4].strip() == SMALL
    low, high = compared[2].nll_difference_interval
    assert any(f" {low:+.4f} to {high:+.4f} |" in line for line in aligned if line.startswith("|   (95 %) "))
    assert f"whisperkv:{whisperkv.__version__}" in text and str(compared[0]) == markdown(compared[:1])


def test_the_report_stands_alone(compared, tmp_path):
    odd = [replace(each, files=[replace(file) for file in each.files]) for each in compared]
    for each in odd:
        each.files[0].name = "<script>alert(1)</script>"
    write_report(odd, tmp_path / "a.html", "A & B")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 5 and "A &amp; B" in page
    assert not re.search(r"<(script|link|iframe|img)|@import|url\((?!#)|href=\"(?!#)", page.replace("&lt;", ""))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(|href=")#([^)"]*)', page)) <= set(ids)
    colours = re.findall(r"<text[^>]*?>", page)
    assert colours and all("fill: currentColor" in text for text in colours), "readable in the dark"
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert "<del>" in page and "patch(model, EvictionConfig(recent=4, heavy=2, pin_prompt=False))" in page
    with pytest.raises(ValueError, match="results must hold one"):
        write_report([], tmp_path / "b.html")


def test_what_cannot_be_compared(folder):
    model, audios = load(str(folder)), [Audio("a", "", [np.ones(16000, np.float32)])]
    with pytest.raises(ValueError, match="setting 'fastest' is named twice"):
        compare(model, audios, ["fastest", "fastest"])
    with pytest.raises(ValueError, match="no recording to compare on"):
        compare(model, [], ["fastest"])
    with pytest.raises(ValueError, match="language must be 'en', as this model knows English alone; got 'de'"):
        compare(model, audios, ["fastest"], Options("de"))
    with pytest.raises(ValueError, match="no reference has a word left"):
        compare(model, [replace(audios[0], text="[music]")], [])


def test_windows():
    """A long recording is cut where it is quiet, and nothing of it is lost."""
    samples = np.random.default_rng(0).standard_normal(70 * 16000).astype(np.float32)
    samples[int(27.5 * 16000) : 28 * 16000] *= 0.01
    windows = windows_of(samples)
    assert (np.concatenate(windows) == samples).all() and len(windows) == 3
    assert 27.5 < len(windows[0]) / 16000 < 28 and all(len(window) <= 30 * 16000 for window in windows)
    assert len(windows_of(samples[: 30 * 16000])) == 1


# A model with random weights, whose vocabulary and features are tiny.en's, in a folder


@pytest.fixture(scope="module")
def folder(tiny_en, tmp_path_factory):
    model, processor = tiny_en
    small = small_twin(model)
    small.generation_config = transformers.GenerationConfig.from_dict(model.generation_config.to_dict())
    small.generation_config.max_new_tokens = 24
    path = tmp_path_factory.mktemp("random")
    small.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def noises(tmp_path):
    """A folder of four recordings, of which one is no sound."""
    path = tmp_path / "noises"
    path.mkdir()
    random = np.random.default_rng(0)
    for name, rate in (("a", 16000), ("b", 44100), ("c", 16000)):
        soundfile.write(path / f"{name}.wav", 0.1 * random.standard_normal((2 * rate, 2)), rate)
        (path / f"{name}.txt").write_text("some words")
    (path / "broken.wav").write_text("no sound")
    return path


def test_a_child_measures_what_we_do(folder):
    random = np.random.default_rng(0)
    noise = [Audio("noise", "", [random.standard_normal(16000).astype(np.float32)])]
    job = children.Job(str(folder), "cpu", noise, parsed("smallest"), Options(threads=1))
    told = []
    apart = children.apart(job, told.append)
    here = measure(*load(str(folder)), noise, parsed("smallest"), Options(threads=1))
    assert (apart.texts, apart.tokens, apart.nats, apart.held) == (here.texts, here.tokens, here.nats, here.held)
    assert told == [1, 1] and apart.peak >= apart.before > 1e8


def test_a_child_that_fails(folder, monkeypatch, tmp_path):
    noise = [Audio("noise", "", [np.ones(16000, np.float32)])]
    job = children.Job("no/such/folder", "cpu", noise, parsed("lossless"), Options())
    with pytest.raises(FileNotFoundError, match="model 'no/such/folder': no such folder, and none of tiny"):
        children.apart(job)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match=r"lossless: the process ended \(7\): out of luck"):
        children.apart(job)


# The commands


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        """(exit code, stdout, stderr)"""
        monkeypatch.setattr(sys, "argv", ["whisperkv", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def test_compare_from_the_command_line(command, folder, noises, tmp_path):
    """A file that is broken is named, the rest goes on, and the exit code tells."""
    out = tmp_path / "report.html"
    code, said, errors = command(
        "compare", noises, "--model", folder, "--setting", "recent=8,heavy=4", "--out", out, "--threads", 1
    )
    assert code == 1 and "left out: broken:" in errors and "broken.wav" in errors
    assert re.match(r"\| setting +\| +unpatched \| +recent=8,heavy=4 \|\n", said) and "\n    NLL|" in said
    assert "<svg" in out.read_text() and (tmp_path / "report.csv").is_file()
    first, other = read_json(tmp_path / "report.json")
    assert first.audios == 3 and first.model == str(folder) and other.evicted > 0 and first.words == 6


def test_what_was_done_before_an_interruption_is_kept(command, folder, noises, tmp_path, monkeypatch):
    settings = []

    def interrupted(job, on_window):
        settings.append(job.setting.name)
        if len(settings) == 3:
            raise KeyboardInterrupt
        return measure(*load(job.model), job.audios, job.setting, job.options, job.given, on_window)

    monkeypatch.setattr(comparing, "apart", interrupted)
    out = tmp_path / "report.html"
    code, said, errors = command("compare", noises, "--model", folder, "--out", out)
    assert (
        code == 130 and "whisperkv compare: interrupted" in errors and settings == ["unpatched", "lossless", "fastest"]
    )
    assert [each.setting for each in read_json(tmp_path / "report.json")] == ["unpatched", "lossless"]
    assert "lossless" in said and "lossless" in out.read_text()


def test_what_tune_has_tried_before_an_interruption_is_kept(command, folder, noises, tmp_path, monkeypatch):
    from whisperkv.evaluation import tuning

    settings = []

    def interrupted(model, processor, audios, setting, *rest):
        settings.append(setting.name)
        if len(settings) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(model, processor, audios, setting, *rest)

    monkeypatch.setattr(tuning, "measure", interrupted)
    code, said, errors = command("tune", noises, "--model", folder, "--out", tmp_path / "tuned.svg", "--threads", 1)
    assert code == 130 and not said and "tuned.json" in errors and "whisperkv tune: interrupted" in errors
    tried = json.loads((tmp_path / "tuned.json").read_text())
    assert [each["setting"] for each in tried] == ["unpatched", "lossless"] and not (tmp_path / "tuned.svg").exists()
    assert all(f"model:{folder}" in each["signatures"]["nll"] for each in tried)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--setting", "fastst"], "'fastst' is no setting; a setting is one of unpatched, lossless, fastest, smallest"),
        (["--setting", "colour=3"], "'colour' is no field; .* with the fields policy, recent, heavy"),
        (["--setting", "merge=2"], "CrossConfig.merge must be a number from 0 to 1; got 2.0"),
        (["--out", "report.pdf"], "--out must end in .html; got report.pdf"),
        (["--out", "no/where/report.html"], "no/where: no such folder"),
    ],
)
def test_what_compare_refuses(command, noises, arguments, message):
    code, said, errors = command("compare", noises, *arguments)
    assert code == 2 and not said and re.search(message, errors) and errors.startswith("whisperkv compare: ")


def test_audio_that_is_not_there(command, tmp_path):
    for name in ("compare", "tune"):
        code, _, errors = command(name, tmp_path / "gone.wav")
        assert code == 2 and "gone.wav: no such file or folder" in errors
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n')
    code, _, errors = command("compare", tmp_path / "a.jsonl")
    assert code == 2 and "a.jsonl, line 1: no audio" in errors
    (tmp_path / "a.wav").write_text("no sound")
    code, _, errors = command("compare", tmp_path / "a.wav")
    assert code == 2 and "none of 1 recordings can be read" in errors


def test_tune_from_the_command_line(command, folder, noises, tmp_path):
    out = tmp_path / "tuned.svg"
    code, said, errors = command(
        "tune", noises, "--model", folder, "--settings", 4, "--for", "memory", "--out", out, "--threads", 1
    )
    assert code == 1 and "left out: broken:" in errors
    assert "The best for memory within 0.3 points of WER and 0.01 nats: lossless" in said, "three are too few"
    pasted = [line.strip() for line in said.splitlines() if line.startswith(("    from ", "    patch("))]
    assert pasted == ["from whisperkv import patch", "patch(model)"] and "<svg" in out.read_text()
    tried = json.loads((tmp_path / "tuned.json").read_text())
    assert [each["setting"] for each in tried][0] == "unpatched" and len(tried) == 5


def test_help_names_every_option(command):
    for name, options in (
        ("compare", ("--setting", "--model", "--out", "--language", "--repeat", "--threads")),
        ("tune", ("--within-wer", "--within-nll", "--for", "--settings", "--model")),
    ):
        code, said, _ = command(name, "--help")
        assert code == 0 and all(option in said for option in options)


def test_signatures_are_one_line():
    line = results.signature("WER", norm="a", no_such="b")
    assert line == "WER|norm:a|no-such:b"
