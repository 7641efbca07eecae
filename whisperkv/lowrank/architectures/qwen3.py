"""Qwen3: keys go through a norm, head by head, after they are rebuilt."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, eager_attention_forward

from .rotary import RotaryArchitecture, RotaryLatentAttention


class LatentQwen3Attention(RotaryLatentAttention, Qwen3Attention):
    original = Qwen3Attention
    eager = staticmethod(eager_attention_forward)


class Qwen3(RotaryArchitecture):
    model_type = "qwen3"
    attention = LatentQwen3Attention
