"""What the decoder carries: at the first pass of a decode its cache is given our layers, or left to transformers."""

from dataclasses import replace

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from .attention import self_cache_layer
from .cache import SelfCacheLayer
from .compat import CACHE, who_traces, with_new_names
from .cross_cache import Audios, CrossCacheLayer, first_rows, owners_of
from .eligible import check_device, check_projections, device_of, needs_grad, why_not
from .records import DecodeRecord, Stats
from .slots import Shared
from .views import Onlookers, layers_behind, plain_layer

_ARGUMENTS = ("input_ids", "attention_mask", "encoder_hidden_states", CACHE, "inputs_embeds")  # in order


class CacheAdoption:
    """A forward pre-hook of the decoder: a fresh cache is given our layers before anything enters it."""

    def __init__(self, eviction, cross, listener, graphs, steps=(), codes=None, low_rank=None):
        self.eviction, self.cross = eviction if eviction and eviction.evicts else None, cross
        self.codes = codes  # of what the encoder heard, where they are of mixed bits
        self.low_rank = low_rank  # a LowRank a layer, where the self-attention's cache holds latents
        self.listener = listener  # of the encoder, if frames are to be left out
        self.graphs = graphs  # of the steps to come, if they are wanted
        self.steps = steps  # what can take a plain step as a whole, in order
        self.record = None  # of the cache that was last passed through the decoder
        self.decodes = 0
        self.note = self.weights_note = ""

    def stats(self, weight_bytes=0):
        note = "; ".join(note for note in (self.note, self.weights_note) if note)
        stats = self.record.stats(self.decodes, note) if self.record else Stats(note=note)
        made = [*(self.low_rank or ()), *([self.codes] if self.codes else [])]
        return replace(stats, weight_bytes=weight_bytes + sum(each.nbytes for each in made))

    def __call__(self, decoder, args, kwargs):
        given = with_new_names({**dict(zip(_ARGUMENTS, args)), **kwargs})
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None or len(args) > len(_ARGUMENTS):
            return None
        rows, tokens = inputs.shape[:2]
        cache = given.get(CACHE)
        layer = self_cache_layer(cache, 0) or _resumed(cache)
        if layer is None or layer.seen == 0:
            layer = self._adopt(decoder, given, rows, tokens)
            if layer is None:
                return _for_each_row(given, rows, cache)
        elif layer.eviction is None and torch.is_grad_enabled() and needs_grad(decoder, given):
            _hand_back(cache)
            self.note = "left to transformers, with the tokens so far: gradients are on (decode under torch.no_grad())"
            return None
        elif tokens == 1:
            given["attention_mask"] = None  # our layers know the padding, and transformers would have to wait for it
        self.record = layer.shared.record
        self.record.tokens = layer.seen + tokens
        return (), given

    def _adopt(self, decoder, given, rows, tokens):
        """Give the fresh cache our layers, or make one if none is given. The first layer, or None if the decode is
        left to transformers."""
        cache, states, config = given.get(CACHE), given.get("encoder_hidden_states"), decoder.config
        use_cache = given.get("use_cache")
        if not (config.use_cache if use_cache is None else use_cache):
            return None
        if cache is not None and not isinstance(cache, Cache):
            return None
        tracer = who_traces(cache)  # first of all: a compiler could not follow what comes
        if tracer:
            self.note = f"left to transformers: {tracer}"
            return None
        if cache is not None and cache.get_seq_length() > 0:
            self.note = self.note or "left to transformers, which began this cache (start from a fresh one)"
            return None
        padding, self.note = _left_padding(given.get("attention_mask"), rows, tokens, device_of(decoder))
        self.note = self.note or why_not(decoder, given, self.cross)
        if self.note:
            return None
        check_device(decoder)
        check_projections(decoder, self.cross)
        if states is not None:
            _check_states(states, rows, config.d_model)
        if self.eviction is not None:
            self.eviction.check_prompt(tokens - (0 if padding is None else int(padding.min())))

        if cache is None or (states is not None and not isinstance(cache, EncoderDecoderCache)):
            cache = DynamicCache() if states is None else EncoderDecoderCache(DynamicCache(), DynamicCache())
            given[CACHE] = cache
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            given["attention_mask"] = mask[..., :tokens]  # made for a static cache of more slots
        record = DecodeRecord(
            layers=len(decoder.layers),
            width=config.d_model,
            item_size=decoder.embed_tokens.weight.dtype.itemsize,
            rows=rows,
            padding=0 if padding is None else int(padding.sum()),
            frames=0 if states is None else states.shape[1],
            eviction=self.eviction,
            rank=self.low_rank[0].rank if self.low_rank else None,
        )
        self.decodes += 1
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        is_plain = self.low_rank is None and self.codes is None  # what graphs have homes for
        is_captured = self.graphs is not None and is_plain and self.graphs.begin(decoder)
        shared = Shared(record, is_captured)
        own.layers = [
            SelfCacheLayer(self.eviction, config.max_target_positions, padding, shared, index, its)
            for index, its in enumerate(self.low_rank or [None] * record.layers)
        ]
        own.layer_class_to_replicate = None
        if states is not None:
            self._adopt_cross(cache, states, record, is_captured)
        return own.layers[0]

    def _adopt_cross(self, cache, states, record, is_captured):
        owners = owners_of(states, self.cross.share_beams)
        beams, keep = record.rows // len(states), None
        if self.listener is not None:
            keep = self.listener.kept(states[first_rows(owners, int(owners[-1]) + 1)])
            if keep is None:
                self.note = "not trimmed or merged: this encoder output was not made by the patched model's own encoder"
        audios, views = Audios.gather(states, owners, keep, record.layers, record, self.codes), Onlookers()
        record.audios, record.frames_kept = len(audios), int(audios.lengths.sum())
        home = self.graphs.home_of(audios, self.cross) if is_captured else None
        if home is not None:
            audios.move_to(home)
        owners = owners.repeat_interleave(beams)
        cache.cross_attention_cache.layers = [
            CrossCacheLayer(self.cross, audios, owners, index, views) for index in range(record.layers)
        ]
        cache.cross_attention_cache.layer_class_to_replicate = None
        cache.is_updated = dict.fromkeys(range(record.layers), False)


# Caches that change hands


def _halves(cache):
    is_pair = isinstance(cache, EncoderDecoderCache)
    return (cache.self_attention_cache, cache.cross_attention_cache) if is_pair else (cache,)


def _resumed(cache):
    """The first layer of a cache that generate() took apart and put together again, as it does with every output, now
    that it is decoded on (by an assistant, round after round): our layers stand in it again. None if it is not one."""
    if not isinstance(cache, Cache):
        return None
    halves = _halves(cache)
    found = [layers_behind(half, kind) for half, kind in zip(halves, (SelfCacheLayer, CrossCacheLayer))]
    if not all(found) or any(layer.eviction is not None for layer, _ in found[0]):
        return None  # what evicts cannot say which of its tokens were cropped
    for half, layers in zip(halves, found):
        half.layers = [layer for layer, _ in layers]
    for layer, tokens in found[0]:
        layer.remove(layer.seen - tokens)
    return halves[0].layers[0]


def _hand_back(cache):
    """Let transformers go on with the tokens so far."""
    for half in _halves(cache):
        half.layers = [plain_layer(layer) for layer in half.layers]


# Whether a decode can be ours


def _left_padding(mask, rows, tokens, device):
    """int32 [rows] of padding columns (None if there are none), and why the mask is not one that we can follow."""
    if mask is None:
        return None, ""
    if mask.dim() == 4:  # made for a static cache: the last token's row, over the tokens of this pass
        visible = mask[:, 0, -1, :tokens]
        visible = visible if visible.dtype == torch.bool else visible == 0
    else:
        visible = mask.bool()
    visible = visible.expand(rows, -1)
    if bool(visible.all()):
        return None, ""
    if visible.shape[1] != tokens or not bool((visible[:, 1:] >= visible[:, :-1]).all() & visible[:, -1].all()):
        return None, (
            "left to transformers: the decoder's attention mask is not plain left padding (generate() makes such a one "
            "of a prompt that holds the padding token itself)"
        )
    return (~visible).sum(-1).int().to(device), ""


def _check_states(states, rows, width):
    """One for each row, or for as many rows as decode an audio together."""
    if states.dim() != 3 or states.shape[-1] != width or len(states) == 0 or rows % len(states):
        raise ValueError(
            f"the encoder's output must be [rows={rows}, frames, width={width}] for {rows} rows of tokens; "
            f"got {list(states.shape)}"
        )


def _for_each_row(given, rows, cache):
    """What transformers is given, which knows no states of fewer rows than the tokens; None if that is no change."""
    states = given.get("encoder_hidden_states")
    if states is None or len(states) in (0, rows) or rows % len(states):
        return None
    if isinstance(cache, EncoderDecoderCache) and cache.get_seq_length() > 0:
        return None  # nobody reads them any more
    return (), {**given, "encoder_hidden_states": states.repeat_interleave(rows // len(states), 0)}
