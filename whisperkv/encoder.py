"""The encoder on the CPU: audio by audio, each layer a few products and one attention."""

import functools

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder, WhisperEncoderLayer

from . import ops
from .compat import become, record_outputs_as
from .snapshot import are_plain, is_hooked
from .weights import FORMATS, NONE, FastLinear, Matrix, Packed, is_ours_to_multiply, matrix_of, multiply, needs_grad

_MODULES = (nn.ModuleList, nn.Conv1d, nn.Embedding, nn.LayerNorm, FastLinear, WhisperEncoderLayer, WhisperAttention)
_NO_LENGTHS = torch.empty(0, dtype=torch.int32)


class FastEncoder(WhisperEncoder):
    """A WhisperEncoder that patch() has turned into ours by its class alone. Whatever it cannot do, the original does,
    layer by layer."""

    @functools.wraps(WhisperEncoder.forward)
    def forward(self, input_features, attention_mask=None, **kwargs):
        if not _is_plain(self, input_features, dict(kwargs)):
            return super().forward(input_features, attention_mask=attention_mask, **kwargs)
        with torch.no_grad():
            return BaseModelOutput(last_hidden_state=torch.stack([_hear(self, audio) for audio in input_features]))


record_outputs_as(FastEncoder, WhisperEncoder)


def install(encoder, format):
    become(encoder, FastEncoder)
    for conv in (encoder.conv1, encoder.conv2):
        conv.packed = Packed(FORMATS[format], by_windows)


def uninstall(encoder):
    if type(encoder) is FastEncoder:
        become(encoder, WhisperEncoder)
        for conv in (encoder.conv1, encoder.conv2):
            vars(conv).pop("packed", None)


def _is_plain(encoder, features, given):
    """Nothing is wanted but the states, and nobody looks on."""
    config, modules = encoder.config, list(encoder.modules())[1:]
    as_dict = given.pop("return_dict", getattr(config, "return_dict", True))
    return (
        isinstance(features, torch.Tensor)
        and features.dim() == 3
        and is_ours_to_multiply(features)
        and features.shape[1:] == (config.num_mel_bins, 2 * config.max_source_positions)
        and not any(given.values())
        and as_dict in (None, True)
        and not (config.output_attentions or config.output_hidden_states)
        and config.activation_function == "gelu"
        and not encoder.training
        and are_plain(modules, _MODULES)
        and not is_hooked(modules)
        and not needs_grad(features, *encoder.parameters())
        and all(matrix_of(module) is not None for module in modules if type(module) is FastLinear)
    )


def _hear(encoder, features):
    """The states [frames, width] of one audio's features [mels, 2 * frames]."""
    x = _stem(encoder, features)
    for layer in encoder.layers:
        x = _layer(layer, x)
    return encoder.layer_norm(x)


def _stem(encoder, features):
    """Both convolutions as products: a row is three neighbouring frames, which lie side by side."""
    mels, frames = features.shape
    padded = features.new_zeros(frames + 4, mels)
    padded[2:-2] = features.T
    heard = multiply(_windows(padded, 1), _matrix_of_convolution(encoder.conv1), activation=ops.GELU)
    heard[0] = heard[-1] = 0
    return multiply(
        _windows(heard[:-1], 2), _matrix_of_convolution(encoder.conv2), activation=ops.GELU,
        residual=encoder.embed_positions.weight.detach(),
    )  # fmt: skip


def _windows(frames, step):
    """[windows, 3 * width] of frames [frames, width], over the same memory."""
    count, width = frames.shape
    return frames.as_strided(((count - 3) // step + 1, 3 * width), (step * width, 1))


def by_windows(weight):
    """[outputs, inputs, 3] of a convolution as a matrix [outputs, 3 * inputs] for windows."""
    return weight.transpose(1, 2).flatten(1)


def _matrix_of_convolution(conv):
    packed = vars(conv)["packed"]
    return Matrix(packed.of(conv.weight), conv.bias.detach(), packed.format, len(conv.weight))


def _layer(layer, x):
    attention, norm = layer.self_attn, layer.self_attn_layer_norm
    shape = (1, len(x), attention.num_heads, attention.head_dim)
    query, key, value = (
        multiply(x, matrix_of(project), norm).view(shape)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    precision = matrix_of(attention.q_proj).format  # the products of frames as those of matrices
    mixed = ops.encoder_attention(query, key, value, NONE, _NO_LENGTHS, attention.scaling, precision)
    x = multiply(mixed.view(x.shape), matrix_of(attention.out_proj), residual=x)
    hidden = multiply(x, matrix_of(layer.fc1), layer.final_layer_norm, ops.GELU)
    return multiply(hidden, matrix_of(layer.fc2), residual=x)
