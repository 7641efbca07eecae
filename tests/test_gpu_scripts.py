"""What `make gpu` runs, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def script(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs():
    ran = script("gpu_ready.py")
    assert ran.returncode and "torch finds no GPU" in ran.stderr and ran.stdout == ""


def test_ops_on_a_cpu(tmp_path):
    """So that the first GPU meets no typing error."""
    ran = script("gpu.py", "--device", "cpu", "--quick", "--tables", "ops", "--results", tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    machine, *rows = (json.loads(line) for line in (tmp_path / "quick-gpu-ops.jsonl").read_text().splitlines())
    assert machine["machine"]["torch"] == torch.__version__
    assert {row["op"] for row in rows} == {"cross_attention", "compact_attention", "score_evict"}
    assert all(row["us"] > 0 for row in rows)
    assert "## cross_attention: times as fast as SDPA" in (tmp_path / "quick-gpu.md").read_text()


def test_after_its_minutes_no_row_is_begun(tmp_path):
    options = ["--device", "cpu", "--quick", "--tables", "ops", "--minutes", "0", "--results", tmp_path]
    assert "ops: 0 minutes are over, the rest is not measured" in script("gpu.py", *options).stdout
    assert len((tmp_path / "quick-gpu-ops.jsonl").read_text().splitlines()) == 2
