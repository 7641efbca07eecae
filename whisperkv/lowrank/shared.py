"""Token latents that the layers of a group share.

Each layer of the group adds to a token's latent, which is whole when the last has. Tokens of the pass itself are
therefore attended by the keys and values that a layer has made of them; all earlier ones by what is rebuilt from their
latents.
"""

import contextlib
import contextvars

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .absorbing import by_heads, softmax

_BESIDE = contextvars.ContextVar("latents of a pass before, by the first layer of a group", default=None)


class Elsewhere(CacheLayerMixin):
    """A layer of a cache whose tokens the first layer of its group holds."""

    def __init__(self, first):
        super().__init__()
        self.first, self.is_initialized = first, True
        self.is_sliding, self.is_croppable = first.is_sliding, getattr(first, "is_croppable", True)
        self.is_compileable = first.is_compileable

    def get_seq_length(self):
        return self.first.get_seq_length()

    def get_mask_sizes(self, query_length):
        return self.first.get_mask_sizes(query_length)

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError("this layer's tokens are in latents that it shares: it takes no keys and values")

    def nothing(self, *args, **kwargs): ...

    lazy_initialization = crop = reset = reorder_cache = offload = prefetch = nothing
    batch_repeat_interleave = batch_select_indices = nothing


class Pass:
    """What a group knows during one pass over a cache."""

    def __init__(self, held, latent, positions, slots):
        self.held, self.latent, self.positions, self.slots = held, latent, positions, slots
        self.added = 0  # [rows, tokens, width]: what the layers so far have made of the pass's own tokens


def forward(attention, hidden, query, turning, mask, cache, others):
    keys, values = attention.keys_values(hidden)
    group, number = attention.latents.group, attention.layer_idx
    beside = _BESIDE.get()
    if cache is None and beside is not None:
        return in_parallel(attention, hidden, query, keys, values, turning, mask, beside)
    own = attention.finished_keys(keys, turning)
    if cache is None:
        output, weights = attention.attend(query, own, by_heads(values, attention.kv_heads), mask, **others)
        return attention.finish(output.reshape(*hidden.shape[:2], -1)), weights
    if number == group[0]:
        begin(attention, cache, hidden, others.get("position_ids"))
    now = cache.layers[group[0]].of_pass
    past_keys, past_values = attention.factors.rebuild(now.latent)
    past_turning = turning if turning is None else attention.cosines(attention.rotary(hidden, now.positions))
    past_keys, past_values = attention.finished_keys(past_keys, past_turning), by_heads(past_values, attention.kv_heads)
    past_keys[:, :, now.slots] = own.to(past_keys.dtype)
    past_values[:, :, now.slots] = by_heads(values, attention.kv_heads).to(past_values.dtype)
    now.added = now.added + attention.factors.compress(torch.cat([keys, values], -1))
    if number == group[-1]:
        codes = attention.factors.codes
        added = now.added.detach()  # no gradient comes back from a later pass
        now.held[:, 0, now.slots] = added.to(now.held.dtype) if codes is None else codes.encode(added)
        cache.layers[group[0]].of_pass = None
    output, weights = attention.attend(query, past_keys, past_values, mask, **others)
    return attention.finish(output.reshape(*hidden.shape[:2], -1)), weights


def begin(attention, cache, hidden, position_ids):
    """Make room in the cache for the tokens of a pass: what the last layer of the group will fill."""
    rows, tokens, _ = hidden.shape
    number, codes = attention.layer_idx, attention.factors.codes
    layer = cache.layers[number] if number < len(cache.layers) else None
    is_static = isinstance(layer, StaticLayer)
    if getattr(cache, "offloading", False) or (is_static and layer.is_sliding):
        raise ValueError(
            "layers that share token latents need a cache that stays where it is and is not both static and sliding: "
            "leave out cache_implementation, or convert with xkv_share='bases'"
        )
    past = int(layer.get_seq_length()) if is_static else 0
    width = attention.factors.down.shape[0]
    if codes is None:
        stored = hidden.new_zeros(rows, tokens, width)
    else:
        stored = torch.zeros(rows, tokens, codes.bytes, dtype=torch.uint8, device=hidden.device)
    held, positions = attention.store(cache, stored, position_ids)
    for other in attention.latents.group[1:]:
        while len(cache.layers) <= other:
            cache.layers.append(cache.layer_class_to_replicate())
        if not isinstance(cache.layers[other], Elsewhere):
            cache.layers[other] = Elsewhere(cache.layers[number])
    seen = held.shape[2]
    begin = past if is_static else seen - tokens
    slots = torch.arange(tokens, device=held.device) + begin
    latent = held[:, 0] if codes is None else codes.decode(held[:, 0]).to(hidden.dtype)
    cache.layers[number].of_pass = Pass(held, latent, positions, slots)


@contextlib.contextmanager
def beside(latents):
    """Let a pass without a cache see earlier tokens by latents: {first layer of a group: [rows, tokens, width]}.

    A layer that finds none there puts what it makes of its tokens: the first pass over a text collects them, the second
    attends to them as generate() would.
    """
    token = _BESIDE.set(latents)
    try:
        yield latents
    finally:
        _BESIDE.reset(token)


class Collected(dict):
    """Latents that a pass is still adding up, and the keys and values that they are made of, by layer."""

    def __init__(self, learns=False):
        super().__init__()
        self.learns, self.made = learns, {}

    def add(self, attention, made):
        first = attention.latents.group[0]
        self.made[attention.layer_idx] = made = made.detach()
        with torch.set_grad_enabled(self.learns):  # of the matrices, and of nothing before
            self[first] = self.get(first, 0) + attention.factors.compress(made)


def in_parallel(attention, hidden, query, keys, values, turning, mask, beside):
    first, heads = attention.latents.group[0], attention.kv_heads
    own, own_values = attention.finished_keys(keys, turning), by_heads(values, heads)
    if isinstance(beside, Collected):
        beside.add(attention, torch.cat([keys, values], -1))
        output, weights = attention.attend(query, own, own_values, mask)
        return attention.finish(output.reshape(*hidden.shape[:2], -1)), weights
    latent, codes = beside[first], attention.factors.codes
    seen_keys, seen_values = attention.factors.rebuild(latent if codes is None else codes.round_trip(latent))
    seen_keys, seen_values = attention.finished_keys(seen_keys, turning), by_heads(seen_values, heads)
    rows, _, tokens, dim = query.shape
    grouped = query.reshape(rows, heads, -1, tokens, dim)
    logits = grouped @ seen_keys[:, :, None].transpose(3, 4)
    itself = torch.eye(tokens, dtype=torch.bool, device=query.device)
    logits = torch.where(itself, (grouped * own[:, :, None]).sum(-1, keepdim=True), logits) * attention.scaling
    logits = logits.view(rows, -1, tokens, tokens)
    weights = softmax(logits, mask, tokens).to(query.dtype)
    grouped = weights.view(rows, heads, -1, tokens, tokens)
    output = grouped.masked_fill(itself, 0) @ seen_values[:, :, None]
    output = output + grouped.diagonal(dim1=-2, dim2=-1)[..., None] * own_values[:, :, None]
    output = output.reshape(rows, -1, tokens, own_values.shape[-1]).transpose(1, 2)
    return attention.finish(output.reshape(*hidden.shape[:2], -1)), weights
