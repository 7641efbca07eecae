"""docs/prune.md: its Python runs, its tables are whole, and its example package is found by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks, run
from speech_models import make

from whisperkv import prune
from whisperkv.prune.families import FAMILIES
from whisperkv.prune.pruners import PRUNERS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "prune.md").read_text()


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, inputs = make("qwen2_audio")
    inputs["input_features"][:, :, 60:110] = 0.0
    names = {"model": model, "inputs": inputs}
    found, printed = blocks("docs/prune.md"), ""
    assert len(found) == 4
    for block in found:
        printed += run(block, names, "docs/prune.md")
        assert names["tokens"].shape[0] == 3
    assert "audio tokens kept a head" in printed


def test_tables_are_whole():
    for name in [*PRUNERS, *(name.removesuffix("_thinker") for family in FAMILIES for name in family.names)]:
        assert f"`{name}`" in TEXT


def test_example_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for file in (DOCS / "example_pruner").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    done = subprocess.run([*install, "--target", tmp_path / "there", source], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install here: {done.stderr[-200:]}")
    code = (
        "from whisperkv import prune; from whisperkv.prune.pruners import pruner_of; "
        "print(prune.names()); print(pruner_of('loudest', {'power': 1.0}))"
    )
    path = os.pathsep.join([str(tmp_path / "there"), str(DOCS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "'loudest'" in done.stdout and "Loudest(power=1.0)" in done.stdout, done.stderr
    assert "loudest" not in prune.names()
