"""The op of the encoder's self-attention against its slow twin in reference.py, and all that can go wrong around it."""

import gc
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import torch
from reference import BFLOAT16, BYTES, FLOAT32
from test_ops import (
    ISAS,
    ON_CUDA,
    assert_same_bits,
    check_values_on,
    copy,
    held_kib,
    resized,
    settings,
    st,
    strided,
)
from test_ops import given as drawn
from torch._subclasses import FakeTensorMode

from whisperkv import ops

pytestmark = pytest.mark.skipif(ON_CUDA, reason="the op is the CPU's alone")

PRECISIONS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "bytes": BYTES}
ENCODER = ("query", "key", "value", "bias", "lengths", "scale", "precision")
# Weights are rounded too. From the twin, which does not round them, an output is this part of its channel's standard
# deviation away, at most and on average over a call.
APART = {FLOAT32: (1e-5, 2e-6), BFLOAT16: (2e-2, 3e-3), BYTES: (0.15, 1.5e-2)}


def problem(audios=2, frames=70, heads=2, dim=64, precision=FLOAT32, joint=True, bias=True, lengths=True, seed=0):
    """All arguments of the op by name. What is in no audio is NaN, so that whoever reads it is found out. Joint ones
    are parts of one projection, as layers have it. Every channel has a spread and a middle of its own."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    states = normal(audios, frames, 3, heads, dim) * (0.5 + normal(3, heads, dim).abs()) + normal(3, heads, dim)
    used = torch.empty(0, dtype=torch.int32)
    if lengths:
        used = torch.randint(1, frames + 1, (audios,), generator=draw).int()
        used[torch.randint(audios, (), generator=draw)] = frames
        for audio, length in enumerate(used):
            states[audio, length:] = torch.nan
    query, key, value = (x if joint else x.contiguous() for x in states.unbind(2))
    counts = torch.randint(1, 17, (audios, frames), generator=draw).float().log()
    return dict(
        query=query, key=key, value=value, bias=counts if bias else torch.empty(0), lengths=used, scale=dim**-0.5,
        precision=precision,
    )  # fmt: skip


def attend(given, op=ops.encoder_attention):
    return op(*(given[name] for name in ENCODER))


def used(given, audio):
    return int(given["lengths"][audio]) if given["lengths"].numel() else given["query"].shape[1]


def check(given):
    before = copy(given)
    output = attend(given)
    for name in ENCODER[:5]:
        assert_same_bits(given[name], before[name])
    wanted = attend(given, reference.encoder_attention)
    assert output.is_contiguous() and output.shape == wanted.shape and output.dtype == torch.float32
    most, average = APART[given["precision"]]
    errors = []
    for audio in range(len(output)):
        length = used(given, audio)
        assert not output[audio, length:].any()
        values = given["value"][audio, :length]
        scale = values.std(0, correction=0).clamp(min=1e-3) + values.abs().amax(0) * 1e-3
        errors.append(((output - wanted)[audio, :length].abs() / scale).flatten())
    error = torch.cat(errors)
    assert error.max() < most and error.mean() < average


# audios, frames, heads, dim
SHAPES = {
    "one frame": (1, 1, 1, 64),
    "two audios of one": (2, 1, 3, 64),
    "less than a vector": (2, 3, 2, 64),
    "a vector of 4": (1, 4, 2, 64),
    "a vector of 16": (2, 16, 2, 64),
    "and one": (2, 17, 2, 64),
    "six": (1, 6, 2, 64),
    "a block": (1, 48, 2, 64),
    "over a block": (2, 49, 2, 64),
    "a panel": (2, 64, 1, 64),
    "over a panel": (2, 65, 1, 64),
    "many panels": (1, 333, 1, 64),
    "more heads than are packed at a time": (2, 20, 9, 64),
    "30 seconds": (1, 1500, 1, 64),
    "dim 1": (2, 30, 2, 1),
    "dim 4": (2, 30, 3, 4),
    "dim 20": (2, 50, 2, 20),
    "dim 66": (2, 50, 2, 66),
    "dim 80": (1, 100, 2, 80),
    "dim 128": (1, 130, 2, 128),
    "dim 260": (1, 20, 1, 260),
}


class TestValues:
    """The numbers. Run again for every instruction set by test_every_instruction_set."""

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_shapes(self, shape, precision):
        check(problem(*shape, precision, seed=sum(shape)))

    @settings(max_examples=60, deadline=None)
    @drawn(
        st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 32).map(lambda n: 4 * n),
        st.sampled_from(list(PRECISIONS.values())), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**30),
    )  # fmt: skip
    def test_any_problem(self, audios, frames, heads, dim, precision, joint, bias, lengths, seed):
        check(problem(audios, frames, heads, dim, precision, joint, bias, lengths, seed))
