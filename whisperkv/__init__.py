"""Whisper in Hugging Face transformers, decoding faster in a fraction of the cache memory."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Loaded on first use, so that the NumPy side works where torch is not installed.
_HOME = {
    "CrossConfig": "config",
    "EvictionConfig": "config",
    "listen": "voice",
    "simulate_eviction": "simulate",
    "attention_kept": "simulate",
    "patch": "patching",
    "unpatch": "patching",
    "stats": "patching",
    "trace": "tracing",
    "plot": "evaluation",
    "load_ctranslate2": "ctranslate2",
    "demo_model": "demo",
    "demo_audio": "demo",
    "transcribe": "transcription.transcribing",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # the same for type checkers and editors, which do not follow __getattr__
    from .config import CrossConfig as CrossConfig
    from .config import EvictionConfig as EvictionConfig
    from .ctranslate2 import load_ctranslate2 as load_ctranslate2
    from .demo import demo_audio as demo_audio
    from .demo import demo_model as demo_model
    from .evaluation import plot as plot
    from .patching import patch as patch
    from .patching import stats as stats
    from .patching import unpatch as unpatch
    from .simulate import attention_kept as attention_kept
    from .simulate import simulate_eviction as simulate_eviction
    from .tracing import trace as trace
    from .transcription.transcribing import transcribe as transcribe
    from .voice import listen as listen
else:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'whisperkv' has no attribute '{name}'")
        return getattr(importlib.import_module(f"whisperkv.{_HOME[name]}"), name)

    def __dir__():
        return sorted([*globals(), *__all__])
