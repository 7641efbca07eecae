"""What low-rank caches need to know of a model: read from the file that whisperkv.lowrank.calibrate() writes.

Of the encoder's output, a basis in which its channels are sorted by what they say, and for each number of bits what
codes of so many lose. Of the self-attention of each layer, the directions in which a token's keys
and values vary, the most telling ones first. Any number of bits and any rank comes from the same file.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch

from . import ops
from .mixed import tile_bytes
from .weights import Packed, transpose_heads

KIND, VERSION = "whisperkv.lowrank", 1
REMEDY = "whisperkv.lowrank.calibrate(model, audio, path) writes one"
MOST_BITS = 8
RANKS = 16  # ranks are multiples of this
SAMPLES = 64  # of a matrix, to tell models apart
CLOSE = 0.01  # what a matrix loses in bfloat16 is below this part of it


def shape_of(decoder):
    config = decoder.config
    return {
        "d_model": config.d_model,
        "decoder_layers": len(decoder.layers),
        "decoder_attention_heads": config.decoder_attention_heads,
    }


def fingerprint(decoder):
    """float32 [layers, 4, SAMPLES]: a few numbers of the matrices that a calibration is about."""
    samples = []
    for layer in decoder.layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            for project in (attention.k_proj, attention.v_proj):
                numbers = project.weight.detach().flatten()
                places = torch.linspace(0, len(numbers) - 1, SAMPLES, dtype=torch.float64).long()
                samples.append(numbers[places.to(numbers.device)].float().cpu())
    return torch.stack(samples).view(len(decoder.layers), 4, SAMPLES)


def rank_of(keep, width):
    """How many numbers a token takes in a layer, where keys and values have 2 * width."""
    return max(round(keep * 2 * width / RANKS), 1) * RANKS


def by_head(matrices, x):
    """[2, heads, head_dim, head_dim] times keys and values, x [2 * width, n]."""
    return (matrices @ x.view(*matrices.shape[:3], -1)).view(x.shape)


def state_of(*weights):
    """What changes when they do."""
    some = [each for each in weights if each is not None]
    return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in some]


class Calibration:
    """The tensors of a file, known to be of this decoder. `field` is the setting that named it, for the errors."""

    def __init__(self, path, decoder, field):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{field}={os.fspath(path)!r}: no such file; {REMEDY}")
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{field}={os.fspath(path)!r} cannot be read ({error}); {REMEDY}") from None
        if about.get("kind") != KIND or about.get("version") != str(VERSION):
            found = f"{about.get('kind')} {about.get('version')}" if "kind" in about else "something else"
            raise ValueError(f"{field}={os.fspath(path)!r} is no {KIND} {VERSION} file, but {found}; {REMEDY}")
        its, ours = json.loads(about["shape"]), shape_of(decoder)
        same = its == ours
        if same:
            one, other = self.tensors["fingerprint"], fingerprint(decoder)
            same = bool(((one - other).abs() <= CLOSE * one.abs() + 1e-4 * one.abs().amax(-1, keepdim=True)).all())
        if not same:
            of = "other weights" if its == ours else f"a model of {its}, and this one is {ours}"
            raise ValueError(f"{field}={os.fspath(path)!r} was calibrated on {of}; {REMEDY} for this model")

    def codes(self, bits):
        return Codes(self.tensors, bits)

    def low_rank(self, decoder, keep, field):
        """A LowRank a layer."""
        rank, most = rank_of(keep, decoder.config.d_model), self.tensors["self.basis"].shape[-1]
        if rank > most:
            share = most / (2 * decoder.config.d_model)
            raise ValueError(
                f"{field}={keep!r} is rank {rank}, and {self.path.name} was calibrated up to {most}: use {share:g} or "
                "less, or calibrate(..., keep=) with more"
            )
        return [LowRank(self.tensors, index, rank) for index in range(len(decoder.layers))]


def bits_of_blocks(errors, budget):
    """int [blocks]: bits of each, that lose least and are `budget` together. errors: float [MOST_BITS + 1, blocks]."""
    bits, left, errors = [0] * errors.shape[1], budget, errors.T.tolist()
    while left:
        # of each block the step down that pays most for a bit, be it over several bits
        steps = [
            ((its[now] - its[more]) / (more - now), block, more)
            for block, (its, now) in enumerate(zip(errors, bits))
            for more in range(now + 1, min(now + left, MOST_BITS) + 1)
        ]
        if not steps:
            break
        _, block, more = max(steps)
        left -= more - bits[block]
        bits[block] = more
    return bits


class Codes:
    """How the encoder's output becomes codes of so many bits on average, and what layers make of it.

    bits    float32 [channels], see mixed.py. Channels that are worth no bit are not there
    places  int64 [channels]: which of all channels they are
    """

    def __init__(self, tensors, bits):
        width = len(tensors["cross.mean"])
        blocks = width // ops.CHANNELS
        errors = tensors["cross.errors"].view(MOST_BITS + 1, blocks, -1).sum(-1)
        of_blocks = torch.tensor(bits_of_blocks(errors, bits * blocks))
        order = of_blocks.argsort(descending=True, stable=True)
        channels = (order[:, None] * ops.CHANNELS + torch.arange(ops.CHANNELS)).flatten()
        its = of_blocks[order].repeat_interleave(ops.CHANNELS)
        channels, its = channels[its > 0], its[its > 0]
        self.bits, self.places = its.float(), channels
        self.mean = tensors["cross.mean"]
        self._there = tensors["cross.there"][:, channels].contiguous()  # [width, channels]
        self._back = tensors["cross.back"][channels].contiguous()  # [channels, width]
        self._packed, self._biases = {}, {}

    @property
    def channels(self):
        return len(self.bits)

    @property
    def tile_bytes(self):
        return tile_bytes(self.bits)

    @property
    def nbytes(self):
        own = self.bits, self.mean, self._there, self._back, *(bias for _, bias in self._biases.values())
        return sum(each.nbytes for each in own) + sum(each.nbytes for both in self._packed.values() for each in both)

    def rotated(self, states):
        """float32 [audios, frames, channels]"""
        device = states.device
        return (states.float() - self.mean.to(device)) @ self._there.to(device)

    def restored(self, frames):
        """float32 [audios, frames, width]"""
        return frames @ self._back.to(frames.device) + self.mean.to(frames.device)

    def packed(self, attention, format=ops.AS_FLOAT32):
        """Of a layer's weights, in this basis: the Packed of its keys' [heads * channels, head_dim], what each head's
        query is multiplied with, and of its values' [width, channels]."""
        key = attention.layer_idx, format
        if key not in self._packed:
            layouts = partial(transpose_heads, attention.num_heads), None
            self._packed[key] = [Packed(format, partial(_rotate, self._back, layout)) for layout in layouts]
        return self._packed[key]

    def weights(self, attention):
        """Of a layer's keys [heads, head_dim, channels] and values [width, channels], and the bias of its values."""
        linears = attention.k_proj, attention.v_proj
        key, value = (packed.of(linear.weight) for packed, linear in zip(self.packed(attention), linears))
        key = key.unflatten(0, (attention.num_heads, -1)).transpose(1, 2)
        return key, value, self.bias(attention)

    def bias(self, attention):
        """That of the values with what the mean, which is in no frame, adds to all of them."""
        project, index = attention.v_proj, attention.layer_idx
        found = state_of(project.weight, project.bias)
        if index not in self._biases or self._biases[index][0] != found:
            weight = project.weight.detach()
            bias = weight.float() @ self.mean.to(weight.device)
            bias = bias if project.bias is None else bias + project.bias.detach().float()
            self._biases[index] = found, bias.to(weight.dtype)
        return self._biases[index][1]


def _rotate(back, layout, weight):
    rotated = (weight.float() @ back.to(weight.device).T).to(weight.dtype)
    return rotated if layout is None else layout(rotated)


class LowRank:
    """What one layer's self-attention keeps of a token: `rank` numbers, of which keys and values are made.

    down, down_bias  [rank, width], [rank]: of a state
    up               for keys and for values [heads, head_dim, rank]
    offset           of both [heads, head_dim], the same for every token; that of the values is the output's bias
    """

    def __init__(self, tensors, index, rank):
        self.rank = rank
        self._mean, self._basis = tensors["self.mean"][index].clone(), tensors["self.basis"][index][:, :rank].clone()
        trained = tensors.get("self.back")  # MLATrainer's: what was found by a calibration goes back the way it came
        self._back = self._basis if trained is None else trained[index][:, :rank].clone()
        self._root, self._inverse = tensors["self.root"][index].clone(), tensors["self.inverse"][index].clone()
        self._of, self._packed = None, {}

    @property
    def nbytes(self):
        held = [self._mean, self._basis, self._back, self._root, self._inverse]
        if self._of is not None:
            held += self.down, self.down_bias, self.up, self.offset
            held += [tensor for made in self._packed.values() for tensor in made]
        storages = [tensor.untyped_storage() for tensor in held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def follow(self, attention):
        """Make all of the layer's weights as they are now."""
        weights = attention.k_proj.weight, attention.v_proj.weight
        found = state_of(*weights)
        if self._of == found:
            return self
        with torch.no_grad(), torch.inference_mode(False):
            self._make(attention, [weight.detach().clone() for weight in weights])
        self._of, self._packed = found, {}
        return self

    def _make(self, attention, weights):
        like, heads = weights[0], attention.num_heads
        width = like.shape[1]
        both = torch.stack([weight.double().cpu() for weight in weights])  # [2, width, width]
        down = self._basis.double().T @ by_head(self._root.double(), both.flatten(0, 1))
        up = by_head(self._inverse.double(), self._back.double()).view(2, heads, width // heads, self.rank)
        mean, bias = self._mean.double(), attention.v_proj.bias
        offset = (both @ mean).view(2, heads, -1)
        if bias is not None:
            offset[1] += bias.detach().double().cpu().view(heads, -1)
        self.down, self.down_bias, self.up, self.offset = (
            each.to(like.device, like.dtype).contiguous() for each in (down, -down @ mean, up, offset)
        )

    def matrices(self, format):
        """`down`, and of each head what makes keys [heads * rank, head_dim] and values [heads * head_dim, rank] of
        latents, as a decoder's step reads them in this format."""
        if format not in self._packed:
            key_up, up = self.up[0].transpose(1, 2).flatten(0, 1), self.up[1].flatten(0, 1)
            made = [each.contiguous() for each in (self.down, key_up, up)]
            self._packed[format] = [ops.pack_matrix(each, format) for each in made] if format else made
        return self._packed[format]

    def rebuilt(self, part, latents):
        """Keys (part 0) or values [rows, heads, tokens, head_dim], of latents [rows, 1, tokens, rank]."""
        return latents @ self.up[part].transpose(1, 2) + self.offset[part][:, None]
