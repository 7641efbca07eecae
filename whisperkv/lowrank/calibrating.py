"""From what was seen on a text to the matrices and the codes of each layer."""

import torch

from . import calibration, factorize
from .architectures import architecture
from .codes import Codes

RIDGE = 1e-4  # of the inputs' variance, in all directions: a text does not show everything


def groups_of(layers):
    """{layer: its group, or None where its latents are of its own inputs}"""
    return {number: each.group if each.is_shared else None for number, each in layers.items()}


class Ground:
    """What is known of a layer's keys and values: mean, covariance, and what an error of each costs."""

    def __init__(self, architecture, attention, rotary, seen, turned):
        self.architecture, self.attention, self.rotary, self.seen = architecture, attention, rotary, seen
        (key_weight, self.key_bias), (value_weight, self.value_bias) = architecture.projections(attention)
        self.weights = key_weight.double(), value_weight.double()
        hidden, device = key_weight.shape[1], key_weight.device
        if seen is None:
            self.mean = torch.zeros(hidden, dtype=torch.float64, device=device)
            self.inputs = torch.eye(hidden, dtype=torch.float64, device=device)
        else:
            self.mean, covariance = seen.mean, seen.covariance
            unseen = RIDGE * covariance.diagonal().mean() * torch.eye(hidden, dtype=torch.float64, device=device)
            self.inputs = covariance + unseen
        self.means = tuple(weight @ self.mean for weight in self.weights)
        self.turns = None
        if turned is not None:
            _, _, dim = architecture.heads(attention)
            self.turns = turns_of(factorize.turned_pairs(
                architecture, attention, rotary, self.queries, self.key_moment, turned
            ), dim)  # fmt: skip

    @property
    def queries(self):
        if self.seen is not None:
            return self.seen.queries
        heads, _, dim = self.architecture.heads(self.attention)
        return torch.eye(dim, dtype=torch.float64, device=self.mean.device).expand(heads, dim, dim)

    @property
    def key_moment(self):
        """The second moment of keys, bias included."""
        whole = self.means[0] if self.key_bias is None else self.means[0] + self.key_bias.detach().double()
        return self.covariance(0) + torch.outer(whole, whole)

    def covariance(self, which):
        return self.weights[which] @ self.inputs @ self.weights[which].T

    def metrics(self):
        if self.seen is None:
            return tuple(factorize.plain_metric(self.covariance(which)) for which in (0, 1))
        keys = factorize.key_metric(
            self.architecture, self.attention, self.rotary, self.queries, self.key_moment, self.turns
        )
        return keys, factorize.value_metric(self.architecture, self.attention, self.covariance(1))

    def spectra(self):
        return tuple(factorize.spectrum(self.covariance(which), metric) for which, metric in enumerate(self.metrics()))

    def together(self):
        """(second moment, metric) of keys and values as one."""
        weight = torch.cat(self.weights)
        return weight @ self.inputs @ weight.T, torch.block_diag(*self.metrics())


class SharedGround(Ground):
    """The same of a layer of a group, whose keys and values were seen themselves."""

    def __init__(self, architecture, attention, rotary, seen, group, number):
        super().__init__(architecture, attention, rotary, None, None)
        whole, self.seen = seen[group[0]], seen[number]
        dim = self.weights[0].shape[0]
        begin = 2 * dim * group.index(number)
        self.rows = slice(begin, begin + dim), slice(begin + dim, begin + 2 * dim)
        self.covariances = tuple(whole.covariance[rows, rows] for rows in self.rows)
        self.moment = whole.second[self.rows[0], self.rows[0]]

    @property
    def key_moment(self):
        return self.moment

    def covariance(self, which):
        return self.covariances[which]


def turns_of(pairs, dim):
    """Which channels of a head belong to these pairs."""
    turns = torch.zeros(dim, dtype=torch.bool)
    turns[pairs] = True
    return turns | turns.roll(dim // 2)


def fill(factors, ground, bases):
    """Set the matrices of a layer whose latents are of its own inputs: bases of keys and values, or one of both."""
    means = ground.means
    if factors.kind == "separate":
        down = torch.cat([basis.encode @ weight for basis, weight in zip(bases, ground.weights)])
        factors.up_keys.copy_(bases[0].up)
        factors.up_values.copy_(bases[1].up)
        rest = [mean - basis.up @ (basis.encode @ mean) for basis, mean in zip(bases, means)]
    else:
        (basis,), both = bases, torch.cat(means)
        down = basis.encode @ torch.cat(ground.weights)
        factors.up.copy_(basis.up)
        rest = (both - basis.up @ (basis.encode @ both)).split(factors.dim)
    factors.down.copy_(down)
    for buffer, missing, bias in zip(
        (factors.bias_keys, factors.bias_values), rest, (ground.key_bias, ground.value_bias)
    ):
        buffer.copy_(missing if bias is None else missing + bias.detach())


def fill_shared(group, grounds, moment, mean, width):
    """Set the matrices of a group that shares latents, of which the moments of all keys and values are known."""
    metric = torch.block_diag(*(each for ground in grounds for each in ground.metrics()))
    basis = factorize.spectrum(moment, metric).cut(width)
    rest = mean - basis.up @ (basis.encode @ mean)
    for factors in group:
        rows = slice(factors.row, factors.row + 2 * factors.dim)
        factors.up.copy_(basis.up)
        factors.down.copy_(basis.encode[:, rows])
        for buffer, missing in zip((factors.bias_keys, factors.bias_values), rest[rows].split(factors.dim)):
            buffer.copy_(missing)


def shared_moments(grounds, seen):
    """(second moment, mean) of all keys and values of a group; without a text, as if all layers had the same input."""
    weight = torch.cat([each for ground in grounds for each in ground.weights])
    if seen is not None:
        unseen = torch.block_diag(*(both @ both.T for both in (torch.cat(ground.weights) for ground in grounds)))
        covariance = seen.covariance
        return covariance + RIDGE * covariance.trace() / unseen.trace() * unseen, seen.mean
    biases = [bias for ground in grounds for bias in (ground.key_bias, ground.value_bias)]
    zeros = grounds[0].means[0]
    return weight @ weight.T, torch.cat([zeros if bias is None else bias.detach().double() for bias in biases])


@torch.no_grad()
def set_codes(model, record, bits, given, tokenizer, count, length):
    rows = calibration.token_rows(given, tokenizer, count, length)
    kind = architecture(record.architecture)
    attentions = kind.attentions(model)
    drop_codes(model, record)
    seen = calibration.collect(model, kind, rows, groups_of(record.layers))
    for number, latents in record.layers.items():
        if latents.is_shared and number != latents.group[0]:
            continue
        members = latents.group if latents.is_shared else [number]
        factors = attentions[number].factors
        metric = latent_metric(kind, attentions, members, seen, factors)
        if latents.is_shared:
            down = torch.cat([attentions[each].factors.down for each in members], 1).double()
        else:
            down = factors.down.double()
        own = seen[number]
        codes = Codes.of(
            down @ own.mean, down @ own.covariance @ down.T, metric, own.samples.double() @ down.T, bits
        )  # fmt: skip
        for each in members:
            attentions[each].factors.codes = codes
            record.layers[each].widths = codes.widths


def latent_metric(kind, attentions, members, seen, factors):
    """What an error of a latent costs, by what it does to the keys and values of all that read it."""
    total = 0
    for number in members:
        attention = attentions[number]
        own = attention.factors
        inputs = seen[members[0]]
        if own.kind == "shared":
            rows = slice(own.row, own.row + 2 * own.dim)
            moments = inputs.second[rows, rows], inputs.covariance[rows, rows]
            ups = own.up[rows].double()
            keys, values = ups[: own.dim], ups[own.dim :]
            key_moment, value_covariance = moments[0][: own.dim, : own.dim], moments[1][own.dim :, own.dim :]
        else:
            down = own.down.double()
            of_keys, of_values = own.parts(down.T)
            keys, values = own.of_keys.double(), own.of_values.double()
            key_mean = keys @ (of_keys.T @ inputs.mean) + own.bias_keys.double()
            covariance = keys @ of_keys.T @ inputs.covariance @ of_keys @ keys.T
            key_moment = covariance + torch.outer(key_mean, key_mean)
            value_covariance = values @ of_values.T @ inputs.covariance @ of_values @ values.T
        asked = factorize.key_metric(
            kind, attention, attention.rotary, seen[number].queries, key_moment, attention.turns
        )
        read = factorize.value_metric(kind, attention, value_covariance)
        of_keys, of_values = keys.T @ asked @ keys, values.T @ read @ values
        total = total + (torch.block_diag(of_keys, of_values) if own.kind == "separate" else of_keys + of_values)
    return total


def drop_codes(model, record):
    attentions = architecture(record.architecture).attentions(model)
    for number, latents in record.layers.items():
        attentions[number].factors.codes = latents.widths = None
