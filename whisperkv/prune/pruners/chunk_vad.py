from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import BasePruner


@dataclass
class ChunkVad(BasePruner):
    """Chunks of speech between silences, whole, those first that the prompt has dwelt on most; silence goes first.

    Silero finds the silence where whisperkv.listen(processor) was called, energy elsewhere.

    every_silent  of a silence this many-th token outlives the others
    """

    every_silent: int = 4
    needs_attention: ClassVar[bool] = True
    needs_silence: ClassVar[bool] = True

    def score(self, k, v, attn_weights, meta):
        silent = meta.silent
        if silent is None:
            raise ValueError("chunk_vad cannot tell which audio tokens of this model are silent: choose another pruner")
        received = (attn_weights.sum(1) / meta.seen.clamp(min=1)).masked_fill(~meta.present, 0)
        begins = torch.zeros_like(silent)
        begins[:, 1:] = (silent[:, 1:] != silent[:, :-1]) | (meta.clip[:, 1:] != meta.clip[:, :-1])
        chunk = begins.cumsum(-1)
        sums = torch.zeros_like(received).scatter_add_(1, chunk, received)
        counts = torch.zeros_like(received).scatter_add_(1, chunk, meta.present.float())
        of_chunk = (sums / counts.clamp(min=1)).gather(1, chunk)
        of_chunk = of_chunk / of_chunk.amax(-1, keepdim=True).clamp(min=1e-20)
        place = torch.arange(k.shape[2], device=k.device)
        rare = (place % self.every_silent == 0).float()
        score = torch.where(silent, rare - 2, of_chunk) - 1e-6 * place
        return score[:, None].expand(k.shape[:3])
