"""What the ops do, in PyTorch: for devices that have none."""

import math

import torch


def ragged_attention(query, layer, scale):
    rows, heads, queries, dim = query.shape
    place, _, slots = layer.tokens()
    kv_heads, most = place.shape[1:]
    keys, values = (each.view(-1, each.shape[-1])[slots].float() for each in (layer.keys, layer.values))
    logits = query.float().reshape(rows, kv_heads, -1, dim) @ keys.mT * scale
    logits = logits.view(rows, kv_heads, -1, queries, most)
    if layer.bias is not None:
        logits = logits + layer.bias.view(-1)[slots][:, :, None, None]
    sees = layer.lengths[..., None] - torch.arange(queries - 1, -1, -1, device=query.device)
    hidden = place[:, :, None, None] >= sees[:, :, None, :, None]
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    output = weights.view(rows, kv_heads, -1, most) @ values
    return output.view(rows, heads, queries, -1).transpose(1, 2).to(query.dtype).contiguous()


def attention_received(query, positions, keys, visible, scale):
    (rows, _, _, dim), kv_heads, tokens = query.shape, keys.shape[1], keys.shape[2]
    received, keys = query.new_zeros(rows, kv_heads, tokens, dtype=torch.float32), keys.float()
    place = torch.arange(tokens, device=query.device)
    for first in range(0, len(positions), 64):
        chosen = positions[first : first + 64].long()
        some = query[:, :, first : first + 64].float().reshape(rows, kv_heads, -1, dim)
        logits = (some @ keys.mT * scale).view(rows, kv_heads, -1, len(chosen), tokens)
        hidden = (place > chosen[:, None]) | ~visible[:, None]
        weights = logits.masked_fill(hidden[:, None, None], -math.inf).softmax(-1).nan_to_num(0.0)
        received += (weights * visible[:, None, None, chosen, None]).sum((2, 3))
    return received


def gather_kept(keys, values, index, starts, lengths, kept_keys, kept_values):
    there = torch.arange(index.shape[-1], device=index.device) < lengths[..., None]
    to = (starts.long()[..., None] + torch.arange(index.shape[-1], device=index.device))[there]
    row, head = (torch.arange(n, device=index.device) for n in index.shape[:2])
    row, head = row[:, None, None].expand_as(index)[there], head[:, None].expand_as(index)[there]
    for ours, theirs in ((kept_keys, keys), (kept_values, values)):
        ours[to] = theirs[row, head, index.long()[there]]
