"""What a pruner is: a dataclass that scores the audio tokens of a layer, chooses some and says what they hold."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import ClassVar, NamedTuple

import torch


@dataclass(frozen=True)
class Meta:
    """What a pruner may know of a layer's audio tokens beside their keys and values.

    All tensors have one column for each audio token of the row that has most; `present` says which exist.
    """

    layer: int
    layers: int  # of the model
    present: torch.Tensor  # bool [rows, audio]
    tokens: torch.Tensor  # int64 [rows, audio], where the tokens stand in the prompt
    clip: torch.Tensor  # int64 [rows, audio], which audio of its row a token is of: 0, 1, ...
    seen: torch.Tensor  # float32 [rows, audio], by how many of the queries in attn_weights a token could be seen
    embeddings: torch.Tensor | None  # [rows, audio, width], what the audio encoder gave the language model
    rate: float  # audio tokens a second; 0 where the family does not know
    features: torch.Tensor | None = None  # [clips, mels, columns], what the model was given
    silent: torch.Tensor | None = None  # bool [rows, audio], tokens without speech; None if that cannot be told
    since: torch.Tensor | None = None  # int64 [rows, audio], of speech, how many tokens ago it began; -1 of silence
    attended: torch.Tensor | None = None  # float32 [rows, audio], attn_weights of all layers and heads, added up
    heard: torch.Tensor | int = 0  # int64 [rows, 1], audio tokens that the row had before, in earlier turns or pieces
    shared: dict = field(default_factory=dict)  # by a pruner's own key: what all layers of one prompt have in common


class Kept(NamedTuple):
    """The keys and values that stay: [rows, kv_heads, kept, dim] each, and for how many tokens each stands."""

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor | None = None  # float32 [rows, kv_heads, kept]; None: each for itself


@dataclass
class BasePruner:
    """Which of the audio tokens of a prompt stay in the cache. A pruner of one's own overrides score, at least.

    needs_attention  whether score() looks at attn_weights, which cost time to add up
    needs_silence    whether it looks at meta.silent or meta.since
    streams          whether scores of different pieces of an audio can be held against one another, for stream=True
    every            of the audio's own queries every so many-th is added up; all queries of the text after it are
    """

    needs_attention: ClassVar[bool] = False
    needs_silence: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    every: ClassVar[int] = 8

    def score(self, k: torch.Tensor, v: torch.Tensor, attn_weights: torch.Tensor | None, meta: Meta) -> torch.Tensor:
        """A number for each audio token and head, the higher the longer it stays: float32 [rows, kv_heads, audio].

        k, v          keys and values of the audio tokens, [rows, kv_heads, audio, dim]
        attn_weights  float32 [rows, kv_heads, audio], the attention that they received in the prompt, added up over
                      queries and the heads of a group; None unless needs_attention
        """
        raise NotImplementedError(
            f"{type(self).__name__} must say how it scores tokens: score(k, v, attn_weights, meta)"
        )

    def select(self, scores: torch.Tensor, budget: float | int) -> torch.Tensor:
        """The tokens that stay, ascending: int64 [rows, kv_heads, kept], -1 behind the last of a head that keeps fewer.

        Tokens that a row lacks have a score of -inf and never stay."""
        exists = scores > -math.inf
        count = kept_of(exists.sum(-1), budget)
        return places(exists & (ranks(scores) < count[..., None]))

    def apply(
        self, k: torch.Tensor, v: torch.Tensor, kept_idx: torch.Tensor
    ) -> Kept | tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of them: a Kept, or (keys, values). As it is: the tokens chosen, unchanged. Rows that
        are given together have as many audio tokens."""
        return Kept(take(k, kept_idx), take(v, kept_idx))


def check_budget(budget):
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(
            f"budget must be a share of the audio tokens, as 0.5, or a whole number of them; got {budget!r}"
        )
    if isinstance(budget, Integral):
        if budget < 1:
            raise ValueError(f"budget must be 1 audio token or more, or a share above 0 and up to 1.0; got {budget!r}")
    elif not 0 < budget <= 1:
        raise ValueError(
            f"budget must be a share above 0 and up to 1.0, or a whole number of audio tokens; got {budget!r}"
        )


def kept_of(count, budget):
    """How many of `count` (a tensor) stay: the share, rounded up, or the number."""
    if isinstance(budget, Integral):
        return count.clamp(max=int(budget))
    return (count * float(budget) - 1e-6).ceil().long()


def ranks(scores):
    """Of each number along the last dimension, how many are higher, or as high and earlier."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def places(chosen):
    """The places of what is True along the last dimension, ascending, -1 behind them."""
    counts = chosen.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    order = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return order.masked_fill(torch.arange(most, device=order.device) >= counts[..., None], -1)


def take(tensor, index):
    """tensor[rows, heads, tokens, dim] at index[rows, heads, kept]; what is -1 takes the first."""
    return tensor.gather(2, index.clamp(min=0)[..., None].expand(*index.shape, tensor.shape[-1]))
