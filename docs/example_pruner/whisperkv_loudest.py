from dataclasses import dataclass

from whisperkv.prune import BasePruner


@dataclass
class Loudest(BasePruner):
    """The audio tokens whose values are largest, in each head."""

    power: float = 2.0

    def score(self, k, v, attn_weights, meta):
        return v.float().abs().pow(self.power).sum(-1)
