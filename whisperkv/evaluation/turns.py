"""The time that each setting takes for one recording. They take turns, so that a busy moment hits all alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from ..features import log_mel
from ..patching import stats, unpatch
from .hearing import RATE, WINDOW
from .settings import NAMED, UNPATCHED, parsed

ROUNDS, PATIENCE = 4, 60  # the best of so many; only two of them once so many seconds have passed


@dataclass
class Turn:
    """The best of one setting."""

    tokens: torch.Tensor
    seconds: float
    held: Any = None  # stats(model), where it is patched


def transcribe(model: Any, processor: Any, samples: NDArray[Any], beams: int, is_patched: bool = True) -> torch.Tensor:
    """The tokens of a recording of any length."""
    if len(samples) <= WINDOW * RATE:
        if is_patched:
            return model.generate(log_mel([samples], processor), num_beams=beams)[0]
        return model.generate(**processor(samples, sampling_rate=RATE, return_tensors="pt"), num_beams=beams)[0]
    whole = {"truncation": False, "padding": "longest", "return_attention_mask": True}
    inputs = processor(samples, sampling_rate=RATE, return_tensors="pt", **whole)
    return model.generate(**inputs, return_timestamps=True, num_beams=beams)[0]


def in_turns(
    model: Any,
    processor: Any,
    samples: NDArray[Any],
    beams: int,
    on_turn: Callable[[str], None] = lambda text: None,
) -> dict[str, Turn]:
    """{setting: its best Turn}, the unpatched model first. on_turn is told of each, in words."""
    best: dict[str, Turn] = {}
    start = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 2 and time.perf_counter() - start > PATIENCE:
            break
        for setting in map(parsed, (UNPATCHED, *NAMED)):
            setting.apply(model)
            before = time.perf_counter()
            tokens = transcribe(model, processor, samples, beams, setting.is_patched)
            seconds = time.perf_counter() - before
            on_turn(f"round {number + 1} of {ROUNDS}: {setting.name}, {seconds:.2f} s")
            if setting.name not in best or seconds < best[setting.name].seconds:
                best[setting.name] = Turn(tokens, seconds, stats(model) if setting.is_patched else None)
    unpatch(model)
    return best


def difference(tokens: torch.Tensor, wanted: torch.Tensor) -> str:
    """Whether two transcripts have the same tokens, in words."""
    if torch.equal(tokens, wanted):
        return "the same"
    pairs = enumerate(zip(tokens.tolist(), wanted.tolist()))
    return f"differ from token {next((n for n, (a, b) in pairs if a != b), min(len(tokens), len(wanted)))}"


def written(best: dict[str, Turn]) -> str:
    """A table, one line a setting."""
    first, lossless, *_ = best.values()
    rows: list[tuple[str, ...]] = [("", "time", "speed", "self cache", "cross cache", "evicted", "tokens")]
    for name, turn in best.items():
        held = turn.held
        sizes = [held.self_bytes, held.cross_bytes] if held else []
        sizes = sizes or [lossless.held.self_bytes_transformers, lossless.held.cross_bytes_transformers]
        same = difference(turn.tokens, first.tokens) if held else str(len(turn.tokens))
        speed, evicted = f"{first.seconds / turn.seconds:.2f}x", str(held.evicted if held else 0)
        rows.append((name, f"{turn.seconds:.3f} s", speed, *(f"{size / 1e6:.2f} MB" for size in sizes), evicted, same))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
