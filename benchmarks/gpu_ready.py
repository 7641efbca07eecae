"""Whether this machine can run what is for a GPU: says what it has, builds the kernels if they are not here, or says
what is missing."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from device import driver

ROOT = Path(__file__).parents[1]


def main():
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}"
    if not torch.cuda.is_available():
        sys.exit(f"torch finds no GPU ({versions}): nothing was run")
    about = torch.cuda.get_device_properties(0)
    print(f"{about.name}, {about.total_memory / 1e9:.0f} GB, driver {driver()}, CUDA {torch.version.cuda}, {versions}")
    if reason := missing():
        print(f"{reason}: building them here", flush=True)
        build(f"{about.major}{about.minor}")
        if reason := missing():
            sys.exit(f"the kernels cannot be used: {reason}")


def missing():
    """Why the kernels cannot be used in a fresh process, or ""."""
    code = "from whisperkv import ops; print(ops.cuda_reason(0))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return ran.stdout.strip() if ran.returncode == 0 else ran.stderr.strip().splitlines()[-1]


def build(arch):
    environment = {"WHISPERKV_CUDA": "on", "WHISPERKV_ARCHS": arch, **os.environ}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        sys.exit(
            "they could not be built: this takes nvcc, a C compiler, setuptools and NumPy. Or build them on a machine "
            f"that has these (WHISPERKV_CUDA=on python3 {' '.join(command[1:])}) and bring whisperkv/*.abi3.so along, "
            "which serve every Python from 3.10 and every torch from 2.10"
        )


if __name__ == "__main__":
    main()
