"""How MLATrainer teaches a Whisper: recordings, what the model hears in them, and the matrices of its calibration.

The model is unpatched while it learns. Keys, values and what the encoder says are rounded and rebuilt as the caches do
it, so that the rest of the decoder is transformers' own; the gradient passes through the codes as if they were numbers.
"""

import hashlib
from contextlib import contextmanager

import torch
from safetensors.torch import load as tensors_of
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ..calibration import Calibration
from ..config import CrossConfig
from ..patching import unpatch
from ..transcription.audio import RATE
from . import whisper_converting
from .whisper_factors import Heard, Own
from .whisper_listening import FRAMES, begins, windows_of


class Part(nn.Module):
    """In the place of a projection to keys (0) or to values (1)."""

    def __init__(self, own, part, project, pairs):
        super().__init__()
        self.own, self.part, self.project, self.pairs = own, part, project, pairs

    def forward(self, states):
        rebuilt = self.own(states)[self.part]
        if self.pairs is not None:
            self.pairs.append((rebuilt, self.project(states).detach()))
        return rebuilt


class WhisperLessons:
    def __init__(self, model, aims, teacher):
        from transformers import WhisperFeatureExtractor

        whisper_converting.codes_of(model)
        config = model.config
        self.model, self.record, self.aims = model, model.lowrank, aims
        self.teacher = model if teacher is None else teacher
        self.seconds = config.max_source_positions // FRAMES
        self.extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=self.seconds)
        self._own, self._heard, self._most = [], None, None

    def rows(self, dataset, max_length):
        self._most = max_length
        return [window for window in windows_of(dataset, self.seconds) if len(window)]

    def order(self, rows, generator):
        """Of an epoch: windows of recordings side by side, as many as fit."""
        windows, space = [], 0
        for place in torch.randperm(len(rows), generator=generator).tolist():
            if len(rows[place]) > space:
                windows.append([])
                space = self.seconds * RATE
            windows[-1].append(rows[place])
            space -= len(rows[place])
        return [torch.cat([torch.from_numpy(row) for row in window]).numpy() for window in windows]

    def about(self, rows):
        """What tells a training from others."""
        tensors = sorted(tensors_of(self.record.calibration).items())
        return (
            self.record.to_dict(),
            [(name, _hash(tensor.numpy())) for name, tensor in tensors],
            list(map(_hash, rows)),
            self._most,
        )

    @contextmanager
    def factors(self):
        """What learns."""
        model = self.model
        whisper_converting.codes_of(model)
        unpatch(model)
        layers = model.get_decoder().layers
        try:
            with self.record.file() as file:
                tensors = Calibration(file, model.get_decoder(), "calibration").tensors
            self._heard = Heard(tensors, self.record.bits, CrossConfig().group).to(model.device)
            ranks = [] if self.record.rank is None else [self.record.rank] * len(layers)
            self._own = [
                Own(tensors, index, rank, layer.self_attn).to(model.device)
                for index, (rank, layer) in enumerate(zip(ranks, layers))
            ]
            yield [*self._own, self._heard]
        finally:
            self.record.patch(model)

    @torch.no_grad()
    def keep(self, factors):
        """Write what was learned into the record's calibration."""
        *own, heard = (each.learned() for each in factors)
        learned = {f"cross.{name}": matrix for name, matrix in heard.items()}
        for name in own[0] if own else ():
            learned[f"self.{name}"] = torch.stack([each[name] for each in own])
        self.record.learn({name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()})

    def loss(self, windows):
        model, teacher = self.model, self.teacher
        features = self.extractor(list(windows), sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            frames = model.get_encoder()(features.to(model.device, model.dtype)).last_hidden_state
            theirs = frames
            if teacher is not model:
                theirs = teacher.get_encoder()(features.to(teacher.device, teacher.dtype)).last_hidden_state
            tokens, said = self._transcribed(theirs)
        given, labels = tokens[:, :-1].to(model.device), tokens[:, 1:].to(model.device)[said]
        pairs = [] if self.aims.reconstructs else None
        with self._as_rebuilt(pairs):
            rebuilt = self._heard(frames)
            logits = logits_of(model, rebuilt, given)[said]
        there = said.flip(1).cumsum(1).flip(1) > 0  # to the last one that was said

        def both():
            yield rebuilt.flatten(0, 1), frames.flatten(0, 1)
            for one, other in pairs:
                yield one[there], other[there]

        return self.aims.loss(
            logits, labels, lambda: logits_of(teacher, theirs, given.to(theirs.device)).to(logits.device)[said], both
        )

    def _transcribed(self, frames):
        """Tokens [windows, length] of the teacher's transcripts, with what they begin with, and which of them but the
        first were said, ends among them, bool [windows, length - 1]."""
        starts = []

        def begin(_, args, kwargs):
            if begins(kwargs):
                starts[:] = [args[0] if args else kwargs["input_ids"]]

        handle = self.teacher.get_decoder().register_forward_pre_hook(begin, with_kwargs=True)
        try:
            states = BaseModelOutput(last_hidden_state=frames)
            tokens = self.teacher.generate(encoder_outputs=states, do_sample=False, num_beams=1)[:, : self._most]
        finally:
            handle.remove()
        ends = self.teacher.generation_config.eos_token_id
        ends = torch.isin(tokens, torch.tensor([] if ends is None else ends, device=tokens.device))
        said = ends.cumsum(1) - ends.long() == 0
        before = said.new_zeros(len(said), starts[0].shape[1] - 1)
        return torch.cat([starts[0], tokens], 1), torch.cat([before, said], 1)

    @contextmanager
    def _as_rebuilt(self, pairs):
        """Keys and values of the self-attention as the cache would give them. Into pairs comes what was rebuilt, and
        what it was."""
        attentions = [layer.self_attn for layer in self.model.get_decoder().layers]
        before = [(attention.k_proj, attention.v_proj) for attention in attentions]
        try:
            for attention, own, (key, value) in zip(attentions, self._own, before):
                attention.k_proj, attention.v_proj = Part(own, 0, key, pairs), Part(own, 1, value, pairs)
            yield
        finally:
            for attention, (key, value) in zip(attentions, before):
                attention.k_proj, attention.v_proj = key, value


def logits_of(model, frames, tokens):
    states = BaseModelOutput(last_hidden_state=frames)
    return model(encoder_outputs=states, decoder_input_ids=tokens, use_cache=False).logits


def _hash(numbers):
    return hashlib.sha256(numbers.tobytes()).hexdigest()
