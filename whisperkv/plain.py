"""What a plain decode step is: one new token a row over our caches, of which nothing but the last states is wanted."""

import torch

from .cache import SelfCacheLayer
from .compat import CACHE
from .cross_cache import CrossCacheLayer

# What a decoder's forward may be given.
_ARGUMENTS = {
    "input_ids", "attention_mask", "encoder_hidden_states", CACHE, "position_ids", "use_cache", "return_dict",
}  # fmt: skip


def is_ordinary(device):
    """Whether nothing is on that only the layers themselves would see."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled(device.type)
    )


def is_plain_step(decoder, given):
    config, ids, places = decoder.config, given.get("input_ids"), given.get("position_ids")
    use_cache, as_dict = given.get("use_cache"), given.get("return_dict", getattr(config, "return_dict", True))
    return (
        ids is not None
        and is_ordinary(ids.device)
        and ids.dim() == 2
        and ids.shape[1] == 1
        and (places is None or places.shape in (ids.shape, (1, 1)))
        and not (torch.is_grad_enabled() or decoder.training)
        and (config.use_cache if use_cache is None else use_cache)
        and as_dict is not False
        and not (config.output_attentions or config.output_hidden_states)
        and all(value is None or value is False for name, value in given.items() if name not in _ARGUMENTS)
        and ids.device == decoder.embed_tokens.weight.device
    )


def layers_of(decoder, past, hears):
    """The layers of the self- and the cross-attention cache if they are ours, else None."""
    count = len(decoder.layers)
    layers = getattr(getattr(past, "self_attention_cache", past), "layers", ())
    audio_layers = getattr(getattr(past, "cross_attention_cache", None), "layers", ()) if hears else ()
    kinds = [SelfCacheLayer] * count + [CrossCacheLayer] * (count if hears else 0)
    return (layers, audio_layers) if [*map(type, layers), *map(type, audio_layers)] == kinds else (None, None)


def are_filled(decoder, layers, audio_layers, rows):
    """Whether all layers hold as much, of so many rows, and no function of the user's chooses what they evict."""
    first = layers[0]
    return (
        0 < first.seen < decoder.max_target_positions
        and first.batch_size == rows
        and first.device == decoder.embed_tokens.weight.device
        and not first.is_ranked
        and all(layer.seen == first.seen for layer in layers)
        and all(
            layer.is_initialized and layer.audios is audio_layers[0].audios and layer.owner.shape[0] == rows
            for layer in audio_layers
        )
    )
