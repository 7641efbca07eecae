"""What a conversion learns from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Aims:
    """See MLATrainer. With neither `distills` nor `reconstructs` it is the likelihood alone."""

    distills: bool
    reconstructs: bool
    alpha: float

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        before: Callable[[], torch.Tensor],
        rebuilt: Callable[[], Pairs],
    ) -> torch.Tensor:
        """Of logits [tokens, vocabulary] and labels [tokens].

        before   gives the logits of the model before its conversion
        rebuilt  gives what was rebuilt [tokens, numbers], and what it was before
        """
        if self.distills:
            with torch.no_grad():
                teacher = before().float().log_softmax(-1)
            return functional.kl_div(logits.float().log_softmax(-1), teacher, reduction="batchmean", log_target=True)
        likelihood = functional.cross_entropy(logits.float(), labels)
        if not self.reconstructs:
            return likelihood
        shares = [_missing(one.float(), other.float()) for one, other in rebuilt()]
        return (1 - self.alpha) * likelihood + self.alpha * sum(shares) / len(shares)


def _missing(rebuilt, wanted):
    """The share of the variance that is not there."""
    return (rebuilt - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
