"""A Whisper as it transcribes: what its decoder's attentions are asked, and how much an error in what they read shows.

An attention gives the sum over j of p_j Wo v_j, with p the softmax of scale * q . k_j. Were every k_j and v_j off by an
independent error, the output would be off by sums of p_j Wo dv_j and of p_j (scale * q . dk_j) Wo (v_j - o), where o is
the mean of the values. So a quadratic form for keys and one for values say what an error costs, each head its own.
"""

from contextlib import contextmanager
from os import PathLike

import torch

from ..compat import CACHE, with_new_names
from ..decoder import FastDecoder
from ..transcription.audio import RATE, read_audio

FRAMES = 50  # of the encoder's output in a second


class Reading:
    """One attention's sums over all that was transcribed.

    costs    float64 [2, heads, head_dim, head_dim]: of an error in keys and in values
    queries  how many it was asked
    """

    def __init__(self, attention):
        self.attention, self.queries = attention, 0
        heads, dim = attention.num_heads, attention.head_dim
        self.costs = torch.zeros(2, heads, dim, dim, dtype=torch.float64)
        output = attention.out_proj.weight.detach().double().view(-1, heads, dim)
        self._said = torch.einsum("ohd,ohe->hde", output, output).float()  # Wo^T Wo of each head

    def add(self, asking, states, is_causal):
        """asking [queries, width] and what they read, states [tokens, width]."""
        attention, heads = self.attention, self.attention.num_heads
        query, keys, values = (
            project(x).view(len(x), heads, -1).transpose(0, 1).float()
            for project, x in ((attention.q_proj, asking), (attention.k_proj, states), (attention.v_proj, states))
        )
        logits = attention.scaling * query @ keys.transpose(1, 2)
        if is_causal:
            logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
        weights = logits.softmax(-1)
        mean, said = weights @ values, self._said.to(values.device)
        squared = weights.square()
        spread = (values @ said * values).sum(-1)[:, None] - 2 * (mean @ said) @ values.transpose(1, 2)
        spread = spread + (mean @ said * mean).sum(-1)[..., None]  # |Wo (v_j - o)|^2
        cost = (squared * spread.clamp(min=0)).sum(-1) * attention.scaling**2
        self.costs[0] += (query.transpose(1, 2) @ (cost[..., None] * query)).double().cpu()
        self.costs[1] += (squared.sum((1, 2))[:, None, None] * said).double().cpu()
        self.queries += query.shape[1]


class Listening:
    """What a model's decoder reads and is asked. `take` is called with each window's encoder output [frames, width] and
    with each layer's states [tokens, width]."""

    def __init__(self, model):
        layers = model.get_decoder().layers
        self.own = [Reading(layer.self_attn) for layer in layers]
        self.cross = [Reading(layer.encoder_attn) for layer in layers]

    @torch.no_grad()
    def hear(self, model, features, take_frames, take_states):
        """One window [mels, 3000] is transcribed, greedily."""
        from transformers.modeling_outputs import BaseModelOutput

        frames = model.get_encoder()(features[None]).last_hidden_state
        with recorded(model.get_decoder()) as asked:
            tokens = model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=frames), do_sample=False, num_beams=1
            )[0]
        end = model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        said = next((place for place, token in enumerate(tokens.tolist()) if token in ends), len(tokens))
        take_frames(frames[0])
        for index, (own, cross) in enumerate(asked):
            prompt = len(own[0])
            own, cross = (torch.cat(each)[: prompt + said] for each in (own, cross))
            take_states(index, own)
            self.own[index].add(own, own, True)
            self.cross[index].add(cross, frames[0], False)


def begins(given):
    """Whether a pass of the decoder is the first over its cache."""
    cache = with_new_names(given).get(CACHE)
    return cache is None or cache.get_seq_length() == 0


@contextmanager
def recorded(decoder):
    """For each layer the inputs of both its attentions, a list of [tokens, width], since the last fresh cache."""
    asked = [([], []) for _ in decoder.layers]
    handles = []

    def begin(_, args, kwargs):
        if begins(kwargs):
            for lists in asked:
                for each in lists:
                    each.clear()

    def keep(where):
        def hook(_, args, kwargs):
            where.append((args[0] if args else kwargs["hidden_states"])[0])

        return hook

    try:
        handles.append(decoder.register_forward_pre_hook(begin, with_kwargs=True))
        for layer, (own, cross) in zip(decoder.layers, asked):
            handles.append(layer.self_attn.register_forward_pre_hook(keep(own), with_kwargs=True))
            handles.append(layer.encoder_attn.register_forward_pre_hook(keep(cross), with_kwargs=True))
        yield asked
    finally:
        for handle in handles:
            handle.remove()


def check_model(model):
    """Raise if it cannot be calibrated."""
    from transformers import WhisperForConditionalGeneration

    if not isinstance(model, WhisperForConditionalGeneration):
        raise TypeError(f"model must be a WhisperForConditionalGeneration, got {type(model).__name__}")
    decoder = model.get_decoder()
    if type(decoder) is FastDecoder or type(decoder.layers[0].self_attn).__module__.startswith("whisperkv"):
        raise ValueError("the model is patched: whisperkv.unpatch(model) first, and patch it with the file")


def is_one(audio):
    """Whether it is a recording, not a list of them."""
    return isinstance(audio, (str, bytes, PathLike)) or getattr(audio, "ndim", 0) == 1


def windows_of(audio, seconds):
    """float32 arrays of up to so many seconds each."""
    import numpy

    if is_one(audio):
        audio = [audio]
    windows = []
    for number, each in enumerate(audio):
        samples = read_audio(each) if isinstance(each, (str, PathLike)) else each
        samples = numpy.asarray(samples, dtype=numpy.float32)
        if samples.ndim != 1 or not len(samples) or not numpy.isfinite(samples).all():
            raise ValueError(f"audio {number} must be mono samples at 16 kHz, all of them numbers, or a file's name")
        windows += [samples[start : start + seconds * RATE] for start in range(0, len(samples), seconds * RATE)]
    if not windows:
        raise ValueError("audio must hold a recording or more: a list of samples at 16 kHz, or of files' names")
    return windows
