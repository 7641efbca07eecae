"""A converted model as a folder."""

import json
from pathlib import Path
from typing import Any

import torch

from . import installing, record, whisper_converting
from .architectures import architecture, names

RECORD, WEIGHTS, ORIGINALS = "lowrank.json", "model.safetensors", "original.safetensors"
FORMAT = 1


def save_mla_model(model: Any, tokenizer: Any, folder: Any) -> None:
    """Write a converted model, and a tokenizer (of a Whisper, the processor) if there is one, into a folder. Matrices
    that layers share are written once; the projections of before too, if they were stored."""
    from safetensors.torch import save_file

    of = getattr(model, "lowrank", None)
    of = of if isinstance(of, whisper_converting.WhisperLowRank) else record.record_of(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    once, same = {}, {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            same[name] = first[key]
        else:
            once[name] = tensor.contiguous()
    save_file(once, folder / WEIGHTS, metadata={"format": "pt"})
    if of.originals is not None:
        kept = {
            f"{number}.{name}.{each}": tensor.contiguous().clone()
            for number, modules in of.originals.items()
            for name, module in modules.items()
            for each, tensor in module.state_dict().items()
        }
        save_file(kept, folder / ORIGINALS, metadata={"format": "pt"})
    if isinstance(of, whisper_converting.WhisperLowRank):
        (folder / whisper_converting.CALIBRATION).write_bytes(of.calibration)
    dtype = str(model.dtype).removeprefix("torch.")
    whole = {"format": FORMAT, "dtype": dtype, "restorable": of.originals is not None, "same": same, **of.to_dict()}
    (folder / RECORD).write_text(json.dumps(whole, indent=1) + "\n")


def load_mla_model(folder: Any, device: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that save_mla_model() has written, of a Whisper (model, processor); the latter is
    None if there was none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, GenerationConfig

    from .converting import tokenizer_at

    folder = Path(folder)
    given = _read_record(folder)
    about = {name: value for name, value in given.items() if name not in _ABOUT}
    tensors = _read_tensors(folder / WEIGHTS)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != given["architecture"]:
        its = given["architecture"]
        raise ValueError(f"{folder} does not fit together: {RECORD} is of {its}, config.json of another")
    is_whisper = given["architecture"] == whisper_converting.NAME
    kind = AutoModelForSpeechSeq2Seq if is_whisper else AutoModelForCausalLM
    model = kind.from_config(config, dtype=getattr(torch, given["dtype"])).eval()
    if is_whisper:
        of = whisper_converting.read(folder, about)
    else:
        of = record.LowRank.from_dict(about)
        its = architecture(of.architecture)
        taken = installing.install(model, of, installing.factors_of(its, its.attentions(model), of.layers))
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors) - set(given["same"]))
    other = [name for name in tensors if name not in expected or expected[name].shape != tensors[name].shape]
    if missing or other:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its {RECORD}: {(missing + other)[0]} is missing or of another shape. "
            "Save the model again"
        )
    model.load_state_dict({**tensors, **{name: tensors[whose] for name, whose in given["same"].items()}})
    model.tie_weights()
    if given["restorable"]:
        kept = _read_tensors(folder / ORIGINALS)
        for number, modules in taken.items():
            for name, module in modules.items():
                begin = f"{number}.{name}."
                own = {key.removeprefix(begin): tensor for key, tensor in kept.items() if key.startswith(begin)}
                module.load_state_dict(own)
        of.originals = taken
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if device is not None:
        model.to(device)
    if isinstance(of, whisper_converting.WhisperLowRank):
        of.patch(model)
        return model, whisper_converting.processor_at(folder)
    return model, tokenizer_at(folder) if (folder / "tokenizer_config.json").exists() else None


_ABOUT = ("format", "dtype", "restorable", "same")


def _read_record(folder):
    known = [*names(), whisper_converting.NAME]
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} holds no converted model (no {RECORD}): write one with save_mla_model()")
    try:
        given = json.loads((folder / RECORD).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is truncated or damaged: save the model again") from error
    if not isinstance(given, dict) or given.get("format") != FORMAT or given.get("architecture") not in known:
        raise ValueError(
            f"{folder / RECORD} was written by another version, or for a model that is not known here: there are "
            f"{', '.join(known)}"
        )
    return given


def _read_tensors(file):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"{file.parent} is not whole: {file.name} is missing. Save the model again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): save the model again") from error
