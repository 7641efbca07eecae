"""LLaMA, with as many heads for keys as for queries or with fewer."""

from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from .rotary import RotaryArchitecture, RotaryLatentAttention


class LatentLlamaAttention(RotaryLatentAttention, LlamaAttention):
    original = LlamaAttention
    eager = staticmethod(eager_attention_forward)


class Llama(RotaryArchitecture):
    model_type = "llama"
    attention = LatentLlamaAttention
