"""The encoder on the CPU: audio by audio, each layer a few products and one attention."""

import functools

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder, WhisperEncoderLayer

from . import ops
from .compat import record_outputs_as
from .snapshot import has_hooks
from .weights import FastLinear, Packed, Matrix, is_ours_to_multiply, matrix_of, multiply, needs_grad

_KNOWN = (nn.ModuleList, nn.Conv1d, nn.Embedding, nn.LayerNorm, FastLinear, WhisperEncoderLayer, WhisperAttention)


class FastEncoder(WhisperEncoder):
    """A WhisperEncoder that patch() has turned into ours by its class alone. Whatever it cannot do, the original does,
    layer by layer."""

    @functools.wraps(WhisperEncoder.forward)
    def forward(self, input_features, attention_mask=None, **kwargs):
        if not _is_plain(self, input_features, kwargs):
            return super().forward(input_features, attention_mask=attention_mask, **kwargs)
        with torch.no_grad():
            return BaseModelOutput(last_hidden_state=torch.stack([_hear(self, audio) for audio in input_features]))


record_outputs_as(FastEncoder, WhisperEncoder)


def _hear(encoder, features):
    """The states [frames, width] of one audio's features [mels, 2 * frames]."""
    x = _stem(encoder, features)
    for layer in encoder.layers:
        x = _layer(layer, x)
    return encoder.layer_norm(x)


def _stem(encoder, features):
    """Both convolutions as products: a row is three neighbouring frames, which lie side by side."""
    first, second = encoder.conv1, encoder.conv2
    mels, frames = features.shape
    padded = features.new_zeros(frames + 4, mels)
    padded[2:-2] = features.T
    heard = multiply(_windows(padded, 1), _matrix_of_convolution(first), activation=ops.GELU)
    heard[0] = heard[-1] = 0
    return multiply(
        _windows(heard[:-1], 2), _matrix_of_convolution(second), activation=ops.GELU,
        residual=encoder.embed_positions.weight.detach(),
    )  # fmt: skip


def _windows(frames, step):
    """[windows, 3 * width] of frames [frames, width], over the same memory."""
    count, width = frames.shape
    return frames.as_strided(((count - 3) // step + 1, 3 * width), (step * width, 1))


def _matrix_of_convolution(conv):
    """Of a convolution over three frames: [outputs, 3 * inputs] in the order of the windows."""
    packed = vars(conv)["packed"]
    weight = packed.of(conv.weight)
    return Matrix(weight, conv.bias.detach(), packed.format, len(conv.weight))


class PackedConvolution(Packed):
    def of(self, weight): ...


def _layer(layer, x):
    attention, norm = layer.self_attn, layer.self_attn_layer_norm
    shape = (1, len(x), attention.num_heads, attention.head_dim)
    query, key, value = (
        multiply(x, matrix_of(project), norm).view(shape)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = ops.encoder_attention(query, key, value, NONE, attention.scaling)
    x = multiply(mixed.view(x.shape), matrix_of(attention.out_proj), residual=x)
    hidden = multiply(x, matrix_of(layer.fc1), layer.final_layer_norm, ops.GELU)
    return multiply(hidden, matrix_of(layer.fc2), residual=x)
