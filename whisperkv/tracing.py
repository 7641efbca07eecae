"""trace(): what a real decode attends to and what its caches hold, step by step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .attention import self_cache_layer
from .compat import CACHE, with_new_names
from .patching import _decoder, _whisper, stats


@dataclass
class Pass:
    """One pass of the decoder over `tokens` new tokens, behind `start` that were there before."""

    start: int
    ids: torch.Tensor  # int64 [rows, tokens]
    order: torch.Tensor | None = None  # int64 [rows]: the rows of the pass before that these go on from, with beams
    attention: list[torch.Tensor] = field(default_factory=list)  # of each layer, [rows, heads, tokens, start + tokens]
    kept: list[torch.Tensor] = field(default_factory=list)  # of each layer, bool [rows, start + tokens]
    keys: list[torch.Tensor] = field(default_factory=list)  # of each layer, [rows, tokens, heads, head_dim]
    self_bytes: int = 0
    cross_bytes: int = 0

    @property
    def end(self) -> int:
        return self.start + self.ids.shape[1]


class Decode:
    """One decode: a window of 30 s, or an attempt at one. Steps are the passes after the prompt's, and a row is what
    ended in that row: with beams, the path that led there."""

    def __init__(self, padding: list[int], end_token: int | None) -> None:
        self.passes: list[Pass] = []
        self._padding, self._end_token = padding, end_token

    @property
    def rows(self) -> int:
        return len(self._padding)

    @property
    def layers(self) -> int:
        return len(self.passes[0].attention)

    def tokens(self, row: int = 0) -> list[int]:
        """What went in: the prompt and the transcript, without padding before and after."""
        return self._ids(row)[self._padding_of(row) : self._end(row)]

    def prompt(self, row: int = 0) -> int:
        """Tokens of the first pass."""
        return self.passes[0].end - self._padding_of(row)

    def attention(self, layer: int = 0, row: int = 0) -> NDArray[np.float32]:
        """[steps, heads, tokens] of a layer's self-attention, as simulate_eviction() takes it: a token that a step
        cannot see yet has 0, and so has one that was evicted before."""
        return self._laid_out(row, lambda one, at: one.attention[layer][at], np.float32)

    def kept(self, layer: int = 0, row: int = 0) -> NDArray[np.bool_]:
        """[steps, tokens]: those that a layer's cache held when a step attended to it."""
        return self._laid_out(row, lambda one, at: one.kept[layer][at][None, None], bool)[:, 0]

    def keys(self, layer: int = 0, row: int = 0) -> NDArray[np.float32]:
        """[tokens, heads, head_dim] of a layer, as simulate_eviction() takes them for the policy "magnitude"."""
        found = [one.keys[layer][at] for one, at in self._path(row)]
        return torch.cat(found)[self._padding_of(row) : self._end(row)].float().numpy()

    def cache_bytes(self) -> NDArray[np.int64]:
        """[passes, 2]: bytes of the self-attention and of the cross-attention cache after each pass, of all rows."""
        return np.array([(one.self_bytes, one.cross_bytes) for one in self.passes], np.int64)

    def __repr__(self) -> str:
        return f"Decode(rows={self.rows}, layers={self.layers}, tokens={self.passes[-1].end})"

    def _path(self, row):
        """(pass, the row in it) of all passes, in order."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be from 0 to {self.rows - 1}; got {row}")
        found = []
        for one in reversed(self.passes):
            found.append((one, row))
            row = row if one.order is None else int(one.order[row])
        return found[::-1]

    def _ids(self, row):
        return torch.cat([one.ids[at] for one, at in self._path(row)]).tolist()

    def _padding_of(self, row):
        return self._padding[self._path(row)[0][1]]

    def _end(self, row):
        """The number of tokens, padding before them included, up to where others of the batch went on without it."""
        ids, first = self._ids(row), self.passes[0].end
        rest = ids[first:]
        return first + (rest.index(self._end_token) if self._end_token in rest else len(rest))

    def _laid_out(self, row, part, dtype):
        """What each step has of the tokens up to its own, [heads, tokens of the pass, width], in rows of one width."""
        path, begin, end = self._path(row)[1:], self._padding_of(row), self._end(row)
        steps = end - self.passes[0].end
        if steps == 0:
            raise ValueError("this decode ended with its prompt: there is no step to look at")
        shape = part(*path[0]).shape
        found = np.zeros((steps, shape[0], end), dtype)
        for one, at in path:
            values = part(one, at)
            for number in range(one.ids.shape[1]):
                step = one.start + number - self.passes[0].end
                if step < steps:
                    width = one.start + number + 1
                    found[step, :, :width] = values[:, min(number, values.shape[1] - 1), :width].numpy()
        return found[..., begin:]


class Trace:
    """What trace() has recorded: `decodes`, and of the last of them attention(), kept(), keys(), tokens()."""

    def __init__(self) -> None:
        self.decodes: list[Decode] = []

    def __len__(self) -> int:
        return len(self.decodes)

    def __getitem__(self, index: int) -> Decode:
        return self.decodes[index]

    def __repr__(self) -> str:
        return f"Trace({self.decodes})"

    def attention(self, layer: int = 0, row: int = 0) -> NDArray[np.float32]:
        return self._last().attention(layer, row)

    def kept(self, layer: int = 0, row: int = 0) -> NDArray[np.bool_]:
        return self._last().kept(layer, row)

    def keys(self, layer: int = 0, row: int = 0) -> NDArray[np.float32]:
        return self._last().keys(layer, row)

    def tokens(self, row: int = 0) -> list[int]:
        return self._last().tokens(row)

    def cache_bytes(self) -> NDArray[np.int64]:
        return self._last().cache_bytes()

    def _last(self):
        if not self.decodes:
            raise ValueError("nothing was decoded with a cache inside `with whisperkv.trace(model)`")
        return self.decodes[-1]


@contextmanager
def trace(model: object) -> Iterator[Trace]:
    """Record what is decoded inside: `with whisperkv.trace(model) as recorded: model.generate(...)`.

    model  what patch() takes, patched or not. Patched, it shows which tokens each layer kept; what it evicted has no
           attention any more, so for simulate_eviction() record unpatched or with patch(model)

    Recorded are, for each layer and step, the weights of self-attention, the tokens that were there and their keys. The
    model decodes layer by layer with the eager attention meanwhile, which is slower and rounds in its own way.
    """
    whisper = _whisper(model)
    decoder, config = _decoder(whisper), whisper.config
    before = config._attn_implementation, config.output_attentions
    recorder = _Recorder(whisper)
    hooks = [
        decoder.register_forward_pre_hook(recorder.begin, with_kwargs=True),
        decoder.register_forward_hook(recorder.end),
    ]
    try:
        whisper.set_attn_implementation("eager")
        config.output_attentions = True  # our attentions give weights where they are asked for
        for index, layer in enumerate(decoder.layers):
            hooks += [
                layer.self_attn.register_forward_hook(recorder.attended(index), with_kwargs=True),
                layer.self_attn.k_proj.register_forward_hook(recorder.projected),
            ]
        yield recorder.trace
    finally:
        recorder.leave()
        for hook in hooks:
            hook.remove()
        config.output_attentions = before[1]
        whisper.set_attn_implementation(before[0])


class _Recorder:
    def __init__(self, whisper):
        self.whisper, self.trace = whisper, Trace()
        self.heads = whisper.config.decoder_attention_heads
        self.cache: Any = None
        self.now: Any = None  # the Pass that goes on
        self.padding: Any = None  # of each row of the decode
        self.order: Any = None

    def begin(self, decoder, args, kwargs):
        given = with_new_names(kwargs)
        ids = args[0] if args else given.get("input_ids")
        cache, mask = given.get(CACHE), given.get("attention_mask")
        start = 0 if cache is None else int(cache.get_seq_length())
        if ids is None:
            raise ValueError("trace() records decodes of input_ids, and this one was given inputs_embeds")
        self.now, self.keys = Pass(start, ids.detach().cpu()), []
        if start == 0 or self.padding is None:
            is_padded = mask is not None and mask.dim() == 2
            padding = (mask[:, : ids.shape[1]] == 0).sum(-1).tolist() if is_padded else [0] * len(ids)
            self.padding = padding
        return None

    def projected(self, module, args, output):
        self.keys.append(output.detach())

    def attended(self, index):
        def note(attention, args, kwargs, output):
            cache = with_new_names(kwargs).get(CACHE)
            if cache is None or self.now is None:  # a pass that no other follows, as when the language is looked for
                self.now = None
                return
            width, weights = self.now.end, output[1]
            if weights is None:
                raise RuntimeError("trace() needs the attention weights, and this model's attention gives none")
            layer = self_cache_layer(cache, index)
            kept = torch.ones(len(weights), width, dtype=torch.bool)
            if layer is not None and layer.eviction is not None:
                kept = layer.full_weights(weights.new_ones(len(weights), 1, 1, layer.slots))[:, 0, 0] > 0
            for row, padding in enumerate(self.padding):
                kept[row, :padding] = False
            self.now.attention.append(weights[..., :width].detach().cpu())
            self.now.kept.append(kept.cpu())
            self.now.keys.append(self.keys.pop().unflatten(-1, (self.heads, -1)).cpu())
            if index == 0:
                self._enter(cache)

        return note

    def _enter(self, cache):
        """Put the pass behind the last one of its decode."""
        if self.now.start == 0 or cache is not self.cache:
            self.leave()
            self.cache, self.order = cache, None
            self._follow(cache)
            self.trace.decodes.append(Decode(self.padding, self.whisper.config.eos_token_id))
        passes = self.trace.decodes[-1].passes
        while passes and passes[-1].start >= self.now.start:  # an assistant's guesses that were taken back
            passes.pop()
        if passes and passes[-1].end > self.now.start:
            _crop(passes[-1], self.now.start)
        self.now.order, self.order = self.order, None
        passes.append(self.now)

    def _follow(self, cache):
        """Note how beams move."""
        reorder = cache.reorder_cache

        def noted(beam_idx):
            rows = beam_idx.detach().cpu()
            self.order = rows if self.order is None else self.order[rows]
            return reorder(beam_idx)

        cache.reorder_cache = noted

    def leave(self):
        if self.cache is not None:
            vars(self.cache).pop("reorder_cache", None)
            self.cache = None

    def end(self, decoder, args, output):
        if self.now is None or not self.now.attention:
            return
        cache = self.cache
        if self_cache_layer(cache, 0) is not None:
            held = stats(self.whisper)
            self.now.self_bytes, self.now.cross_bytes = held.self_bytes, held.cross_bytes
        else:
            self.now.self_bytes = _bytes_of(getattr(cache, "self_attention_cache", cache))
            self.now.cross_bytes = _bytes_of(getattr(cache, "cross_attention_cache", None))


def _bytes_of(cache):
    layers = getattr(cache, "layers", ())
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)


def _crop(one, end):
    tokens = end - one.start
    one.ids = one.ids[:, :tokens]
    one.attention = [weights[:, :, :tokens] for weights in one.attention]
    one.keys = [keys[:, :tokens] for keys in one.keys]
