from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import BasePruner


@dataclass
class StreamingAnchor(BasePruner):
    """The last audio, and of what came before it the starts of sentences: where speech begins after a silence.

    anchor   audio tokens from the start of a sentence on that stay longer
    longer   seconds by which they outlive the rest
    """

    anchor: int = 4
    longer: float = 30.0
    needs_silence: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self):
        if isinstance(self.anchor, bool) or not isinstance(self.anchor, int) or self.anchor < 1:
            raise ValueError(
                f"streaming_anchor: anchor must be a whole number of tokens, 1 or more; got {self.anchor!r}"
            )
        if isinstance(self.longer, bool) or not 0 <= self.longer < float("inf"):
            raise ValueError(f"streaming_anchor: longer must be a number of seconds, 0 or more; got {self.longer!r}")

    def score(self, k, v, attn_weights, meta):
        if meta.since is None:
            raise ValueError(
                "streaming_anchor cannot tell which audio tokens of this model are silent: take window instead"
            )
        is_anchor = (meta.since >= 0) & (meta.since < self.anchor)
        place = torch.arange(k.shape[2], device=k.device) + meta.heard
        score = place + is_anchor * self.longer * (meta.rate or 12.5)
        return score[:, None].expand(k.shape[:3])
