"""Whisper's self-attention over our cache."""

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .cache import SelfCacheLayer


def self_cache_layer(past_key_values, index):
    """Our layer of the self-attention cache, or None if the cache is not ours."""
    cache = past_key_values
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index is not None and index < len(layers) else None
    return layer if isinstance(layer, SelfCacheLayer) else None


class SelfAttention(WhisperAttention):
    """A WhisperAttention that patch() has turned into ours by its class alone: weights, hooks and wrapped projections
    stay where they are. Whatever our cache does not hold, the original does."""

    def forward(
        self,
        hidden_states,
        key_value_states=None,
        past_key_values=None,
        attention_mask=None,
        output_attentions=False,
        **kwargs,
    ):
        layer = self_cache_layer(past_key_values, self.layer_idx)
        tokens = hidden_states.shape[1]
        # Several tokens at once without eviction: the original attention keeps its own bits, over our slots.
        if layer is None or key_value_states is not None or (layer.is_exact and tokens > 1):
            return super().forward(
                hidden_states, key_value_states, past_key_values, attention_mask, output_attentions, **kwargs
            )
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).contiguous() for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise RuntimeError(
                "whisperkv's cache keeps no gradients: decode under torch.no_grad(), "
                "or start from a fresh cache, which is left to transformers while gradients are on"
            )
        wanted = output_attentions or self.config.output_attentions
        wanted = wanted and self.config._attn_implementation == "eager"  # as in transformers: the others return none
        output, weights = layer.attend(query, key, value, self.scaling, wanted)
        weights = layer.full_weights(weights).to(hidden_states.dtype) if wanted else None
        return self.out_proj(output.view(hidden_states.shape)), weights
