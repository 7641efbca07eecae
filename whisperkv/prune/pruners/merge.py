from dataclasses import dataclass

import torch

from ..base import BasePruner, Kept


@dataclass
class Merge(BasePruner):
    """Neighbours that are alike become one token, which counts for all of them: nothing is dropped.

    The most alike are joined first, as the audio encoder made them, until the budget is met; the same ones in all layers.
    """

    def score(self, k, v, attn_weights, meta):
        if "heights" not in meta.shared:
            looks = v.transpose(1, 2).flatten(2) if meta.embeddings is None else meta.embeddings
            meta.shared["heights"] = torch.stack(
                [_heights(row.float(), clip, there) for row, clip, there in zip(looks, meta.clip, meta.present, strict=True)]
            )
        return meta.shared["heights"][:, None].expand(k.shape[:3])

    def apply(self, k, v, kept_idx):
        """A token that stays is the mean of those from it up to the next that stays."""
        audio = k.shape[2]
        there = torch.zeros(*k.shape[:2], audio + 1, dtype=torch.bool, device=k.device)
        there.scatter_(2, kept_idx.masked_fill(kept_idx < 0, audio), True)
        of = (there[..., :audio].cumsum(-1) - 1).clamp(min=0)  # which of the kept each token belongs to
        counts = torch.zeros(kept_idx.shape, device=k.device).scatter_add_(2, of, torch.ones(of.shape, device=k.device))
        return Kept(*(_means(each, of, counts) for each in (k, v)), counts.clamp(min=1))


def _means(tensor, of, counts):
    sums = torch.zeros(*counts.shape, tensor.shape[-1], device=tensor.device)
    sums.scatter_add_(2, of[..., None].expand_as(tensor), tensor.float())
    return sums / counts[..., None].clamp(min=1)


def _heights(looks, clip, present):
    """How late each token is joined to what stands before it, the first of a clip never: float32 [audio].

    Ward's way: of all pairs of neighbouring groups those are joined whose joining adds least to the squared distances of
    tokens from their group's mean. In a round every pair is joined that is the best for both of its groups."""
    count = int(present.sum())
    heights = looks.new_full((looks.shape[0],), 4.0e6)
    first = torch.arange(count, device=looks.device)  # of each group
    mean, size, of = looks[:count], looks.new_ones(count), clip[:count]
    for turn in range(64 * 16):
        if len(first) < 2:
            break
        cost = (mean[1:] - mean[:-1]).square().sum(-1) * size[1:] * size[:-1] / (size[1:] + size[:-1])
        cost = cost.masked_fill(of[1:] != of[:-1], torch.inf)
        before = torch.nn.functional.pad(cost[:-1], (1, 0), value=torch.inf)
        after = torch.nn.functional.pad(cost[1:], (0, 1), value=torch.inf)
        joins = (cost < before) & (cost <= after) & cost.isfinite()
        if not bool(joins.any()):
            break
        # The cheaper half only, so that a good pair of later rounds comes before a poor one of this.
        joins &= cost <= cost[joins].median()
        left = joins.nonzero()[:, 0]
        order = cost[left].argsort(stable=True).argsort(stable=True)
        heights[first[left + 1]] = turn * 1000.0 + order / len(order)
        together = (size[left] + size[left + 1])[:, None]
        mean = mean.clone()
        mean[left] = (mean[left] * size[left, None] + mean[left + 1] * size[left + 1, None]) / together
        size = size.clone()
        size[left] = together[:, 0]
        stays = torch.ones(len(first), dtype=torch.bool, device=first.device)
        stays[left + 1] = False
        first, mean, size, of = first[stays], mean[stays], size[stays], of[stays]
    return heights
