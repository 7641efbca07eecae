"""Qwen2 and Qwen2.5: keys and values have a bias, which stays outside of the latents."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, eager_attention_forward

from .rotary import RotaryArchitecture, RotaryLatentAttention


class LatentQwen2Attention(RotaryLatentAttention, Qwen2Attention):
    original = Qwen2Attention
    eager = staticmethod(eager_attention_forward)


class Qwen2(RotaryArchitecture):
    model_type = "qwen2"
    attention = LatentQwen2Attention
