"""A decode step on the CPU in one call: all layers, and no Python between them.

What a step reads is gathered when a decode takes its first one. Whatever is not a plain step of one token runs layer by
layer as ever, with the same result.
"""

import functools
import math

import torch

from . import ops
from .compat import CACHE
from .graphs import GRAPHS
from .plain import are_filled, is_plain_step, layers_of
from .snapshot import Snapshot, hooks_so_far
from .weights import NONE, FastLinear, Packed, is_ours_to_multiply, is_readable, matrix_of, transpose_heads

_POLICY = {name: number for number, (name, *_) in enumerate(ops.POLICIES)}
_NO_CACHE = [torch.empty(0)] * 2  # positions and scores of a layer that evicts nothing


class Steps:
    """The steps of one patched model."""

    def step(self, decoder, given, forward):
        """The last hidden states [rows, 1, width] of one new token a row; None if that is not for us."""
        weight = decoder.embed_tokens.weight
        if weight.device.type in GRAPHS or not is_ours_to_multiply(weight) or not is_plain_step(decoder, given):
            return None
        past, hears = given.get(CACHE), given.get("encoder_hidden_states") is not None
        layers, audio_layers = layers_of(decoder, past, hears)
        ids = given["input_ids"]
        if layers is None or not are_filled(decoder, layers, audio_layers, len(ids)):
            return None
        shared = layers[0].shared
        if shared.reading is None or shared.reading.is_stale(decoder, audio_layers):
            shared.reading = Reading(decoder, layers, audio_layers)
        return shared.reading.step(decoder, ids, given.get("position_ids"), layers, audio_layers)


class Reading:
    """What the steps of a decode read beside the cache of the self-attention: gathered once, as it stays the same."""

    def __init__(self, decoder, layers, audio_layers):
        snapshot = Snapshot(decoder)
        self.hooks, self.embeddings = hooks_so_far(), snapshot.embeddings
        self.heard, self.keys = [], audio_layers[0].keys_of_audios if audio_layers else None
        self.weights = None  # while there are none, steps are not for us
        if snapshot.is_plain and not snapshot.is_hooked and decoder.config.activation_function == "gelu":
            self._gather(decoder, layers, audio_layers)

    def __reduce__(self):
        return type(None), ()  # a copy of the cache gathers its own

    def is_stale(self, decoder, audio_layers):
        return (
            self.hooks != hooks_so_far()
            or self.embeddings != decoder.embed_tokens.weight.data_ptr()
            or (audio_layers and self.keys is not audio_layers[0].keys_of_audios)
        )

    def step(self, decoder, ids, places, layers, audio_layers):
        first = layers[0]
        if self.weights is None or first.home is not None or first.key_slots.dtype != torch.float32:
            return None
        for layer in layers:
            layer.make_room(1)
        if any(layer.sources is not first.sources and layer.sources.numel() for layer in layers):
            return None
        places = decoder.embed_positions.weight[first.seen if places is None else places[:, 0]]
        x = decoder.embed_tokens.weight[ids[:, 0]] + places
        caches = []
        for layer in layers:
            caches += layer.key_slots, layer.value_slots, layer.cursor
            caches += _NO_CACHE if layer.eviction is None else (layer.positions, layer.scores)
        owner = audio_layers[0].owner if audio_layers else first.cursor
        evicts = first.eviction is not None
        output = ops.decoder_step(
            x, first.sources, owner, self.lengths, self.bias, caches, self.heard, self.weights, self.format, self.heads,
            self.hidden, self.frames, self.group, self.is_latent,
            _POLICY[first.policy] if evicts else -1,
            min(first.budget, first.slots) if evicts else 1,
            first.eviction.recent if evicts else 1,
            first.eviction.decay if evicts else 1.0,
            self.epsilon, self.scale,
        )  # fmt: skip
        for layer in layers:
            layer.count(1)
        return output[:, None]

    def _gather(self, decoder, layers, audio_layers):
        layer = layers[0]
        heads, scales, formats, epsilons, weights = layer.heads, set(), set(), set(), []
        hears = bool(audio_layers)
        self.is_latent = hears and audio_layers[0].config.is_latent
        linears = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
        if not all(type(linear) is FastLinear and is_readable(linear) for linear in linears):
            return

        def add_norm(norm):
            epsilons.add(norm.eps)
            weights.extend((norm.weight, norm.bias))

        def add(linear, packed=None):
            matrix = matrix_of(linear, packed)
            formats.add(matrix.format)
            weights.extend((matrix.weight, matrix.bias))

        codes = audio_layers[0].audios.codes if hears else None

        def by_head(linear):
            """What each head's query is multiplied with, in the latent formats."""
            if "by_head" not in vars(linear):
                linear.by_head = Packed(linear.packed.format, functools.partial(transpose_heads, heads))
            return linear.by_head

        def add_rotated(attention):
            packed = codes.packed(attention, attention.k_proj.packed.format)
            linears = attention.k_proj, attention.v_proj
            key, value = (each.of(linear.weight) for each, linear in zip(packed, linears))
            weights.extend((key, NONE, value, codes.bias(attention)))

        def add_latents(low, format):
            down, key_up, up = low.matrices(format)
            weights[-6:-2] = [down, low.down_bias, up, low.offset[1].flatten()]
            return key_up, NONE

        for index, each in enumerate(decoder.layers):
            own, cross = each.self_attn, each.encoder_attn
            scales.update((own.scaling, cross.scaling))
            add_norm(each.self_attn_layer_norm)
            for linear in (own.q_proj, own.k_proj, own.v_proj, own.out_proj):
                add(linear)
            key_up = NONE, NONE
            if layers[index].low_rank is not None:
                key_up = add_latents(layers[index].low_rank.follow(own), own.k_proj.packed.format)
            add_norm(each.encoder_attn_layer_norm)
            add(cross.q_proj)
            if codes is None:
                add(cross.k_proj, by_head(cross.k_proj) if self.is_latent else None)
                add(cross.v_proj)
            else:
                add_rotated(cross)
            add(cross.out_proj)
            add_norm(each.final_layer_norm)
            for linear in (each.fc1, each.fc2):
                add(linear)
            weights.extend(key_up)
        add_norm(decoder.layer_norm)

        width, hidden = decoder.config.d_model, decoder.config.decoder_ffn_dim
        if len(formats) > 1 or len(epsilons) > 1 or len(scales) > 1:
            return
        (self.format,), (self.epsilon,), (self.scale,) = formats, epsilons, scales
        is_packed = self.format != ops.AS_FLOAT32
        if width % ops.PANEL or hidden % ops.PANEL or math.frexp(self.scale)[0] != 0.5:
            return
        low_rank = layer.low_rank
        if (self.is_latent or low_rank) and is_packed and width // heads % ops.PANEL:
            return
        if low_rank and is_packed and low_rank.rank % ops.PANEL:
            return
        if any(weight.dtype != torch.float32 for weight in weights if weight.dtype != torch.int32):
            return
        self.heads, self.hidden, self.frames, self.group = heads, hidden, 1, 16
        self.lengths, self.bias = layer.cursor, NONE
        if hears:
            audios = audio_layers[0].audios
            self.frames, self.group = audios.room, audio_layers[0].config.group
            self.lengths, self.bias = audios.lengths, audios.bias
            for each in audio_layers:
                keys, values = each.keys_of_audios, each.values_of_audios
                self.heard += keys.data, values.data, keys.scales, values.value_scales
            if self.heard[0].dtype not in (torch.float32, torch.uint8):
                return
        self.weights = [weight.detach() for weight in weights]
