from dataclasses import dataclass

import torch

from ..base import BasePruner, Kept


@dataclass
class Merge(BasePruner):
    """Neighbours whose keys are alike become one token, which counts for all of them: nothing is dropped.

    Every head joins its own, the most alike first, until the budget is met. A query then meets the mean of their keys,
    so what it would have given to each hardly changes, and takes the mean of their values as often as they were.
    """

    def score(self, k, v, attn_weights, meta):
        return heights(k, meta.clip, meta.present)

    def apply(self, k, v, kept_idx):
        """A token that stays is the mean of those from it up to the next that stays."""
        audio = k.shape[2]
        there = torch.zeros(*k.shape[:2], audio + 1, dtype=torch.bool, device=k.device)
        there.scatter_(2, kept_idx.masked_fill(kept_idx < 0, audio), True)
        of = (there[..., :audio].cumsum(-1) - 1).clamp(min=0)  # which of the kept each token belongs to
        counts = torch.zeros(kept_idx.shape, device=k.device).scatter_add_(2, of, torch.ones(of.shape, device=k.device))
        counts = counts.clamp(min=1)
        return Kept(*(_means(each, of, counts) for each in (k, v)), counts)


def _means(tensor, of, counts):
    sums = torch.zeros(*counts.shape, tensor.shape[-1], device=tensor.device)
    sums.scatter_add_(2, of[..., None].expand_as(tensor), tensor.float())
    return sums / counts[..., None]


def heights(looks, clip, present):
    """How much it costs to join each token to what stands before it, the first of a clip most: float32 [rows, heads,
    audio].

    Ward's way: groups of neighbours are joined, and the cost is what that adds to the squared distances of tokens from
    the mean of their group. Every pair that is the best for both of its groups is joined at once, which gives the
    groups that joining one pair after the other, the cheapest first, would have given.
    """
    rows, heads, audio = looks.shape[:3]
    there = present[:, None].expand(rows, heads, audio)
    line = torch.arange(rows * heads, device=looks.device).view(rows, heads, 1) * (audio + 1)
    of = (line + clip[:, None])[there]  # what must not be joined with another
    mean = looks[there].float()
    size, inside = mean.new_ones(len(mean)), mean.new_zeros(len(mean))  # of each group; its costliest joining
    first = torch.arange(len(mean), device=mean.device)
    cost_of = mean.new_full((len(mean),), torch.finfo(torch.float32).max)
    while len(first) > 1:
        cost = (mean[1:] - mean[:-1]).square_().sum(-1) * (size[1:] * size[:-1] / (size[1:] + size[:-1]))
        cost = cost.nan_to_num_(torch.finfo(torch.float32).max / 2).masked_fill_(of[1:] != of[:-1], torch.inf)
        before = torch.nn.functional.pad(cost[:-1], (1, 0), value=torch.inf)
        after = torch.nn.functional.pad(cost[1:], (0, 1), value=torch.inf)
        left = ((cost < before) & (cost <= after)).nonzero()[:, 0]
        if len(left) == 0:
            break
        inside[left] = torch.maximum(torch.maximum(inside[left], inside[left + 1]), cost[left])
        cost_of[first[left + 1]] = inside[left]
        a, b = size[left, None], size[left + 1, None]
        mean[left] = (mean[left] * a + mean[left + 1] * b) / (a + b)
        size[left] += size[left + 1]
        stays = torch.ones_like(first, dtype=torch.bool)
        stays[left + 1] = False
        first, mean, size, inside, of = (each[stays] for each in (first, mean, size, inside, of))
    scores = torch.zeros(rows, heads, audio, device=looks.device)
    scores[there] = cost_of
    return scores
