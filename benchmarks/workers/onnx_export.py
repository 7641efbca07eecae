"""FOLDER of transformers -> FOLDER of ONNX, matrices as int8 codes and activations rounded as they come."""

import json
import sys
import tempfile
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.exporters.onnx import main_export

NEEDED = ("encoder_model.onnx", "decoder_model_merged.onnx")

source, target = map(Path, sys.argv[1:])
with tempfile.TemporaryDirectory() as exported:
    main_export(
        str(source),
        exported,
        task="automatic-speech-recognition-with-past",
        library_name="transformers",
        do_validation=False,
    )
    target.mkdir()
    for name in NEEDED:
        quantize_dynamic(
            Path(exported, name),
            target / name,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
        )
for name in ("config.json", "generation_config.json", "tokenizer.json"):
    (target / name).write_bytes((source / name).read_bytes())
# transformers 4, which optimum needs, calls two things otherwise.
tokenizer = json.loads((source / "tokenizer_config.json").read_text())
tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens", [])
(target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
extractor = json.loads((source / "processor_config.json").read_text())["feature_extractor"]
(target / "preprocessor_config.json").write_text(json.dumps(extractor))
