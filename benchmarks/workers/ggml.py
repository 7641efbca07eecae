"""A Whisper of transformers as a file of whisper.cpp, in 16-bit floats or as codes of 8 bits (q8_0)."""

import struct

import numpy

MAGIC, FLOAT32, FLOAT16, Q8_0 = 0x67676D6C, 0, 1, 8  # the types of its tensors
FILE_TYPES = {"f16": 1, "q8_0": 2007}  # 2000 is the version of the quantization
BLOCK = 32  # codes that share a scale
NAMES = (  # transformers' to those of whisper.cpp, in this order
    ("embed_tokens.weight", "token_embedding.weight"),
    ("embed_positions.weight", "positional_embedding"),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
    (".layers.", ".blocks."),
    ("self_attn_layer_norm", "attn_ln"),
    ("encoder_attn_layer_norm", "cross_attn_ln"),
    ("final_layer_norm", "mlp_ln"),
    ("self_attn.", "attn."),
    ("encoder_attn.", "cross_attn."),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("out_proj", "out"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
)


def write(path, model, processor, form):
    """form  "f16" or "q8_0": how matrices are held; biases, norms and positions are float32, convolutions float16"""
    config, filters = model.config, processor.feature_extractor.mel_filters.T
    with open(path, "wb") as file:
        header = (
            MAGIC, config.vocab_size, config.max_source_positions, config.d_model, config.encoder_attention_heads,
            config.encoder_layers, config.max_target_positions, config.d_model, config.decoder_attention_heads,
            config.decoder_layers, config.num_mel_bins, FILE_TYPES[form], *filters.shape,
        )  # fmt: skip
        file.write(struct.pack(f"{len(header)}i", *header))
        file.write(numpy.ascontiguousarray(filters, numpy.float32).tobytes())
        words = words_of(processor.tokenizer)
        file.write(struct.pack("i", len(words)))
        for word in words:
            file.write(struct.pack("i", len(word)) + word)
        for name, tensor in model.model.state_dict().items():
            for theirs, its in NAMES:
                name = name.replace(theirs, its)
            write_tensor(file, name, tensor.float().numpy(), form)


def words_of(tokenizer):
    """The bytes of every token below the special ones, which whisper.cpp counts up by itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's way: these stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    vocabulary = {token: word for word, token in tokenizer.get_vocab().items()}
    ordinary = range(min(tokenizer.added_tokens_decoder))
    return [bytes(byte_of[character] for character in vocabulary[token]) for token in ordinary]


def write_tensor(file, name, values, form):
    kind = FLOAT16
    if "conv" in name and name.endswith("bias"):
        values = values[:, None]
    if values.ndim < 2 or name.endswith(("bias", "positional_embedding")):
        kind = FLOAT32
    elif values.ndim == 2 and form == "q8_0":
        kind = Q8_0
    file.write(struct.pack("3i", values.ndim, len(name), kind))
    file.write(struct.pack(f"{values.ndim}i", *values.shape[::-1]) + name.encode())
    if kind == Q8_0:
        file.write(blocks(values).tobytes())
    else:
        file.write(values.astype(numpy.float32 if kind == FLOAT32 else numpy.float16).tobytes())


def blocks(values):
    """Of 32 codes each, behind their scale."""
    rows = values.reshape(-1, BLOCK)
    scales = abs(rows).max(1, keepdims=True) / 127
    codes = numpy.rint(rows / numpy.where(scales > 0, scales, 1)).astype(numpy.int8)
    made = numpy.empty(len(rows), numpy.dtype([("scale", "<f2"), ("codes", "i1", (BLOCK,))]))
    made["scale"], made["codes"] = scales[:, 0], codes
    return made
