"""Pure functions from texts to numbers."""

import re
from collections.abc import Sequence

import numpy as np

ROUNDS = 10_000


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as answers are compared."""
    text = re.sub(r"[^\w\s']", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether it is one of the answers."""
    return normalized(text) in map(normalized, answers)


def word_errors(text: str, wanted: str) -> tuple[int, int]:
    """(words wrong, missing or too many; words wanted), both texts as they are."""
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("jiwer is not installed: pip install jiwer") from error
    if not wanted.strip():
        return len(text.split()), 0
    found = jiwer.process_words(wanted, text)
    return found.substitutions + found.deletions + found.insertions, len(wanted.split())


def interval(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % of what the mean would be over other samples (bootstrap); with weights, of sum(values) / sum(weights)."""
    given = np.asarray(values, float)
    if given.size == 0:
        raise ValueError("values must hold one number at least")
    draws = np.random.default_rng(seed).integers(len(given), size=(ROUNDS, len(given)))
    below = draws.shape[1] if weights is None else np.maximum(np.asarray(weights, float)[draws].sum(1), 1e-12)
    low, high = np.quantile(given[draws].sum(1) / below, [0.025, 0.975])
    return float(low), float(high)
