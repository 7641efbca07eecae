"""Turns a faster-whisper (CTranslate2) folder into a transformers model and processor, without a hub."""

import json
from math import prod
from os import PathLike
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from .model_bin import FLOATS, broken, dequantized, read_index, read_tensor

# Variables that say which transformer this is, and what Whisper has there. CTranslate2's GELU is number 3.
FLAGS = {
    "decoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/multi_query_attention": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
# Written by CTranslate2 too: numbers read elsewhere or without meaning for Whisper, and the tied projection.
UNUSED = {
    "decoder/alibi_use_positive_positions",
    "decoder/alignment_heads",
    "decoder/alignment_layer",
    "decoder/num_heads",
    "decoder/projection/weight",
    "decoder/projection/weight_scale",
    "decoder/scale_alibi",
    "encoder/num_heads",
}
END, START, PREVIOUS = "<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>"
TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = "<|translate|>", "<|transcribe|>", "<|notimestamps|>"
TIMESTAMPS = 1501  # 0.00 to 30.00 s in steps of 0.02


def load_ctranslate2(
    directory: str | PathLike[str], dtype: torch.dtype = torch.float32
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The `(model, processor)` of a faster-whisper folder, or of its model.bin, beside which are config.json and
    tokenizer.json."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r}: pass one of {', '.join(map(str, FLOATS))}")
    directory = Path(directory)
    if directory.name == "model.bin" and directory.is_file():
        directory = directory.parent
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder; pass the folder that holds model.bin")
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: no such file; faster-whisper's folder of a model has it")

    with open(directory / "model.bin", "rb") as file:
        variables = read_index(file)
        sizes = model_sizes(file, variables)
        tokenizer = load_tokenizer(directory / "tokenizer.json", sizes["vocab_size"])
        start, end = tokenizer.convert_tokens_to_ids([START, END])
        config = WhisperConfig(
            **sizes,
            decoder_start_token_id=start,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            begin_suppress_tokens=None,  # the generation config has them
        )
        model = load_weights(file, variables, config, dtype)
    model.generation_config = generation_config(directory / "config.json", config, tokenizer)

    # The encoder makes 50 positions of a second.
    extractor = WhisperFeatureExtractor(config.num_mel_bins, chunk_length=config.max_source_positions // 50)
    return model.eval(), WhisperProcessor(extractor, tokenizer)


# ---- model.bin ----


def model_sizes(file, variables):
    """The fields of a WhisperConfig that the variables tell."""

    def shape(name, rank):
        if name not in variables:
            raise broken(file.name, f"variable {name!r} is missing")
        if len(variables[name].shape) != rank:
            raise broken(file.name, f"variable {name!r} has shape {variables[name].shape}, which is not of rank {rank}")
        return variables[name].shape

    def flag(name, default):
        if name not in variables:
            return default
        if variables[name].shape or variables[name].dtype in FLOATS:
            raise broken(file.name, f"variable {name!r} is not a whole number")
        return int(read_tensor(file, variables[name]))

    for name, value in FLAGS.items():
        if flag(name, value) != value:
            raise broken(file.name, f"{name} is {flag(name, value)}, and {value} for every Whisper")

    vocab_size, d_model = shape("decoder/embeddings/weight", 2)
    mels = shape("encoder/conv1/weight", 3)[1]
    heads = {side: flag(f"{side}/num_heads", max(1, d_model // 64)) for side in ("encoder", "decoder")}
    if mels not in (80, 128):
        raise broken(file.name, f"the audio has {mels} mel bins, and Whisper takes 80 or 128")
    if d_model < 4 or d_model % 2 or any(count < 1 or d_model % count for count in heads.values()):
        raise broken(file.name, f"{d_model} channels cannot be split over the heads {heads}")

    sizes = {
        "d_model": d_model,
        "vocab_size": vocab_size,
        "num_mel_bins": mels,
        "max_source_positions": shape("encoder/position_encodings/encodings", 2)[0],
        "max_target_positions": shape("decoder/position_encodings/encodings", 2)[0],
    }
    for side in ("encoder", "decoder"):
        layers = 1
        while f"{side}/layer_{layers}/self_attention/linear_0/weight" in variables:
            layers += 1
        sizes[f"{side}_layers"] = layers
        sizes[f"{side}_attention_heads"] = heads[side]
        sizes[f"{side}_ffn_dim"] = shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
    return sizes


def parameters_of(config):
    """{variable of CTranslate2: the parameters of transformers that it holds, stacked along the first dimension}"""
    names = {"decoder/embeddings/weight": ["model.decoder.embed_tokens.weight"]}

    def linear(theirs, *ours):
        names[f"{theirs}/weight"] = [f"{name}.weight" for name in ours]
        names[f"{theirs}/bias"] = [f"{name}.bias" for name in ours]

    def norm(theirs, ours):
        names[f"{theirs}/gamma"] = [f"{ours}.weight"]
        names[f"{theirs}/beta"] = [f"{ours}.bias"]

    linear("encoder/conv1", "model.encoder.conv1")
    linear("encoder/conv2", "model.encoder.conv2")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        names[f"{side}/position_encodings/encodings"] = [f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(layers):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            q, k, v, out = (f"{ours}.self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", q, k, v)
            linear(f"{theirs}/self_attention/linear_1", out)
            if side == "decoder":
                q, k, v, out = (f"{ours}.encoder_attn.{name}_proj" for name in ("q", "k", "v", "out"))
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", q)
                linear(f"{theirs}/attention/linear_1", k, v)
                linear(f"{theirs}/attention/linear_2", out)
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    return names


def check_names(file, variables, parameters):
    """Names cost a file little, and the layers that they promise a lot of time and memory."""
    known = {*parameters, *FLAGS, *UNUSED, *(f"{name}_scale" for name in parameters if name.endswith("/weight"))}
    missing = [name for name in parameters if name not in variables]
    foreign = [name for name in variables if name not in known]
    if missing:
        raise broken(file.name, f"{len(missing)} variables are missing, {missing[0]!r} first")
    if foreign:
        raise broken(file.name, f"variable {foreign[0]!r} is not one of Whisper's")
    stored = sum(prod(variable.shape) for variable in {one.offset: one for one in variables.values()}.values())
    if sum(prod(variables[name].shape) for name in parameters) > 2 * stored:
        raise broken(file.name, "its aliases repeat the same weights over and over")


def load_weights(file, variables, config, dtype):
    parameters = parameters_of(config)
    projection = variables.get("decoder/projection/weight")
    config.tie_word_embeddings = projection == variables["decoder/embeddings/weight"]  # the same bytes of the file
    if not config.tie_word_embeddings:
        parameters["decoder/projection/weight"] = ["proj_out.weight"]
    check_names(file, variables, parameters)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    # k_proj has no bias: CTranslate2 stacks zeros in its place, and softmax would cancel any other value.
    shapes = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}

    for name, ours in parameters.items():
        stacked = [shapes.get(one, [config.d_model]) for one in ours]
        expected = [sum(shape[0] for shape in stacked), *stacked[0][1:]]
        if variables[name].shape != expected:
            raise broken(
                file.name, f"variable {name!r} has shape {variables[name].shape}, not {expected} as the others"
            )

    state = {}
    for name, ours in parameters.items():
        whole = dequantized(file, variables, name)
        rows = [shapes.get(one, [config.d_model])[0] for one in ours]
        for one, part in zip(ours, whole.split(rows)):
            if one in shapes:
                state[one] = part.to(dtype, copy=True)
    if config.tie_word_embeddings:
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


# ---- config.json and tokenizer.json ----


def read_json(path):
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise broken(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise broken(path, "is not a JSON object")
    return content


def load_tokenizer(path, vocab_size):
    """The tokenizer with its special tokens, and the timestamps that most folders leave out."""
    content = read_json(path)
    try:
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        added = {token["id"]: (token["content"], token["special"]) for token in content["added_tokens"]}
        ids = {text: number for number, (text, special) in added.items()}
        begin = ids[NO_TIMESTAMPS] + 1
        for number in range(begin, min(begin + TIMESTAMPS, vocab_size)):
            added.setdefault(number, (f"<|{(number - begin) * 0.02:.2f}|>", False))
        # Whisper's tokenizer looks for the timestamps behind the last special token.
        tokens = {
            number: AddedToken(text, normalized=False, special=special and number < begin)
            for number, (text, special) in sorted(added.items())
        }
        tokenizer = WhisperTokenizer(
            vocab=vocab,
            merges=[tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges],
            pad_token=END,
            added_tokens_decoder=tokens,
            extra_special_tokens=[str(token) for token in tokens.values() if token.special and str(token) != END],
        )
        found = tokenizer.get_vocab()
    except Exception as error:  # tokenizers raises plain Exception
        reason = f"{type(error).__name__}: {error}"
        raise broken(
            path, f"is not the tokenizer of a Whisper ({reason})", "take it from the original model"
        ) from error
    for name in (END, START, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_TIMESTAMPS):
        if name not in ids:
            raise broken(path, f"has no token {name}", "take it from the original model")
    if any(found.get(text) != number for number, (text, special) in added.items()) or max(found.values()) >= vocab_size:
        raise broken(path, f"has other token ids than the {vocab_size} of model.bin", "take it from the original model")
    # transformers would read this from a normalizer.json, which these folders lack: spellings are left alone.
    tokenizer.english_spelling_normalizer = {}
    return tokenizer


def generation_config(path, config, tokenizer):
    content = read_json(path)

    def token_list(key):
        tokens = content.get(key)
        if tokens is not None and not (
            isinstance(tokens, list) and all(type(token) is int and 0 <= token < config.vocab_size for token in tokens)
        ):
            raise broken(path, f"{key} is not a list of tokens below {config.vocab_size}")
        return tokens

    heads = content.get("alignment_heads")
    layers, width = config.decoder_layers, config.decoder_attention_heads
    if heads is None:  # as CTranslate2: every head of the upper half
        heads = [[layer, head] for layer in range(layers // 2, layers) for head in range(width)]
    if not isinstance(heads, list) or not all(
        isinstance(pair, list)
        and [type(index) for index in pair] == [int, int]
        and 0 <= pair[0] < layers
        and 0 <= pair[1] < width
        for pair in heads
    ):
        raise broken(path, f"alignment_heads is not a list of [layer, head] below [{layers}, {width}]")

    vocab = tokenizer.get_vocab()
    languages = {}
    if "" in vocab:  # so CTranslate2 tells a multilingual Whisper
        languages = {
            "lang_to_id": {text: id for text, id in vocab.items() if vocab[START] < id < vocab[TRANSLATE]},
            "task_to_id": {"transcribe": vocab[TRANSCRIBE], "translate": vocab[TRANSLATE]},
            "task": "transcribe",
        }
    return GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        prev_sot_token_id=vocab[PREVIOUS],
        no_timestamps_token_id=vocab[NO_TIMESTAMPS],
        suppress_tokens=token_list("suppress_ids"),
        begin_suppress_tokens=token_list("suppress_ids_begin"),
        alignment_heads=heads,
        is_multilingual=bool(languages),
        max_length=config.max_target_positions,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **languages,
    )
