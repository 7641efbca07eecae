"""What the graphs of a decoder take for granted of its modules and weights."""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer, WhisperPositionalEmbedding

from .attention import CrossAttention, SelfAttention
from .compat import CAPTURING
from .weights import FastLinear

# What a decoder may be made of; all else runs without graphs.
_MODULES = (
    nn.ModuleList, nn.Linear, FastLinear, nn.LayerNorm, nn.Embedding, WhisperPositionalEmbedding, WhisperDecoderLayer,
    SelfAttention, CrossAttention,
)  # fmt: skip
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def hooks_so_far():
    """How many hooks this process has registered, on whatever module: while that is the same, none has come."""
    return RemovableHandle.next_id


def are_plain(modules, kinds):
    """Whether modules are of these kinds or activations, in eval mode, and run as their classes say."""
    return all(
        (type(module) in kinds or type(module).__module__ in _ACTIVATIONS)
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not module.training
        for module in modules
    )


def is_hooked(modules):
    """By others than transformers, which leaves hooks behind that do nothing unless outputs are asked for."""
    return _has_any_global_hook() or any(
        getattr(hook, "__module__", "") != CAPTURING
        for module in modules
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


class Snapshot:
    """A decoder as it is when a decode begins: which modules it has, and where their weights are."""

    def __init__(self, decoder):
        modules = list(decoder.modules())[1:]
        held = [each for module in modules for each in (*module._parameters.values(), *module._buffers.values())]
        tensors = [tensor for tensor in held if tensor is not None]
        self.is_plain = are_plain(modules, _MODULES) and all(
            type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors
        )
        self.facts = self.is_plain and (
            [id(module) for module in modules],
            [(tensor.data_ptr(), tensor.dtype) for tensor in tensors],
        )
        self.embeddings = decoder.embed_tokens.weight.data_ptr()
        self.heads = decoder.config.decoder_attention_heads
        self._modules = modules
        self._attentions = [layer.self_attn for layer in decoder.layers]
        self._joined = None

    @property
    def is_hooked(self):
        return is_hooked(self._modules)

    def joined(self):
        """The JoinedProjections of all layers, as their weights are now."""
        if self._joined is None:
            self._joined = JoinedProjections(self._attentions)
        self._joined.refresh()
        return self._joined


class JoinedProjections:
    """The query's, key's and value's projections of each layer's self-attention as one product, which is one kernel.

    This copies the weights: 315 MB for large-v3 in float16, a tenth of the model. Weights that are changed in place are
    followed by refresh(), from the next decode on.

    of_layer  for each its weight [3 * width, width] and its bias [3 * width], 0 for the keys
    """

    def __init__(self, attentions):
        projections = [(each.q_proj, each.k_proj, each.v_proj) for each in attentions]
        like = projections[0][0].weight
        shape = (len(attentions), 3, *like.shape)
        with torch.inference_mode(False):  # what is made in inference mode could not be written to outside it
            weights = torch.empty(shape, dtype=like.dtype, device=like.device)
            biases = torch.zeros(shape[:3], dtype=like.dtype, device=like.device)
        self.of_layer = list(zip(weights.flatten(1, 2), biases.flatten(1)))
        copies = [*weights.flatten(0, 1), *biases.flatten(0, 1)]
        modules = [module for layer in projections for module in layer]
        originals = [*(module.weight for module in modules), *(module.bias for module in modules)]
        self._pairs = [(copy, original) for copy, original in zip(copies, originals) if original is not None]

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(*map(list, zip(*self._pairs)))
