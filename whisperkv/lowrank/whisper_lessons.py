"""How MLATrainer teaches a Whisper: recordings, what the model hears in them, and the matrices of its calibration.

The model is unpatched while it learns. Keys, values and what the encoder says are rounded and rebuilt as the caches do
it, so that the rest of the decoder is transformers' own; the gradient passes through the codes as if they were numbers.
"""

import hashlib
from contextlib import contextmanager

import torch
from safetensors.torch import load as tensors_of
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from ..calibration import Calibration, Codes
from ..compat import CACHE, with_new_names
from ..config import CrossConfig
from ..mixed import rounded, scales_of
from ..patching import unpatch
from ..transcription.audio import RATE
from . import whisper_converting
from .whisper_listening import FRAMES, windows_of

PACE = 40.0  # so that MLATrainer's usual rate is a good one
FAINT = 1e-3  # of the largest deviation: a channel that varies less counts for as much


class Free(nn.Module):
    """Matrices that are bound to nothing while they learn."""

    def euclidean(self):
        return list(self.parameters())

    def ups(self):
        return {}


class Own(Free):
    """What the self-attention of a layer keeps of a token: `down` times keys and values, weighed. `up` times that is
    what they are rebuilt as. See whisperkv.calibration.LowRank.

    there  [rank, 2 * width], and back [2 * width, rank]: what is added to `down` and to `up`. A step of any of their
           numbers changes what is rebuilt by as much: they are in units of what is lost, over what a direction has
    """

    def __init__(self, tensors, index, rank, attention):
        super().__init__()
        its = {name.removeprefix("self."): each[index] for name, each in tensors.items() if name.startswith("self.")}
        basis, root = its["basis"], its["root"]  # root [2, heads, head_dim, head_dim]
        lost, most = its["deviations"][rank:].square().mean().nan_to_num(0).sqrt(), its["deviations"][: basis.shape[1]]
        lost, most = (each.clamp(min=FAINT * float(most[0])) for each in (lost, most))
        units = lost / most
        self.there, self.back = nn.Parameter(torch.zeros(rank, len(basis))), nn.Parameter(torch.zeros(len(basis), rank))
        weights = [project.weight.detach().float().cpu() for project in (attention.k_proj, attention.v_proj)]
        both, (heads, dim) = torch.cat(weights), root.shape[1:3]
        offset = both @ its["mean"]
        if attention.v_proj.bias is not None:
            offset[len(offset) // 2 :] += attention.v_proj.bias.detach().float().cpu()
        for name, buffer in {
            "down": basis[:, :rank].T,
            "up": its.get("back", basis)[:, :rank],
            "units": PACE * units[:rank],
            "spread": PACE * (torch.eye(len(basis)) + basis * (units - 1) @ basis.T),
            "weighed": (root @ both.view(2, heads, dim, -1)).view(both.shape),
            "inverse": its["inverse"],
            "mean": its["mean"],
            "offset": offset,
        }.items():
            self.register_buffer(name, buffer.clone())

    def matrices(self):
        """down [rank, 2 * width] and up [2 * width, rank]."""
        return self.down + self.there @ self.spread, self.up + self.back * self.units

    def forward(self, states):
        """Keys and values [..., width]."""
        down, up = self.matrices()
        latent = functional.linear(states.float() - self.mean, down @ self.weighed)
        up = (self.inverse @ up.view(*self.inverse.shape[:3], -1)).view(up.shape)
        return functional.linear(latent, up, self.offset).to(states.dtype).chunk(2, -1)

    def learned(self):
        """The same with `up` orthonormal."""
        down, up = (matrix.double() for matrix in self.matrices())
        upright, across = torch.linalg.qr(up)
        return {"basis": (across @ down).T.float(), "back": upright.float()}


class Heard(Free):
    """What is held of the encoder's output. See whisperkv.calibration.Codes.

    there  [width, channels], and back [channels, width]: what is added to what makes codes and to what is rebuilt of
           them, of all channels, in units of what rounding loses over what a channel has
    """

    def __init__(self, tensors, bits, group):
        super().__init__()
        self.codes, self.group = Codes(tensors, bits), group
        self.places, errors = self.codes.places, tensors["cross.errors"]
        deviations = errors[0].sqrt()
        lost = float(errors[self.codes.bits.long(), self.places].mean().sqrt())
        units = PACE * lost / deviations.clamp(min=FAINT * float(deviations.amax()))
        self.there = nn.Parameter(torch.zeros(len(units), len(self.places)))
        self.back = nn.Parameter(torch.zeros(len(self.places), len(units)))
        self.register_buffer("units", units)
        for name in ("there", "back", "mean"):
            self.register_buffer(f"all_{name}", tensors[f"cross.{name}"].clone())

    def matrices(self):
        """[width, channels] and [channels, width], of the channels that have codes."""
        there = self.all_there[:, self.places] + self.all_there * self.units @ self.there
        return there, self.all_back[self.places] + self.units[self.places, None] * self.back @ self.all_back

    def forward(self, states):
        """What is rebuilt of states [audios, frames, width]."""
        there, back = self.matrices()
        frames = (states.float() - self.all_mean) @ there
        lengths = torch.full((len(frames),), frames.shape[1], device=frames.device)
        with torch.no_grad():
            bits, shape = self.codes.bits.to(frames.device), self.codes.shape.to(frames.device)
            scales = scales_of(frames, lengths, *shape, self.group)
            lost = rounded(frames, bits, scales, self.group) - frames
        return ((frames + lost) @ back + self.all_mean).to(states.dtype)

    def learned(self):
        learned = {"there": self.all_there.clone(), "back": self.all_back.clone()}
        learned["there"][:, self.places], learned["back"][self.places] = self.matrices()
        return learned


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
        *own, heard = factors
        learned = {f"cross.{name}": matrix for name, matrix in heard.learned().items()}
        for name in ("basis", "back") if own else ():
            learned[f"self.{name}"] = torch.stack([each.learned()[name] for each in own])
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
        begins = []

        def begin(_, args, kwargs):
            cache = with_new_names(kwargs).get(CACHE)
            if cache is None or cache.get_seq_length() == 0:
                begins[:] = [args[0] if args else kwargs["input_ids"]]

        handle = self.teacher.get_decoder().register_forward_pre_hook(begin, with_kwargs=True)
        try:
            states = BaseModelOutput(last_hidden_state=frames)
            tokens = self.teacher.generate(encoder_outputs=states, do_sample=False, num_beams=1)[:, : self._most]
        finally:
            handle.remove()
        ends = self.teacher.generation_config.eos_token_id
        ends = torch.isin(tokens, torch.tensor([] if ends is None else ends, device=tokens.device))
        said = ends.cumsum(1) - ends.long() == 0
        before = said.new_zeros(len(said), begins[0].shape[1] - 1)
        return torch.cat([begins[0], tokens], 1), torch.cat([before, said], 1)

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
