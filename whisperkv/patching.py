"""patch(), unpatch() and stats(): our attention and caches in a Whisper that is otherwise left alone."""

import sys
from typing import TypeVar

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import WhisperForCausalLM, WhisperForConditionalGeneration, WhisperModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoder, WhisperEncoder

from . import ops
from .attention import CrossAttention, SelfAttention, self_cache_layer
from .cache import SelfCacheLayer, SpareBuffer
from .config import CrossConfig, EvictionConfig
from .cross_cache import Audios, CrossCacheLayer, first_rows, owners_of
from .graphs import GraphDecoder, Graphs
from .listener import EncoderListener
from .records import DecodeRecord, Stats

Model = TypeVar("Model")  # what is given comes back

_MODELS = (WhisperForConditionalGeneration, WhisperModel, WhisperForCausalLM)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTENTIONS = {"self_attn": SelfAttention, "encoder_attn": CrossAttention}
_DECODER_ARGUMENTS = ("input_ids", "attention_mask", "encoder_hidden_states", "past_key_values", "inputs_embeds")


def patch(
    model: Model, eviction: EvictionConfig | None = None, cross: CrossConfig | None = None, graphs: bool = True
) -> Model:
    """Make a Whisper decode through whisperkv, and return it.

    model     a WhisperForConditionalGeneration, WhisperModel or WhisperForCausalLM, or a pipeline, PEFT model,
              torch.compile or (Distributed)DataParallel wrapper around one
    eviction  which tokens the self-attention cache keeps; None keeps all, and the tokens come out as before
    cross     how the cross-attention cache holds an audio; None is CrossConfig(), which is lossless too
    graphs    on CUDA, capture a decode step of each shape once and replay it. What cannot be captured (hooks, adapters,
              attentions asked for, a policy that is a function) runs as it does with False. The memory of the last
              caches is kept for the next ones until unpatch().

    A model that is already patched takes the new settings.
    """
    whisper = _whisper(model)
    decoder = _decoder(whisper)
    if eviction is not None and not isinstance(eviction, EvictionConfig):
        hint = ": pass it as cross=" if isinstance(eviction, CrossConfig) else ""
        known = "an EvictionConfig, as EvictionConfig(recent=64, heavy=32), or None"
        raise TypeError(f"eviction must be {known}; got {eviction!r}{hint}")
    if cross is not None and not isinstance(cross, CrossConfig):
        hint = ": pass it as eviction=" if isinstance(cross, EvictionConfig) else ""
        raise TypeError(f"cross must be a CrossConfig, as CrossConfig(format='int8'), or None; got {cross!r}{hint}")
    if not isinstance(graphs, bool):
        raise ValueError(f"graphs must be True or False; got {graphs!r}")
    cross = cross or CrossConfig()
    for index, layer in enumerate(decoder.layers):
        for name, ours in _ATTENTIONS.items():
            kind = type(getattr(layer, name))
            if kind not in (WhisperAttention, ours):
                raise TypeError(
                    f"decoder layer {index}: {name} is a {kind.__name__}, and whisperkv knows only WhisperAttention"
                )
    _check_tensors(decoder)
    _check_projections(decoder, cross)
    encoder = _encoder(whisper)
    if cross.trim != "off" and encoder is None:
        raise ValueError(
            f"CrossConfig.trim={cross.trim!r} needs the encoder, and {type(whisper).__name__} has none: use trim='off'"
        )
    _refuse_while_generating(whisper, "patch")
    _restore(whisper)
    for layer in decoder.layers:
        for name, ours in _ATTENTIONS.items():
            getattr(layer, name).__class__ = ours
    listener = None
    if cross.trim != "off":
        listener = EncoderListener(cross.trim)
        encoder.register_forward_hook(listener, with_kwargs=True)
    if graphs and type(decoder) is WhisperDecoder:
        decoder.__class__ = GraphDecoder
    graphs = Graphs() if type(decoder) is GraphDecoder else None
    decoder.register_forward_pre_hook(CacheAdoption(eviction, cross, listener, graphs), with_kwargs=True)
    return model


def unpatch(model: Model) -> Model:
    """Make the model exactly what it was before patch(), and return it. An unpatched model is left alone."""
    whisper = _whisper(model)
    _refuse_while_generating(whisper, "unpatch")
    _restore(whisper)
    return model


def stats(model: object) -> Stats:
    """The caches of the last decode. A generate() over long audio decodes chunk by chunk: this is the last chunk."""
    adoption = _adoption(_decoder(_whisper(model)))
    if adoption is None:
        raise ValueError("the model is not patched: call whisperkv.patch(model) first")
    return adoption.stats()


# What the decoder carries


class CacheAdoption:
    """A forward pre-hook of the decoder: a fresh cache is given our layers before anything enters it."""

    def __init__(self, eviction, cross, listener, graphs):
        self.eviction, self.cross = eviction, cross
        self.listener = listener  # of the encoder, if frames are to be trimmed
        self.graphs = graphs  # of the steps to come, if they are wanted
        self.record = None  # of the cache that was last passed through the decoder
        self.decodes = 0
        self.note = ""

    def stats(self):
        return self.record.stats(self.decodes, self.note) if self.record else Stats(note=self.note)

    def __call__(self, decoder, args, kwargs):
        given = {**dict(zip(_DECODER_ARGUMENTS, args)), **kwargs}
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None or len(args) > len(_DECODER_ARGUMENTS):
            return None
        rows, tokens = inputs.shape[:2]
        layer = self_cache_layer(given.get("past_key_values"), 0)
        if layer is None or layer.seen == 0:
            layer = self._adopt(decoder, given, rows, tokens)
            if layer is None:
                return None
        elif tokens == 1:
            given["attention_mask"] = None  # our layers know the padding, and transformers would have to wait for it
        self.record = layer.record
        self.record.tokens = layer.seen + tokens
        return (), given

    def _adopt(self, decoder, given, rows, tokens):
        """Give the fresh cache our layers, or make one if none is given. The first layer, or None if the decode is
        left to transformers."""
        cache, states, config = given.get("past_key_values"), given.get("encoder_hidden_states"), decoder.config
        use_cache = given.get("use_cache")
        if not (config.use_cache if use_cache is None else use_cache):
            return None
        if cache is not None and (not isinstance(cache, Cache) or cache.get_seq_length() > 0):
            return None
        padding, self.note = _left_padding(
            given.get("attention_mask"), rows, tokens, decoder.embed_tokens.weight.device
        )
        if decoder.training:
            self.note = "left to transformers: the model is in training mode (call model.eval())"
        elif torch.is_grad_enabled() and _needs_grad(decoder, given):
            self.note = "left to transformers: gradients are on (decode under torch.no_grad())"
        elif (dtype := decoder.embed_tokens.weight.dtype) not in _DTYPES:
            self.note = f"left to transformers: the model is in {_name(dtype)} (whisperkv takes {_name(*_DTYPES)})"
        if self.note:
            return None
        _check_tensors(decoder)
        _check_projections(decoder, self.cross)
        if states is not None:
            _check_states(states, rows, config.d_model)
        if self.eviction is not None:
            self.eviction.check_prompt(tokens - (0 if padding is None else int(padding.min())))

        if cache is None or (states is not None and not isinstance(cache, EncoderDecoderCache)):
            cache = DynamicCache() if states is None else EncoderDecoderCache(DynamicCache(), DynamicCache())
            given["past_key_values"] = cache
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            given["attention_mask"] = mask[..., :tokens]  # made for a static cache of more slots
        record = DecodeRecord(
            layers=len(decoder.layers),
            width=config.d_model,
            limit=config.max_target_positions,
            item_size=decoder.embed_tokens.weight.dtype.itemsize,
            rows=rows,
            padding=0 if padding is None else int(padding.sum()),
            frames=0 if states is None else states.shape[1],
            eviction=self.eviction,
        )
        self.decodes += 1
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        spare = SpareBuffer()
        own.layers = [
            SelfCacheLayer(self.eviction, config.max_target_positions, padding, spare, record, index)
            for index in range(record.layers)
        ]
        own.layer_class_to_replicate = None
        is_captured = self.graphs is not None and self.graphs.begin(decoder)
        if states is not None:
            self._adopt_cross(cache, states, record, is_captured)
        return own.layers[0]

    def _adopt_cross(self, cache, states, record, is_captured):
        owners = owners_of(states, self.cross.share_beams)
        keep = None
        if self.listener is not None:
            keep = self.listener.kept(states[first_rows(owners, int(owners[-1]) + 1)])
            if keep is None:
                self.note = "not trimmed: this encoder output was not made by the patched model's own encoder"
        audios = Audios.gather(states, owners, keep, record.layers, record)
        record.audios, record.frames_kept = len(audios), int(audios.lengths.sum())
        if is_captured:
            audios.move_to(self.graphs.home_of(audios, self.cross))
        cache.cross_attention_cache.layers = [
            CrossCacheLayer(self.cross, audios, owners, index) for index in range(record.layers)
        ]
        cache.cross_attention_cache.layer_class_to_replicate = None
        cache.is_updated = dict.fromkeys(range(record.layers), False)


def _left_padding(mask, rows, tokens, device):
    """int32 [rows] of padding columns (None if there are none), and why the mask is not one that we can follow."""
    if mask is None:
        return None, ""
    if mask.dim() == 4:  # made for a static cache: the last token's row, over the tokens of this pass
        visible = mask[:, 0, -1, :tokens]
        visible = visible if visible.dtype == torch.bool else visible == 0
    else:
        visible = mask.bool()
    visible = visible.expand(rows, -1)
    if bool(visible.all()):
        return None, ""
    if visible.shape[1] != tokens or not bool((visible[:, 1:] >= visible[:, :-1]).all() & visible[:, -1].all()):
        return None, "left to transformers: the decoder's attention mask is not plain left padding"
    return (~visible).sum(-1).int().to(device), ""


def _needs_grad(decoder, given):
    inputs = (given.get("encoder_hidden_states"), given.get("inputs_embeds"))
    return any(x is not None and x.requires_grad for x in inputs) or any(p.requires_grad for p in decoder.parameters())


# Finding our way about a model


def _whisper(model):
    """The Whisper inside a pipeline, a PEFT model, a compiled one or one for several devices."""
    whisper = model
    for _ in range(5):  # wrappers at most
        if isinstance(whisper, _MODELS):
            return whisper
        if hasattr(whisper, "get_base_model"):
            whisper = whisper.get_base_model()
        elif isinstance(whisper, (DataParallel, DistributedDataParallel)):
            whisper = whisper.module
        else:  # a compiled model's, a pipeline's
            whisper = getattr(whisper, "_orig_mod", getattr(whisper, "model", whisper))
    kind, hint = type(model).__name__, ""
    if isinstance(model, (tuple, list)) and model and isinstance(model[0], torch.nn.Module):
        hint = f": it is the first of this {kind}: patch(model)"
    elif isinstance(model, (WhisperEncoder, WhisperDecoder)):
        hint = f", a {kind} alone: pass the model that it is part of"
    elif isinstance(model, str):
        hint = f": load it first, WhisperForConditionalGeneration.from_pretrained({model!r})"
    elif isinstance(model, type):
        hint = ", a class, and not a model made from it"
    known = ", ".join(kind.__name__ for kind in _MODELS)
    raise TypeError(f"whisperkv patches {known}, or a pipeline or PEFT model around one; got {kind}{hint}")


def _decoder(whisper):
    return next(module for module in whisper.modules() if isinstance(module, WhisperDecoder))


def _encoder(whisper):
    return next((module for module in whisper.modules() if isinstance(module, WhisperEncoder)), None)


def _adoption(decoder):
    return next((hook for hook in decoder._forward_pre_hooks.values() if isinstance(hook, CacheAdoption)), None)


def _restore(whisper):
    decoder, encoder = _decoder(whisper), _encoder(whisper)
    if type(decoder) is GraphDecoder:
        decoder.__class__ = WhisperDecoder
    for layer in decoder.layers:
        for name, ours in _ATTENTIONS.items():
            if type(getattr(layer, name)) is ours:
                getattr(layer, name).__class__ = WhisperAttention
    _remove_hooks(decoder._forward_pre_hooks, decoder._forward_pre_hooks_with_kwargs, CacheAdoption)
    if encoder is not None:
        _remove_hooks(encoder._forward_hooks, encoder._forward_hooks_with_kwargs, EncoderListener)


def _remove_hooks(hooks, with_kwargs, kind):
    for key, hook in list(hooks.items()):
        if isinstance(hook, kind):
            del hooks[key]
            with_kwargs.pop(key, None)


def _check_tensors(decoder):
    weight = decoder.embed_tokens.weight
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {weight.device}: whisperkv has kernels for cpu and cuda (model.to('cpu'))")
    if weight.is_cuda and not ops.CUDA:
        raise ValueError(
            f"the model is on {weight.device}, and whisperkv has no CUDA kernels here ({ops.CUDA_REASON}): "
            "move it with model.to('cpu')"
        )


def _name(*dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_projections(decoder, cross):
    """The latent formats read the weights themselves."""
    if not cross.is_latent:
        return
    for index, layer in enumerate(decoder.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(layer.encoder_attn, name)
            if type(module) is not torch.nn.Linear or module.weight.dtype != decoder.embed_tokens.weight.dtype:
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ValueError(
                    f"CrossConfig.format={cross.format!r} needs the plain weights of k_proj and v_proj, and {name} of "
                    f"decoder layer {index} is a {kind}: merge the adapter (merge_and_unload()) or use a "
                    "format that calls it ('model', 'int8', 'int4')"
                )


def _check_states(states, rows, width):
    if states.dim() != 3 or states.shape[-1] != width or len(states) != rows:
        raise ValueError(
            f"the encoder's output must be [rows={rows}, frames, width={width}] for {rows} rows of tokens; "
            f"got {list(states.shape)}"
        )


def _refuse_while_generating(whisper, action):
    """A cache is in use from the first token of generate() to the last, so its layers cannot be changed between."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is whisper:
                raise RuntimeError(f"{action}() while the model is generating: wait until generate() has returned")
            frame = frame.f_back
