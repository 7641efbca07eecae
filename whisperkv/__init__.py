"""Whisper in Hugging Face transformers, decoding faster in a fraction of the cache memory."""

import importlib

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
    "load_ctranslate2": "ctranslate2",
    "demo_model": "demo",
    "demo_audio": "demo",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'whisperkv' has no attribute '{name}'")
    return getattr(importlib.import_module(f"whisperkv.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
