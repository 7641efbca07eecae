"""`whisperkv demo`, which is `make demo`: what it shows, and what it says of recordings that it cannot read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from whisperkv import cli
from whisperkv.evaluation import comparing, measure, read_json

soundfile = pytest.importorskip("soundfile")
for package in ("typer", "rich", "jiwer", "matplotlib", "jinja2"):
    pytest.importorskip(package)
RATE = 16000


@pytest.fixture
def demo(monkeypatch, capsys, tmp_path, tiny_en):
    """Runs it in tmp_path: (exit code, stdout, stderr). All happens in this process."""
    monkeypatch.chdir(tmp_path)
    jobs = []

    def here(job, on_window):
        jobs.append(job)
        return measure(*tiny_en, job.audios, job.setting, job.options, job.given, on_window)

    monkeypatch.setattr(comparing, "apart", here)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo", *map(str, arguments)])
        return (ended.value.code or 0, *capsys.readouterr())

    run.jobs = jobs
    return run


def test_the_clip(demo, monkeypatch, tmp_path, speech):
    from whisperkv.cli import demo as command

    monkeypatch.setattr(command, "REPEAT", 1)
    code, shown, errors = demo("--beams", 1)
    assert code == 0 and not errors.strip()
    *_, table, last = shown.strip().split("\n\n")
    assert last.startswith("The report: whisperkv-demo/report.html ")
    head, _, *rows = table.splitlines()
    assert head.split() == "| setting | unpatched | lossless | fastest | smallest |".split()
    assert {len(line) for line in table.splitlines()} == {len(head)} and len(head) < 100, "fits in a terminal"
    figures = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert float(figures["WER %"][0]) < 5 and figures["WER %"][0] == figures["WER %"][1]
    assert float(figures["cross cache, MB"][2]) < 0.1 * float(figures["cross cache, MB"][0])
    assert shown.startswith("unpatched, lossless") and "pulled them back to shore." in " ".join(shown.split())
    page = (tmp_path / "whisperkv-demo" / "report.html").read_text()
    assert "<svg" in page and "speech" in page
    results = read_json(tmp_path / "whisperkv-demo" / "report.json")
    assert [each.setting for each in results] == ["unpatched", "lossless", "fastest", "smallest"]
    assert results[0].files[0].wanted.split() == speech[1].split(), "what the clip says is known"
    assert [job.model for job in demo.jobs] == ["tiny.en"] * 4


def test_a_recording_of_ones_own(demo, tmp_path, speech, monkeypatch):
    """A long one once, a short one often; in another report; held against transformers."""
    from whisperkv.cli import demo as command

    assert command.REPEAT > 2
    monkeypatch.setattr(command, "REPEAT", 2)
    soundfile.write(tmp_path / "long.flac", np.tile(speech[0][: 4 * RATE], 16), RATE)
    soundfile.write(tmp_path / "short.wav", speech[0][: 2 * RATE], RATE)
    code, shown, _ = demo("short.wav", "--out", "mine.html", "--beams", 1, "--threads", 1)
    assert code == 0 and "The report: mine.html" in shown and not Path("whisperkv-demo").exists()
    assert demo.jobs[0].options.repeat == 2 and demo.jobs[0].options.threads == 1
    first, *_ = read_json("mine.json")
    assert first.files[0].wanted == first.files[0].text and first.wer == 0

    def stop(job, on_window):
        raise ValueError(f"{job.options.repeat} pass of {len(job.audios[0].windows)} windows")

    monkeypatch.setattr(comparing, "apart", stop)
    code, _, errors = demo("long.flac")
    assert code == 2 and errors.strip().endswith("whisperkv demo: 1 pass of 3 windows")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (None, "no such file"),
        (b"", "the file is empty; copy or record it again"),
        (b"not a sound" * 99, "Pass WAV, FLAC, OGG or MP3"),
        (np.zeros(0), "there is no sound in it"),
        (np.array([0.1, np.nan]), "not every sample is a number"),
    ],
)
def test_what_it_refuses(demo, tmp_path, data, complaint):
    if isinstance(data, bytes):
        (tmp_path / "a.wav").write_bytes(data)
    elif data is not None:
        soundfile.write(tmp_path / "a.wav", data, RATE, subtype="FLOAT")
    code, shown, errors = demo("a.wav")
    assert code == 2 and not shown and complaint in errors and "a.wav" in errors


def test_as_a_module():
    found = subprocess.run([sys.executable, "-m", "whisperkv.demo", "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and "Usage: whisperkv demo [OPTIONS] [audio]" in found.stdout
