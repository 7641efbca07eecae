from dataclasses import dataclass
from typing import ClassVar

from ..base import BasePruner, kept_of, places, ranks


@dataclass
class HeadL1(BasePruner):
    """Whole heads: those that look at the audio least keep none of it. Under GQA that is a head of keys and values with
    all that read it.

    budget is the share of a layer's heads that keep their audio.
    """

    needs_attention: ClassVar[bool] = True

    def score(self, k, v, attn_weights, meta):
        received = attn_weights.masked_fill(~meta.present[:, None], 0)
        return received.sum(-1, keepdim=True).expand(received.shape)

    def select(self, scores, budget):
        exists = scores > float("-inf")
        count = kept_of(exists.any(-1).sum(-1), budget)
        return places(exists & (ranks(scores.amax(-1)) < count[:, None])[..., None])
