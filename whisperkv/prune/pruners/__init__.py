"""Pruners by name: ours, and those that other packages bring as entry points of the group "whisperkv.pruners"."""

from importlib.metadata import entry_points

from ..base import BasePruner
from .chunk_vad import ChunkVad
from .head_l1 import HeadL1
from .merge import Merge
from .random import Random
from .streaming_anchor import StreamingAnchor
from .stride import Stride
from .token_attn_recency import TokenAttnRecency
from .token_saliency import TokenSaliency
from .window import Window

PRUNERS = {
    "token_attn_recency": TokenAttnRecency,
    "chunk_vad": ChunkVad,
    "token_saliency": TokenSaliency,
    "streaming_anchor": StreamingAnchor,
    "head_l1": HeadL1,
    "merge": Merge,
    "random": Random,
    "stride": Stride,
    "window": Window,
}
GROUP = "whisperkv.pruners"


def names() -> list[str]:
    """Of all pruners that are here, those of other packages included."""
    return sorted({*PRUNERS, *(entry.name for entry in entry_points(group=GROUP))})


def streaming():
    """Names of ours that can stream."""
    return [name for name, kind in PRUNERS.items() if kind.streams]


def pruner_of(pruner, settings):
    """A pruner, by its name and settings, or as it was made."""
    if isinstance(pruner, BasePruner):
        if settings:
            raise TypeError(f"{type(pruner).__name__} is made already: give {', '.join(settings)} to it")
        return pruner
    kind = PRUNERS.get(pruner) if isinstance(pruner, str) else None
    if kind is None:
        for entry in entry_points(group=GROUP):
            if entry.name == pruner:
                kind = entry.load()
    if kind is None:
        raise ValueError(f"pruner must be one of {', '.join(names())}, or a BasePruner; got {pruner!r}")
    return kind(**settings)
