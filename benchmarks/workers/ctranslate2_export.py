"""FOLDER of transformers -> FOLDER of CTranslate2, as faster-whisper reads it."""

import json
import sys
import tempfile
from pathlib import Path

from ctranslate2.converters import TransformersConverter

source, target = map(Path, sys.argv[1:])
# The environment has transformers 4, which knows neither this tokenizer_config.json nor processor_config.json.
extractor = json.loads((source / "processor_config.json").read_text())["feature_extractor"]
tokenizer = json.loads((source / "tokenizer_config.json").read_text())
tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens", [])
with tempfile.TemporaryDirectory() as older:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        Path(older, name).symlink_to((source / name).resolve())
    Path(older, "tokenizer_config.json").write_text(json.dumps(tokenizer))
    Path(older, "preprocessor_config.json").write_text(json.dumps(extractor))
    TransformersConverter(older, copy_files=["tokenizer.json", "preprocessor_config.json"]).convert(
        str(target), quantization="float16"
    )
