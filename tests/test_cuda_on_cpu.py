"""The kernels for CUDA on machines that have none: the same sources, their threads as fibers on the CPU."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """A folder with a whisperkv whose ops on the CPU are the kernels for CUDA."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    place = tmp_path_factory.mktemp("on_cpu")
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", place / "objects", "--build-lib", place],
        cwd=ROOT,
        env={**os.environ, "WHISPERKV_CUDA": "on_cpu"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    assert "warning" not in built.stderr, built.stderr[-4000:]
    # Another process may be writing compiled files, which come and go by other names while they are copied.
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "whisperkv", place / "whisperkv", ignore=left_out, dirs_exist_ok=True)
    return place


def run(command, folder, **env):
    environment = {**os.environ, "WHISPERKV_TEST_DEVICE": "cpu", "PYTHONPATH": str(folder), **env}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


# In both orders of threads: what one leaves for another without waiting is found in one of them.
@pytest.mark.parametrize("order", [{}, {"SHIM_REVERSE": "1"}], ids=["forwards", "backwards"])
@pytest.mark.parametrize("file", ["test_ops.py", "test_cross_ops.py", "test_latent_ops.py", "test_prune_ops.py"])
def test_values(on_cpu, file, order):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "TestValues or TestOfCuda", str(TESTS / file)]
    ran = run(command, on_cpu, **order)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout


def test_tokens(on_cpu):
    """A real model with real audio decodes through them to the tokens of transformers."""
    few = "same_tokens_of_a_latent_cache and greedy or policies and magnitude"
    ran = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", few, str(TESTS / "test_generate.py")], on_cpu)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert "2 passed" in ran.stdout or "2 skipped" in ran.stdout


def test_low_rank_caches(on_cpu):
    """Both caches of a small model, from the calibration to the tokens."""
    few = "full_rank or more_bits or few_bits or with_eviction or other_dtypes"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", few, str(TESTS / "test_lowrank_whisper.py")]
    ran = run(command, on_cpu)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert "10 passed" in ran.stdout


def test_it_is_the_kernels_for_cuda(on_cpu):
    assert run(["-c", "from whisperkv import ops; print(ops.ISA)"], on_cpu).stdout.split() == ["cuda_on_cpu"]


@pytest.mark.skipif(not find_spec("whisperkv._cuda"), reason="built without nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_for_cuda_where_there_is_no_driver():
    """It can be imported, and says what is missing only when it is asked for more."""
    code = "from whisperkv import _cuda, ops; print(ops.CUDA, ops.CUDA_REASON); _cuda.register(*ops._LIBRARIES)"
    ran = run(["-c", code], ROOT)
    assert ran.stdout.strip() == "False torch finds no GPU"
    assert "ImportError: this torch has no CUDA" in ran.stderr.splitlines()[-1]
    probed = run(["-c", "from whisperkv import _cuda; print(_cuda.probe())"], ROOT).stdout
    assert "driver" in probed or "no CUDA-capable device" in probed
