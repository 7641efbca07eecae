"""Attention converted to small latents.

whisperkv.lowrank.calibrate(model, audio, "tiny.safetensors")
whisperkv.patch(model, cross=CrossConfig("latent_int3", calibration="tiny.safetensors"))
"""

import importlib
from typing import TYPE_CHECKING

# Loaded on first use.
_HOME = {
    "calibrate": "whisper_calibrate",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .whisper_calibrate import calibrate as calibrate
else:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'whisperkv.lowrank' has no attribute '{name}'")
        return getattr(importlib.import_module(f"whisperkv.lowrank.{_HOME[name]}"), name)

    def __dir__():
        return sorted([*globals(), *__all__])
