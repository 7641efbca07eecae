"""What the engines read, made from the weights that there are: folders of transformers, and from these files of
whisper.cpp and folders of OpenVINO, ONNX Runtime and CTranslate2, each by its own environment. What is there already is
left alone.

    python benchmarks/workers/prepare.py [--models tiny.en base small large-v3-turbo]

small and large-v3-turbo have random weights: they are for speed only.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import torch
import transformers
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

ROOM = Path.home() / ".cache" / "whisperkv" / "engines"
ENVIRONMENTS = Path(__file__).parents[2] / ".venv-engines"
HERE = Path(__file__).parent
RANDOM = {  # width, layers of the encoder and of the decoder, heads, mels, tokens
    "small": (768, 12, 12, 12, 80, 51865),
    "large-v3-turbo": (1280, 32, 4, 20, 128, 51866),
}
ALL = (*models.REAL, *RANDOM)


def folder(model, form):
    return ROOM / model / form


def python_of(environment):
    return ENVIRONMENTS / environment / "bin" / "python"


def random_model(name):
    """(model, processor). What comes out are words alone, and never ends by itself: times would have the engines go
    back in the audio, each in its own way."""
    width, encoder_layers, decoder_layers, heads, mels, vocabulary = RANDOM[name]
    base, processor = models.load("base")
    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=mels, d_model=width, encoder_layers=encoder_layers,
        decoder_layers=decoder_layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # their logits are 0, and among so many words one is always above
        model.get_input_embeddings().weight[base.generation_config.eos_token_id :] = 0
    model.generation_config = GenerationConfig.from_dict(base.generation_config.to_dict())
    processor.feature_extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    return model, processor


def hugging_face(model, path):
    made, processor = random_model(model) if model in RANDOM else models.load(model)
    made.save_pretrained(path)
    processor.save_pretrained(path)


def whisper_cpp(form):
    def make(model, path):
        import ggml

        source = folder(model, "transformers")
        whisper = WhisperForConditionalGeneration.from_pretrained(source)
        ggml.write(path, whisper, transformers.WhisperProcessor.from_pretrained(source), form)

    return make


def ctranslate2(model, path):
    """The real ones are faster-whisper folders from the start."""
    if model in models.REAL:
        path.symlink_to(models.folder(model), target_is_directory=True)
        return
    export("onnx", "ctranslate2_export.py", model, path)


def exported(environment, script):
    return lambda model, path: export(environment, script, model, path)


def export(environment, script, model, path):
    python = python_of(environment)
    if not python.exists():
        raise FileNotFoundError(f"{python}: no such environment: make engines")
    subprocess.run([python, HERE / script, folder(model, "transformers"), path], check=True)


MAKE = {
    "transformers": hugging_face,
    "ctranslate2": ctranslate2,
    "ggml-f16.bin": whisper_cpp("f16"),
    "ggml-q8_0.bin": whisper_cpp("q8_0"),
    "openvino-int8": exported("openvino", "openvino_export.py"),
    "onnx-int8": exported("onnx", "onnx_export.py"),
}


def prepare(model):
    for form, make in MAKE.items():
        path = folder(model, form)
        if path.exists():
            continue
        print(f"{model}: {form}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_name(f"making-{path.name}")
        clear(making)
        try:
            make(model, making)
            making.rename(path)
        except Exception as error:  # the others can still be made
            print(f"{model}: {form} could not be made: {type(error).__name__}: {error}", file=sys.stderr)
            clear(making)


def clear(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models.REAL, choices=ALL, metavar="MODEL", help="of %(choices)s")
    for model in parser.parse_args().models:
        prepare(model)


if __name__ == "__main__":
    main()
