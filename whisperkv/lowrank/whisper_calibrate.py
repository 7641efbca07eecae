"""calibrate(): what the low-rank caches of a Whisper need to know of it, found by letting it transcribe some audio."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..calibration import KIND, MOST_BITS, VERSION, by_head, fingerprint, rank_of, shape_of
from .whisper_listening import FRAMES, Listening, check_model, windows_of

MOST = 1 << 13  # frames of which is found what codes lose
SIZES = 40  # of steps that are tried
LEAST = 1e-6  # of the largest cost: below, a direction counts for as much
SPREAD = 1e-4  # of what states vary on average: so much they do in every direction


@torch.no_grad()
def calibrate(
    model: Any,
    audio: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    keep: float = 0.5,
    verbose: bool = True,
) -> Path:
    """Write the calibration file of a Whisper, and return its path. The model stays as it is.

    model    a WhisperForConditionalGeneration, unpatched
    audio    recordings like those that will be transcribed: a list of mono samples at 16 kHz, or of files' names. Some
             ten minutes of several speakers do. Longer ones are cut into windows of 30 seconds
    path     where to write: a safetensors file
    keep     up to which `keep` of EvictionConfig the file will serve, 0.5 at most. Large models may want less, for a
             smaller file
    verbose  show a progress bar

        whisperkv.lowrank.calibrate(model, recordings, "base.safetensors")
        whisperkv.patch(model, EvictionConfig(policy="all", keep=0.25, calibration="base.safetensors"),
                        CrossConfig("latent_int3", calibration="base.safetensors"))
    """
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import WhisperFeatureExtractor

    check_model(model)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 0.5:
        raise ValueError(f"keep must be above 0 and up to 0.5, got {keep!r}")
    seconds = model.config.max_source_positions // FRAMES
    windows, path = windows_of(audio, seconds), Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {path.parent}")
    decoder, width = model.get_decoder(), model.config.d_model
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds)
    like, training = decoder.embed_tokens.weight, model.training
    listening, frames = Listening(model), Frames(width, len(windows) * model.config.max_source_positions)
    states = [Moments(width) for _ in decoder.layers]
    try:
        model.eval()
        for window in tqdm(windows, unit="window", disable=not verbose):
            features = extractor(window, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features[0]
            listening.hear(
                model, features.to(like.device, like.dtype), frames.add, lambda index, x: states[index].add(x)
            )
    finally:
        model.train(training)
    tensors = {
        "fingerprint": fingerprint(decoder),
        **of_cross_attention(frames, listening.cross),
        **of_self_attention(states, listening.own, min(rank_of(keep, width), width)),
    }
    about = {"kind": KIND, "version": str(VERSION), "shape": json.dumps(shape_of(decoder))}
    partial = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, about)
    os.replace(partial, path)
    return path


class Moments:
    """Mean and covariance of states [n, width], in float64."""

    def __init__(self, width):
        self.count, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x):
        x = x.double().cpu()
        self.count, self.sum, self.squares = self.count + len(x), self.sum + x.sum(0), self.squares + x.T @ x

    @property
    def mean(self):
        return self.sum / self.count

    @property
    def covariance(self):
        return self.squares / self.count - torch.outer(self.mean, self.mean)


class Frames(Moments):
    """The same of the encoder's output, of which some frames are kept."""

    def __init__(self, width, expected):
        super().__init__(width)
        self.every, self.some = max(expected // MOST, 1), []

    def add(self, x):
        super().add(x)
        self.some.append(x[:: self.every].float().cpu())


def root_of(matrix):
    """The symmetric square roots of a positive matrix and of its inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = values.clamp(min=LEAST * float(values.amax())).sqrt()[..., None, :]
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


def of_cross_attention(frames, readings):
    """The basis of the encoder's output, its channels in order of what they cost when they are lost."""
    width, cost = len(frames.mean), 0
    for reading in readings:
        attention, costs = reading.attention, reading.costs / reading.queries
        for project, its in zip((attention.k_proj, attention.v_proj), costs):
            weight = project.weight.detach().double().cpu().view(len(its), -1, width)
            cost = cost + torch.einsum("hdw,hde,hev->wv", weight, its, weight)
    # The cost is an estimate over few queries. Its square root, between it and none at all, is better than either.
    root, inverse = root_of(root_of(cost / cost.diagonal().mean())[0])
    values, vectors = torch.linalg.eigh(root @ frames.covariance @ root)
    vectors = vectors.flip(1)
    there, back, mean = root @ vectors, vectors.T @ inverse, frames.mean
    some = (torch.cat(frames.some) - mean.float()) @ there.float()
    named = {"mean": mean, "there": there, "back": back, "errors": errors_of(some)}
    return {f"cross.{name}": tensor.float() for name, tensor in named.items()}


def errors_of(x):
    """Of x [frames, channels]: what the best codes of each number of bits lose, float32 [MOST_BITS + 1, channels]."""
    low, high, deviation = x.amin(0), x.amax(0), x.std(0, correction=0)
    middle = (low + high) / 2
    errors = torch.full((MOST_BITS + 1, x.shape[1]), torch.inf)
    errors[0] = x.square().mean(0)
    for bits in range(1, MOST_BITS + 1):
        levels = 2**bits - 1
        for share in torch.linspace(0.05, 1, SIZES):
            half = torch.maximum((high - low) / 2 * share, deviation * 1e-3).clamp(min=1e-12)
            step, least = 2 * half / levels, middle * share - half
            error = (((x - least) / step).round_().clamp_(0, levels) * step + least).sub_(x).square_().mean(0)
            errors[bits] = torch.minimum(errors[bits], error)
    return errors


def of_self_attention(states, readings, rank):
    """Of each layer the directions of [keys; values] that cost most when they are lost."""
    means, bases, deviations, roots, inverses = [], [], [], [], []
    for moments, reading in zip(states, readings):
        attention = reading.attention
        weights = [project.weight.detach().double().cpu() for project in (attention.k_proj, attention.v_proj)]
        both, width = torch.cat(weights), weights[0].shape[1]
        root, inverse = root_of(reading.costs / reading.queries)  # [2, heads, head_dim, head_dim]
        weighed = by_head(root, both)
        covariance = moments.covariance  # and a little in all directions: full rank must be all there is
        spread = torch.linalg.eigh(covariance + SPREAD * covariance.diagonal().mean() * torch.eye(width))
        half = spread.eigenvectors * spread.eigenvalues.clamp(min=0).sqrt()
        directions = torch.linalg.svd(weighed @ half, full_matrices=False)
        bases.append(directions.U[:, :rank])
        deviations.append(directions.S)
        means.append(moments.mean)
        roots.append(root)
        inverses.append(inverse)
    named = {"mean": means, "basis": bases, "deviations": deviations, "root": roots, "inverse": inverses}
    return {f"self.{name}": torch.stack(tensors).float() for name, tensors in named.items()}
