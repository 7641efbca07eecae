"""Latents as codes of a few bits: static steps for each channel, and more bits where a channel varies more."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import record

STEPS = (0.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)  # of a normal number, by bits (Max, 1960)
MOST = 8
TRIED = torch.linspace(0.6, 2.4, 19).tolist()  # multiples of these


def allot(variances, bits):
    """Bits of each channel, 0 to 8 and `bits` on average: one after another to the channel that errs most."""
    errors = variances.double().clamp(min=0).tolist()
    widths = [0] * len(errors)
    for _ in range(int(round(bits * len(errors)))):
        open_ones = [number for number, width in enumerate(widths) if width < MOST]
        worst = max(open_ones, key=lambda number: errors[number])
        widths[worst] += 1
        errors[worst] /= 4
    return widths


class Codes(nn.Module):
    """Bytes of latents, [..., bytes] of [..., width], and back.

    turn    [width, width]: to channels that do not vary together and whose errors cost alike
    back    the inverse
    centre  [width], of latents; low and step [width]: a channel's code c stands for low + c * step
    """

    def __init__(self, widths):
        super().__init__()
        self.widths = list(widths)
        width = len(widths)
        self.bytes = -(-sum(widths) // 8)
        for name, shape in (("turn", (width, width)), ("back", (width, width)), ("centre", width), ("low", width),
                            ("step", width)):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))
        channels = torch.tensor([channel for channel, bits in enumerate(widths) for _ in range(bits)])
        places = torch.tensor([place for bits in widths for place in range(bits)])
        self.register_buffer("channels", channels, persistent=False)  # of each bit, in order
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("most", torch.tensor([2**bits - 1 for bits in widths]), persistent=False)

    def _apply(self, function, recurse=True):
        """The steps stay float32 whatever a model's dtype becomes."""
        kept = {name: getattr(self, name) for name in ("turn", "back", "centre", "low", "step")}
        super()._apply(function, recurse)
        for name, was in kept.items():
            now = getattr(self, name)
            if now.dtype != torch.float32 and not was.is_meta:
                setattr(self, name, was.to(now.device))
        return self

    def codes_of(self, latent):
        turned = (latent.float() - self.centre) @ self.turn.T
        codes = ((turned - self.low) / self.step).round()
        return codes.clamp(min=0).minimum(self.most).to(torch.int32)

    def latents_of(self, codes):
        return (self.low + codes * self.step) @ self.back.T + self.centre

    def encode(self, latent):
        bits = (self.codes_of(latent)[..., self.channels] >> self.places) & 1
        bits = nn.functional.pad(bits, (0, 8 * self.bytes - bits.shape[-1])).unflatten(-1, (self.bytes, 8))
        weights = 2 ** torch.arange(8, dtype=torch.int32, device=bits.device)
        return (bits * weights).sum(-1).to(torch.uint8)

    def decode(self, stored):
        bits = (stored[..., None].to(torch.int32) >> torch.arange(8, device=stored.device)) & 1
        bits = bits.flatten(-2)[..., : len(self.channels)]
        codes = torch.zeros(*stored.shape[:-1], len(self.widths), dtype=torch.int32, device=stored.device)
        return self.latents_of(codes.index_add_(-1, self.channels, (bits << self.places).to(torch.int32)))

    def round_trip(self, latent):
        """What will be read of latents; gradients pass as if it were they."""
        held = self.latents_of(self.codes_of(latent)).to(latent.dtype)
        return latent + (held - latent).detach()

    @classmethod
    def of(cls, mean, covariance, metric, samples, bits):
        """For latents with this mean and covariance, of which an error e costs e' metric e; samples [some, width]."""
        width = len(mean)
        metric = (metric + metric.T) / 2
        metric = metric + 1e-6 * metric.diagonal().mean() * torch.eye(width, dtype=metric.dtype, device=metric.device)
        root = torch.linalg.cholesky(metric)
        variances, vectors = torch.linalg.eigh(root.T @ covariance @ root)
        vectors = vectors.flip(1)
        variances = variances.flip(0).clamp(min=0)
        codes = cls(allot(variances, bits)).to(mean.device)
        codes.turn.copy_(vectors.T @ root.T)
        codes.back.copy_(torch.linalg.solve_triangular(root.T, vectors, upper=True))
        codes.centre.copy_(mean)
        turned = (samples.to(mean) - mean) @ (vectors.T @ root.T).T
        unit = variances.sqrt() * torch.tensor(STEPS, dtype=mean.dtype, device=mean.device)[codes.widths]
        unit = unit.clamp(min=1e-12)
        most = codes.most.double()
        best = torch.full_like(unit, torch.inf)
        for factor in TRIED:
            step = unit * factor
            low = -step * most / 2
            error = (((turned - low) / step).round().clamp(min=0).minimum(most) * step + low - turned).square().mean(0)
            codes.step.copy_(torch.where(error < best, step, codes.step.double()))
            best = error.minimum(best)
        codes.low.copy_(-codes.step * codes.most / 2)
        return codes

    def extra_repr(self):
        return f"{sum(self.widths)} bits for {len(self.widths)} numbers, {min(self.widths)} to {max(self.widths)} each"


def check_bits(bits):
    if bits not in record.BITS or isinstance(bits, bool):
        raise ValueError(f"cache_bits must be {', '.join(map(str, record.BITS))} or None; got {bits!r}")


def quantize_latents(
    model: Any, bits: int | None, calibration: Iterable[Any] | str | None = None, tokenizer: Any = None,
    num_calibration_samples: int = 128, max_calibration_length: int = 512,
) -> Any:  # fmt: skip
    """Let the cache of a converted model hold codes of `bits` bits a number (8, 4, 3, 2), or its numbers again (None).

    Steps are fixed, from a calibration text as convert_to_mla() takes one: call this again after training.
    """
    from . import calibrating

    of = record.record_of(model)
    if bits is None:
        calibrating.drop_codes(model, of)
        return model
    check_bits(bits)
    calibrating.set_codes(model, of, bits, calibration, tokenizer, num_calibration_samples, max_calibration_length)
    return model
