"""Recordings with what is said in them, and how close, how fast and how small each setting of whisperkv comes."""

import importlib
from typing import TYPE_CHECKING, Any

from .manifests import from_dataset, manifest
from .metrics import (
    WordCounts,
    exact_match,
    interval,
    loops,
    normalized,
    normalizer,
    word_counts,
    word_diff,
    word_errors,
)
from .readers import gigaspeech, librispeech, read, recordings, spoken_qa
from .samples import Sample
from .settings import Setting, parsed

# Loaded on first use: what needs torch, transformers or matplotlib.
_HOME = {
    "Audio": "hearing",
    "heard": "hearing",
    "Options": "measuring",
    "measure": "measuring",
    "Result": "results",
    "markdown": "results",
    "read_json": "results",
    "write_csv": "results",
    "write_json": "results",
    "compare": "comparing",
    "compare_each": "comparing",
    "write_report": "report",
    "tune": "tuning",
}
__all__ = [
    "Sample", "Setting", "WordCounts", "exact_match", "from_dataset", "gigaspeech", "interval", "librispeech", "loops",
    "manifest", "normalized", "normalizer", "parsed", "read", "recordings", "spoken_qa", "word_counts", "word_diff",
    "word_errors",
]  # fmt: skip
__all__ += sorted(_HOME)

if TYPE_CHECKING:  # the same for type checkers and editors, which do not follow __getattr__
    from . import plot as plot
    from .comparing import compare as compare
    from .comparing import compare_each as compare_each
    from .hearing import Audio as Audio
    from .hearing import heard as heard
    from .measuring import Options as Options
    from .measuring import measure as measure
    from .report import write_report as write_report
    from .results import Result as Result
    from .results import markdown as markdown
    from .results import read_json as read_json
    from .results import write_csv as write_csv
    from .results import write_json as write_json
    from .tuning import tune as tune
else:

    def __getattr__(name: str) -> Any:
        if name == "plot":
            return importlib.import_module(".plot", __name__)
        if name in _HOME:
            return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
