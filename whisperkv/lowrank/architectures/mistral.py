"""Mistral, whose layers may look back no further than a window."""

from transformers.models.mistral.modeling_mistral import MistralAttention, eager_attention_forward

from .rotary import RotaryArchitecture, RotaryLatentAttention


class LatentMistralAttention(RotaryLatentAttention, MistralAttention):
    original = MistralAttention
    eager = staticmethod(eager_attention_forward)

    @property
    def window(self):
        return {"sliding_window": self.config.sliding_window}


class Mistral(RotaryArchitecture):
    model_type = "mistral"
    attention = LatentMistralAttention

    def window(self, attention):
        return attention.config.sliding_window
