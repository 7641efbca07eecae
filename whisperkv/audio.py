"""Recordings from files."""

from os import PathLike

import numpy as np
from numpy.typing import NDArray

RATE = 16_000  # samples a second, of all Whispers and of the speech LLMs


def read_audio(path: str | PathLike[str]) -> NDArray[np.float32]:
    """A recording of any rate and number of channels, as float32 mono at 16 kHz."""
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install whisperkv[demo]") from error
    with open(path, "rb") as file:
        try:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: {error.error_string} Pass WAV, FLAC, OGG or MP3") from error
    samples = samples.mean(axis=1)
    if len(samples) and rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    if len(samples) == 0:
        raise ValueError(f"{path}: there is no sound in it")
    if not abs(samples).max() < float("inf"):
        raise ValueError(f"{path}: not every sample is a number")
    return samples
