"""Attention over pruned layers, and what the tokens of a prompt receive, beside the model's own attention."""

import functools
import math
import sys

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layer import PrunedLayer
from .running import running

PREFIX = "whisperkv_prune_"


def install(config):
    """Let a language model attend through us. What attends where nothing is pruned is what did before."""
    own = config._attn_implementation
    if own.startswith(PREFIX):
        return
    name = PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(attend, own))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation = {"": name}


def uninstall(config):
    if config._attn_implementation.startswith(PREFIX):
        config._attn_implementation = {"": config._attn_implementation.removeprefix(PREFIX)}


def attend(own, module, query, key, value, attention_mask, scaling=None, **others):
    run = running()
    layer = None if run is None else _layer_of(run, module)
    if layer is not None and any(others.get(name) is not None for name in ("softcap", "s_aux")):
        run.is_special = True
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layer, PrunedLayer):
        output = ragged_attention(query, layer, scale)
        if run.collects:
            run.receive(module, attention_received(query, run, key, scale))
        return output, None
    if run is not None and run.collects and layer is not None:
        run.receive(module, attention_received(query, run, key, scale))
    function = ALL_ATTENTION_FUNCTIONS.get(own) or sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, attention_mask, scaling=scaling, **others)


def _layer_of(run, module):
    """The layer of the cache that a module reads; None if it is none of the language model's."""
    number = None if run.cache is None else run.family.reads(module)
    return run.cache.layers[number] if number is not None and number < len(run.cache.layers) else None


def ragged_attention(query, layer, scale):
    """[rows, queries, heads, dim]: the last query sees all of a head's tokens, the one before it one less, and so on."""
    rows, heads, queries, dim = query.shape
    kv_heads, most = layer.lengths.shape[1], int(layer.lengths.max())
    place = torch.arange(most, device=query.device)
    slots = layer._slots(place.expand(rows, kv_heads, most).minimum(layer.lengths[..., None].long() - 1).clamp(min=0))
    keys, values = (each.view(-1, each.shape[-1])[slots].float() for each in (layer.keys, layer.values))
    logits = query.float().reshape(rows, kv_heads, -1, dim) @ keys.mT * scale
    logits = logits.view(rows, kv_heads, -1, queries, most)
    if layer.bias is not None:
        logits = logits + layer.bias.view(-1)[slots][:, :, None, None]
    sees = layer.lengths[..., None] - torch.arange(queries - 1, -1, -1, device=query.device)
    hidden = place >= sees[:, :, None, :, None]
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    output = weights.view(rows, kv_heads, -1, most) @ values
    return output.view(rows, heads, queries, -1).transpose(1, 2).to(query.dtype).contiguous()


def attention_received(query, run, key, scale):
    """float32 [rows, kv_heads, tokens]: by the pass's tokens, of those whose queries were chosen."""
    rows, heads, tokens, dim = query.shape
    key = key[:, :, -tokens:].float()
    kv_heads = key.shape[1]
    received = key.new_zeros(rows, kv_heads, tokens)
    place = torch.arange(tokens, device=query.device)
    visible = run.visible
    for chosen in run.choose_queries().long().split(64):
        some = query[:, :, chosen].float().reshape(rows, kv_heads, -1, dim)
        logits = (some @ key.mT * scale).view(rows, kv_heads, -1, len(chosen), tokens)
        hidden = (place > chosen[:, None])[None]
        if visible is not None:
            hidden = hidden | ~visible[:, None, :]
        weights = logits.masked_fill(hidden[:, None, None], -math.inf).softmax(-1).nan_to_num(0.0)
        if visible is not None:
            weights = weights * visible[:, None, None, chosen, None]
        received += weights.sum((2, 3))
    return received
