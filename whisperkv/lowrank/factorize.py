"""Which few numbers of a token's keys and values matter: by what layers are given, what asks and what is read."""

from dataclasses import dataclass

import torch

from .attention import rotated

RIDGE = 1e-3  # of a metric's mean: so that it has an inverse
DISTANCES = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)  # between a query and a key, as they are met with


@dataclass
class Basis:
    """Keys or values (or both) are up @ latent, and a latent is encode @ them."""

    up: torch.Tensor  # [dim, width], orthonormal
    encode: torch.Tensor  # [width, dim]


@dataclass
class Spectrum:
    """The directions of keys or values, those first whose loss costs most."""

    costs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def cut(self, width):
        up, across = torch.linalg.qr(self.left[:, :width])
        return Basis(up, across @ self.right[:width])


def roots(metric):
    """The square root of a metric, and that one's inverse."""
    metric = (metric + metric.T) / 2
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=0) + RIDGE * values.mean().clamp(min=1e-30)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def spectrum(moment, metric):
    """Of keys or values whose second moment is given: an error e of them costs e' metric e."""
    root, inverse = roots(metric)
    whitened = root @ moment @ root
    costs, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    vectors = vectors.flip(1)
    return Spectrum(costs.flip(0).clamp(min=0), inverse @ vectors, vectors.T @ root)


def split(first, second, width):
    """How many of `width` numbers go to each of two spectra, whose costs are in one unit."""
    both = torch.cat([first.costs, second.costs])
    best = both.argsort(descending=True, stable=True)[:width]
    ours = int((best < len(first.costs)).sum())
    least = max(1, width - len(second.costs))
    ours = min(max(ours, least), width - 1, len(first.costs))
    return ours, width - ours


def turnings(rotary, dim, turns):
    """[distances, head_dim, head_dim]: a query that is turned by each distance is query @ turning."""
    if rotary is None:
        return torch.eye(dim, dtype=torch.float64)[None]
    device = rotary.inv_freq.device
    distances = torch.tensor(DISTANCES, device=device)[:, None]
    cos, sin = (each.double() for each in rotary(torch.zeros(1, device=device), distances))  # [distances, 1, head_dim]
    if turns is not None:
        turns = turns.to(device)
        cos, sin = torch.where(turns, cos, rotary.attention_scaling), sin.masked_fill(~turns, 0)
    own = torch.eye(dim, dtype=torch.float64, device=device).expand(len(cos), 1, dim, dim)
    return rotated(own, (cos.expand(-1, dim, -1), sin.expand(-1, dim, -1)))[:, 0] * rotary.attention_scaling


def key_metric(architecture, attention, rotary, queries, moment, turns):
    """[kv_heads * head_dim] squared: an error e of a key costs e' metric e, the square of the error of a logit, as the
    mean over heads."""
    heads, kv_heads, dim = architecture.heads(attention)
    turning = turnings(rotary, dim, turns).to(queries.device)
    asked = torch.einsum("nij,hik,nkl->hjl", turning, queries, turning) / len(turning)
    asked = asked.view(kv_heads, -1, dim, dim).sum(1) * (attention.scaling**2 / heads)
    norm = architecture.key_norm(attention)
    if norm is not None:
        gain = norm.weight.detach().double().to(queries.device)
        sizes = moment.diagonal().view(kv_heads, dim).mean(-1)
        asked = asked * torch.outer(gain, gain) / sizes[:, None, None]
    return torch.block_diag(*asked)


def value_metric(architecture, attention, covariance):
    """The same of values: the share of what the layer writes that is lost."""
    heads, kv_heads, dim = architecture.heads(attention)
    output = architecture.output(attention).double().to(covariance.device)
    read = output.T.view(heads, dim, -1)
    read = (read @ read.transpose(1, 2)).view(kv_heads, -1, dim, dim).sum(1)
    metric = torch.block_diag(*read)
    return metric / (metric * covariance).sum().clamp(min=1e-30)


def plain_metric(moment):
    """Where nothing is known of what asks and reads: the share of the numbers' energy that is lost."""
    return torch.eye(len(moment), dtype=torch.float64, device=moment.device) / moment.trace().clamp(min=1e-30)


def turned_pairs(architecture, attention, rotary, queries, moment, count):
    """Of each head's rotary pairs the `count` that suffer most if they are no longer rotated."""
    _, kv_heads, dim = architecture.heads(attention)
    half = dim // 2
    angles = rotary.inv_freq.detach().double()[:, None] * torch.tensor(DISTANCES, device=rotary.inv_freq.device)
    moved = (1 - angles.cos()).mean(-1)[:half]
    asked = queries.diagonal(dim1=1, dim2=2).sum(0)
    held = moment.diagonal().view(kv_heads, dim).sum(0)
    cost = (asked[:half] + asked[half:]) * (held[:half] + held[half:]) * moved.to(asked.device)
    return sorted(cost.argsort(descending=True, stable=True)[:count].tolist())
