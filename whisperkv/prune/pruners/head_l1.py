import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import BasePruner, check_budget, kept_of, places, ranks


@dataclass
class HeadL1(BasePruner):
    """Whole heads: those that look at the audio least keep none of it. Under GQA that is a head of keys and values with
    all that read it.

    tokens  a pruner, by name or as it was made, that chooses among the audio of the heads that stay. budget is then
            what it is to that pruner, of those heads; without, the share of heads that keep audio, or their number
    heads   with tokens, the share of heads that keep audio, or their number
    """

    tokens: str | BasePruner | None = None
    heads: float | int = 0.5
    needs_attention: ClassVar[bool] = True

    def __post_init__(self):
        if self.tokens is not None:
            from . import pruner_of

            self.tokens = pruner_of(self.tokens, {})
            if isinstance(self.tokens, HeadL1):
                raise ValueError("head_l1: tokens must be a pruner that chooses tokens; got head_l1")
            self.needs_silence, self.every, self.apply = self.tokens.needs_silence, self.tokens.every, self.tokens.apply
        try:
            check_budget(self.heads)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("budget", "head_l1: heads").replace("audio token", "head")) from None

    def score(self, k, v, attn_weights, meta):
        looked = attn_weights.masked_fill(~meta.present[:, None], 0).sum(-1)  # [rows, kv_heads]
        if self.tokens is None:
            return looked[..., None].expand(k.shape[:3])
        count = kept_of(torch.full(looked.shape[:1], looked.shape[1], device=looked.device), self.heads)
        stay = ranks(looked) < count[:, None]
        scores = self.tokens.score(k, v, attn_weights, meta)
        return scores.masked_fill(~stay[..., None], -math.inf)

    def select(self, scores, budget):
        if self.tokens is not None:  # what a score of -inf has become is the least number there is
            return self.tokens.select(scores.masked_fill(scores <= torch.finfo(torch.float32).min, -math.inf), budget)
        exists = scores > -math.inf
        count = kept_of(exists.any(-1).sum(-1), budget)
        return places(exists & (ranks(scores.amax(-1)) < count[:, None])[..., None])
