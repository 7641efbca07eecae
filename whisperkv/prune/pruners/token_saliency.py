import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import BasePruner
from ..saliency import SaliencyHead
from .token_attn_recency import attention_and_recency

LEAST = 1e-6  # of both: a token that is surely silent can still be told from another


@dataclass
class TokenSaliency(BasePruner):
    """Audio tokens that sound like speech and that the prompt has dwelt on, in all layers and heads the same.

    head      what hears it: the file of a saliency head (whisperkv.prune.saliency.train makes one), or any function of
              embeddings [rows, audio, width] that returns numbers [rows, audio], as log of odds. None: a model that was
              trained with blanks, as by CTC, has none yet, and silence found in the features speaks for it
    saliency  from 0 to 1: the power of that beside the power of the attention, as the two are multiplied
    recency   from 0 to 1: how much less the attention to the first token counts than that to the last
    """

    head: str | os.PathLike | Callable | None = None
    saliency: float = 0.5
    recency: float = 0.3
    needs_attention: ClassVar[bool] = True
    needs_silence: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("saliency", "recency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"token_saliency: {name} must be a number from 0 to 1; got {value!r}")
        if isinstance(self.head, str | os.PathLike):
            self.head = SaliencyHead.load(self.head)
        if self.head is not None and not callable(self.head):
            raise TypeError(f"token_saliency: head must be a file or a function of embeddings; got {self.head!r}")

    def score(self, k, v, attn_weights, meta):
        if "saliency" not in meta.shared:
            meta.shared["saliency"] = self._saliency(meta)
        rest = attention_and_recency(meta, self.recency)
        sounds, rest = (each.clamp(min=LEAST).log() for each in (meta.shared["saliency"], rest))
        scores = self.saliency * sounds + (1 - self.saliency) * rest
        return scores[:, None].expand(k.shape[:3])

    def _saliency(self, meta):
        if self.head is None:
            if meta.silent is None:
                raise ValueError("token_saliency needs a head for this model: see whisperkv.prune.saliency.train")
            return 1 - meta.silent.float()
        if meta.embeddings is None:
            raise ValueError(
                "token_saliency cannot see what the audio encoder of this model gives: choose another pruner"
            )
        if isinstance(self.head, SaliencyHead) and self.head.width != meta.embeddings.shape[-1]:
            raise ValueError(
                f"token_saliency: the head was trained for embeddings of {self.head.width} channels and this model's "
                f"have {meta.embeddings.shape[-1]}"
            )
        with torch.no_grad():
            return self.head(meta.embeddings).float().sigmoid().to(meta.present.device)
