from dataclasses import dataclass

import torch

from ..base import BasePruner


@dataclass
class Random(BasePruner):
    """Audio tokens drawn by lot, the same ones in every head of a layer. What a pruner must beat."""

    seed: int = 0

    def score(self, k, v, attn_weights, meta):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + meta.layer)
        drawn = torch.rand(k.shape[2], generator=generator).to(k.device)
        return drawn.expand(k.shape[:3])
