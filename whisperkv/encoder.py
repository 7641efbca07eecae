"""The encoder: on the CPU audio by audio, each layer a few products and one attention; and over no more frames than
`trim` and `merge` leave, wherever it runs."""

import functools

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder, WhisperEncoderLayer

from . import ops
from .compat import become, record_outputs_as
from .merge import merged, merging_layer
from .snapshot import are_plain, is_hooked
from .weights import (
    FORMATS,
    NONE,
    FastLinear,
    Packed,
    is_ours_to_multiply,
    is_readable,
    matrix_of,
    multiply,
    needs_grad,
)

_MODULES = (nn.ModuleList, nn.Conv1d, nn.Embedding, nn.LayerNorm, FastLinear, WhisperEncoderLayer, WhisperAttention)
_NO_LENGTHS = torch.empty(0, dtype=torch.int32)


class FastEncoder(WhisperEncoder):
    """A WhisperEncoder that patch() has turned into ours by its class alone. Whatever it cannot do, the original does,
    layer by layer."""

    @functools.wraps(WhisperEncoder.forward)
    def forward(self, input_features, attention_mask=None, **kwargs):
        as_dict = kwargs.get("return_dict")
        as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
        wanted = any(value for name, value in kwargs.items() if name != "return_dict")
        is_plain = not wanted and _is_plain(self, input_features)
        share, kept = _share(self, input_features), None
        if self.listener and not wanted:
            kept = self.listener.listen(input_features, attention_mask, share)
        if kept is None and not is_plain:
            return super().forward(input_features, attention_mask=attention_mask, **kwargs)
        if is_plain:
            with torch.no_grad():
                states, keep = _hear_all(self, input_features, kept, share)
        else:
            states, keep = _by_layers(self, input_features, kept, share)
        if kept is not None:
            self.listener.note(keep)
        return BaseModelOutput(last_hidden_state=states) if as_dict else (states,)


record_outputs_as(FastEncoder, WhisperEncoder)


def install(encoder, format, listener=None):
    """The listener says which frames are kept, if `trim` or `merge` do."""
    become(encoder, FastEncoder)
    encoder.listener = listener
    for conv in (encoder.conv1, encoder.conv2):
        conv.packed = Packed(FORMATS[format], by_windows)


def uninstall(encoder):
    if type(encoder) is FastEncoder:
        become(encoder, WhisperEncoder)
        vars(encoder).pop("listener", None)
        for conv in (encoder.conv1, encoder.conv2):
            vars(conv).pop("packed", None)


def _is_plain(encoder, features):
    """Nobody wants to see what lies between."""
    config, modules = encoder.config, list(encoder.modules())[1:]
    return (
        isinstance(features, torch.Tensor)
        and features.dim() == 3
        and is_ours_to_multiply(features)
        and features.shape[1:] == (config.num_mel_bins, 2 * config.max_source_positions)
        and not (config.output_attentions or config.output_hidden_states)
        and config.activation_function == "gelu"
        and not encoder.training
        and are_plain(modules, _MODULES)
        and not is_hooked(modules)
        and not needs_grad(features, *encoder.parameters())
        and all(is_readable(module) for module in modules if type(module) is FastLinear)
    )


def _share(encoder, features):
    """Of the pairs, how many are merged. None of what a model learns from, or of what it will refuse."""
    if not encoder.listener or features.shape[-1] != 2 * encoder.config.max_source_positions:
        return 0
    return 0 if encoder.training or needs_grad(features, *encoder.parameters()) else encoder.listener.merge


def _hear_all(encoder, features, kept, share):
    """The states [audios, frames, width] of features [audios, mels, 2 * frames], and which frames are kept in the end,
    bool [audios, frames]. A frame that is not has the states of the one that stands for it."""
    if kept is None:
        return torch.stack([_hear(encoder, audio) for audio in features]), None
    states = features.new_empty(len(features), encoder.config.max_source_positions, encoder.config.d_model)
    keep = torch.empty_like(kept.of_all, dtype=torch.bool)
    for audio in range(len(features)):
        heard, own = _hear_kept(encoder, features[audio], kept.audio(audio), share)
        torch.index_select(heard, 0, own.of_all[0], out=states[audio])
        keep[audio] = own.keep[0]
    return states, keep


def _hear(encoder, features):
    """The states [frames, width] of one audio's features [mels, 2 * frames]."""
    x = _stem(encoder, features)
    for layer in encoder.layers:
        x = _layer(layer, x)
    return encoder.layer_norm(x)


def _hear_kept(encoder, features, kept, share):
    """The same of the frames that are kept, and which they are when some have been merged."""
    x, bias = _stem(encoder, features, kept.places[0]), kept.bias
    for index, layer in enumerate(encoder.layers):
        if share and index == merging_layer(len(encoder.layers)):
            states, kept = merged(x[None], kept, share)
            x, bias = states[0], kept.bias
        x = _layer(layer, x, bias)
    return encoder.layer_norm(x), kept


def _by_layers(encoder, features, kept, share):
    """What _hear_all() does, by the layers themselves."""
    x = nn.functional.gelu(encoder.conv1(features))
    x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight.to(x.device)
    width = x.shape[-1]
    x = x.gather(1, kept.places[..., None].expand(-1, -1, width))
    mask = _mask(kept, x.dtype)
    for index, layer in enumerate(encoder.layers):
        if share and index == merging_layer(len(encoder.layers)):
            x, kept = merged(x, kept, share)
            mask = _mask(kept, x.dtype)
        x = layer(x, mask)
        x = x[0] if isinstance(x, tuple) else x
    return encoder.layer_norm(x).gather(1, kept.of_all[..., None].expand(-1, -1, width)), kept.keep


def _mask(kept, dtype):
    """What the layers themselves add to their logits, [audios, 1, 1, frames]."""
    after = torch.arange(kept.places.shape[1], device=kept.places.device) >= kept.lengths[:, None]
    return kept.bias.masked_fill(after, torch.finfo(torch.float32).min).to(dtype)[:, None, None]


def _stem(encoder, features, places=None):
    """Both convolutions as products: a row is three neighbouring frames, which lie side by side."""
    mels, frames = features.shape
    padded = features.new_zeros(frames + 4, mels)
    padded[2:-2] = features.T
    heard = multiply(_windows(padded, 1), matrix_of(encoder.conv1), activation=ops.GELU)
    heard[0] = heard[-1] = 0
    windows, positions = _windows(heard[:-1], 2), encoder.embed_positions.weight.detach()
    if places is not None and len(places) < len(windows):
        windows, positions = windows[places], positions[places]
    return multiply(windows, matrix_of(encoder.conv2), activation=ops.GELU, residual=positions)


def _windows(frames, step):
    """[windows, 3 * width] of frames [frames, width], over the same memory."""
    count, width = frames.shape
    return frames.as_strided(((count - 3) // step + 1, 3 * width), (step * width, 1))


def by_windows(weight):
    """[outputs, inputs, 3] of a convolution as a matrix [outputs, 3 * inputs] for windows."""
    return weight.transpose(1, 2).flatten(1)


def _layer(layer, x, bias=NONE):
    attention, norm = layer.self_attn, layer.self_attn_layer_norm
    shape = (1, len(x), attention.num_heads, attention.head_dim)
    query, key, value = (
        multiply(x, matrix_of(project), norm).view(shape)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    precision = matrix_of(attention.q_proj).format  # the products of frames as those of matrices
    mixed = ops.encoder_attention(query, key, value, bias, _NO_LENGTHS, attention.scaling, precision)
    x = multiply(mixed.view(x.shape), matrix_of(attention.out_proj), residual=x)
    hidden = multiply(x, matrix_of(layer.fc1), layer.final_layer_norm, ops.GELU)
    return multiply(hidden, matrix_of(layer.fc2), residual=x)
