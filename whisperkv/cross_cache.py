"""The cross-attention cache: one for each audio, shared by all the rows (beams, samples) that decode it.

What it holds is a matter of format: keys and values of every layer as the model computes them or as codes of 8 or 4
bits, or ("latent") the encoder's output alone, once for all layers. K = E Wk and V = E Wv + bv, so attention can run on
E itself: the query times Wk before, Wv and bv after the weighted sum.
"""

import math
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import is_
from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from . import ops
from .calibration import Codes
from .config import CrossConfig
from .graph_memory import apart
from .mixed import pack_mixed, scales_of, unpack_mixed
from .trim import Kept
from .views import Onlookers, View

COUNTERS = 128  # of each audio for cross_attention(): a few for each head
ROOM = 128  # a home has room for a multiple of so many frames, that audios trimmed to other lengths may follow in it


def _is_autocast(device):
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def owners_of(states, share):
    """int32 [rows]: which audio each row decodes. Rows of one audio stand together and have the same states."""
    rows = len(states)
    if not share:
        return torch.arange(rows, dtype=torch.int32, device=states.device)
    others = [(one != next_one).any() for one, next_one in zip(states, states[1:])]
    begins = torch.stack([torch.zeros((), dtype=torch.bool, device=states.device), *others])
    return begins.cumsum(0, dtype=torch.int32)


def first_rows(owners, audios):
    """int64 [audios]: of each audio the first row."""
    return torch.searchsorted(owners, torch.arange(audios, dtype=owners.dtype, device=owners.device))


@dataclass
class Matrix:
    """Frames of every audio and head, with what is needed to read them: floats [audios, heads, frames, dim], or codes
    and scales of pack_frames()."""

    data: torch.Tensor
    scales: torch.Tensor
    bits: int = 0

    @classmethod
    def of(cls, states, lengths, bits, group):
        """From states [audios, frames, heads, dim]."""
        if bits:
            return cls(*ops.pack_frames(states.contiguous(), lengths, bits, group), bits)
        data = states.transpose(1, 2).contiguous()
        data = data if data.data_ptr() != states.data_ptr() else data.clone()  # states is not ours
        return cls(data, torch.empty(0, device=data.device))

    def fill(self, states, lengths, group):
        """The same, in memory that is there and may have room for more frames."""
        if self.bits:
            codes, scales = ops.pack_frames(states.contiguous(), lengths, self.bits, group)
            self.data[:, :, : codes.shape[2]] = codes
            self.scales[:, :, : scales.shape[2]] = scales
        else:
            self.data[:, :, : states.shape[1]] = states.transpose(1, 2)

    def __getstate__(self):
        return {**vars(self), "data": apart(self.data), "scales": apart(self.scales)}

    @property
    def value_scales(self):
        return self.scales

    @property
    def nbytes(self):
        return self.data.nbytes + self.scales.nbytes

    def floats(self, frames, dim, group, dtype, audios):
        """[audios, heads, frames, dim], of those audios."""
        data, scales = self.data[audios], self.scales[audios] if self.bits else None
        if not self.bits:
            return data[:, :, :frames]
        audios, heads, tiles, _, channels = data.shape
        codes = data.view(audios, heads, tiles, -1, ops.TILE, 4)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 4).view(audios, heads, tiles, -1, ops.TILE, 4)
        codes = codes.transpose(3, 4).reshape(audios, heads, -1, channels)[:, :, :frames]
        step, low = (scales[:, :, :, part].repeat_interleave(group, 2)[:, :, :frames] for part in (0, 1))
        return (codes * step + low)[..., :dim].to(dtype)


@dataclass
class MixedMatrix:
    """The encoder's output of every audio in another basis, as codes of mixed bits, see mixed.py."""

    data: torch.Tensor
    scales: torch.Tensor
    bits: torch.Tensor
    codes: Codes

    @classmethod
    def of(cls, states, lengths, codes, group):
        """From states [audios, frames, width]."""
        frames, bits = codes.rotated(states), codes.bits.to(states.device)
        scales = scales_of(frames, lengths, bits, group)
        return cls(pack_mixed(frames, lengths, bits, scales, group), scales, bits, codes)

    @property
    def value_scales(self):
        return self.bits  # keys and values are one, and what is left to say is this

    @property
    def nbytes(self):
        return self.data.nbytes + self.scales.nbytes

    def floats(self, frames, dim, group, dtype, audios):
        """[audios, 1, frames, dim], of those audios."""
        frames = unpack_mixed(self.data[audios], self.scales[audios], self.bits, group, frames)
        return self.codes.restored(frames)[:, None].to(dtype)


@dataclass
class Audios:
    """What the encoder heard. All layers share it while they fill their caches, and the latent formats thereafter.

    states   [audios, frames, width], of the frames that are kept; let go once the last layer has its keys and values
    lengths  int32 [audios]: how many that is of each
    kept     where they stood in the encoder's output, and how many each stands for; None if all are kept
    bias     float32 [audios, frames]: what that adds to their logits; empty if all are kept
    heard    frames in the encoder's output
    room     frames that the matrices have room for
    counters int32, zeros between the calls of cross_attention()
    home     where graphs expect all this; None if no step is to be captured
    codes    how the latent becomes codes of mixed bits; None if it does not
    """

    states: torch.Tensor | None
    lengths: torch.Tensor
    kept: Kept | None
    heard: int
    layers: int
    record: object
    codes: Codes | None = None
    latent: Matrix | MixedMatrix | None = field(default=None, init=False)
    home: "CrossHome | None" = field(default=None, init=False)

    def __post_init__(self):
        self.room = self.frames
        self.bias = torch.empty(0, device=self.lengths.device) if self.kept is None else self.kept.bias
        self.counters = torch.zeros(len(self) * COUNTERS, dtype=torch.int32, device=self.lengths.device)

    def __getstate__(self):
        integers = {"lengths": apart(self.lengths), "counters": apart(self.counters)}
        return {**vars(self), "home": None, "bias": apart(self.bias), **integers}

    @classmethod
    def gather(cls, states, owners, keep, layers, record, codes=None):
        """Of each audio once. `keep` bool [audios, frames] or None."""
        heard, audios = states.shape[1], int(owners[-1]) + 1
        states = states.detach()
        if audios < len(states):
            states = states[first_rows(owners, audios)]
        if keep is None or bool(keep.all()):
            lengths = torch.full((audios,), heard, dtype=torch.int32, device=states.device)
            return cls(states, lengths, None, heard, layers, record, codes)
        kept = Kept.of(keep)
        states = states.gather(1, kept.places[..., None].expand(-1, -1, states.shape[-1]))
        return cls(states, kept.lengths, kept, heard, layers, record, codes)

    def move_to(self, home):
        """Before anything is held."""
        home.lengths.copy_(self.lengths)
        home.counters.zero_()
        home.bias.zero_()
        if self.kept is not None:
            home.bias[:, : self.frames] = self.bias
        self.home, self.lengths, self.counters, self.room = home, home.lengths, home.counters, home.room
        self.bias = home.bias

    def hold(self, states, config, layer, part):
        """The Matrix of states [audios, frames, heads, dim], as keys (part 0) or values (1) of a layer."""
        if self.codes is not None:
            return MixedMatrix.of(states[:, :, 0], self.lengths, self.codes, config.group)
        if self.home is None:
            return Matrix.of(states, self.lengths, config.bits, config.group)
        matrix = self.home.of_layer[layer][part]
        matrix.fill(states, self.lengths, config.group)
        return matrix

    def __len__(self):
        return len(self.lengths)

    @property
    def frames(self):
        return self.heard if self.kept is None else self.kept.places.shape[1]

    def filled(self, matrices):
        """A layer has what it needs of the states."""
        self.record.cross_bytes += sum(matrix.nbytes for matrix in matrices)
        self.layers -= 1
        if self.layers == 0:
            self.record.cross_bytes += self.bias.nbytes
            self.states = None


class CrossLayout(NamedTuple):
    """What decides the addresses and kernels of a step over the cross-attention cache."""

    layers: int
    audios: int
    heads: int
    room: int
    head_dim: int
    dtype: torch.dtype
    config: CrossConfig

    @classmethod
    def of(cls, audios, heads, config):
        states = audios.states
        room = min(-(-audios.frames // ROOM) * ROOM, audios.heard)
        heads = 1 if config.is_latent else heads
        return cls(audios.layers, len(audios), heads, room, states.shape[-1] // heads, states.dtype, config)

    def tensors(self):
        matrices = 1 if self.config.is_latent else 2 * self.layers
        shape, bits = (matrices, self.audios, self.heads), self.config.bits
        if bits:
            channels = -(-self.head_dim // ops.CHANNELS) * ops.CHANNELS
            data = (*shape, -(-self.room // ops.TILE), 2 * bits, channels), torch.uint8
            scales = (*shape, -(-self.room // self.config.group), 2, channels), torch.float32
        else:
            data = (*shape, self.room, self.head_dim), self.dtype
            scales = (matrices, 0), torch.float32
        return {
            "data": data,
            "scales": scales,
            "lengths": ((self.audios,), torch.int32),
            "bias": ((self.audios, 0 if self.config.keeps_all else self.room), torch.float32),
            "counters": ((self.audios * COUNTERS,), torch.int32),
        }


class CrossHome:
    """Where the matrices of all layers are while graphs are replayed over them; of_layer: keys and values of each."""

    def __init__(self, lease):
        layout = lease.layout
        self.lease, self.key, self.room = lease, lease.key, layout.room
        self.lengths, self.bias, self.counters = (lease.tensors[name] for name in ("lengths", "bias", "counters"))
        tensors = zip(lease.tensors["data"], lease.tensors["scales"])
        matrices = [Matrix(data, scales, layout.config.bits) for data, scales in tensors]
        if layout.config.is_latent:
            self.of_layer = [(matrices[0], matrices[0])] * layout.layers
        else:
            self.of_layer = list(zip(matrices[::2], matrices[1::2]))


class CrossCacheLayer(CacheLayerMixin):
    """One decoder layer's view of the audios.

    owner         int32 [rows]: the audio of each row. Reordering and selecting rows changes this and nothing else.
    home, index   the home of the self-attention cache, if the owner is there too; which layer this is
    keys_of_audios, values_of_audios  in the latent formats both are the one Matrix that all layers share
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    max_cache_len = 0  # so generate() in transformers 5.10 never keeps a static cache with our layers for its next call

    def __init__(self, config, audios, owner, index=0, views=None):
        self.config, self.index, self.home = config, index, None
        self.audios, self.owner = audios, owner
        self.keys_of_audios = self.values_of_audios = None
        self.attention = None  # a weak reference to the layer's attention, whose projections may be asked for
        self.is_initialized = False
        self.views = views or Onlookers()

    def __getstate__(self):
        return {**vars(self), "attention": None, "home": None, "owner": apart(self.owner)}

    # What attention calls

    def fill(self, attention):
        """Take from the encoder's states what this format keeps."""
        audios, config = self.audios, self.config
        states = audios.states
        self.dtype, self.device = states.dtype, states.device
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        if config.is_latent:
            if audios.latent is None:
                audios.latent = audios.hold(states[:, :, None], config, self.index, 0)
                audios.record.cross_bytes += audios.latent.nbytes
            self.keys_of_audios = self.values_of_audios = audios.latent
            audios.filled([])
        else:
            shape = (*states.shape[:2], self.heads, self.head_dim)
            self.keys_of_audios, self.values_of_audios = (
                audios.hold(project(states).view(shape), config, self.index, part)
                for part, project in enumerate((attention.k_proj, attention.v_proj))
            )
            audios.filled([self.keys_of_audios, self.values_of_audios])
            if not config.bits:
                self.dtype = self.keys_of_audios.data.dtype  # that of the projections, under autocast
        self.is_initialized = True

    def attend(self, query, attention, want_weights):
        """query [rows, tokens, heads, head_dim]: output of the same shape, and the weights over all frames that were
        heard [rows, heads, tokens, frames] if they are wanted."""
        self.attention = weakref.ref(attention)
        if len(query) != len(self.owner):
            raise ValueError(
                f"the cross-attention cache is of {len(self.owner)} rows over {len(self.audios)} audios, and "
                f"{len(query)} rows are being decoded: start from a fresh cache"
            )
        if want_weights and self.config.bits:
            warnings.warn(
                f'CrossConfig(format="{self.config.format}"): the attention weights (and times made of them) are those '
                'of a quantized cache, not exact; format="model" or "latent" gives exact ones',
                stacklevel=2,
            )
        dtype, query, scale = query.dtype, query.to(self.dtype), attention.scaling  # autocast may come and go
        if math.frexp(scale)[0] != 0.5:  # no power of two: the scaled query is rounded, as in transformers
            query, scale = query * scale, 1.0
        if self.config.is_latent:
            with torch.autocast(self.device.type, enabled=False) if _is_autocast(self.device) else nullcontext():
                output, weights = self._attend_latent(query, scale, attention, want_weights)
        else:
            output, weights = self._run(query, scale, want_weights)
        return output.to(dtype), self._all_frames(weights) if want_weights else None

    # What transformers calls

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError(
            "this cross-attention cache was made for whisperkv's own attention: patch the model again, "
            "or start from a fresh cache"
        )

    def lazy_initialization(self, key_states, value_states):
        """fill() does this."""

    def get_seq_length(self):
        return self.audios.frames if self.is_initialized else 0

    def get_mask_sizes(self, query_length):
        return self.get_seq_length(), 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    @property
    def batch_size(self):
        return len(self.owner) if self.is_initialized else -1

    max_batch_size = batch_size

    def reset(self):
        self.views.dismiss()
        self.keys_of_audios = self.values_of_audios = None
        self.is_initialized = False

    def crop(self, tokens_to_keep_or_remove):
        """The audio stays whatever becomes of its tokens."""

    def reorder_cache(self, beam_idx):
        if self.home is not None and self.owner is self.home.owner and len(beam_idx) == len(self.owner):
            self.views.dismiss()
            self.home.reorder_owner(self.index, beam_idx)
        else:
            self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices):
        self.views.dismiss()
        self.owner = self.owner[indices.to(self.owner.device)]

    def batch_repeat_interleave(self, repeats):
        self.views.dismiss()
        self.owner = self.owner.repeat_interleave(repeats)

    def offload(self):
        """Nothing is worth moving."""

    prefetch = offload

    @property
    def keys(self):
        """[rows, heads, frames, head_dim], of the frames that are kept."""
        return self._view(0)

    @property
    def values(self):
        return self._view(1)

    # What views.py calls

    def floats(self, part, rows, frames):
        audios = self.owner[torch.tensor(rows, device=self.owner.device)]
        matrix, group = (self.keys_of_audios, self.values_of_audios)[part], self.config.group
        if not self.config.is_latent:
            return matrix.floats(frames, self.head_dim, group, self.dtype, audios)
        attention = self.attention and self.attention()
        if attention is None:
            raise RuntimeError(
                f'CrossConfig(format="{self.config.format}") holds no keys and values, but the encoder\'s output, '
                "and the model that makes them of it is gone"
            )
        states = matrix.floats(frames, self.heads * self.head_dim, group, self.dtype, audios)[:, 0]
        project = (attention.k_proj, attention.v_proj)[part]
        return project(states).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    # What graphs.py calls

    @property
    def is_home(self):
        """Whether what a step reads of the audios is where graphs expect it."""
        home = self.audios.home
        matrices = self.keys_of_audios, self.values_of_audios
        return home is not None and all(map(is_, matrices, home.of_layer[self.index]))

    def move_to(self, home):
        """Let the owner of the home be this layer's; it is the same for all layers."""
        if self.index == 0:
            home.owner.copy_(self.owner)
        self.home, self.owner = home, home.owner

    def leave(self):
        self.home, self.owner = None, apart(self.owner)

    # How it works

    def _view(self, part):
        if not self.is_initialized:
            return None
        return View(self, part, tuple(range(len(self.owner))), self.audios.frames)

    def _run(self, query, scale, want_weights):
        keys, values, audios = self.keys_of_audios, self.values_of_audios, self.audios
        return ops.cross_attention(
            query, keys.data, values.data, keys.scales, values.value_scales, self.owner, audios.lengths,
            audios.bias, audios.counters, audios.room, self.config.group, scale, want_weights,
        )  # fmt: skip

    def _attend_latent(self, query, scale, attention, want_weights):
        rows, tokens, heads, head_dim = query.shape
        key_weight, value_weight, bias = attention.k_proj.weight, attention.v_proj.weight, attention.v_proj.bias
        if self.audios.codes is not None:
            key_weight, value_weight, bias = self.audios.codes.weights(attention)
        width = key_weight.shape[-1]
        by_head = query.reshape(-1, heads, head_dim).transpose(0, 1)  # [heads, rows * tokens, head_dim]
        folded = (by_head.to(key_weight.dtype) @ key_weight.view(heads, head_dim, width)).to(query.dtype)
        folded = folded.transpose(0, 1).contiguous().view(rows, tokens * heads, 1, width)
        mixed, weights = self._run(folded, scale, want_weights)
        mixed = mixed.view(-1, heads, width).transpose(0, 1).to(value_weight.dtype)
        output = mixed @ value_weight.view(heads, head_dim, width).transpose(1, 2)
        output = output.transpose(0, 1).reshape(query.shape)
        if bias is not None:
            output += bias.view(heads, head_dim)
        if want_weights:
            weights = weights.view(rows, tokens, heads, -1).transpose(1, 2)
        return output, weights

    def _all_frames(self, weights):
        """Each weight at the time of its frame; one that stands for several shares it out among them."""
        kept = self.audios.kept
        if kept is None:
            return weights
        weights = weights[..., : self.audios.frames] / kept.counts[self.owner][:, None, None]
        of_all = kept.of_all[self.owner][:, None, None].expand(*weights.shape[:-1], -1)
        return weights.gather(-1, of_all)
