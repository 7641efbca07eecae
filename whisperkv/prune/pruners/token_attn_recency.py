from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import BasePruner


@dataclass
class TokenAttnRecency(BasePruner):
    """Audio tokens that the prompt has dwelt on, and late ones. All layers and heads keep the same: what one head says
    of a token is little, and what all of them say together is much.

    recency  from 0 to 1: how much less the attention to the first token counts than that to the last
    """

    recency: float = 0.3
    needs_attention: ClassVar[bool] = True

    def __post_init__(self):
        if isinstance(self.recency, bool) or not 0 <= self.recency <= 1:
            raise ValueError(f"token_attn_recency: recency must be a number from 0 to 1; got {self.recency!r}")

    def score(self, k, v, attn_weights, meta):
        return attention_and_recency(meta, self.recency)[:, None].expand(k.shape[:3])


def attention_and_recency(meta, recency):
    """From 0 to 1: [rows, audio]. Attention is that of a query that could see the token."""
    received = (meta.attended / meta.seen.clamp(min=1)).masked_fill(~meta.present, 0)
    received = received / received.amax(-1, keepdim=True).clamp(min=1e-20)
    audio = meta.present.sum(-1, keepdim=True).clamp(min=1)
    late = torch.arange(received.shape[-1], device=received.device) / audio
    return received * (1 - recency * (1 - late))
