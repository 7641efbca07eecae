"""FOLDER of transformers -> FOLDER of OpenVINO, matrices as int8 codes, tokenizer included."""

import sys
from pathlib import Path

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForSpeechSeq2Seq, OVWeightQuantizationConfig
from transformers import AutoTokenizer

source, target = sys.argv[1:]
model = OVModelForSpeechSeq2Seq.from_pretrained(
    source, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(bits=8)
)
model.save_pretrained(target)
both = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
for name, tokenizer in zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), both):
    openvino.save_model(tokenizer, Path(target, name))
for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
    if not Path(target, name).exists() and Path(source, name).exists():
        Path(target, name).write_bytes(Path(source, name).read_bytes())
