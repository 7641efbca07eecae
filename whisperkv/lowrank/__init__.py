"""Attention converted to small latents, in language models and in Whisper.

model, tokenizer = whisperkv.lowrank.convert_to_mla(model, compression_ratio=4, tokenizer=tokenizer)

whisperkv.lowrank.calibrate(whisper, audio, "tiny.safetensors")
whisperkv.patch(whisper, cross=CrossConfig("latent_int3", calibration="tiny.safetensors"))
"""

import importlib
from typing import TYPE_CHECKING

# Loaded on first use: a name, and the file that holds it.
_HOME = {
    "Architecture": "architectures.base",
    "register": "architectures",
    "convert_to_mla": "converting",
    "restore": "converting",
    "quantize_latents": "codes",
    "MLATrainer": "training",
    "compute_perplexity": "evaluating",
    "generate_samples": "evaluating",
    "measure_cache_memory": "evaluating",
    "CacheMemory": "evaluating",
    "save_mla_model": "files",
    "load_mla_model": "files",
    "calibrate": "whisper_calibrate",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # the same for type checkers and editors, which do not follow __getattr__
    from .architectures import register as register
    from .architectures.base import Architecture as Architecture
    from .codes import quantize_latents as quantize_latents
    from .converting import convert_to_mla as convert_to_mla
    from .converting import restore as restore
    from .evaluating import CacheMemory as CacheMemory
    from .evaluating import compute_perplexity as compute_perplexity
    from .evaluating import generate_samples as generate_samples
    from .evaluating import measure_cache_memory as measure_cache_memory
    from .files import load_mla_model as load_mla_model
    from .files import save_mla_model as save_mla_model
    from .training import MLATrainer as MLATrainer
    from .whisper_calibrate import calibrate as calibrate
else:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'whisperkv.lowrank' has no attribute '{name}'")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

    def __dir__():
        return sorted([*globals(), *__all__])
