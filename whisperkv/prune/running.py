"""The pass that a thread is in: what the layers and our attention must know of it and cannot be told as arguments."""

from contextvars import ContextVar

import torch

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

    def start(self):
        _RUNNING.set(self)

    @staticmethod
    def end():
        _RUNNING.set(None)

    def enter(self, cache, pruned):
        self.cache, self._pruned = cache, frozenset(map(id, pruned))

    def attends_to(self, layer):
        return id(layer) in self._pruned

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
