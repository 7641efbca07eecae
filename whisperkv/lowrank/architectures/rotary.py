"""What models with rotary positions and separate projections have in common."""

from ..absorbing import by_heads
from ..attention import LatentAttention
from .base import Architecture, plain


class RotaryLatentAttention(LatentAttention):
    @property
    def key_norm(self):
        return getattr(self, "k_norm", None)

    @property
    def dropout_rate(self):
        return self.attention_dropout

    def queries(self, hidden):
        queries = by_heads(self.q_proj(hidden), self.config.num_attention_heads)
        return self.q_norm(queries) if hasattr(self, "q_norm") else queries

    def keys_values(self, hidden):
        return self.k_proj(hidden), self.v_proj(hidden)

    def finish(self, output):
        return self.o_proj(output)


class RotaryArchitecture(Architecture):
    """Layers at model.model.layers, with q_proj, k_proj, v_proj and o_proj."""

    def attentions(self, model):
        return [layer.self_attn for layer in model.model.layers]

    def projections(self, attention):
        return plain(attention.k_proj, "k_proj"), plain(attention.v_proj, "v_proj")

    def take_out(self, attention):
        del attention.k_proj, attention.v_proj

    def output(self, attention):
        return plain(attention.o_proj, "o_proj")[0]

    def heads(self, attention):
        config = attention.config
        return config.num_attention_heads, config.num_key_value_heads, attention.head_dim

    def rotary(self, model):
        return model.model.rotary_emb

    def key_norm(self, attention):
        return getattr(attention, "k_norm", None)

    def window(self, attention):
        return getattr(attention, "sliding_window", None)
