"""Attention over pruned layers, and what the tokens of a prompt receive, beside the model's own attention."""

import functools
import sys

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from . import in_torch
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
    """[rows, queries, heads, dim]: the last query sees all tokens of a head, the one before it one less, and so on."""
    if not ops.prunes(query):
        return in_torch.ragged_attention(query, layer, scale)
    keys, values = (each.view(-1, each.shape[-1]) for each in (layer.keys, layer.values))
    bias = query.new_empty(0, dtype=torch.float32) if layer.bias is None else layer.bias.view(-1)
    return ops.ragged_attention(query, keys, values, layer.starts, layer.lengths, bias, scale)


def attention_received(query, run, key, scale):
    """float32 [rows, kv_heads, tokens]: by the pass's tokens, of those whose queries were chosen."""
    tokens = query.shape[2]
    key, places = key[:, :, -tokens:], run.choose_queries()
    received = ops.attention_received if ops.prunes(query) else in_torch.attention_received
    return received(query[:, :, places.long()], places, key, run.shown, scale)
