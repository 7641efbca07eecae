"""Attention over latents, beside a model's own attention class."""

import torch
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat import CACHE, OLD_CACHE
from . import shared
from .absorbing import absorbed_attention, by_heads

REFUSED = ("QuantizedLayer", "QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")


class LatentAttention:
    """A mixin before the attention class of a model. The subclass says what is special to the model:

    original              its own attention class
    queries(hidden)       [rows, heads, tokens, head_dim], before any rotation
    keys_values(hidden)   what its own projections make, [rows, tokens, kv_heads * head_dim] each, before any rotation
    finish(output)        of [rows, tokens, heads * head_dim], the output projection

    A conversion adds `latents` (how its tokens are held), `factors`, `kv_heads`, `rotary` (the module that gives
    cosines and sines of positions, or None) and `turns` (which channels of a head are rotated, or None for all).
    """

    key_norm = None  # a module that keys go through, head by head

    def cosines(self, embeddings):
        """(cosines, sines) of positions, [rows, tokens, head_dim]; 1 and 0 where nothing is to be rotated."""
        if self.turns is None:
            return embeddings
        cos, sin = embeddings
        return torch.where(self.turns, cos, self.rotary.attention_scaling), sin.masked_fill(~self.turns, 0)

    def finished_keys(self, keys, embeddings):
        """[rows, kv_heads, tokens, head_dim] of what was rebuilt, [rows, tokens, kv_heads * head_dim]."""
        keys = by_heads(keys, self.kv_heads)
        keys = keys if self.key_norm is None else self.key_norm(keys)
        return keys if embeddings is None else rotated(keys, embeddings)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        cache = kwargs.pop(CACHE, None) if CACHE in kwargs else kwargs.pop(OLD_CACHE, None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        turning = None if position_embeddings is None else self.cosines(position_embeddings)
        query = self.queries(hidden_states)
        query = query if turning is None else rotated(query, turning)
        if self.latents.is_shared:
            return shared.forward(self, hidden_states, query, turning, attention_mask, cache, kwargs)
        factors = self.factors
        latent = factors.compress(hidden_states)
        if cache is not None:
            latent, turning = self.remember(cache, latent, turning, kwargs.get("position_ids"))
        elif factors.codes is not None:
            latent = factors.codes.round_trip(latent)
        if self.absorbs(query):
            output, weights = absorbed_attention(self, query, latent, turning, attention_mask)
        else:
            keys, values = factors.rebuild(latent)
            keys, values = self.finished_keys(keys, turning), by_heads(values, self.kv_heads)
            output, weights = self.attend(query, keys, values, attention_mask, **kwargs)
        return self.finish(output.reshape(*hidden_states.shape[:2], -1)), weights

    def absorbs(self, query):
        """Whether it is less work to bring the queries to the latents than to rebuild keys and values."""
        _, heads, tokens, dim = query.shape
        plain = self.config._attn_implementation in ("eager", "sdpa") and not self.training
        return plain and not torch.is_grad_enabled() and tokens * heads <= self.kv_heads * dim

    def attend(self, query, keys, values, mask, **kwargs):
        function = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation) or self.eager
        return function(
            self, query, keys, values, mask, dropout=self.dropout_rate if self.training else 0.0, scaling=self.scaling,
            **self.window, **kwargs,
        )  # fmt: skip

    @property
    def window(self):
        """What the attention functions are told of a sliding window."""
        window = getattr(self, "sliding_window", None)
        return {} if window is None else {"sliding_window": window}

    def remember(self, cache, latent, turning, position_ids):
        """Put new latents into the cache: all that it holds, and the cosines and sines of their positions."""
        codes = self.factors.codes
        stored = latent if codes is None else codes.encode(latent)
        held, positions = self.store(cache, stored, position_ids)
        latent = held[:, 0] if codes is None else codes.decode(held[:, 0]).to(latent.dtype)
        if turning is None:
            return latent, None
        return latent, self.cosines(self.rotary(latent, positions))

    def store(self, cache, stored, position_ids):
        """Latents or codes [rows, tokens, width] go where a model's own cache has keys [rows, 1, tokens, width], and
        positions, once for all layers of a kind, where it has values."""
        rows, tokens, width = stored.shape
        check_cache(cache, self.layer_idx)
        leads = self.rotary is not None and self.latents.positions_in == self.layer_idx
        if leads:
            if position_ids is None:
                past = cache.get_seq_length(self.layer_idx)
                position_ids = torch.arange(tokens, device=stored.device)[None] + past
            positions = position_ids.expand(rows, tokens).to(torch.int32)[:, None, :, None]
        else:
            positions = stored.new_empty((rows, 1, tokens, 0), dtype=torch.int32)
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if layer is not None and layer.is_initialized and layer.keys.shape[1::2] != (1, width):
            if layer.get_seq_length() != 0:
                raise ValueError(
                    "the cache holds keys and values of before the conversion: begin with a new one, or with none"
                )
            layer.is_initialized = False  # generate() had it made for keys and values
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[self.layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(stored[:, None], positions)
            layer.values = layer.values.to(positions.dtype)  # some transformers give it the dtype of keys
        held, seen = cache.update(stored[:, None], positions, self.layer_idx)
        if leads:
            cache.layers[self.layer_idx].positions = seen
        if self.rotary is not None:
            seen = cache.layers[self.latents.positions_in].positions
            return held, seen[:, 0, :, 0].long().to(held.device)
        return held, None

    def extra_repr(self):
        return f"{self.original.__name__} over latents"


def check_cache(cache, number):
    layer = cache.layers[number] if number < len(cache.layers) else None
    if any(kind.__name__ in REFUSED for kind in type(layer).__mro__):
        raise ValueError(
            "a quantized cache cannot hold latents: leave out cache_implementation='quantized' and convert with "
            "cache_bits=4"
        )


def rotated(states, embeddings):
    """[rows, heads, tokens, head_dim] by cosines and sines [rows, tokens, head_dim]."""
    cos, sin = (each[:, None] for each in embeddings)
    half = states.shape[-1] // 2
    return states * cos + torch.cat([-states[..., half:], states[..., :half]], -1) * sin
