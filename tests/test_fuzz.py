"""Calls that nobody would write: each is answered, or refused with an error that begins with the op's name; between
them are sound ones, which are answered with the values of the reference. Sanitizers see the rest.

WHISPERKV_FUZZ=<number> for another seed, which a failure names with its case.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import reference
import test_choose_ops
import test_cross_ops
import test_frames_ops
import test_linear_ops
import test_ops
import test_prune_ops
import test_step_ops
import torch
from conftest import SEED
from test_ops import DEVICE, ON_CUDA, POLICIES, assert_same_bits, copy
from torch.utils._pytree import tree_leaves, tree_map_only

from whisperkv import ops

NUMBERS = [0, 1, -1, 2, 3, 16, 32, 255, 256, 2**31 - 1, 2**31, 2**32, 2**48, 2**62, 2**63 - 1, -(2**31), -(2**63)]
SIDES = [0, 1, 2, 3, 5, 8, 16, 17, 33, 64, 90]
HUGE = [1 << 20, 1 << 31, 1 << 40, 1 << 57]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool]


def wild_integers(draw, tensor):
    """Anything, or near what it was."""
    if draw.random() < 0.3:
        return torch.randint(-(2**31), 2**31, tensor.shape).to(tensor.dtype)
    return tensor + torch.randint(-2, 3, tensor.shape).to(tensor.dtype)


def wild_floats(draw, tensor):
    spoilt = tensor.clone()
    some = torch.rand(tensor.shape) < 0.2
    return spoilt.masked_fill_(some, draw.choice([torch.nan, torch.inf, -torch.inf, 6e4, 0]))


def other_shape(draw, tensor):
    shape = list(tensor.shape)
    for _ in range(draw.choice([1, 1, 2])):
        if shape:
            shape[draw.randrange(len(shape))] = draw.choice(SIDES)
    if draw.random() < 0.2:
        shape = shape[1:] if draw.random() < 0.5 else [1, *shape]
    return torch.zeros(shape, dtype=tensor.dtype)


def huge(draw, tensor):
    """Of one number that is repeated, by sides whose product torch itself can take."""
    shape = list(tensor.shape) or [1]
    shape[draw.randrange(len(shape))] = draw.choice(HUGE)
    try:
        return torch.zeros((), dtype=tensor.dtype).expand(shape)
    except RuntimeError:
        return tensor


def strided(draw, tensor):
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack([tensor, tensor], -1)[..., 0]


def shifted(draw, tensor):
    if tensor.numel() == 0:
        return tensor
    memory = bytearray(tensor.nbytes + 8)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=draw.randrange(1, 8))
    return moved.view(tensor.shape).copy_(tensor)


def other_dtype(draw, tensor):
    return tensor.nan_to_num().to(draw.choice(DTYPES))


CHANGES = [wild_integers, wild_integers, wild_floats, other_shape, other_shape, huge, strided, shifted, other_dtype]


def sound_self(draw):
    tokens = draw.choice([1, 1, 2, 5])
    given = test_ops.problem(
        draw.randrange(4), tokens, draw.randrange(1, 4), tokens + draw.randrange(30), draw.choice(SIDES[1:]),
        draw.choice(FLOATS), draw.random() < 0.3, draw.randrange(1 << 30), draw.random() < 0.5,
    )  # fmt: skip
    return given | dict(policy=draw.randrange(len(POLICIES)), want_weights=draw.random() < 0.5)


def sound_cross(draw):
    bits = draw.choice([0, 8, 4])
    dim, group = draw.choice(SIDES[1:]), draw.choice([16, 32, 256])
    given = test_cross_ops.problem(
        draw.randrange(4), draw.choice([1, 2, 40]), draw.randrange(1, 3), draw.choice([1, 15, 90, 300]), dim,
        draw.randrange(1, 3), bits, group, draw.choice(FLOATS), draw.random() < 0.3, draw.randrange(1 << 30),
        draw.random() < 0.5,
    )  # fmt: skip
    return given | dict(want_weights=draw.random() < 0.5)


def sound_frames(draw):
    return test_frames_ops.problem(
        draw.randrange(1, 4), draw.choice(SIDES[1:]), draw.randrange(1, 4), 4 * draw.choice(SIDES[1:-2]),
        draw.randrange(3), *(draw.random() < 0.5 for _ in range(3)), seed=draw.randrange(1 << 30),
    )  # fmt: skip


# `own`: the model's weights, as the reference takes them; the op may be given them packed.


def sound_matrix(draw):
    weight = test_linear_ops.problem(1, draw.choice(SIDES[1:]), draw.choice(SIDES[1:]))["weight"]
    return dict(weight=weight.to(draw.choice(FLOATS)), format=draw.randrange(3))


def sound_linear(draw):
    given = test_linear_ops.problem(
        draw.choice([0, 1, 5, 100]), draw.choice(SIDES[1:]), draw.choice(SIDES[1:]), draw.randrange(3),
        draw.random() < 0.5, draw.random() < 0.5, draw.randrange(4), draw.randrange(2), draw.choice([0, 3]),
        draw.randrange(1 << 30),
    )  # fmt: skip
    is_packed = given["format"] != reference.AS_FLOAT32 or draw.random() < 0.5
    weight = ops.pack_matrix(given["weight"], given["format"]) if is_packed else given["weight"]
    return given | dict(own=given["weight"], weight=weight)


def sound_choice(draw):
    beams, vocabulary = draw.randrange(1, 6), draw.choice([1, 5, 200, 700])
    kind, seed = draw.choice(test_choose_ops.KINDS), draw.randrange(1 << 30)
    scores, added = test_choose_ops.scores_of(draw.randrange(1, 4), beams, vocabulary, kind, seed)
    return dict(scores=scores, added=added, count=draw.randrange(min(beams * vocabulary, 40)) + 1)


def sound_gathering(draw):
    return test_prune_ops.gathering(
        draw.randrange(4), draw.randrange(1, 4), draw.choice(SIDES[1:]), draw.choice(SIDES[1:]), draw.choice(SIDES[1:]),
        draw.choice(FLOATS), draw.random() < 0.5, draw.randrange(1 << 30),
    )  # fmt: skip


def sound_ragged(draw):
    return test_prune_ops.ragged(
        draw.randrange(4), draw.randrange(1, 4), draw.choice([1, 2, 4, 7]), draw.choice([1, 1, 3, 20]),
        draw.choice([*SIDES, 600]), draw.choice(SIDES[1:]), draw.choice(FLOATS), draw.random() < 0.5,
        draw.random() < 0.5, draw.randrange(1 << 30),
    )  # fmt: skip


def sound_received(draw):
    return test_prune_ops.received(
        draw.randrange(4), draw.randrange(1, 4), draw.choice([1, 2, 4, 7]), draw.choice(SIDES[1:]),
        draw.choice(SIDES[1:]), draw.choice(SIDES[1:]), draw.choice(FLOATS), draw.random() < 0.5, draw.random() < 0.5,
        draw.randrange(1 << 30),
    )  # fmt: skip


def sound_step(draw):
    heads, format = draw.randrange(1, 3), draw.randrange(3)
    given = test_step_ops.problem(
        draw.randrange(4), draw.randrange(1, 3), 32 * heads, heads, 32, draw.choice(SIDES[1:]), format,
        draw.randrange(-1, len(POLICIES)), draw.random() < 0.5, draw.random() < 0.8, draw.choice([1, 15, 90]),
        draw.randrange(1, 3), draw.choice([0, 8, 4]), draw.random() < 0.5, draw.random() < 0.5, draw.randrange(1 << 30),
    )  # fmt: skip
    is_packed = format != reference.AS_FLOAT32 or draw.random() < 0.5
    return (test_step_ops.packed(given) if is_packed else given) | dict(own=given["weights"])


def wanted_of(op, given):
    return getattr(reference, op)(*(given[name] for name in OPS[op].arguments))


def check_attention(op, given, results, before):
    """What is packed, test_cross_ops.py holds to the roundings of the kernels."""
    wanted = wanted_of(op, before)
    if given["keys"].dtype != torch.uint8:
        tolerance = test_ops.TOLERANCE[given["query"].dtype]
        torch.testing.assert_close(results, wanted, rtol=tolerance, atol=tolerance)


def check_eviction(op, given, results, before):
    wanted_of(op, before)
    test_ops.assert_same_cache(given, before)


def check_frames(op, given, results, before):
    test_frames_ops.assert_near(given, results, wanted_of(op, before))


def check_matrix(op, given, results, before):
    """By what comes out of a product with it, where every input stands alone."""
    none, one_by_one = torch.empty(0), torch.eye(given["weight"].shape[1])
    read = reference.as_read(given["weight"].float(), given["format"], together=ops.PANEL)
    product = ops.linear(one_by_one, none, none, results, none, none, given["format"], len(read), 0.0, 0)
    test_linear_ops.assert_near(given | dict(x=one_by_one, norm_weight=none), product, read.T)


def check_linear(op, given, results, before):
    test_linear_ops.assert_near(given, results, wanted_of(op, before | dict(weight=before["own"])))


def check_choice(op, given, results, before):
    torch.testing.assert_close(results, wanted_of(op, before), rtol=0, atol=0, equal_nan=True)


def check_gathering(op, given, results, before):
    wanted_of(op, before)
    for name in OPS[op].written:
        assert_same_bits(given[name], before[name])


def check_ragged(op, given, results, before):
    test_prune_ops.assert_near(given, results, wanted_of(op, before))


def check_received(op, given, results, before):
    test_prune_ops.assert_received(given, results, wanted_of(op, before))


def check_step(op, given, results, before):
    theirs = before | dict(weights=before["own"])
    test_step_ops.assert_near(given, results, theirs, wanted_of(op, theirs))


class Op(NamedTuple):
    arguments: tuple
    sound: Callable  # all arguments of a call that is answered
    check: Callable  # what comes of it
    written: tuple = ()  # arguments
    refused: int = 200  # calls at least, of the 450 that are not sound


OPS = {
    "compact_attention": Op(test_ops.ATTENTION, sound_self, check_attention, ("keys", "values")),
    "score_evict": Op(test_ops.EVICTION, sound_self, check_eviction, ("cursor", "positions", "scores")),
    "pack_frames": Op(test_cross_ops.PACKING, sound_cross, lambda *_: None),  # test_cross_ops.py does, to the bit
    "cross_attention": Op(test_cross_ops.CROSS, sound_cross, check_attention, ("counters",)),
    "encoder_attention": Op(test_frames_ops.ENCODER, sound_frames, check_frames),
    "pack_matrix": Op(("weight", "format"), sound_matrix, check_matrix, refused=100),
    "linear": Op(test_linear_ops.LINEAR, sound_linear, check_linear),
    "gather_kept": Op(test_prune_ops.GATHERING, sound_gathering, check_gathering, ("kept_keys", "kept_values")),
    "ragged_attention": Op(test_prune_ops.RAGGED, sound_ragged, check_ragged),
    "attention_received": Op(test_prune_ops.RECEIVED, sound_received, check_received),
    "choose_tokens": Op(("scores", "added", "count"), sound_choice, check_choice, refused=100),
    "decoder_step": Op(test_step_ops.STEP, sound_step, check_step, ("caches",)),
}
OF_THE_CPU = {"encoder_attention", "pack_matrix", "linear", "choose_tokens", "decoder_step"}


def change_of(draw, value, others):
    """Another value than that, or one of the others, which are in use as well."""
    if isinstance(value, torch.Tensor):
        if max(value.shape, default=0) > 1 << 20:
            return value  # huge already
        alike = [other for other in others if other.dtype == value.dtype]
        if draw.random() < 0.1:
            return draw.choice(alike)
        change = draw.choice(CHANGES)
        unfit = wild_integers if value.is_floating_point() else wild_floats
        return value if change is unfit else change(draw, value)
    if isinstance(value, float):
        return draw.choice([0.0, -1.0, 1e300, float("nan"), float("inf"), 1e-300])
    return value if isinstance(value, bool) else draw.choice(NUMBERS)


def change_of_list(draw, values, others):
    """One of its tensors changed, gone, twice there, or in another's place."""
    values, place = list(values), draw.randrange(len(values))
    if draw.random() < 0.8:
        values[place] = change_of(draw, values[place], others)
        return values
    other = draw.randrange(len(values))
    values[place], values[other] = values[other], values[place]
    return draw.choice([values, values[:place] + values[place + 1 :], values[: place + 1] + values[place:]])


def changed(draw, op, given):
    """One or two arguments, or two that are one."""
    names = OPS[op].arguments
    for _ in range(draw.choice([1, 1, 1, 2])):
        name = draw.choice(names)
        tensors = tensors_of(given, names)
        if isinstance(given[name], list):
            value = change_of_list(draw, given[name], tensors) if given[name] else []
        else:
            value = change_of(draw, given[name], tensors)
        if not (op == "linear" and name == "x" and value.numel() > 1 << 20):  # which it would multiply, all day long
            given[name] = value
    return given


def answer(op, given):
    """What the op returns, or False if it refuses."""
    try:
        return test_ops.run(getattr(ops, op), [given[name] for name in OPS[op].arguments])
    except RuntimeError as error:
        if not str(error).startswith(f"whisperkv::{op}: "):
            raise AssertionError("refused by another name") from error
        return False


def tensors_of(given, names):
    return [each for each in tree_leaves([given[name] for name in names]) if isinstance(each, torch.Tensor)]


def copies_of(tensors):
    """What they hold, but for huge ones, all of whose numbers are one."""
    flat = [each.reshape(-1) for each in tensors if 0 < each.numel() <= 1 << 20]
    return [each.clone(memory_format=torch.contiguous_format) for each in flat]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no memory at odd addresses to give, and keeps a fault")
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_calls(op):
    if ON_CUDA and op in OF_THE_CPU:
        pytest.skip("of the CPU alone")
    draw, refused = random.Random(f"{SEED} {op}"), 0
    torch.manual_seed(SEED)
    for case in range(600):
        given, is_sound = OPS[op].sound(draw), case % 4 == 0
        given = given if is_sound else changed(draw, op, given)
        before, names = copy(given) if is_sound else None, OPS[op].arguments
        written = tensors_of(given, OPS[op].written)
        kept = [each for each in tensors_of(given, names) if not any(each is other for other in written)]
        kept_before, written_before = copies_of(kept), copies_of(written)
        try:
            results = answer(op, given)
            refused += results is False
            for now, then in zip(copies_of(kept), kept_before):
                assert_same_bits(now, then)
            for now, then in zip(copies_of(written), written_before if results is False else ()):
                assert_same_bits(now, then)
            if is_sound:
                assert results is not False
                OPS[op].check(op, given, results, before)
        except Exception as error:
            shown = tree_map_only(torch.Tensor, lambda x: (x.dtype, list(x.shape)), given)
            raise AssertionError(f"WHISPERKV_FUZZ={SEED}, case {case} of {op}: {shown}") from error
    assert refused > OPS[op].refused
