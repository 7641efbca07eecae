"""GPT-2: positions are added to the embeddings, so queries can meet latents, and no key need be rebuilt."""

import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward
from transformers.pytorch_utils import Conv1D

from ..absorbing import by_heads
from ..attention import LatentAttention
from .base import Architecture, plain


class LatentGPT2Attention(LatentAttention, GPT2Attention):
    original = GPT2Attention
    eager = staticmethod(eager_attention_forward)

    @property
    def dropout_rate(self):
        return self.attn_dropout.p

    def queries(self, hidden):
        return by_heads(self.c_attn(hidden)[..., : self.embed_dim], self.num_heads)

    def keys_values(self, hidden):
        return self.c_attn(hidden).split(self.embed_dim, -1)[1:]

    def attend(self, query, keys, values, mask, **kwargs):
        if self.config._attn_implementation == "eager" and self.reorder_and_upcast_attn:
            return self._upcast_and_reordered_attn(query, keys, values, mask)
        return super().attend(query, keys, values, mask, **kwargs)

    def finish(self, output):
        return self.resid_dropout(self.c_proj(output))


class GPT2(Architecture):
    model_type = "gpt2"
    attention = LatentGPT2Attention

    def attentions(self, model):
        return [block.attn for block in model.transformer.h]

    def projections(self, attention):
        weight, bias = plain(attention.c_attn, "c_attn")
        _, *weights = weight.split(attention.embed_dim)
        _, *biases = bias.split(attention.embed_dim)
        return tuple(zip(weights, biases))

    def take_out(self, attention):
        width, whole = attention.embed_dim, attention.c_attn
        queries = Conv1D(width, width).to(whole.weight)
        with torch.no_grad():
            queries.weight.copy_(whole.weight[:, :width])
            queries.bias.copy_(whole.bias[:width])
        queries.requires_grad_(whole.weight.requires_grad)
        attention.c_attn = queries

    def output(self, attention):
        return plain(attention.c_proj, "c_proj")[0]

    def heads(self, attention):
        return attention.num_heads, attention.num_heads, attention.head_dim
