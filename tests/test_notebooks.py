"""The notebooks of docs/notebooks run from the first cell to the last, on tiny.en and the demo clip."""

import os
from pathlib import Path

import pytest
from conftest import or_skip
from pages import ROOT

import whisperkv

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SAID = {  # what some cell of each must show
    "quick-start": ["True", "self-attention", "image/png", "'fastest': '"],
    "choosing-a-budget": ["image/png", "48 slots: "],
    "writing-a-policy": ["by_age", "image/png", " evicted, "],
    "from-faster-whisper": ["WhisperForConditionalGeneration", "packed weights", " 0.00 "],
}


def shown(cells):
    """All that cells show, as text, and the kinds of what they show."""
    found = []
    for cell in cells:
        for output in cell.get("outputs", ()):
            kinds = output.get("data", {})
            found += [output.get("text", ""), kinds.get("text/plain", ""), *kinds]
    return "\n".join(found)


def test_there_are_as_many_as_are_known():
    assert {file.stem for file in NOTEBOOKS} == set(SAID)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel"), pytest.importorskip("matplotlib")
    or_skip(whisperkv.demo_model)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(whisperkv.__file__).parents[1])]))
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    wanted = shown(notebook.cells)
    done = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    for cell in code:
        for output in cell.outputs:
            assert output.get("name") != "stderr", output["text"]
    said = shown(code)
    for words in SAID[file.stem]:
        assert words in said and words in wanted, words


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_small(file):
    assert file.stat().st_size < 60_000
