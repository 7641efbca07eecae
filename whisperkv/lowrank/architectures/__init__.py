"""The models that can be converted: one file each, found by the model type of a config."""

import importlib
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)

# The file of each; what was registered by others is the class itself.
_KNOWN: dict[str, Any] = {"gpt2": "gpt2", "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


def register(architecture: Kind) -> Kind:
    """Let convert_to_mla() know an Architecture of your own, by its model_type. It can stand before a class."""
    _KNOWN[getattr(architecture, "model_type")] = architecture
    return architecture


def names():
    return sorted(_KNOWN)


def architecture(name):
    """The Architecture of a model type."""
    known = _KNOWN[name]
    if isinstance(known, str):
        module = importlib.import_module(f"{__name__}.{known}")
        known = next(
            each for each in vars(module).values()
            if isinstance(each, type) and each.__module__ == module.__name__ and hasattr(each, "model_type")
        )  # fmt: skip
    return known()


def architecture_of(model):
    """The Architecture of a model, or a TypeError or ValueError that says what to do instead."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise TypeError(f"a model of transformers is needed; got {type(model).__name__}")
    if kind in _KNOWN:
        return architecture(kind)
    if kind == "whisper":
        raise ValueError(
            "this is for language models, or a Whisper that was converted: convert_to_mla(model, "
            "calibration=recordings) first"
        )
    if kind.startswith("deepseek") or getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{kind} holds latents already (multi-head latent attention): use it as it is")
    if config.is_encoder_decoder or not getattr(model, "can_generate", bool)():
        raise ValueError(
            f"{kind} keeps no cache of its own tokens alone (encoder-only, or an encoder and a decoder): convert a "
            f"decoder, of {', '.join(names())}"
        )
    raise TypeError(
        f"no architecture for {kind!r}; there are {', '.join(names())}. To add one: whisperkv.lowrank.register, "
        "docs/lowrank.md"
    )
