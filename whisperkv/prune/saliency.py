"""A small head that hears which audio tokens hold speech, from what the audio encoder gives the language model."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .base import BasePruner


class SaliencyHead(nn.Module):
    """Embeddings [..., width] to the logarithm of odds that they hold speech [...]."""

    def __init__(self, width, hidden=64):
        super().__init__()
        self.width, self.hidden = width, hidden
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, embeddings):
        return self.layers(embeddings.float())[..., 0]

    def save(self, path):
        from safetensors.torch import save_file

        save_file(self.state_dict(), path, {"whisperkv": "saliency head"})

    @classmethod
    def load(cls, path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
            hidden, width = weights["layers.1.weight"].shape
            head = cls(width, hidden)
            head.load_state_dict(weights)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is no saliency head that whisperkv.prune has saved ({error})") from error
        return head.eval()


class _Listening(BasePruner):
    """Keeps all, and remembers what it heard."""

    needs_silence = True

    def __init__(self):
        self.heard = []

    def score(self, k, v, attn_weights, meta):
        if meta.embeddings is None or meta.silent is None:
            raise ValueError(
                "of this model no audio token can be told to be speech or silence, so no head can be trained"
            )
        if "heard" not in meta.shared:  # by the first layer
            meta.shared["heard"] = True
            self.heard.append((meta.embeddings[meta.present].float(), ~meta.silent[meta.present]))
        return torch.ones(k.shape[:3], device=k.device)


def train(
    model: Any,
    prompts: Iterable[dict[str, Any]],
    steps: int = 400,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> tuple[SaliencyHead, float]:
    """A head for this model, and the share of held out tokens that it gets right.

    prompts   what the model is given, one dict a batch, as generate() takes it. Voice labels come from Silero where
              whisperkv.listen(processor) was called before the features were made, from energy elsewhere
    steps     of training, each over 1024 tokens
    seed      of what is left to chance: the same gives the same head
    progress  called with each loss
    """
    from .applying import apply

    embeddings, labels = [], []
    with torch.no_grad():
        for prompt in prompts:
            listening = _Listening()
            with apply(model, listening, budget=1.0):
                model(**prompt)
            for heard, speech in listening.heard:
                embeddings.append(heard)
                labels.append(speech)
    if not embeddings:
        raise ValueError("prompts must hold audio, one prompt at least")
    embeddings, labels = torch.cat(embeddings), torch.cat(labels).float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    held_out, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    if len(rest) == 0 or not 0 < float(labels[rest].mean()) < 1:
        raise ValueError("prompts must hold speech and silence, a few seconds of both")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = SaliencyHead(embeddings.shape[-1]).to(embeddings.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    with torch.enable_grad():
        for _ in range(steps):
            some = rest[torch.randint(len(rest), (min(1024, len(rest)),), generator=generator).to(rest.device)]
            loss = nn.functional.binary_cross_entropy_with_logits(head(embeddings[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(loss.item())
    head.eval()
    with torch.no_grad():
        right = ((head(embeddings[held_out]) > 0) == (labels[held_out] > 0)).float().mean().item()
    return head, right
