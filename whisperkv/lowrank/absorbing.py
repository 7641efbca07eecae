"""Attention in which queries meet latents, and no key is rebuilt that need not be rotated."""

import torch
from torch.nn import functional


def by_heads(states, heads):
    """[rows, heads, tokens, head_dim] of [rows, tokens, heads * head_dim]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def absorbed_attention(attention, query, latent, turning, mask):
    """What attention over rebuilt keys and values gives, [rows, tokens, heads, head_dim], and its weights.

    A bias of keys that are not rotated adds the same to all logits of a query, and is left out.
    """
    factors, kv_heads = attention.factors, attention.kv_heads
    rows, heads, tokens, dim = query.shape
    of_keys, of_values = factors.parts(latent)
    up = factors.of_keys.unflatten(0, (kv_heads, dim))  # [kv_heads, head_dim, keys]
    grouped = query.reshape(rows, kv_heads, -1, dim)  # [rows, kv_heads, heads of one * tokens, head_dim]
    if attention.rotary is None:
        straight, turned = slice(None), None
    elif attention.turns is None:
        straight, turned = None, slice(None)
    else:
        straight, turned = (each.nonzero()[:, 0] for each in (~attention.turns, attention.turns))
    logits = 0
    if straight is not None:
        asks = torch.einsum("bkqd,kdr->bkqr", grouped[..., straight], up[:, straight])
        if turned is not None:
            asks = asks * attention.rotary.attention_scaling  # as rotated keys would be
        logits = asks.flatten(1, 2) @ of_keys.transpose(1, 2)  # [rows, heads * tokens, latents]
        logits = logits.view(rows, kv_heads, -1, logits.shape[-1])
    if turned is not None:
        bias = factors.bias_keys.view(kv_heads, dim)[:, turned].flatten()
        keys = functional.linear(of_keys, up[:, turned].flatten(0, 1), bias)
        embeddings = tuple(each[..., turned] for each in turning)
        logits = logits + grouped[..., turned] @ attention.finished_keys(keys, embeddings).transpose(2, 3)
    logits = logits.view(rows, heads, tokens, -1) * attention.scaling
    weights = softmax(logits, mask, tokens).to(query.dtype)
    seen = weights.flatten(1, 2) @ of_values  # [rows, heads * tokens, values]
    up = factors.of_values.unflatten(0, (kv_heads, dim))
    output = torch.einsum("bkqr,kdr->bkqd", seen.view(rows, kv_heads, -1, seen.shape[-1]), up)
    output = output + factors.bias_values.view(kv_heads, 1, dim)
    return output.reshape(rows, heads, tokens, dim).transpose(1, 2), weights


def softmax(logits, mask, tokens):
    """float32, under a mask of truth values, of numbers to add, or, without one, so that none looks ahead."""
    logits = logits.float()
    if mask is None and tokens > 1:
        seen = logits.shape[-1]
        ahead = torch.ones(tokens, seen, dtype=torch.bool, device=logits.device).triu(seen - tokens + 1)
        logits = logits.masked_fill(ahead, -torch.inf)
    elif mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(-1)
