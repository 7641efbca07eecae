"""The pruning of one prompt, once the language model has read it: layer by layer, what a pruner keeps stays."""

import torch
from transformers.cache_utils import DynamicLayer

from .base import BasePruner, Kept, Meta, places, take
from .layer import PrunedLayer
from .records import PruneStats


def why_not(cache, run):
    """Why a prompt cannot be pruned; "" if it can."""
    if run.asks_attentions:
        return "not pruned: attentions were asked for, and of a pruned cache they have no place for what was dropped"
    if torch.is_grad_enabled() and run.embeddings is not None and run.embeddings.requires_grad:
        return "not pruned: gradients are on, and none pass through a pruned cache (use torch.no_grad())"
    if torch.compiler.is_compiling():
        return "not pruned: the model is being compiled"
    for layer in cache.layers:
        if type(layer).__name__.startswith("Static"):
            return "not pruned: a static cache keeps its shape (leave out cache_implementation)"
    if type(cache).__name__ == "QuantizedCache" or any("Quant" in type(layer).__name__ for layer in cache.layers):
        return "not pruned: the cache is quantized (leave out cache_implementation)"
    if getattr(cache, "offloading", False):
        return "not pruned: the cache is offloaded (leave out cache_implementation)"
    return ""


def prune(run, family, language_model, budget, prompts):
    """Prune the audio of the pass that has just ended, in every layer that the family lets us, and say what was done."""
    audio, cache, pruner = run.audio, run.cache, run.pruner
    visible = torch.ones_like(audio) if run.visible is None else run.visible
    audio = audio & visible
    tokens = audio.shape[1]
    index = places(audio)  # [rows, most], in the pass
    present = index >= 0
    clip = ((audio[:, 1:] & ~audio[:, :-1]).cumsum(-1)).gather(1, (index - 1).clamp(min=0)) if tokens > 1 else index * 0
    tail = tokens - 1 - int(index.max())
    common = {}
    seen = _seen(run, visible).gather(1, index.clamp(min=0)) if run.received else torch.zeros_like(index, dtype=torch.float32)
    embeddings = None
    if run.embeddings is not None:
        embeddings = run.embeddings.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, run.embeddings.shape[-1]))
    kept_counts, held, full = [], 0, 0
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, (DynamicLayer, PrunedLayer)) or layer.is_sliding or not family.prunes(language_model, number):
            continue
        meta = Meta(number, len(cache.layers), present, index.clamp(min=0), clip, seen, embeddings, family.rate, common)
        keys, values = layer.passed if isinstance(layer, PrunedLayer) else (layer.keys, layer.values)
        heads = keys.shape[1]
        where = index.clamp(min=0)[:, None].expand(-1, heads, -1)
        k, v = take(keys, where), take(values, where)
        received = run.received.pop(number, None)
        if received is not None:
            received = received.gather(2, where)
        scores = pruner.score(k, v, received, meta)
        if tuple(scores.shape) != tuple(k.shape[:3]):
            raise ValueError(
                f"{type(pruner).__name__}.score must return [rows, kv_heads, audio], {tuple(k.shape[:3])} here; got {tuple(scores.shape)}"
            )
        scores = torch.nan_to_num(scores.float(), neginf=torch.finfo(torch.float32).min).masked_fill(~present[:, None], -torch.inf)
        chosen = pruner.select(scores, budget)
        stays = (visible & ~audio)[:, None].expand(-1, heads, -1).clone()
        there = chosen >= 0
        row, head = (each[..., None].expand_as(chosen)[there] for each in torch.meshgrid(
            torch.arange(stays.shape[0], device=chosen.device), torch.arange(heads, device=chosen.device), indexing="ij"))
        stays[row, head, index[row, chosen[there]]] = True
        place = places(stays)
        if isinstance(layer, PrunedLayer):
            was = layer.lengths.long() - visible.sum(-1)[:, None]  # tokens of a head before this pass
            rank = visible.cumsum(-1) - 1  # of a token of the pass among those that entered
            new = rank[:, None].expand_as(stays).gather(2, place.clamp(min=0)) + was[..., None]
            old = torch.arange(int(was.max()), device=place.device).expand(*was.shape, -1)
            both = torch.cat([old.masked_fill(old >= was[..., None], -1), new.masked_fill(place < 0, -1)], -1)
            order = (both < 0).to(torch.uint8).argsort(dim=-1, stable=True)
            both = both.gather(-1, order)[..., : int((both >= 0).sum(-1).max())]
            layer.keep(both)
            layer.tail, layer.passed = tail, None
        else:
            was = layer.get_seq_length() * 0 + torch.zeros(stays.shape[:2], dtype=torch.int64, device=place.device)
            lengths = (place >= 0).sum(-1, dtype=torch.int32)
            layer = PrunedLayer.gather(layer.keys, layer.values, place, lengths, layer.get_seq_length(), tail)
            cache.layers[number] = layer
        if type(pruner).apply is not BasePruner.apply:
            kept = Kept(*pruner.apply(k, v, chosen))
            before = (stays.cumsum(-1) - 1).gather(2, index[:, None].expand(-1, heads, -1).clamp(min=0))
            at = before.gather(2, chosen.clamp(min=0)) + was[..., None]
            layer.hold(at.masked_fill(~there, -1), kept)
        kept_counts.append(tuple(there.sum(-1).float().mean(0).tolist()))
        held += layer.bytes()
        full += 2 * layer.logical * keys.shape[0] * heads * keys.shape[-1] * keys.element_size()
    return PruneStats(
        rows=audio.shape[0],
        tokens=int(visible.sum(-1).max()),
        audio_tokens=int(present.sum(-1).max()),
        kept=tuple(kept_counts),
        bytes=held,
        bytes_full=full,
        prompts=prompts,
    )


def _seen(run, visible):
    """float32 [rows, tokens]: how many of the chosen queries could see a token."""
    asked = torch.zeros_like(visible, dtype=torch.float32)
    asked[:, run.choose_queries().long()] = 1
    asked = asked * visible
    return asked.flip(-1).cumsum(-1).flip(-1)
