"""The torch ops, implemented in C: csrc/whisperkv.h says what they do, tests/reference.py does the same in PyTorch."""

import functools
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
for _name in ("compact_attention", "score_evict", "pack_frames", "cross_attention", "choose_tokens"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(_name, _refuse_transform, "FuncTorchDynamicLayerFrontMode")

compact_attention = torch.ops.whisperkv.compact_attention.default
score_evict = torch.ops.whisperkv.score_evict.default
pack_frames = torch.ops.whisperkv.pack_frames.default
cross_attention = torch.ops.whisperkv.cross_attention.default
choose_tokens = torch.ops.whisperkv.choose_tokens.default  # on the CPU alone

TILE, CHANNELS, MOST_CHANNELS = 16, 32, 132_096  # of a packed cache, as in whisperkv.h


def chooses(tensor):
    """Whether choose_tokens takes it."""
    return tensor.device.type == "cpu" and ISA != "cuda_on_cpu"


# What torch.compile and torch.export see. The dtype of a cache may be any, but is the same for all of None.
_ATTENTION = {
    "query": (None, "rows tokens heads dim"),
    "key": (None, "rows tokens heads dim"),
    "value": (None, "rows tokens heads dim"),
    "keys": (None, "rows heads slots dim"),
    "values": (None, "rows heads slots dim"),
    "cursor": (torch.int32, "cursors rows"),
    "sources": (torch.int32, "rows slots"),  # or empty
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
_CROSS_PACKED = {
    **_CROSS,
    "keys": (torch.uint8, "audios heads tiles strip channels"),
    "values": (torch.uint8, "audios heads tiles strip channels"),
    "key_scales": (torch.float32, "audios heads groups two channels"),
    "value_scales": (torch.float32, "audios heads groups two channels"),
}
_CHOICE = {"scores": (torch.float32, "audios beams vocabulary"), "added": (torch.float32, "audios beams")}


def _sizes(op, layout, *tensors):
    """The sizes by name; what the C code refuses is refused here too."""
    sizes, cache_dtype, device = {"cursors": 4, "two": 2}, None, tensors[0].device
    for (name, (dtype, shape)), tensor in zip(layout.items(), tensors):
        shape = shape.split()
        if dtype is None:
            dtype = cache_dtype = cache_dtype or tensor.dtype
        problem = f"{op.name()}: {name} must be {dtype} [{', '.join(shape)}] on {device}"
        if (tensor.dtype, tensor.dim(), tensor.device) != (dtype, len(shape), device):
            raise RuntimeError(f"{problem}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
        for side, size in zip(shape, tensor.shape):
            wanted = sizes.setdefault(side, size)
            text = f"{problem} with {side}={wanted}, got {list(tensor.shape)}"
            torch._check(size == wanted, lambda text=text: text)
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{op.name()}: {name} requires grad, {_NO_GRADIENT}")
    return sizes


@torch.library.register_fake(compact_attention)
def _(query, key, value, keys, values, cursor, sources, scale, want_weights):
    table = [] if 0 in sources.shape else [sources]
    sizes = _sizes(compact_attention, _ATTENTION, query, key, value, keys, values, cursor, *table)
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
def _(query, keys, values, key_scales, value_scales, owner, lengths, frames, group, scale, want_weights):
    if keys.dtype == torch.uint8:
        given = (query, keys, values, owner, lengths, key_scales, value_scales)
        sizes = _sizes(cross_attention, _CROSS_PACKED, *given)
        text = f"{cross_attention.name()}: query must have at most {MOST_CHANNELS} channels, got {sizes['dim']}"
        torch._check(sizes["dim"] <= MOST_CHANNELS, lambda text=text: text)
        for side, allowed in (
            ("strip", (16, 8)),
            ("channels", (-(-sizes["dim"] // CHANNELS) * CHANNELS,)),
            ("tiles", (-(-frames // TILE),)),
            ("groups", (-(-frames // group),)),
        ):
            text = f"{cross_attention.name()}: keys of {frames} frames in groups of {group} must have {side} " + (
                f"{' or '.join(map(str, allowed))}, got {sizes[side]}"
            )
            torch._check(sizes[side] in allowed, lambda text=text: text)
    else:
        sizes = _sizes(cross_attention, _CROSS, query, keys, values, owner, lengths)
        frames = sizes["frames"]
    weights = [sizes["rows"], sizes["heads"], sizes["tokens"], frames] if want_weights else [0]
    return query.new_empty(query.shape), query.new_empty(weights, dtype=torch.float32)


@torch.library.register_fake(choose_tokens)
def _(scores, added, count):
    sizes = _sizes(choose_tokens, _CHOICE, scores, added)
    shape = [sizes["audios"], count]
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)
