"""Recordings with what is said in them, and how close a transcript or an answer comes."""

from .metrics import exact_match, interval, normalized, word_errors
from .readers import Sample, gigaspeech, librispeech, read, spoken_qa

__all__ = [
    "Sample", "exact_match", "gigaspeech", "interval", "librispeech", "normalized", "read", "spoken_qa", "word_errors",
]  # fmt: skip
