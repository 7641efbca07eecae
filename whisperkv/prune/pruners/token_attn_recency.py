from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import BasePruner


@dataclass
class TokenAttnRecency(BasePruner):
    """Audio tokens that the prompt has dwelt on, and late ones.

    recency  how much being late counts beside the attention received, from 0 to 1
    """

    recency: float = 0.1
    needs_attention: ClassVar[bool] = True

    def __post_init__(self):
        if isinstance(self.recency, bool) or not 0 <= self.recency <= 1:
            raise ValueError(f"token_attn_recency: recency must be a number from 0 to 1; got {self.recency!r}")

    def score(self, k, v, attn_weights, meta):
        return attention_and_recency(attn_weights, meta, self.recency)


def attention_and_recency(received, meta, recency):
    """Both from 0 to 1, weighed: [rows, kv_heads, audio]. Attention is that of a query that could see the token."""
    received = (received / meta.seen[:, None].clamp(min=1)).masked_fill(~meta.present[:, None], 0)
    received = received / received.amax(-1, keepdim=True).clamp(min=1e-20)
    audio = meta.present.sum(-1, keepdim=True).clamp(min=1)
    late = (torch.arange(received.shape[-1], device=received.device) / audio)[:, None]
    return (1 - recency) * received + recency * late
