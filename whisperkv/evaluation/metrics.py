"""Pure functions from texts to numbers."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..transcription.results import REPEATED, compression_ratio

ROUNDS = 10_000
LETTERS = ("zh", "ja", "th", "lo", "my", "yue")  # written without spaces: a letter is a word, as Whisper has it
LOOP = (
    "its text compresses more than 2.4 times (zlib, Whisper's own threshold), "
    "or four or more words stand three times in a row"
)


class WordCounts(NamedTuple):
    """How a text differs from what was wanted, in words."""

    substitutions: int
    deletions: int
    insertions: int
    words: int  # wanted

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as answers are compared."""
    text = re.sub(r"[^\w\s']", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def normalizer(language: str = "en", spellings: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Whisper's own: that of English, with a table of British and American spellings if there is one, or that of all
    other languages. It remembers the last texts, as settings mostly write the same."""
    return _normalizer(language, tuple(sorted((spellings or {}).items())))


@functools.lru_cache(maxsize=4)
def _normalizer(language, spellings):
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    is_english = language == "en"
    made = EnglishTextNormalizer(dict(spellings)) if is_english else BasicTextNormalizer(False, language in LETTERS)
    return functools.lru_cache(maxsize=10_000)(made)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether it is one of the answers."""
    return normalized(text) in map(normalized, answers)


def word_counts(text: str, wanted: str) -> WordCounts:
    """Of both texts as they are. Where nothing is wanted every word is an insertion."""
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("jiwer is not installed: pip install whisperkv[cli]") from error
    if not wanted.strip():
        return WordCounts(0, 0, len(text.split()), 0)
    found = jiwer.process_words(wanted, text)
    return WordCounts(found.substitutions, found.deletions, found.insertions, len(wanted.split()))


def word_errors(text: str, wanted: str) -> tuple[int, int]:
    """(words wrong, missing or too many; words wanted), both texts as they are."""
    counts = word_counts(text, wanted)
    return counts.errors, counts.words


def loops(text: str, normalize: Callable[[str], str] = normalized) -> bool:
    """Whether a transcript has got stuck, see LOOP."""
    words = " ".join(normalize(text).split()) + " "
    return compression_ratio(text) > 2.4 or bool(re.search(REPEATED, words))


def interval(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % of what the mean would be over other samples (bootstrap); with weights, of sum(values) / sum(weights). With
    differences of pairs as values it is the paired bootstrap."""
    given = np.asarray(values, float)
    if given.size == 0:
        raise ValueError("values must hold one number at least")
    draws = np.random.default_rng(seed).integers(len(given), size=(ROUNDS, len(given)))
    below = draws.shape[1] if weights is None else np.maximum(np.asarray(weights, float)[draws].sum(1), 1e-12)
    low, high = np.quantile(given[draws].sum(1) / below, [0.025, 0.975])
    return float(low), float(high)


def word_diff(text: str, wanted: str) -> list[tuple[str, str, str]]:
    """("equal", "substitute", "delete" or "insert", words wanted, words of the text), piece by piece."""
    import jiwer

    theirs, ours = wanted.split(), text.split()
    if not theirs or not ours:
        return [("delete" if theirs else "insert", wanted, text)] if theirs or ours else []
    (pieces,) = jiwer.process_words(wanted, text).alignments
    return [
        (
            piece.type,
            " ".join(theirs[piece.ref_start_idx : piece.ref_end_idx]),
            " ".join(ours[piece.hyp_start_idx : piece.hyp_end_idx]),
        )
        for piece in pieces
    ]
