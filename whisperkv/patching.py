"""patch(), unpatch() and stats(): our attention and caches in a Whisper that is otherwise left alone."""

import sys
from typing import TypeVar

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import WhisperForCausalLM, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoder, WhisperEncoder

from . import encoder as encoders
from . import searches
from . import weights as matrices
from .adoption import CacheAdoption
from .calibration import Calibration
from .compat import become
from .config import CrossConfig, EvictionConfig
from .decoder import FastDecoder
from .eligible import ATTENTIONS, check_calibrated, check_device, check_projections
from .graphs import Graphs
from .listener import EncoderListener
from .records import Stats
from .steps import Steps

Model = TypeVar("Model")  # what is given comes back

_MODELS = (WhisperForConditionalGeneration, WhisperModel, WhisperForCausalLM)


def patch(
    model: Model,
    eviction: EvictionConfig | None = None,
    cross: CrossConfig | None = None,
    weights: str = "model",
    graphs: bool = True,
) -> Model:
    """Make a Whisper decode through whisperkv, and return it.

    model     a WhisperForConditionalGeneration, WhisperModel or WhisperForCausalLM, or a pipeline, PEFT model,
              torch.compile or (Distributed)DataParallel wrapper around one
    eviction  which tokens the self-attention cache keeps; None keeps all, and the tokens come out as before
    cross     how the cross-attention cache holds an audio; None is CrossConfig(), which is lossless too
    weights   on the CPU, how the matrices of encoder, decoder and output head are read: "model" as they are, and the
              tokens come out as before; "bfloat16" or "int8" from packed copies in that format, faster still
    graphs    on CUDA, capture a decode step of each shape once and replay it. What cannot be captured (hooks, adapters,
              attentions asked for, a policy that is a function) runs as it does with False. The memory of the last
              caches is kept for the next ones until unpatch().

    A model that is already patched takes the new settings.
    """
    whisper = _whisper(model)
    decoder = _decoder(whisper)
    if eviction is not None and not isinstance(eviction, EvictionConfig):
        hint = ": pass it as cross=" if isinstance(eviction, CrossConfig) else ""
        known = "an EvictionConfig, as EvictionConfig(recent=64, heavy=32), or None"
        raise TypeError(f"eviction must be {known}; got {eviction!r}{hint}")
    if cross is not None and not isinstance(cross, CrossConfig):
        hint = ": pass it as eviction=" if isinstance(cross, EvictionConfig) else ""
        raise TypeError(f"cross must be a CrossConfig, as CrossConfig(format='int8'), or None; got {cross!r}{hint}")
    if not isinstance(graphs, bool):
        raise ValueError(f"graphs must be True or False; got {graphs!r}")
    cross = cross or CrossConfig()
    matrices.check(whisper, weights)
    for index, layer in enumerate(decoder.layers):
        for name, ours in ATTENTIONS.items():
            kind = type(getattr(layer, name))
            if kind not in (WhisperAttention, ours):
                raise TypeError(
                    f"decoder layer {index}: {name} is a {kind.__name__}, and whisperkv knows only WhisperAttention"
                )
    check_device(decoder)
    check_projections(decoder, cross)
    codes, low_rank = _calibrated(decoder, cross, eviction)
    encoder = _encoder(whisper)
    _check_encoder(encoder, whisper, cross)
    _refuse_while_generating(whisper, "patch")
    _restore(whisper)
    for layer in decoder.layers:
        for name, ours in ATTENTIONS.items():
            become(getattr(layer, name), ours)
    listener = None
    if not cross.keeps_all:
        listener = EncoderListener(cross.trim, cross.merge)
        encoder.register_forward_hook(listener, with_kwargs=True)
    others = matrices.install(whisper, weights)
    if type(encoder) is WhisperEncoder:
        encoders.install(encoder, weights, listener)
    if type(decoder) is WhisperDecoder:
        become(decoder, FastDecoder)
    graphs = Graphs() if graphs and type(decoder) is FastDecoder else None
    steps = [graphs, Steps()] if graphs else [Steps()]
    adoption = CacheAdoption(eviction, cross, listener, graphs, steps, codes, low_rank)
    adoption.weights_note = matrices.note_of(others, weights)
    decoder.register_forward_pre_hook(adoption, with_kwargs=True)
    searches.install(whisper, cross.share_beams)
    return model


def unpatch(model: Model) -> Model:
    """Make the model exactly what it was before patch(), and return it. An unpatched model is left alone."""
    whisper = _whisper(model)
    _refuse_while_generating(whisper, "unpatch")
    _restore(whisper)
    return model


def stats(model: object) -> Stats:
    """The caches of the last decode. A generate() over long audio decodes chunk by chunk: this is the last chunk."""
    adoption = _adoption(_decoder(_whisper(model)))
    if adoption is None:
        raise ValueError("the model is not patched: call whisperkv.patch(model) first")
    return adoption.stats(matrices.bytes_of(_whisper(model)))


# Finding our way about a model


def _whisper(model):
    """The Whisper inside a pipeline, a PEFT model, a compiled one or one for several devices."""
    whisper = model
    for _ in range(5):  # wrappers at most
        if isinstance(whisper, _MODELS):
            return whisper
        if hasattr(whisper, "get_base_model"):
            whisper = whisper.get_base_model()
        elif isinstance(whisper, (DataParallel, DistributedDataParallel)):
            whisper = whisper.module
        else:  # a compiled model's, a pipeline's
            whisper = getattr(whisper, "_orig_mod", getattr(whisper, "model", whisper))
    kind, hint = type(model).__name__, ""
    if isinstance(model, (tuple, list)) and model and isinstance(model[0], torch.nn.Module):
        hint = f": it is the first of this {kind}: patch(model)"
    elif isinstance(model, (WhisperEncoder, WhisperDecoder)):
        hint = f", a {kind} alone: pass the model that it is part of"
    elif isinstance(model, str):
        hint = f": load it first, WhisperForConditionalGeneration.from_pretrained({model!r})"
    elif isinstance(model, type):
        hint = ", a class, and not a model made from it"
    known = ", ".join(kind.__name__ for kind in _MODELS)
    raise TypeError(f"whisperkv patches {known}, or a pipeline or PEFT model around one; got {kind}{hint}")


def _decoder(whisper):
    return next(module for module in whisper.modules() if isinstance(module, WhisperDecoder))


def _encoder(whisper):
    return next((module for module in whisper.modules() if isinstance(module, WhisperEncoder)), None)


def _calibrated(decoder, cross, eviction):
    """What the files that were named say of codes of mixed bits and of a low-rank cache, or None."""
    codes = low_rank = None
    if cross.is_mixed:
        check_calibrated(decoder, f"CrossConfig.format={cross.format!r} with a calibration")
        codes = Calibration(cross.calibration, decoder, "CrossConfig.calibration").codes(cross.bits)
    if eviction is not None and eviction.is_low_rank:
        field = "EvictionConfig.keep"
        check_calibrated(decoder, f"{field}={eviction.keep!r}")
        calibration = Calibration(eviction.calibration, decoder, "EvictionConfig.calibration")
        low_rank = calibration.low_rank(decoder, eviction.keep, field)
    return codes, low_rank


def _check_encoder(encoder, whisper, cross):
    """Raise if it cannot do what `trim` and `merge` ask for."""
    for field, off in (("trim", "off"), ("merge", 0)):
        given = f"CrossConfig.{field}={getattr(cross, field)!r}"
        if getattr(cross, field) == off:
            continue
        if encoder is None:
            raise ValueError(f"{given} needs the encoder, and {type(whisper).__name__} has none: use {field}={off!r}")
        if field == "merge" and type(encoder) not in (WhisperEncoder, encoders.FastEncoder):
            known = f"a WhisperEncoder, and this one is a {type(encoder).__name__}"
            raise ValueError(f"{given} needs {known}: use merge=0")


def _adoption(decoder):
    return next((hook for hook in decoder._forward_pre_hooks.values() if isinstance(hook, CacheAdoption)), None)


def _restore(whisper):
    searches.uninstall(whisper)
    decoder, encoder = _decoder(whisper), _encoder(whisper)
    matrices.uninstall(whisper)
    if type(decoder) is FastDecoder:
        become(decoder, WhisperDecoder)
    for layer in decoder.layers:
        for name, ours in ATTENTIONS.items():
            if type(getattr(layer, name)) is ours:
                become(getattr(layer, name), WhisperAttention)
    _remove_hooks(decoder._forward_pre_hooks, decoder._forward_pre_hooks_with_kwargs, CacheAdoption)
    if encoder is not None:
        encoders.uninstall(encoder)
        _remove_hooks(encoder._forward_hooks, encoder._forward_hooks_with_kwargs, EncoderListener)


def _remove_hooks(hooks, with_kwargs, kind):
    for key, hook in list(hooks.items()):
        if isinstance(hook, kind):
            del hooks[key]
            with_kwargs.pop(key, None)


def _refuse_while_generating(whisper, action):
    """A cache is in use from the first token of generate() to the last, so its layers cannot be changed between."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is whisper:
                raise RuntimeError(f"{action}() while the model is generating: wait until generate() has returned")
            frame = frame.f_back
