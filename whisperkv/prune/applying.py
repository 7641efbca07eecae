"""apply(), remove() and stats(): pruning in a speech LLM that is otherwise left alone."""

import weakref
from typing import Any

import torch
from transformers import DynamicCache

from ..compat import CACHE, OLD_CACHE
from . import attention, prompt
from .base import BasePruner, check_budget
from .families import family_of
from .layer import PrunedLayer
from .pruners import pruner_of, streaming
from .records import PruneStats
from .running import Run, running

_APPLIED: weakref.WeakKeyDictionary[Any, "Pruning"] = weakref.WeakKeyDictionary()

PIECE = 512  # tokens of a prompt that are read at once, with stream=True


def apply(
    model: Any, pruner: str | BasePruner = "merge", budget: float | int = 0.5, stream: bool = False, **settings: Any
) -> "Pruning":
    """Let a speech LLM drop part of the audio from its cache as soon as it has read the prompt.

    model     one of the families of whisperkv.prune.families, from transformers
    pruner    the name of a pruner, as "merge", or one that was made
    budget    the share of the audio tokens that stay, or their number
    stream    read a prompt in pieces and prune as they arrive, so that never more than the budget and a piece is held;
              the budget counts over all pieces and turns. For pruners whose scores can be compared over time, as
              "streaming_anchor". The logits of a prompt are then those of its last piece
    settings  of the pruner, by name: apply(model, "random", budget=0.5, seed=3)

    What comes back can stand in a `with`, after which the model is as it was; or call remove(model). A model to which a
    pruner is applied already takes the new one.
    """
    check_budget(budget)
    pruner = pruner_of(pruner, settings)
    if not isinstance(stream, bool):
        raise TypeError(f"stream must be True or False; got {stream!r}")
    if stream and not pruner.streams:
        raise ValueError(f"stream=True is for pruners that can, {', '.join(streaming())}; got {type(pruner).__name__}")
    family = family_of(model)
    model = family.whole(model)
    remove(model)
    _APPLIED[model] = pruning = Pruning(model, family, pruner, budget, stream)
    return pruning


def remove(model: Any) -> None:
    """Make the model what it was before apply(). One that has no pruner is left alone."""
    pruning = _of(model)
    if pruning is not None:
        pruning.remove()


def stats(model: Any) -> PruneStats:
    """The cache of the last prompt that held audio."""
    pruning = _of(model)
    if pruning is None:
        raise ValueError("no pruner is applied to the model: call whisperkv.prune.apply(model, ...) first")
    return pruning.stats


def _of(model):
    try:
        return _APPLIED.get(family_of(model).whole(model))
    except TypeError:
        return None


def _features(given):
    """What a pass brings of audio, as the model is given it."""
    names = (name for name, value in given.items() if "features" in name and "mask" not in name and value is not None)
    return given.get(next(names, None))


def _hears(tokens, given):
    """Whether a pass brings audio. Without, the token that stands for it is one that the model has written itself."""
    if tokens.shape[1] == 1:  # Phi-4 is given the features again with each token that it has written
        return False
    cache = given.get("cache", given.get(OLD_CACHE))
    return cache is None or cache.get_seq_length() == 0 or _features(given) is not None


def _of_piece(value, begin, end, tokens):
    """Of embeddings [rows, tokens, width], and of positions, whose last side is tokens."""
    if not isinstance(value, torch.Tensor) or tokens not in value.shape:
        return value
    if value.is_floating_point() and value.dim() >= 3 and value.shape[1] == tokens:
        return value[:, begin:end]
    return value[..., begin:end] if value.shape[-1] == tokens else value


class Pruning:
    """A pruner at work in a model, until remove() or the end of a `with`."""

    def __init__(self, model, family, pruner, budget, stream=False):
        self._model = weakref.ref(model)
        self.family, self.pruner, self.budget, self.stream = family, pruner, budget, stream
        self.language_model = family.language_model(model)
        self.audio_token = family.audio_token(model)
        self.stats = PruneStats()
        attention.install(self.language_model.config)
        hooks = (
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            self.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            self.language_model.register_forward_hook(self._after_language_model, with_kwargs=True),
        )
        embedder = family.embedder(self.language_model)
        if embedder is not None:
            hooks += (embedder.register_forward_hook(self._after_embedder),)
        self._hooks = hooks

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.remove()

    def __repr__(self):
        return f"Pruning({self.pruner!r}, budget={self.budget!r}{', stream=True' if self.stream else ''})"

    def remove(self):
        for hook in self._hooks:
            hook.remove()
        attention.uninstall(self.language_model.config)
        model = self._model()
        if model is not None and _APPLIED.get(model) is self:
            del _APPLIED[model]

    # One pass: the model is given tokens, its language model the embeddings of these, and of audio

    def _before_model(self, model, args, kwargs):
        tokens = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        audio = visible = None
        if tokens is not None:
            found = tokens == self.audio_token
            audio = found if _hears(tokens, kwargs) and bool(found.any()) else None
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                mask = mask.bool()
                visible = None if bool(mask.all()) else mask[:, -tokens.shape[1] :]
        if audio is not None and bool(audio[:, -1].any()):
            raise ValueError("the prompt ends inside its audio: nothing after it asks for a text")
        run = Run(self.family, self.pruner, audio, visible)
        run.embedded, run.streams, run.number = tokens is None, self.stream, self.stats.prompts + 1
        if visible is not None:
            run.earlier = mask[:, : -tokens.shape[1]]
        features = None if audio is None else _features(kwargs)
        if isinstance(features, torch.Tensor) and features.dim() == 3:
            run.features = self.family.columns(features, model.config)
        run.asks_attentions = bool(kwargs.get("output_attentions"))
        run.start()

    def _after_model(self, model, args, output):
        Run.end()

    def _before_language_model(self, language_model, args, kwargs):
        run = running()
        if run is None:
            run = Run(self.family, self.pruner, None, None)
            run.start()
        name = next((name for name in ("cache", OLD_CACHE) if name in kwargs), CACHE)
        cache = kwargs.get(name)
        embeddings = kwargs.get("inputs_embeds")
        if run.audio is not None and embeddings is not None:
            self.family.check(run.audio.shape[1], embeddings.shape[1])
        run.embeddings = embeddings if run.audio is not None else None
        attention.install(language_model.config)  # in case someone has chosen another since
        if run.audio is None and (cache is None or cache.get_seq_length() == 0):
            self._hear_nothing(run)
        if cache is None:
            uses_cache = kwargs.get("use_cache")
            if run.audio is None or not (language_model.config.use_cache if uses_cache is None else uses_cache):
                return None
            cache = DynamicCache(config=language_model.config)
            kwargs = {**kwargs, name: cache}
        pruned = []
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, PrunedLayer):
                if layer.logical == 0:  # it has been reset
                    cache.layers[number] = DynamicCache(config=language_model.config).layers[number]
                else:
                    pruned.append(layer)
        run.enter(cache, pruned)
        if run.streams and run.audio is not None and not run.is_piece and not args:
            kwargs = self._read_in_pieces(language_model, kwargs, run, name, cache)
        return args, kwargs

    def _read_in_pieces(self, language_model, kwargs, run, name, cache):
        """Read all pieces of a prompt but the last, and return what is given for that one."""
        tokens, past, mask = run.audio.shape[1], cache.get_seq_length(), kwargs.get("attention_mask")
        hears_inside = kwargs.get("inputs_embeds") is None  # then what the language model is given cannot be cut
        is_plain = mask is None or getattr(mask, "ndim", 0) == 2
        if tokens <= PIECE or hears_inside or not is_plain or prompt.why_not(cache, run):
            return kwargs
        for begin in range(0, tokens, PIECE):
            end = min(begin + PIECE, tokens)
            piece = run.piece(begin, end)
            part = {each: _of_piece(value, begin, end, tokens) for each, value in kwargs.items()}
            part |= {"attention_mask": None if mask is None else mask[:, : past + end], name: cache, "use_cache": True}
            piece.start()
            if end < tokens:
                language_model(**part)
        piece.embeddings = part["inputs_embeds"]
        piece.enter(cache, [layer for layer in cache.layers if isinstance(layer, PrunedLayer)])
        return part

    def _after_embedder(self, embedder, args, embeddings):
        run = running()
        if run is not None and run.audio is not None:
            run.embeddings = embeddings

    def _hear_nothing(self, run):
        if run.embedded:
            note = "not pruned: the prompt was given as embeddings, of which none is known to be audio (give input_ids)"
            self.stats = PruneStats(note=note, prompts=self.stats.prompts)
            return
        raise ValueError(
            f"no audio in the prompt: token {self.audio_token}, which stands for it, is not in input_ids. For text "
            "alone call whisperkv.prune.remove(model) first"
        )

    def _after_language_model(self, language_model, args, kwargs, output):
        run = running()
        if run is None or run.audio is None or run.cache is None:
            return
        run.note = prompt.why_not(run.cache, run)
        if run.note:
            self.stats = PruneStats(note=run.note, prompts=self.stats.prompts)
            return
        with torch.no_grad():
            self.stats = prompt.prune(run, self.family, language_model, self.budget)
