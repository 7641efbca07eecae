"""Whisper's attentions over our caches."""

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .cache import SelfCacheLayer
from .compat import CACHE, with_new_names
from .cross_cache import CrossCacheLayer


def _layer(cache, index, kind):
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index is not None and index < len(layers) else None
    return layer if isinstance(layer, kind) else None


def self_cache_layer(cache, index):
    """Our layer of the self-attention cache, or None if the cache is not ours."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return _layer(cache, index, SelfCacheLayer)


def cross_cache_layer(cache, index):
    """Our layer of the cross-attention cache, or None if the cache is not ours."""
    return _layer(getattr(cache, "cross_attention_cache", None), index, CrossCacheLayer)


def _refuse_gradients(*tensors):
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "whisperkv's cache keeps no gradients: decode under torch.no_grad(), "
            "or start from a fresh cache, which is left to transformers while gradients are on"
        )


def _wants_weights(attention, output_attentions):
    """As in transformers: attentions other than eager return none."""
    wanted = output_attentions or attention.config.output_attentions
    return wanted and attention.config._attn_implementation == "eager"


_ARGUMENTS = {CACHE: None, "attention_mask": None, "output_attentions": False}  # of an attention, in order


def _given(args, kwargs):
    return {**_ARGUMENTS, **dict(zip(_ARGUMENTS, args)), **with_new_names(kwargs)}


class SelfAttention(WhisperAttention):
    """A WhisperAttention that patch() has turned into ours by its class alone: weights, hooks and wrapped projections
    stay where they are. Whatever our cache does not hold, the original does."""

    def forward(self, hidden_states, key_value_states=None, *args, **kwargs):
        given = _given(args, kwargs)
        layer = self_cache_layer(given[CACHE], self.layer_idx)
        tokens = hidden_states.shape[1]
        # Several tokens at once without eviction: the original attention keeps its own bits, over our slots.
        is_theirs = layer is not None and layer.is_exact and layer.low_rank is None and tokens > 1
        if layer is None or key_value_states is not None or is_theirs:
            return super().forward(hidden_states, key_value_states, **given)
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        if layer.low_rank is not None:
            return self._attend_latents(layer, hidden_states, shape, given)
        if layer.joined is None:
            projected = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        else:  # one row, one token
            projected = torch.nn.functional.linear(hidden_states, *layer.joined).chunk(3, -1)
        query, key, value = (each.view(shape).contiguous() for each in projected)
        _refuse_gradients(query, key, value)
        wanted = _wants_weights(self, given["output_attentions"])
        output, weights = layer.attend(query, key, value, self.scaling, wanted)
        weights = layer.full_weights(weights).to(hidden_states.dtype) if wanted else None
        return self.out_proj(output.reshape(hidden_states.shape)), weights

    def _attend_latents(self, layer, hidden_states, shape, given):
        """q (U c) = (q U) c: what makes keys of latents goes to the query, what makes values to the output."""
        low = layer.low_rank.follow(self)
        query = self.q_proj(hidden_states).view(shape)
        latent = torch.nn.functional.linear(hidden_states, low.down, low.down_bias)[:, :, None]
        _refuse_gradients(query, latent)
        by_head = query.flatten(0, 1).transpose(0, 1)  # [heads, rows * tokens, head_dim]
        asked = (by_head @ low.up[0]).transpose(0, 1).contiguous().view(*shape[:3], low.rank)
        wanted = _wants_weights(self, given["output_attentions"])
        output, weights = layer.attend(asked, latent, latent[..., :0], self.scaling, wanted)
        mixed = output.flatten(0, 1).transpose(0, 1) @ low.up[1].transpose(1, 2)
        mixed = mixed.transpose(0, 1) + low.offset[1]
        weights = layer.full_weights(weights).to(hidden_states.dtype) if wanted else None
        return self.out_proj(mixed.reshape(hidden_states.shape)), weights


class CrossAttention(WhisperAttention):
    """The same for a WhisperAttention over the encoder's output."""

    def forward(self, hidden_states, key_value_states=None, *args, **kwargs):
        given = _given(args, kwargs)
        layer = cross_cache_layer(given[CACHE], self.layer_idx)
        if layer is None or key_value_states is None:
            return super().forward(hidden_states, key_value_states, **given)
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        _refuse_gradients(query)
        if not layer.is_initialized:
            layer.fill(self)
            given[CACHE].is_updated[self.layer_idx] = True
        output, weights = layer.attend(query, self, _wants_weights(self, given["output_attentions"]))
        weights = None if weights is None else weights.to(hidden_states.dtype)
        return self.out_proj(output.reshape(hidden_states.shape)), weights
