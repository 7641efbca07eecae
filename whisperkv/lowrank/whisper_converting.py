"""convert_to_mla() of a Whisper: both its caches calibrated and patched in one call, and what a converted one is."""

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from ..adoption import CacheAdoption
from ..calibration import RANKS, rank_of
from ..compat import CACHE
from ..config import CALIBRATED, CrossConfig, EvictionConfig
from ..ops import TILE
from ..patching import patch, unpatch
from ..slots import slots_for
from ..transcription.audio import RATE
from .whisper_listening import FRAMES, check_model, is_one, windows_of

BITS = 3  # of a number of the audio's latent, where none are asked for
NAME = "whisper"
CALIBRATION = "calibration.safetensors"
REMEDY = "leave it out for a Whisper"


@dataclass
class WhisperLowRank:
    """What a converted Whisper is.

    ratio        how many times fewer numbers a token of the self-attention's cache takes
    bits         of a number of the audio's latent, on average
    rank         numbers of a token in a layer; None: keys and values as they are
    calibration  the file that calibrate() wrote
    """

    ratio: float
    bits: int
    rank: int | None
    calibration: bytes = field(repr=False)
    architecture: str = NAME
    originals: None = None  # nothing is taken out: restore() always works

    @contextmanager
    def file(self):
        """The calibration as a file, inside a `with`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, CALIBRATION)
            file.write_bytes(self.calibration)
            yield file

    def learn(self, tensors):
        """Let others stand in the calibration."""
        with self.file() as file, safe_open(file, "pt") as opened:
            about = opened.metadata()
        self.calibration = save({**load(self.calibration), **tensors}, about)

    def patch(self, model):
        with self.file() as file:
            eviction = None if self.rank is None else EvictionConfig("all", keep=1 / self.ratio, calibration=file)
            patch(model, eviction, CrossConfig(f"latent_int{self.bits}", calibration=file))
        model.lowrank = self

    def to_dict(self) -> dict[str, Any]:
        return {"architecture": self.architecture, "ratio": self.ratio, "bits": self.bits, "rank": self.rank}


def is_whisper(model) -> bool:
    """Whether a model, a name or a folder is a Whisper's."""
    if isinstance(model, torch.nn.Module):
        return getattr(getattr(model, "config", None), "model_type", None) == NAME
    from transformers import AutoConfig

    from ..transcription.loading import OTHER_NAMES, SIZES

    path = Path(model)
    is_size = str(model) in (*SIZES, *OTHER_NAMES) and not path.is_dir()
    if is_size or path.name == "model.bin" or (path / "model.bin").is_file():
        return True
    return AutoConfig.from_pretrained(model).model_type == NAME


def convert(model, processor, given, defaults):
    """(model, processor). `given` are the arguments of convert_to_mla()."""
    from .whisper_calibrate import calibrate

    _check(given, defaults)
    if isinstance(getattr(model, "lowrank", None), WhisperLowRank):
        raise ValueError(f"the model is converted already: {model.lowrank!r}. Load it anew, or restore() it first")
    if isinstance(model, torch.nn.Module):
        check_model(model)
    ratio, audio = float(given["compression_ratio"]), given["calibration"]
    recordings = audio if _is_calibrated(audio) else _recordings(audio, given["num_calibration_samples"])
    model, processor = _load(model, processor, given["device"], given["dtype"])
    width = model.config.d_model
    if given["d_latent"] is not None:
        if given["d_latent"] > width or given["d_latent"] % RANKS:
            raise ValueError(
                f"d_latent must be a multiple of {RANKS} up to {width}, which is all there is to a token's keys and "
                f"values; got {given['d_latent']}"
            )
        ratio = 2 * width / given["d_latent"]
    rank = None if ratio == 1 else rank_of(1 / ratio, width)
    if _is_calibrated(audio):
        calibration = Path(audio).read_bytes()
    else:
        with tempfile.TemporaryDirectory() as folder:
            keep = min(1 / ratio, 0.5)
            file = calibrate(model, recordings, Path(folder, CALIBRATION), keep=keep, verbose=given["verbose"])
            calibration = file.read_bytes()
    WhisperLowRank(ratio, given["cache_bits"] or BITS, rank, calibration).patch(model)
    return model, processor


def _check(given, defaults):
    method, ratio, bits = given["compression_method"], given["compression_ratio"], given["cache_bits"]
    if method not in ("auto", "joint"):
        raise ValueError(
            f"compression_method must be 'auto' or 'joint' for a Whisper, a latent for a token's keys and values in a "
            f"layer and one for the audio; got {method!r}"
        )
    for name in ("max_calibration_length", "cross_layer_group_size", "xkv_share", "rope_pairs"):
        if given[name] != defaults[name]:
            raise ValueError(f"{name} is for language models: {REMEDY}; got {given[name]!r}")
    if 1 < ratio < 2:
        raise ValueError(
            "compression_ratio must be 1, or 2 and more, for a Whisper: a token's keys and values are made of one "
            f"state, half their size; got {ratio!r}"
        )
    if bits is not None and f"latent_int{bits}" not in CALIBRATED:
        raise ValueError(
            f"cache_bits must be 4, 3 or 2 for a Whisper; got {bits!r}. "
            f"whisperkv.patch(model, cross=CrossConfig('latent_int{bits}')) needs no conversion"
        )
    if not given["use_calibration"]:
        raise ValueError(f"use_calibration=False leaves a Whisper nothing to go by: {REMEDY}")


def _load(model, processor, device, dtype):
    from ..transcription.loading import load

    if not isinstance(model, torch.nn.Module):
        model, its = load(str(model), device or "cpu", dtype)
        return model, processor or its
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    if processor is None and model.name_or_path:
        processor = processor_at(model.name_or_path)
    return model.eval(), processor


def _is_calibrated(audio):
    return isinstance(audio, (str, PathLike)) and Path(audio).suffix == ".safetensors"


def _recordings(audio, most):
    if audio is None:
        raise ValueError(
            "calibration must hold recordings for a Whisper: files' names or samples at 16 kHz, some ten minutes of "
            "several speakers like those that will be transcribed; got None"
        )
    return [audio] if is_one(audio) else list(islice(audio, most))


def codes_of(model):
    """How the audio's latents become codes."""
    for hook in model.get_decoder()._forward_pre_hooks.values():
        if isinstance(hook, CacheAdoption) and hook.codes is not None:
            return hook.codes
    raise ValueError(
        "the model was patched otherwise, or unpatched, since it was converted: restore(model), and convert it anew"
    )


def restore(model):
    unpatch(model)
    del model.lowrank
    return model


def read(folder, about):
    """The WhisperLowRank of a folder."""
    file = folder / CALIBRATION
    if not file.is_file():
        raise ValueError(f"{folder} is not whole: {file.name} is missing. Save the model again")
    return WhisperLowRank(**about, calibration=file.read_bytes())


def processor_at(path):
    """None if there is none."""
    from transformers import WhisperProcessor

    try:
        return WhisperProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError, TypeError):
        return None


def memory(model, tokens, audios):
    """(full, latent) bytes of both caches, after so many tokens of each of so many audios."""
    of, config = model.lowrank, model.config
    codes = codes_of(model)
    most = config.max_target_positions
    if tokens > most:
        raise ValueError(f"sequence_length must be at most {most}, the tokens that this Whisper decodes; got {tokens}")
    size, frames, layers = model.dtype.itemsize, config.max_source_positions, config.decoder_layers
    numbers = 2 * config.d_model
    full = audios * layers * numbers * size * (tokens + frames)
    own = audios * layers * (of.rank or numbers) * size * slots_for(tokens, most)
    tiles, groups = -(-frames // TILE), -(-frames // CrossConfig.group)
    return full, own + audios * (tiles * codes.tile_bytes + groups * 2 * 4 * codes.channels)


@torch.no_grad()
def measured(model, tokens, audios):
    """Bytes of the tensors that both caches hold after a pass."""
    from transformers.modeling_outputs import BaseModelOutput

    shape = audios, model.config.max_source_positions, model.config.d_model
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    ids = torch.zeros(audios, tokens, dtype=torch.int64, device=model.device)
    encoded = BaseModelOutput(last_hidden_state=states)
    cache = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True)[CACHE]
    own = [slots for layer in cache.self_attention_cache.layers for slots in (layer.key_slots, layer.value_slots)]
    audios_of = [layer.keys_of_audios for layer in cache.cross_attention_cache.layers]
    heard = [tensor for each in audios_of for tensor in (each.data, each.scales)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in own + heard if tensor.numel()}.values())


def transcripts(model, processor, recordings, max_new_tokens, settings):
    """What the model hears in recordings, each of its windows transcribed alone."""
    said, seconds = [], model.config.max_source_positions // FRAMES
    for recording in [recordings] if is_one(recordings) else recordings:
        texts = []
        for window in windows_of([recording], seconds):
            features = processor(window, sampling_rate=RATE, return_tensors="pt").input_features
            tokens = model.generate(features.to(model.device, model.dtype), max_new_tokens=max_new_tokens, **settings)
            texts.append(processor.decode(tokens[0], skip_special_tokens=True).strip())
        said.append(" ".join(texts))
    return said
