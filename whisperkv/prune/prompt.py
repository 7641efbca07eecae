"""The pruning of one prompt, once the language model has read it: layer by layer, what the pruner keeps stays."""

import torch
from transformers.cache_utils import DynamicLayer

from .base import BasePruner, Kept, Meta, kept_of, places, take
from .hearing import begins_of
from .layer import PrunedLayer
from .records import PruneStats


def why_not(cache, run):
    """Why a prompt cannot be pruned; "" if it can."""
    if run.asks_attentions:
        return "not pruned: attentions were asked for, and those of a pruned cache have no place for what was dropped"
    if run.is_special:
        return "not pruned: the model's attention caps its logits or has sinks, as that over a pruned cache does not"
    if torch.is_grad_enabled() and run.embeddings is not None and run.embeddings.requires_grad:
        return "not pruned: gradients are on, and none pass through a pruned cache (use torch.no_grad())"
    kinds = {type(layer).__name__ for layer in cache.layers} | {type(cache).__name__}
    for part, what in (("Static", "keeps its shape"), ("Quant", "is quantized")):
        if any(part in kind for kind in kinds):
            return f"not pruned: the cache {what} (leave out cache_implementation)"
    if getattr(cache, "offloading", False):
        return "not pruned: the cache is offloaded (leave out cache_implementation)"
    return ""


class Prompt:
    """Where the audio stands among the tokens of a pass, and what all layers share."""

    def __init__(self, run, rate, layers):
        self.pruner, self.run, self.rate, self.layers, self.shared = run.pruner, run, rate, layers, {}
        self.visible = run.shown
        self.audio = run.audio & self.visible
        index = places(self.audio)
        self.present = index >= 0
        self.index = index.clamp(min=0)  # [rows, audio], in the pass
        self.tail = self.audio.shape[1] - 1 - int(index.max())  # tokens behind the last audio
        self.clip = (begins_of(self.audio).cumsum(-1) - 1).gather(1, self.index)
        self.seen = self._seen() if run.received else torch.zeros_like(self.index, dtype=torch.float32)
        self.attended = self._attended() if run.received else None
        self.embeddings = run.embeddings
        if run.embeddings is not None:
            self.embeddings = run.embeddings.gather(1, self.index[..., None].expand(-1, -1, run.embeddings.shape[-1]))
        silent = run.silent() if run.pruner.needs_silence else None
        self.silent = None if silent is None else silent.gather(1, self.index) & self.present
        self.since = None if silent is None else run.since().gather(1, self.index)

    def _seen(self):
        """float32 [rows, audio]: how many of the queries whose attention was added up could see a token."""
        asked = torch.zeros_like(self.visible, dtype=torch.float32)
        asked[:, self.run.choose_queries().long()] = 1
        return (asked * self.visible).flip(-1).cumsum(-1).flip(-1).gather(1, self.index)

    def _attended(self):
        """float32 [rows, audio]: the attention that a token received, in all layers and by all heads."""
        total = torch.zeros(self.visible.shape, device=self.index.device)
        for received in self.run.received.values():
            total += received.sum(1).to(total.device)
        return total.gather(1, self.index)

    def score(self, number, keys, values, heard):
        """(keys, values, scores) of a layer's audio, [rows, kv_heads, audio, ...]; of what is not there -inf."""
        where = self.index[:, None].expand(-1, keys.shape[1], -1)
        k, v = take(keys, where), take(values, where)
        received = self.run.received.pop(number, None)
        received = None if received is None else received.gather(2, where)
        meta = Meta(
            layer=number,
            layers=self.layers,
            present=self.present,
            tokens=self.index,
            clip=self.clip,
            seen=self.seen,
            embeddings=self.embeddings,
            rate=self.rate,
            features=self.run.features,
            silent=self.silent,
            since=self.since,
            attended=self.attended,
            heard=heard,
            shared=self.shared,
        )
        scores = self.pruner.score(k, v, received, meta)
        if tuple(scores.shape) != tuple(k.shape[:3]):
            raise ValueError(
                f"{type(self.pruner).__name__}.score must return [rows, kv_heads, audio], here {list(k.shape[:3])}; "
                f"got {list(scores.shape)}"
            )
        most = torch.finfo(torch.float32).max
        scores = scores.float().nan_to_num(nan=-most, posinf=most, neginf=-most)
        return k, v, scores.masked_fill(~self.present[:, None], -torch.inf)

    def choose(self, k, v, scores, budget):
        """What the pruner keeps of a layer's audio: the places of its tokens among the audio's, [rows, kv_heads, kept],
        -1 behind the last, and what it makes of them, None if they stay as they are."""
        chosen = self.pruner.select(scores, budget)
        if getattr(self.pruner.apply, "__func__", None) is BasePruner.apply:
            return chosen, None
        return chosen, self._made_of(k, v, chosen)

    def of_all(self, scores):
        """Of each token of the pass: inf of text. float32 [rows, kv_heads, tokens]"""
        spread = scores.new_full((*scores.shape[:2], self.audio.shape[1] + 1), torch.inf)
        where = self.index.masked_fill(~self.present, self.audio.shape[1])
        return spread.scatter_(2, where[:, None].expand_as(scores), scores)[..., :-1].masked_fill(
            ~self.audio[:, None], torch.inf
        )

    def _made_of(self, k, v, chosen):
        """What the pruner makes of the chosen: of rows that have as much audio together, so that it sees no gaps."""
        audio = self.present.sum(-1).tolist()
        if len(set(audio)) == 1:
            return Kept(*self.pruner.apply(k, v, chosen))
        keys, values = take(k, chosen).float(), take(v, chosen).float()
        counts = torch.ones(chosen.shape, device=k.device)
        for row, count in enumerate(audio):
            one, most = slice(row, row + 1), int((chosen[row] >= 0).sum(-1).max())
            made = Kept(*self.pruner.apply(k[one, :, :count], v[one, :, :count], chosen[one, :, :most]))
            keys[one, :, :most], values[one, :, :most] = made.keys.float(), made.values.float()
            if made.counts is not None:
                counts[one, :, :most] = made.counts
        return Kept(keys, values, counts)

    def stays(self, chosen):
        """bool [rows, kv_heads, tokens]: which tokens of the pass stay."""
        rows, heads, audio = chosen.shape[0], chosen.shape[1], self.index.shape[1]
        kept = chosen.new_zeros(rows, heads, audio + 1, dtype=torch.bool)  # the last takes what is -1
        kept.scatter_(2, chosen.masked_fill(chosen < 0, audio), True)
        stays = (self.visible & ~self.audio)[:, None].expand(-1, heads, -1).clone()
        kept = kept[..., :audio] & self.present[:, None]
        row, head, nth = kept.nonzero(as_tuple=True)
        stays[row, head, self.index[row, nth]] = True
        return stays

    def at(self, chosen, stays, before):
        """Where in its head each chosen token now is, [rows, kv_heads, kept], -1 behind the last."""
        place = (stays.cumsum(-1) - 1).gather(2, self.index[:, None].expand(-1, stays.shape[1], -1))
        place = place.gather(2, chosen.clamp(min=0)) + before[..., None]
        return place.masked_fill(chosen < 0, -1)


def prune(run, family, language_model, budget):
    """Prune the audio of the pass that has just ended, in every layer that the family lets us; say what was done."""
    cache = run.cache
    prompt = Prompt(run, family.rate, len(cache.layers))
    tokens = prompt.audio.shape[1]
    counts, held, full, heard = [], 0, 0, 0
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer | PrunedLayer) or not family.prunes(language_model, number):
            continue
        if layer.is_sliding and layer.keys.shape[2] < layer.get_seq_length():  # a text longer than any that it can read
            continue
        is_new = isinstance(layer, DynamicLayer)
        keys, values = (layer.keys, layer.values) if is_new else layer.passed
        before = 0 if is_new else layer.heard
        k, v, scores = prompt.score(number, keys[:, :, -tokens:], values[:, :, -tokens:], before)
        visible = prompt.visible[:, None].expand(-1, k.shape[1], -1)
        kept = None
        if run.streams:
            stays = visible
        else:
            chosen, kept = prompt.choose(k, v, scores, budget)
            stays = prompt.stays(chosen)
        if is_new:
            first = _earlier(run, layer.get_seq_length() - tokens, visible)
            index = places(torch.cat([first, stays], -1))
            cache.layers[number] = layer = PrunedLayer.gather(keys, values, index, layer.get_seq_length())
            ahead = first.sum(-1)
        else:
            ahead = layer.lengths.long() - prompt.visible.sum(-1)[:, None]
            if not run.streams:
                layer.keep_of_last(stays, prompt.visible)
        layer.tail, layer.passed = prompt.tail, None
        layer.heard = heard = prompt.present.sum(-1, keepdim=True) + before
        if run.streams:
            stay = layer.keep_best(prompt.of_all(scores), prompt.visible, kept_of(heard, budget))
        else:
            stay = (chosen >= 0).sum(-1)
        if kept is not None:
            layer.hold(prompt.at(chosen, stays, ahead), kept)
        counts.append(tuple(stay.double().mean(0).tolist()))
        held += layer.bytes()
        full += layer.bytes_full()
    if not counts:
        return PruneStats(note="not pruned: no layer of the model looks at all tokens", prompts=run.number - 1)
    return PruneStats(
        rows=prompt.audio.shape[0],
        tokens=int(prompt.visible.sum(-1).max()) + (0 if run.earlier is None else int(run.earlier.sum(-1).max())),
        audio_tokens=int((heard if run.streams else prompt.present.sum(-1)).max()),
        kept=tuple(counts),
        bytes=held,
        bytes_full=full,
        prompts=run.number,
    )


def _earlier(run, tokens, like):
    """bool [rows, kv_heads, tokens]: which of the tokens before the pass are no padding."""
    if run.earlier is None or not tokens:
        return like.new_ones(*like.shape[:2], tokens)
    return run.earlier[:, None, -tokens:].expand(-1, like.shape[1], -1)
