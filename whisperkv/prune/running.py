"""The pass that a thread is in: what the layers and our attention must know of it and cannot be told as arguments."""

from contextvars import ContextVar

import torch

from .hearing import silent_tokens

_RUNNING = ContextVar("whisperkv.prune", default=None)


def running():
    """The pass of this thread, or None."""
    return _RUNNING.get()


class Run:
    """One pass of a language model, from the model's own forward to its end."""

    def __init__(self, family, pruner, audio, visible):
        self.family, self.pruner = family, pruner
        self.audio = audio  # bool [rows, tokens], or None where no token is audio
        self.visible = visible  # bool [rows, tokens], or None if all are
        self.earlier = None  # the same of the tokens before the pass
        self.is_piece = self.streams = False  # of a prompt that is read in pieces
        self.number = 0  # of the prompt since apply()
        self.embedded = True  # whether the model was given embeddings instead of tokens
        self.asks_attentions = False
        self.is_special = False  # whether its attention is of a kind that ours is not
        self.note = ""
        self.cache = None
        self.features = None  # what the audio encoder is given
        self.embeddings = None  # [rows, tokens, width]
        self.received = {}  # of a layer's number: attention that its tokens have received from all that read them
        self.queries = None  # whose attention is added up
        self._pruned = frozenset()
        self._silent = self._since = None

    def piece(self, begin, end):
        """A pass over some tokens of this one."""
        some = slice(begin, end)
        audio = self.audio[:, some]
        piece = Run(self.family, self.pruner, audio if bool(audio.any()) else None, _part(self.visible, some))
        piece.is_piece, piece.streams, piece.number, piece.embedded = True, self.streams, self.number, self.embedded
        if begin and self.visible is not None:
            piece.earlier = self.visible[:, :begin]
        if self.pruner.needs_silence:
            piece._silent, piece._since = _part(self.silent(), some), _part(self.since(), some)
        piece.features = self.features
        return piece

    def silent(self):
        """bool [rows, tokens]: audio without speech; None if that cannot be told."""
        if self._silent is None and not self.is_piece:
            self._silent = silent_tokens(self.features, self.audio & self.shown)
        return self._silent

    def since(self):
        """int64 [rows, tokens]: of speech, how many tokens ago it began; -1 of all else. None if it cannot be told."""
        if self._since is None and self.silent() is not None:
            speech = self.audio & ~self.silent()
            place = torch.arange(speech.shape[1], device=speech.device).expand_as(speech)
            self._since = (place - place.masked_fill(speech, -1).cummax(-1).values - 1).masked_fill(~speech, -1)
        return self._since

    def start(self):
        _RUNNING.set(self)

    @staticmethod
    def end():
        _RUNNING.set(None)

    def enter(self, cache, pruned):
        self.cache, self._pruned = cache, frozenset(map(id, pruned))

    def attends_to(self, layer):
        return id(layer) in self._pruned

    @property
    def shown(self):
        """bool [rows, tokens]: what is no padding, of a pass that holds audio."""
        return torch.ones_like(self.audio) if self.visible is None else self.visible

    def visible_of(self, tokens):
        """Which of the pass's tokens enter a pruned layer; None if all do."""
        if self.visible is None or tokens != self.visible.shape[1]:
            return None
        return self.visible

    @property
    def collects(self):
        return self.audio is not None and self.pruner.needs_attention

    def receive(self, module, attention):
        number = self.family.reads(module)
        before = self.received.get(number)
        self.received[number] = attention if before is None else before + attention

    def choose_queries(self):
        """The places of the queries whose attention is added up: some of the audio's, and all of the text after it."""
        if self.queries is None:
            tokens = self.audio.shape[1]
            text = ~self.audio
            text[:, : int(self.audio.int().argmax(-1).min())] = False  # before any audio
            chosen = text.any(0)
            chosen[:: self.pruner.every] = True
            self.queries = torch.arange(tokens, device=self.audio.device)[chosen].int()
        return self.queries


def _part(tensor, some):
    return None if tensor is None else tensor[:, some]
