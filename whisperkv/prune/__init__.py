"""Speech LLMs with part of their audio pruned out of the cache.

with whisperkv.prune.apply(model, "merge", budget=0.5):
    model.generate(**inputs)
"""

from .applying import Pruning, apply, remove, stats
from .base import BasePruner, Kept, Meta
from .pruners import names
from .records import PruneStats

__all__ = ["BasePruner", "Kept", "Meta", "PruneStats", "Pruning", "apply", "names", "remove", "stats"]
