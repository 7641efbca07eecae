"""What the decoder carries: at the first pass of a decode its cache is given our layers, or left to transformers."""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperAttention

from . import ops
from .attention import CrossAttention, SelfAttention, self_cache_layer
from .cache import SelfCacheLayer, Shared
from .compat import who_traces
from .cross_cache import Audios, CrossCacheLayer, first_rows, owners_of
from .records import DecodeRecord, Stats
from .views import Onlookers, layers_behind, plain_layer

ATTENTIONS = {"self_attn": SelfAttention, "encoder_attn": CrossAttention}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ARGUMENTS = ("input_ids", "attention_mask", "encoder_hidden_states", "past_key_values", "inputs_embeds")  # in order


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
        given = {**dict(zip(_ARGUMENTS, args)), **kwargs}
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None or len(args) > len(_ARGUMENTS):
            return None
        rows, tokens = inputs.shape[:2]
        cache = given.get("past_key_values")
        layer = self_cache_layer(cache, 0) or _resumed(cache)
        if layer is None or layer.seen == 0:
            layer = self._adopt(decoder, given, rows, tokens)
            if layer is None:
                return None
        elif layer.eviction is None and torch.is_grad_enabled() and _needs_grad(decoder, given):
            _hand_back(cache)
            self.note = "left to transformers, with the tokens so far: gradients are on (decode under torch.no_grad())"
            return None
        elif tokens == 1:
            given["attention_mask"] = None  # our layers know the padding, and transformers would have to wait for it
        self.record = layer.shared.record
        self.record.tokens = layer.seen + tokens
        return (), given

    def _adopt(self, decoder, given, rows, tokens):
        """Give the fresh cache our layers, or make one if none is given. The first layer, or None if the decode is
        left to transformers."""
        cache, states, config = given.get("past_key_values"), given.get("encoder_hidden_states"), decoder.config
        use_cache = given.get("use_cache")
        if not (config.use_cache if use_cache is None else use_cache):
            return None
        if cache is not None and not isinstance(cache, Cache):
            return None
        tracer = who_traces(cache)  # first of all: a compiler could not follow what comes
        if tracer:
            self.note = f"left to transformers: {tracer}"
            return None
        if cache is not None and cache.get_seq_length() > 0:
            self.note = self.note or "left to transformers: this cache was begun by transformers (start from a fresh one)"
            return None
        padding, self.note = _left_padding(given.get("attention_mask"), rows, tokens, device_of(decoder))
        self.note = self.note or _why_not(decoder, given, self.cross)
        if self.note:
            return None
        check_device(decoder)
        check_projections(decoder, self.cross)
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
            item_size=decoder.embed_tokens.weight.dtype.itemsize,
            rows=rows,
            padding=0 if padding is None else int(padding.sum()),
            frames=0 if states is None else states.shape[1],
            eviction=self.eviction,
        )
        self.decodes += 1
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        is_captured = self.graphs is not None and self.graphs.begin(decoder)
        shared = Shared(record, is_captured)
        own.layers = [
            SelfCacheLayer(self.eviction, config.max_target_positions, padding, shared, index)
            for index in range(record.layers)
        ]
        own.layer_class_to_replicate = None
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
        audios, views = Audios.gather(states, owners, keep, record.layers, record), Onlookers()
        record.audios, record.frames_kept = len(audios), int(audios.lengths.sum())
        home = self.graphs.home_of(audios, self.cross) if is_captured else None
        if home is not None:
            audios.move_to(home)
        cache.cross_attention_cache.layers = [
            CrossCacheLayer(self.cross, audios, owners, index, views) for index in range(record.layers)
        ]
        cache.cross_attention_cache.layer_class_to_replicate = None
        cache.is_updated = dict.fromkeys(range(record.layers), False)


# Caches that change hands


def _halves(cache):
    is_pair = isinstance(cache, EncoderDecoderCache)
    return (cache.self_attention_cache, cache.cross_attention_cache) if is_pair else (cache,)


def _resumed(cache):
    """The first layer of a cache that generate() took apart and put together again, as it does with every output, now
    that it is decoded on (by an assistant, round after round): our layers stand in it again. None if it is not one."""
    if not isinstance(cache, Cache):
        return None
    halves = _halves(cache)
    found = [layers_behind(half, kind) for half, kind in zip(halves, (SelfCacheLayer, CrossCacheLayer))]
    if not all(found) or any(layer.eviction is not None for layer, _ in found[0]):
        return None  # what evicts cannot say which of its tokens were cropped
    for half, layers in zip(halves, found):
        half.layers = [layer for layer, _ in layers]
    for layer, tokens in found[0]:
        layer.remove(layer.seen - tokens)
    return halves[0].layers[0]


def _hand_back(cache):
    """Let transformers go on with the tokens so far."""
    for half in _halves(cache):
        half.layers = [plain_layer(layer) for layer in half.layers]


# Whether a decode can be ours


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
        return None, (
            "left to transformers: the decoder's attention mask is not plain left padding (generate() makes such a one "
            "of a prompt that holds the padding token itself)"
        )
    return (~visible).sum(-1).int().to(device), ""


def _needs_grad(decoder, given):
    inputs = (given.get("encoder_hidden_states"), given.get("inputs_embeds"))
    return any(x is not None and x.requires_grad for x in inputs) or any(p.requires_grad for p in decoder.parameters())


def _why_not(decoder, given, cross):
    """Why this decode is left to transformers; "" if it is ours."""
    dtype = decoder.embed_tokens.weight.dtype
    hidden = next((name for name, module in _attentions(decoder) if _hides_ours(module)), None)
    if decoder.training:
        reason = "the model is in training mode (call model.eval())"
    elif torch.is_grad_enabled() and _needs_grad(decoder, given):
        reason = "gradients are on (decode under torch.no_grad())"
    elif dtype not in DTYPES:
        reason = f"the model is in {_name(dtype)} (whisperkv takes {_name(*DTYPES)})"
    elif hidden:
        reason = f"{hidden} has a forward of its own, which hides whisperkv's (patch() after it was set, or remove it)"
    elif len(set(map(str, getattr(decoder, "hf_device_map", {}).values()))) > 1 or _is_spread(decoder):
        reason = "accelerate has spread the decoder over several devices"
    elif cross.is_latent and any(weight.is_meta for weight in _latent_weights(decoder)):
        reason = f"accelerate has offloaded the weights that CrossConfig.format={cross.format!r} reads ('model' works)"
    else:
        return ""
    return f"left to transformers: {reason}"


def _attentions(decoder):
    for index, layer in enumerate(decoder.layers):
        for name in ATTENTIONS:
            yield f"{name} of decoder layer {index}", getattr(layer, name)


def _hides_ours(module):
    """Whether the instance has a forward that does not lead to its class's: accelerate's hooks keep the old one."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def become(module, kind):
    """Let a module be of another class, and what accelerate's hooks have noted of its forward follow."""
    old, module.__class__ = type(module), kind
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is old.forward:
            setattr(module, name, kind.forward.__get__(module))


def _hook_device(module):
    """Where accelerate lets a module run; None if it leaves it alone."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cuda", device) if isinstance(device, int) else device and torch.device(device)


def _is_spread(decoder):
    return len({_hook_device(module) for module in decoder.modules() if hasattr(module, "_hf_hook")} - {None}) > 1


def device_of(decoder):
    """Where it computes: offloaded weights are elsewhere between two passes."""
    weight = decoder.embed_tokens.weight
    return (weight.is_meta and _hook_device(decoder.embed_tokens)) or weight.device


def check_device(decoder):
    device = device_of(decoder)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {device}: whisperkv has kernels for cpu and cuda (model.to('cpu'))")
    reason = ops.cuda_reason(device.index) if device.type == "cuda" else ""
    if reason:
        raise ValueError(
            f"the model is on {device}, and whisperkv has no CUDA kernels for it ({reason}): "
            "move it with model.to('cpu')"
        )


def _latent_weights(decoder):
    return [
        getattr(layer.encoder_attn, name).weight
        for layer in decoder.layers
        for name in ("k_proj", "v_proj")
        if type(getattr(layer.encoder_attn, name)) is nn.Linear
    ]


def check_projections(decoder, cross):
    """The latent formats read the weights themselves."""
    if not cross.is_latent:
        return
    dtype = decoder.embed_tokens.weight.dtype
    for index, layer in enumerate(decoder.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(layer.encoder_attn, name)
            weight = getattr(module, "weight", None)
            is_plain = type(module) is nn.Linear and type(weight) in (torch.Tensor, nn.Parameter)
            if is_plain and weight.dtype == dtype:
                continue
            odd = weight if type(module) is nn.Linear else module
            kind = f"{type(odd).__module__}.{type(odd).__name__}"
            raise ValueError(
                f"CrossConfig.format={cross.format!r} needs the plain weights of k_proj and v_proj in the model's "
                f"{_name(dtype)}, and {name} of decoder layer {index} "
                f"{'has a weight of' if odd is weight else 'is a'} {kind}{f' in {_name(odd.dtype)}' if odd is weight else ''}: "
                "merge the adapter (merge_and_unload()), leave the decoder out of the quantization, or use a format that "
                "calls it ('model', 'int8', 'int4')"
            )


def _name(*dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_states(states, rows, width):
    if states.dim() != 3 or states.shape[-1] != width or len(states) != rows:
        raise ValueError(
            f"the encoder's output must be [rows={rows}, frames, width={width}] for {rows} rows of tokens; "
            f"got {list(states.shape)}"
        )
