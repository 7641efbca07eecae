"""The torch ops, implemented in C: csrc/whisperkv.h says what they do, tests/reference.py does the same in PyTorch."""

import functools
import math
import os

try:
    import torch
except ImportError as error:
    raise ImportError("whisperkv needs torch for this: pip install torch") from error

from . import _torch

POLICIES = _torch.POLICIES  # (name, reads_attention, reads_key_norm); a policy's number is its place
ISA = _torch.ISA

LEAST_CAPABILITY = (8, 0)  # of a GPU: Ampere

_LIBRARIES = [os.path.join(os.path.dirname(torch.__file__), "lib", f"libtorch_{name}.so") for name in ("cpu", "cuda")]
_torch.register(_LIBRARIES[0])


def _start_cuda():
    """ "" if the ops take CUDA tensors from now on, else why not."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        from . import _cuda

        _cuda.register(*_LIBRARIES)
    except ImportError as error:
        return f"this whisperkv was built without CUDA, install it where nvcc is ({error})"
    return ""


CUDA_REASON = _start_cuda()
CUDA = not CUDA_REASON


@functools.cache
def cuda_reason(index):
    """ "" if the ops take tensors of the GPU of that number, else why not."""
    if not CUDA:
        return CUDA_REASON
    from . import _cuda

    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, capability))
        return f"they need compute capability {least}, and {name} has {has}"
    with torch.cuda.device(index):
        problem = _cuda.probe()
    return problem and f"CUDA says of {name}: {problem}"


_NO_GRADIENT = "and no gradient can pass through a cache: call under torch.no_grad()"


def _refuse_transform(*args):
    raise RuntimeError("whisperkv's ops write to a cache: torch.func transforms (grad, jvp, vmap) cannot enter them")


# torch's own autograd step for ops without gradients only warns, in backward. Here calls fall through it, so that the
# C code itself sees which inputs require grad and refuses them; where gradients are off that costs nothing.
_library = torch.library.Library("whisperkv", "IMPL")
for _name in (
    "compact_attention", "score_evict", "pack_frames", "cross_attention", "encoder_attention", "pack_matrix", "linear",
    "decoder_step", "gather_kept", "ragged_attention", "attention_received", "choose_tokens",
):  # fmt: skip
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(_name, _refuse_transform, "FuncTorchDynamicLayerFrontMode")

compact_attention = torch.ops.whisperkv.compact_attention.default
score_evict = torch.ops.whisperkv.score_evict.default
pack_frames = torch.ops.whisperkv.pack_frames.default
cross_attention = torch.ops.whisperkv.cross_attention.default
pack_matrix = torch.ops.whisperkv.pack_matrix.default
linear = torch.ops.whisperkv.linear.default
decoder_step = torch.ops.whisperkv.decoder_step.default
encoder_attention = torch.ops.whisperkv.encoder_attention.default
gather_kept = torch.ops.whisperkv.gather_kept.default
ragged_attention = torch.ops.whisperkv.ragged_attention.default
attention_received = torch.ops.whisperkv.attention_received.default
choose_tokens = torch.ops.whisperkv.choose_tokens.default  # on the CPU alone

TILE, CHANNELS, MOST_CHANNELS = 16, 32, 132_096  # of a packed cache, as in whisperkv.h
AS_FLOAT32, AS_BFLOAT16, AS_INT8, AS_FINE_INT8 = range(4)  # how a matrix is read
NO_ACTIVATION, GELU = range(2)
MOST_INPUTS = (2**31 - 1) // (255 * 128)  # of a matrix
PANEL = 32  # outputs of a packed matrix that stand side by side
REPEATS = 4  # units of 8 bit codes that are entered again


ON_CPU = ISA != "cuda_on_cpu"  # whether the ops are there that are the CPU's alone


def chooses(tensor):
    """Whether choose_tokens takes it."""
    return tensor.device.type == "cpu" and ON_CPU


def prunes(tensor):
    """Whether gather_kept, ragged_attention and attention_received take tensors like it."""
    return tensor.device.type == "cpu" and ON_CPU and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


# What torch.compile and torch.export see. The dtype of a cache may be any, but is the same for all of None.
_ATTENTION = {
    "query": (None, "rows tokens heads dim"),
    "key": (None, "rows tokens kv_heads dim"),
    "value": (None, "rows tokens kv_heads dim"),
    "keys": (None, "rows kv_heads slots dim"),
    "values": (None, "rows kv_heads slots dim"),
    "cursor": (torch.int32, "cursors rows"),
}
_EVICTION = {
    "weights": (torch.float32, "rows heads tokens slots"),
    "keys": (None, "rows heads slots dim"),
    "cursor": (torch.int32, "cursors rows"),
    "positions": (torch.int32, "rows slots"),
    "scores": (torch.float32, "rows slots"),
}
_PACKING = {"states": (None, "audios frames heads dim"), "lengths": (torch.int32, "audios")}
_CROSS = {
    "query": (None, "rows tokens heads dim"),
    "keys": (None, "audios heads frames dim"),
    "values": (None, "audios heads frames dim"),
    "owner": (torch.int32, "rows"),
    "lengths": (torch.int32, "audios"),
}
_LINEAR = {
    "x": (torch.float32, "rows inputs"),
    "norm_weight": (torch.float32, "inputs"),
    "norm_bias": (torch.float32, "inputs"),
    "weight": (torch.float32, "outputs inputs"),
    "bias": (torch.float32, "outputs"),
    "residual": (torch.float32, "others outputs"),
}
_CROSS_PACKED = {
    **_CROSS,
    "keys": (torch.uint8, "audios heads tiles strip channels"),
    "values": (torch.uint8, "audios heads tiles strip channels"),
    "key_scales": (torch.float32, "audios heads groups two channels"),
    "value_scales": (torch.float32, "audios heads groups two channels"),
}
_CROSS_MIXED = {
    **_CROSS_PACKED,
    "keys": (torch.uint8, "audios heads tiles bytes"),
    "values": (torch.uint8, "audios heads tiles bytes"),
    "value_scales": (torch.float32, "channels"),  # bits
}
_ENCODER = {
    "query": (torch.float32, "audios frames heads dim"),
    "key": (torch.float32, "audios frames heads dim"),
    "value": (torch.float32, "audios frames heads dim"),
    "bias": (torch.float32, "audios frames"),  # or empty
    "lengths": (torch.int32, "audios"),  # or empty
}
_MAY_BE_EMPTY = {
    "sources": (torch.int32, "rows slots"),
    "bias": (torch.float32, "audios frames"),
    "counters": (torch.int32, "counters"),
}
# Of one layer of a decoder's step, in the order of its lists; and how many norms and matrices a layer has.
_STEP_CACHES = {
    "keys": (torch.float32, "rows heads slots head"),
    "values": (torch.float32, "rows heads slots head"),
    "cursor": (torch.int32, "cursors rows"),
    "positions": (torch.int32, "rows slots"),
    "scores": (torch.float32, "rows slots"),
}
_STEP_HEARD = {
    "audio keys": (torch.float32, "audios audio_heads frames channels"),
    "audio values": (torch.float32, "audios audio_heads frames channels"),
}
_STEP_HEARD_PACKED = {
    "audio keys": (torch.uint8, "audios audio_heads tiles strip channels"),
    "audio values": (torch.uint8, "audios audio_heads tiles strip channels"),
    "key scales": (torch.float32, "audios audio_heads groups two channels"),
    "value scales": (torch.float32, "audios audio_heads groups two channels"),
}
_STEP_HEARD_MIXED = {
    "audio keys": (torch.uint8, "audios audio_heads tiles bytes"),
    "audio values": (torch.uint8, "audios audio_heads tiles bytes"),
    "key scales": (torch.float32, "audios audio_heads groups two channels"),
    "value scales": (torch.float32, "channels"),  # bits
}
_STEP_PARTS = 14
_GATHERING = {
    "keys": (None, "rows kv_heads tokens dim"),
    "values": (None, "rows kv_heads tokens dim"),
    "index": (torch.int32, "rows kv_heads most"),
    "starts": (torch.int32, "rows kv_heads"),
    "lengths": (torch.int32, "rows kv_heads"),
    "kept_keys": (None, "slots dim"),
    "kept_values": (None, "slots dim"),
}
_RAGGED = {
    "query": (None, "rows heads queries dim"),
    "keys": (None, "slots dim"),
    "values": (None, "slots dim"),
    "starts": (torch.int32, "rows kv_heads"),
    "lengths": (torch.int32, "rows kv_heads"),
    "bias": (torch.float32, "slots"),  # or empty
}
_RECEIVED = {
    "query": (None, "rows heads queries dim"),
    "positions": (torch.int32, "queries"),
    "keys": (None, "rows kv_heads tokens dim"),
    "visible": (torch.uint8, "rows tokens"),  # or bool
}
_CHOICE = {"scores": (torch.float32, "audios beams vocabulary"), "added": (torch.float32, "audios beams")}


def _sizes(op, layout, *tensors, frames=None, **others):
    """The sizes by name; what the C code refuses is refused here too. Others may be empty."""
    sizes, cache_dtype, device = {"cursors": 4, "two": 2}, None, tensors[0].device
    if frames is not None:
        sizes["frames"] = frames
    given = {**dict(zip(layout, tensors)), **{name: each for name, each in others.items() if 0 not in each.shape}}
    for name, tensor in given.items():
        dtype, shape = {**_MAY_BE_EMPTY, **layout}[name]
        if dtype is None:
            dtype = cache_dtype = cache_dtype or tensor.dtype
        _fit(op, name, tensor, dtype, shape, device, sizes)
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{op.name()}: {name} requires grad, {_NO_GRADIENT}")
    return sizes


def _fit(op, name, tensor, dtype, shape, device, sizes):
    """Refuses a tensor of other sizes than are known by now, and learns the others of it."""
    shape = shape.split()
    problem = f"{op.name()}: {name} must be {dtype} [{', '.join(shape)}] on {device}"
    if (tensor.dtype, tensor.dim(), tensor.device) != (dtype, len(shape), device):
        raise RuntimeError(f"{problem}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    for side, size in zip(shape, tensor.shape):
        wanted = sizes.setdefault(side, size)
        text = f"{problem} with {side}={wanted}, got {list(tensor.shape)}"
        torch._check(size == wanted, lambda text=text: text)


def _check_groups(op, sizes):
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    text = f"{op.name()}: query must have heads that are a multiple of {kv_heads} kv_heads, got {heads}"
    torch._check(heads % kv_heads == 0, lambda: text)


@torch.library.register_fake(compact_attention)
def _(query, key, value, keys, values, cursor, sources, scale, want_weights):
    given = dict(query=query, key=key, value=value, keys=keys, values=values, cursor=cursor)
    if values.numel() == 0 < keys.numel():  # latents
        del given["value"], given["values"]
    sizes = _sizes(compact_attention, {name: _ATTENTION[name] for name in given}, *given.values(), sources=sources)
    if "value" in given:
        text = f"{compact_attention.name()}: key must have the heads of the query, got {list(key.shape)}"
        torch._check(sizes["kv_heads"] == sizes["heads"], lambda: text)
    _check_groups(compact_attention, sizes)
    weights = [sizes[side] for side in ("rows", "heads", "tokens", "slots")] if want_weights else [0]
    return query.new_empty(query.shape), query.new_empty(weights, dtype=torch.float32)


@torch.library.register_fake(score_evict)
def _(weights, keys, cursor, positions, scores, policy, budget, recent, decay):
    _sizes(score_evict, _EVICTION, weights, keys, cursor, positions, scores)


@torch.library.register_fake(pack_frames)
def _(states, lengths, bits, group):
    sizes = _sizes(pack_frames, _PACKING, states, lengths)
    audios, frames, heads = (sizes[side] for side in ("audios", "frames", "heads"))
    channels = -(-sizes["dim"] // CHANNELS) * CHANNELS
    codes = states.new_empty([audios, heads, -(-frames // TILE), 2 * bits, channels], dtype=torch.uint8)
    return codes, states.new_empty([audios, heads, -(-frames // group), 2, channels], dtype=torch.float32)


@torch.library.register_fake(cross_attention)
def _(
    query, keys, values, key_scales, value_scales, owner, lengths, bias, counters, frames, group, scale, want_weights
):  # fmt: skip
    given, others = (query, keys, values, owner, lengths), dict(bias=bias, counters=counters)
    if keys.dtype == torch.uint8:
        is_mixed = keys.dim() == 4
        layout = _CROSS_MIXED if is_mixed else _CROSS_PACKED
        sizes = _sizes(cross_attention, layout, *given, key_scales, value_scales, frames=frames, **others)
        text = f"{cross_attention.name()}: query must have at most {MOST_CHANNELS} channels, got {sizes['dim']}"
        torch._check(sizes["dim"] <= MOST_CHANNELS, lambda text=text: text)
        for side, allowed in (
            *(() if is_mixed else (("strip", (16, 8)),)),
            ("groups", (-(-frames // group),)),
            ("channels", (-(-sizes["dim"] // CHANNELS) * CHANNELS,)),
            ("tiles", (-(-frames // TILE),)),
        ):
            text = f"{cross_attention.name()}: keys of {frames} frames in groups of {group} must have {side} " + (
                f"{' or '.join(map(str, allowed))}, got {sizes[side]}"
            )
            torch._check(sizes[side] in allowed, lambda text=text: text)
    else:
        sizes = _sizes(cross_attention, _CROSS, *given, **others)
        frames = sizes["frames"]
    weights = [sizes["rows"], sizes["heads"], sizes["tokens"], frames] if want_weights else [0]
    return query.new_empty(query.shape), query.new_empty(weights, dtype=torch.float32)


def panel_words(format, inputs):
    unit, more = ((1, 0), (2, 0), (4, 1), (4, REPEATS + 2))[format]
    return (-(-inputs // unit) + more) * PANEL


@torch.library.register_fake(pack_matrix)
def _(weight, format):
    sizes = _sizes(pack_matrix, {"weight": (None, "outputs inputs")}, weight)
    return weight.new_empty([-(-sizes["outputs"] // PANEL), panel_words(format, sizes["inputs"])], dtype=torch.int32)


@torch.library.register_fake(linear)
def _(x, norm_weight, norm_bias, weight, bias, residual, format, outputs, epsilon, activation):
    given = dict(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias, residual=residual)
    layout = {name: _LINEAR[name] for name, tensor in given.items() if 0 not in tensor.shape or name == "x"}
    if weight.dtype == torch.int32:
        layout["weight"] = (torch.int32, "panels words")
    sizes = _sizes(linear, layout, *(given[name] for name in layout))
    wanted = (outputs, sizes["inputs"])
    if weight.dtype == torch.int32:
        wanted = (-(-outputs // PANEL), panel_words(format, sizes["inputs"]))
    text = f"{linear.name()}: weight must be {list(wanted)}, got {list(weight.shape)}"
    torch._check(tuple(weight.shape) == wanted, lambda text=text: text)
    return x.new_empty([sizes["rows"], outputs])


@torch.library.register_fake(encoder_attention)
def _(query, key, value, bias, lengths, scale, precision):
    given = dict(query=query, key=key, value=value, bias=bias, lengths=lengths)
    given = {name: tensor for name, tensor in given.items() if name in ("query", "key", "value") or tensor.numel()}
    _sizes(encoder_attention, {name: _ENCODER[name] for name in given}, *given.values())
    return query.new_empty(query.shape)


@torch.library.register_fake(decoder_step)
def _(
    x, sources, owner, lengths, bias, caches, heard, weights, format, heads, hidden, frames, group, is_latent, policy,
    budget, recent, decay, epsilon, scale,
):  # fmt: skip
    def refuse(problem):
        raise RuntimeError(f"{decoder_step.name()}: {problem}")

    def check(is_right, problem):
        torch._check(is_right, lambda: f"{decoder_step.name()}: {problem}")

    def fit(name, tensor, dtype, shape, **known):
        _fit(decoder_step, name, tensor, dtype, shape, x.device, {**sizes, **known} if known else sizes)

    def fit_matrix(weight, its_bias, outputs, inputs, biases):
        if weight.dtype == torch.int32:
            panels, words = -(-outputs // PANEL), panel_words(format, inputs)
            fit("a weight", weight, torch.int32, "panels words", panels=panels, words=words)
        elif format == AS_FLOAT32:
            fit("a weight", weight, torch.float32, "outputs inputs", outputs=outputs, inputs=inputs)
        else:
            refuse("weights must come from pack_matrix for this format")
        if 0 not in its_bias.shape:
            fit_vector(its_bias, biases)

    def fit_vector(vector, outputs):
        check(outputs > 0, "the weights of the audio's keys must come without a bias")
        fit("a bias or norm", vector, torch.float32, "outputs", outputs=outputs)

    if torch.is_grad_enabled():
        refuse("has no gradients: call under torch.no_grad()")
    for name, number, least, most in (
        ("format", format, 0, AS_FINE_INT8), ("heads", heads, 1, 1024), ("policy", policy, -1, len(POLICIES) - 1),
        ("hidden", hidden, PANEL, MOST_INPUTS),
    ):  # fmt: skip
        check(least <= number <= most, f"{name} must be in {least}..{most}, got {number}")
    for name, number in dict(decay=decay, epsilon=epsilon, scale=scale).items():
        check(math.isfinite(number), f"{name} must be finite, got {number}")
    sizes = {"cursors": 4, "two": 2, "heads": heads}
    fit("x", x, torch.float32, "rows width")
    width = sizes["width"]
    for name, number, unit in (("hidden", hidden, PANEL), ("width", width, PANEL), ("width", width, heads)):
        check(number % unit == 0, f"{name} must be a multiple of {unit}, got {number}")
    check(width <= MOST_INPUTS, f"width must be at most {MOST_INPUTS}, got {width}")
    head, layers, latent = width // heads, len(weights) // (2 * _STEP_PARTS), width
    sizes["head"] = head
    wanted = 2 * (_STEP_PARTS * layers + 1), len(_STEP_CACHES) * layers, len(_STEP_HEARD_PACKED) * layers
    if layers < 1 or (len(weights), len(caches)) != wanted[:2] or len(heard) not in (0, wanted[2]):
        counts = f"{len(caches)}, {len(heard)} and {len(weights)}"
        refuse(f"the lists must be of the same layers, got {counts} tensors")

    layout, rank = list(_STEP_CACHES.items())[: None if policy >= 0 else 3], 0
    if caches[1].numel() == 0 < caches[0].numel():  # latents, which have no values
        rank = sizes["rank"] = caches[0].shape[-1]
        check(rank <= width, f"rank must be in 1..{width}, got {rank}")
        latents = torch.float32, "rows one slots rank"
        sizes["one"] = 1
        layout = [(name, latents if name == "keys" else wanted) for name, wanted in layout]
    for first in range(0, len(caches), len(_STEP_CACHES)):
        for (name, wanted), tensor in zip(layout, caches[first:]):
            if not (rank and name == "values"):
                fit(name, tensor, *wanted)
            elif tensor.numel():
                refuse("the layers must all hold latents, or none")
    if 0 not in sources.shape:
        fit("sources", sources, torch.int32, "rows slots")
    if policy >= 0:
        check(budget >= 1, f"budget must be 1 or more, got {budget}")
        check(budget <= sizes["slots"], f"budget must be at most {sizes['slots']}, got {budget}")
        check(recent >= 1, f"recent must be 1 or more, got {recent}")

    if heard:
        check(frames >= 1, f"frames must be 1 or more, got {frames}")
        check(frames < 2**31, f"frames must be below 2^31, got {frames}")
        is_sound = group > 0 and group % TILE == 0 and (group % 256 == 0 or 256 % group == 0)
        check(is_sound, f"group must be 16, 32, 64, 128 or a multiple of 256 frames, got {group}")
        is_packed, dim = heard[0].dtype == torch.uint8, width if is_latent else head
        is_mixed = is_packed and heard[0].dim() == 4
        channels = -(-dim // CHANNELS) * CHANNELS if is_packed else dim
        if is_mixed:
            channels = latent = heard[2].shape[-1]
            check(channels <= width and channels % CHANNELS == 0, f"channels must be up to {width}, got {channels}")
        sizes |= dict(audio_heads=1 if is_latent else heads, channels=channels, frames=frames)
        sizes |= dict(tiles=-(-frames // TILE), groups=-(-frames // group))
        fit("owner", owner, torch.int32, "rows")
        fit("lengths", lengths, torch.int32, "audios")
        if 0 not in bias.shape:
            fit("bias", bias, torch.float32, "audios frames")
        layout = _STEP_HEARD_MIXED if is_mixed else _STEP_HEARD_PACKED if is_packed else _STEP_HEARD
        for first in range(0, len(heard), len(_STEP_HEARD_PACKED)):
            for (name, wanted), tensor in zip(layout.items(), heard[first:]):
                fit(name, tensor, *wanted)
        if is_packed and not is_mixed:
            strip = sizes["strip"]
            check(strip in (16, 8), f"audio keys must have 16 or 8 bytes a tile and channel, got {strip}")

    norm, square = (width,), (width, width, width)  # outputs, inputs, and of the bias
    key, value, up = square, square, None
    if rank:
        key, value, up = (rank, width, rank), (width, rank, width), (heads * rank, head, 0)
    of_audio, norm_of_audio = (square, norm) if heard else (None, None)  # None: not read
    keys, values = ((heads * latent, head, 0), (width, latent, width)) if is_latent else (None, None)
    more = norm, (hidden, width, hidden), (width, hidden, width)
    parts = norm, square, key, value, square, norm_of_audio, of_audio, keys, values, of_audio, *more, up
    for layer in range(layers):
        pairs = weights[2 * len(parts) * layer :]
        for part, wanted in enumerate(parts):
            weight, its_bias = pairs[2 * part : 2 * part + 2]
            if wanted == norm:
                fit_vector(weight, width)
                fit_vector(its_bias, width)
            elif wanted:
                fit_matrix(weight, its_bias, *wanted)
        if is_latent:
            of_values = pairs[2 * 8]
            check(of_values.dtype != torch.int32 or head % PANEL == 0, f"a head must be a multiple of {PANEL}")
    fit_vector(weights[-2], width)
    fit_vector(weights[-1], width)
    return x.new_empty(x.shape)


@torch.library.register_fake(gather_kept)
def _(keys, values, index, starts, lengths, kept_keys, kept_values):
    _sizes(gather_kept, _GATHERING, keys, values, index, starts, lengths, kept_keys, kept_values)


@torch.library.register_fake(ragged_attention)
def _(query, keys, values, starts, lengths, bias, scale):
    given = dict(query=query, keys=keys, values=values, starts=starts, lengths=lengths)
    given |= {} if 0 in bias.shape else {"bias": bias}
    sizes = _sizes(ragged_attention, {name: _RAGGED[name] for name in given}, *given.values())
    _check_groups(ragged_attention, sizes)
    return query.new_empty([sizes[side] for side in ("rows", "queries", "heads", "dim")])


@torch.library.register_fake(attention_received)
def _(query, positions, keys, visible, scale):
    layout = _RECEIVED | ({"visible": (torch.bool, "rows tokens")} if visible.dtype == torch.bool else {})
    sizes = _sizes(attention_received, layout, query, positions, keys, visible)
    _check_groups(attention_received, sizes)
    return query.new_empty([sizes[side] for side in ("rows", "kv_heads", "tokens")], dtype=torch.float32)


@torch.library.register_fake(choose_tokens)
def _(scores, added, count):
    sizes = _sizes(choose_tokens, _CHOICE, scores, added)
    shape = [sizes["audios"], count]
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)
