"""Small language models with random weights, one of each architecture, and a tokenizer of bytes."""

import torch

VOCABULARY = 260  # bytes, and pad, begin and end

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.15, pad_token_id=256, bos_token_id=257, eos_token_id=258,
)  # fmt: skip
OF_GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=48, n_layer=4, n_head=4, n_positions=128, initializer_range=0.15, pad_token_id=256,
    bos_token_id=257, eos_token_id=258,
)  # fmt: skip
FEWER = dict(num_key_value_heads=2)
MODELS = {
    "gpt2": ("GPT2", OF_GPT2),
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 4}),
    "llama_grouped": ("Llama", {**SIZES, **FEWER}),
    "mistral": ("Mistral", {**SIZES, **FEWER, "sliding_window": 12}),
    "qwen2": ("Qwen2", {**SIZES, **FEWER}),
    "qwen2_sliding": (
        "Qwen2", {**SIZES, **FEWER, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {**SIZES, **FEWER, "head_dim": 16}),
}  # fmt: skip


def language_model(name, seed=0, **others):
    import transformers

    kind, sizes = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **others})
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():  # biases and norms that do something
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are named by letters from 256 on
    others = [byte for byte in range(256) if byte not in plain]
    vocabulary = {chr(byte if byte in plain else 256 + others.index(byte)): byte for byte in range(256)}
    vocabulary |= {"<pad>": 256, "<begin>": 257, "<end>": 258}
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", padding_side="left"
    )
