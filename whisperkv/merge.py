"""Neighbours among the frames that sound alike become one, on their way through the encoder."""

import torch

from .trim import Kept

AFTER = 0.4  # of the encoder's layers. Later, less time is saved; earlier, likelihood drops: see benchmarks/merging.py


def merging_layer(layers):
    """The one of so many before which frames are merged."""
    return round(AFTER * layers)


def merged(states, kept, share):
    """The states of fewer frames, [audios, most, width] as before, and the Kept frames that they are of.

    Frames 2i and 2i + 1 make a pair, if both are kept and stand for themselves alone. In each audio that share of its
    pairs, the most alike by the cosine of their states (of equal ones the first), become their average, which counts
    twice. An audio that holds anything but numbers is kept whole.
    """
    places, alone = kept.places, kept.counts == 1
    is_own = torch.arange(places.shape[1], device=places.device) < kept.lengths[:, None]
    is_pair = (places[:, :-1] % 2 == 0) & (alone & is_own)[:, 1:] & alone[:, :-1]  # each with the one that follows
    sizes = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
    alike = (states[:, :-1].float() * states[:, 1:].float()).sum(-1) / (sizes[:, :-1] * sizes[:, 1:]).clamp(min=1e-12)
    are_numbers = (alike.isfinite() | ~is_own[:, 1:]).all(-1, keepdim=True)
    order = alike.masked_fill(~is_pair, -torch.inf).argsort(descending=True, stable=True)
    most = (is_pair.sum(-1, keepdim=True).double() * share).floor()
    merge = (order.argsort() < most) & are_numbers

    gone = torch.zeros_like(kept.of_all, dtype=torch.bool).scatter(1, places[:, 1:], merge)
    fewer = Kept.of(kept.keep & ~gone)
    first = kept.of_all.gather(1, fewer.places)
    second = first + torch.nn.functional.pad(merge, (0, 1)).gather(1, first)  # itself, if it is not merged
    one, other = (states.gather(1, each[..., None].expand(-1, -1, states.shape[-1])) for each in (first, second))
    return one.mul_(0.5).add_(other, alpha=0.5), fewer
