"""The op of the encoder's self-attention against its slow twin in reference.py, and all that can go wrong around it."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from reference import BFLOAT16, BYTES, FLOAT32
from test_ops import (
    ISAS,
    ON_CUDA,
    assert_same_bits,
    check_transform_is_refused,
    check_values_on,
    copy,
    counts_bytes,
    grows,
    resized,
    settings,
    st,
)
from test_ops import given as drawn
from torch._subclasses import FakeTensorMode

from whisperkv import ops

pytestmark = pytest.mark.skipif(ON_CUDA, reason="the op is the CPU's alone")

PRECISIONS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "bytes": BYTES}
ENCODER = ("query", "key", "value", "bias", "lengths", "scale", "precision")
# Weights are rounded too. From the twin, which does not round them, an output is this part of its channel's largest
# value away, at most and on average over a call. Measured over 3 x 600 random problems: 1.8e-6 and 1.1e-7, 1.4e-3 and
# 3.6e-4, 0.025 and 1.4e-3.
APART = {FLOAT32: (4e-6, 2e-7), BFLOAT16: (4e-3, 6e-4), BYTES: (4e-2, 3e-3)}


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


def in_float64(query, key, value, bias, lengths, scale, precision):
    weights = (torch.einsum("aqhd,akhd->ahqk", query, key) * scale).softmax(-1)
    return torch.einsum("ahqk,akhd->aqhd", weights, value)


def used(given, audio):
    return int(given["lengths"][audio]) if given["lengths"].numel() else given["query"].shape[1]


def check(given):
    before = copy(given)
    output = attend(given)
    for name in ENCODER[:5]:
        assert_same_bits(given[name], before[name])
    assert_near(given, output, attend(given, reference.encoder_attention))


def assert_near(given, output, wanted):
    assert output.is_contiguous() and output.shape == wanted.shape and output.dtype == torch.float32
    most, average = APART[given["precision"]]
    errors = []
    for audio in range(len(output)):
        length = used(given, audio)
        assert not output[audio, length:].any()
        values = given["value"][audio, :length]
        scale = values.abs().amax(0).clamp(min=1e-30)
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

    def test_as_exact_as_torch(self):
        """In float32, from what float64 gives."""
        given = problem(2, 333, 3, bias=False, lengths=False)
        wanted = attend({name: x.double() if name in ENCODER[:3] else x for name, x in given.items()}, in_float64)
        heads = [given[name].transpose(1, 2) for name in ENCODER[:3]]
        torchs = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
        ours, theirs = ((output - wanted).square().mean() for output in (attend(given), torchs))
        assert ours < 1.5 * theirs

    @settings(max_examples=60, deadline=None)
    @drawn(
        st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 32).map(lambda n: 4 * n),
        st.sampled_from(list(PRECISIONS.values())), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**30),
    )  # fmt: skip
    def test_any_problem(self, audios, frames, heads, dim, precision, joint, bias, lengths, seed):
        check(problem(audios, frames, heads, dim, precision, joint, bias, lengths, seed))

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    def test_sharp_attention(self, precision):
        """One frame takes nearly all. The roundings of queries and keys grow with the logits; the twin has them too."""
        given = problem(frames=300, precision=precision, bias=False) | dict(scale=1.0)
        output, wanted = attend(given), attend(given, reference.encoder_attention)
        rtol, atol = {FLOAT32: (1e-5, 1e-4), BFLOAT16: (2e-2, 0.3), BYTES: (2e-2, 0.5)}[precision]
        torch.testing.assert_close(output, wanted, rtol=rtol, atol=atol)

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    def test_enormous_logits_and_a_scale_of_nothing(self, precision):
        given = problem(frames=100, precision=precision, lengths=False)
        assert attend(given | dict(scale=1e6)).isfinite().all()
        given |= dict(scale=0.0, bias=torch.empty(0))
        values = given["value"]
        means = values.mean(1, keepdim=True).expand_as(values)
        atol = float(values.abs().max()) * APART[precision][0]
        torch.testing.assert_close(attend(given), means, rtol=0, atol=atol)

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    def test_a_bias_counts_a_frame_for_many(self, precision):
        """With log n a frame weighs as much as n of its kind."""
        few = problem(1, 30, 2, precision=precision, lengths=False)
        counts = torch.randint(1, 9, (30,))
        few["bias"] = counts.float().log()[None]
        many = {name: few[name].repeat_interleave(counts, 1) for name in ("query", "key", "value")}
        got, wanted = attend(few), attend(few | many | dict(bias=torch.empty(0)))
        first = counts.cumsum(0) - counts
        scale = few["value"].abs().amax(1, keepdim=True)
        assert ((got - wanted[:, first]).abs() / scale).max() < 2 * APART[precision][0]

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    def test_a_bias_of_minus_infinity_hides_a_frame(self, precision):
        given = problem(1, 50, 2, precision=precision, lengths=False)
        given["bias"][0, 20:] = -torch.inf
        shown = {name: given[name][:, :20] for name in ("query", "key", "value", "bias")}
        atol = float(given["value"].abs().max()) * APART[precision][0]
        wanted = attend(given | {**shown, "bias": shown["bias"].contiguous()})
        torch.testing.assert_close(attend(given)[:, :20], wanted, rtol=0, atol=atol)
        given["bias"][:] = -torch.inf
        assert attend(given).isnan().all()  # as softmax has it

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    def test_an_audio_of_a_length_is_that_long(self, precision):
        """Bit for bit, and whatever stands behind it."""
        given = problem(3, 130, 2, precision=precision)
        given["lengths"][:] = torch.tensor([1, 130, 77])
        together = attend(given)
        for audio, length in enumerate(given["lengths"].tolist()):
            alone = {name: given[name][audio : audio + 1, :length] for name in ENCODER[:3]}
            bias, lengths = given["bias"][audio : audio + 1, :length].contiguous(), torch.empty(0, dtype=torch.int32)
            got = attend(given | alone | dict(bias=bias, lengths=lengths))
            assert_same_bits(together[audio, :length], got[0])
            assert not together[audio, length:].any()

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    @pytest.mark.parametrize("dim", [64, 20])
    def test_strides_do_not_matter(self, dim, precision):
        """Nor what lies between frames and around all of them."""
        plain = problem(2, 61, 3, dim, precision, joint=False, lengths=False)
        wanted = attend(plain)
        assert_same_bits(attend(problem(2, 61, 3, dim, precision, lengths=False)), wanted)
        memory = torch.full((3, 2 * 70 * 1000 + 3), torch.nan)
        fenced = dict(plain)
        for room, name in zip(memory, ENCODER[:3]):
            fenced[name] = room.as_strided((2, 61, 3, dim), (70 * 1000, 1000, dim, 1), room.storage_offset() + 2)
            fenced[name].copy_(plain[name])
        assert_same_bits(attend(fenced), wanted)
        one = {name: plain[name][:1] for name in ENCODER[:4]}
        many = {name: x.expand(4, *x.shape[1:]) for name, x in one.items() if name != "bias"}
        got = attend(plain | many | dict(bias=one["bias"].repeat(4, 1)))
        for audio in got:
            assert_same_bits(audio, wanted[0])

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    @pytest.mark.parametrize("shape", [(1, 700, 2), (3, 100, 7)], ids=["long", "many"])
    def test_same_bits_whatever_the_threads(self, shape, precision):
        """And from run to run."""
        given = problem(*shape, precision=precision)
        results, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append(attend(given))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert_same_bits(results[0], other)

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
    def test_what_is_broken(self, precision, poison):
        """A query spoils itself, a key its head, a value its channel, a bias its audio; nothing else changes a bit."""
        given = problem(2, 70, 3, precision=precision, lengths=False)
        sound = attend(given)
        for name, spoils in (
            ("query", (1, 33, 2)),
            ("key", (1, slice(None), 2)),
            ("value", (1, slice(None), 2, 5)),
        ):
            broken = copy(given)
            broken[name][1, 33, 2, 5] = poison
            output = attend(broken)
            if name != "key" or poison != poison:  # an infinite key may weigh nothing
                assert not output[spoils].isfinite().any()
            output[spoils] = sound[spoils]
            assert_same_bits(output, sound)
        broken = copy(given)
        broken["bias"][1, 33] = poison
        output = attend(broken)
        assert_same_bits(output[0], sound[0])
        assert output[1].isfinite().all() if poison == -torch.inf else output[1].isnan().all()

    def test_keys_as_softmax_has_them(self):
        """In float32 an infinite key weighs nothing, or makes NaN, for the same queries as in torch."""
        given = problem(1, 40, 2, lengths=False)
        given["key"][0, 7, 1, 3] = torch.inf
        wanted = attend(given, reference.encoder_attention)
        assert wanted.isnan().any() and wanted[:, :, 1].isfinite().any()
        torch.testing.assert_close(attend(given), wanted, equal_nan=True, rtol=1e-4, atol=1e-5)

    def test_many_small_weights_are_not_lost(self):
        """One frame weighs as much as all others together, each of which is nearer to 0 bytes than to 1."""
        given = problem(1, 1400, 1, precision=BYTES, bias=False, lengths=False)
        given["query"][:] = given["key"][:] = 0
        given["bias"] = torch.zeros(1, 1400)
        given["bias"][0, 700] = torch.tensor(1399.0).log()
        given["value"][:] = 1.0
        given["value"][0, 700] = -1.0
        assert attend(given).abs().max() < 0.01

    def test_the_largest_weights_fit_a_byte(self):
        """Whatever rounding has left over of those before them."""
        given = problem(1, 1400, 1, precision=BYTES, lengths=False)
        given["query"][:] = given["key"][:] = 0
        given["bias"] = (torch.rand(1, 1400) * (torch.rand(1, 1400) < 0.5)).log1p().neg()
        output, wanted = attend(given), attend(given, reference.encoder_attention)
        assert ((output - wanted).abs() / given["value"].abs().amax(1, keepdim=True)).max() < 2e-3


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


# What keeps the bounds honest

WRONG = {
    "no bias": lambda given: given.update(bias=torch.zeros_like(given["bias"])),
    "a frame too few": lambda given: given.update(lengths=given["lengths"] - 1),
    "scale": lambda given: given.update(scale=given["scale"] * 1.1),
    "neighbours": lambda given: given.update(value=given["value"].roll(1, 1)),
    "channels": lambda given: given.update(key=given["key"].roll(1, 3)),
}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_bounds_are_tight_enough(wrong, precision):
    given = problem(precision=precision)
    given["lengths"][:] = 60
    for name in ENCODER[:3]:
        given[name] = given[name].nan_to_num(0.5)
    exact = attend(given, reference.encoder_attention)
    changed = dict(given)
    WRONG[wrong](changed)
    scale = given["value"].abs().amax(1, keepdim=True)
    error = (attend(changed, reference.encoder_attention) - exact)[:, :59].abs() / scale
    assert error.max() > APART[precision][0] or error.mean() > APART[precision][1]


# Calls


def set_first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0] = value
        return tensor

    return change


def shifted(tensor):
    memory = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=1).view(tensor.shape)


BAD = [
    ("query", torch.Tensor.double, "query must be float32, got float64"),
    ("query", torch.Tensor.bfloat16, "query must be float32, got bfloat16"),
    ("query", lambda t: t[0], r"\[audios, frames, heads, dim\], got \[70, 2, 64\]"),
    ("query", lambda t: t[:, :0], r"no side but rows empty, got \[2, 0, 2, 64\]"),
    ("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "query must have heads that are contiguous"),
    ("query", shifted, "query must begin at a multiple of 4 bytes"),
    ("key", torch.Tensor.half, "key must be float32, got float16"),
    ("key", resized(0), r"audios=2, frames=70, heads=2, dim=64\], got \[3, 70, 2, 64\]"),
    ("key", resized(1), r"got \[2, 71, 2, 64\]"),
    ("key", resized(3), r"got \[2, 70, 2, 65\]"),
    ("key", lambda t: t.mT.contiguous().mT, "key must have heads that are contiguous"),
    ("value", resized(2), r"got \[2, 70, 3, 64\]"),
    ("value", lambda t: t.flip(2).transpose(2, 3), r"value must be .* got \[2, 70, 64, 2\]"),
    ("bias", torch.Tensor.double, "bias must be float32, got float64"),
    ("bias", resized(1), r"\[audios=2, frames=70\], got \[2, 71\]"),
    ("bias", lambda t: t[0], r"\[audios=2, frames=70\], got \[70\]"),
    ("bias", lambda t: t.mT.contiguous().mT, "bias must be contiguous"),
    ("lengths", torch.Tensor.long, "lengths must be int32, got int64"),
    ("lengths", resized(0), r"\[audios=2\], got \[3\]"),
    *(
        ("lengths", set_first(n), rf"length of audio 0 must be in 1\.\.70 frames, got {n}")
        for n in (0, -1, 71, -(2**31))
    ),
    *(("scale", lambda _, x=x: x, "scale must be finite") for x in (float("nan"), float("inf"), 1e300)),
    *(("precision", lambda _, n=n: n, rf"precision must be in 0\.\.2, got {n}") for n in (3, -1, 2**62)),
]


@pytest.mark.parametrize("argument, change, text", BAD)
def test_bad_input(argument, change, text):
    """Named, refused, nothing written, and the next call works."""
    given = problem()
    bad = copy(given)
    bad[argument] = change(bad[argument])
    before = copy(bad)
    with pytest.raises(RuntimeError, match=text) as error:
        attend(bad)
    assert "whisperkv::encoder_attention: " in str(error.value)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(bad[name], value)
    check(given)


@pytest.mark.parametrize("side, shape", [("frames", (1, 65537, 1, 1)), ("dim", (1, 1, 1, 65537))])
def test_too_much_to_add_up(side, shape):
    given = problem() | {name: torch.zeros(shape) for name in ENCODER[:3]}
    given |= dict(bias=torch.empty(0), lengths=torch.empty(0, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=rf"{side} must be in 1\.\.65536, got 65537"):
        attend(given)


def test_the_widest_heads():
    """Sums of the products of the largest bytes there are just fit 32 bits, either way."""
    dim = 65536
    query, key = torch.ones(1, 2, 1, dim), torch.ones(1, 2, 1, dim)
    key[:, 1] = -1
    value = torch.zeros(1, 2, 1, dim)
    value[:, 0] = 3
    given = problem() | dict(query=query, key=key, value=value, scale=1 / dim, precision=BYTES)
    given |= dict(bias=torch.empty(0), lengths=torch.empty(0, dtype=torch.int32))
    torch.testing.assert_close(attend(given), attend(given, reference.encoder_attention), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ENCODER[:5])
@pytest.mark.parametrize("change", [lambda t: t.to("meta"), torch.Tensor.to_sparse], ids=["meta", "sparse"])
def test_not_a_plain_cpu_tensor(name, change):
    given = problem()
    with pytest.raises((RuntimeError, NotImplementedError), match="encoder_attention"):
        attend(given | {name: change(given[name].nan_to_num())})


@pytest.mark.parametrize("name", ENCODER[:4])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_gradients_are_refused(name, leaf):
    given = problem()
    tensor = given[name].nan_to_num().requires_grad_()
    bad = given | {name: tensor if leaf else tensor * 2}
    with pytest.raises(RuntimeError, match=rf"{name} requires grad.*torch\.no_grad\(\)"):
        attend(bad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not attend(bad).requires_grad


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functional_transforms_are_refused(transform):
    given = problem()
    total = lambda x: attend(given | dict(query=x)).sum()  # noqa: E731
    check_transform_is_refused(transform, total, given["query"])


def test_many_threads_at_once():
    given = [problem(2, 130, 2, precision=seed % 3, seed=seed) for seed in range(6)]

    def repeated(each):
        for _ in range(10):
            result = attend(each)
        return result

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(repeated, given))
    for one, other in zip(together, map(repeated, given)):
        assert_same_bits(one, other)


def test_another_thread_writes_during_a_call():
    """Lengths are nonsense now and then: a call refuses them, or it never sees that."""
    given = problem(3, 300, 4)
    wanted, written, done = attend(given), given["lengths"].numpy(), threading.Event()
    sound = written.copy()

    def disturb():
        while not done.is_set():
            written[:] = -(2**31)
            written[:] = sound

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        passed = 0
        for _ in range(200):
            try:
                output = attend(given)
            except RuntimeError as error:
                assert re.search("length of audio . must be", str(error))
                continue
            passed += 1
            assert_same_bits(output, wanted)
    finally:
        done.set()
        disturber.join()
    assert passed


@counts_bytes
@torch.no_grad()
def test_no_leak():
    good = problem(1, 3, 1, 8)
    bad = good | dict(lengths=good["lengths"] + 9)

    def refused():
        with pytest.raises(RuntimeError):
            attend(bad)

    for call in (lambda: attend(good), refused):
        assert not grows(call)


# Compilers


@pytest.mark.parametrize(
    "changes", [dict(), dict(precision=BYTES), dict(bias=False), dict(lengths=False), dict(frames=1, dim=5)], ids=str
)
def test_opcheck_compile(changes):
    given = problem(**changes)
    arguments = [given[name] for name in ENCODER]
    torch.library.opcheck(
        ops.encoder_attention, [x.nan_to_num() if isinstance(x, torch.Tensor) else x for x in arguments]
    )


def heard(given):
    """With something before and after for a compiler to move."""
    given = dict(given, query=given["query"] * 2)
    return ops.encoder_attention(*(given[name] for name in ENCODER)) + 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_compile(dynamic):
    """With the backend that works out every shape, but writes no code."""
    torch._dynamo.reset()
    compiled = torch.compile(heard, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for audios, frames in ((2, 50), (3, 70)):
        given = problem(audios, frames, lengths=False)
        torch.testing.assert_close(compiled(given), heard(given))


@pytest.mark.parametrize(
    "argument, change, text",
    [
        ("query", lambda t: t[0], r"\[audios, frames, heads, dim\] on cpu, got torch.float32 \[70, 2, 64\]"),
        ("query", torch.Tensor.half, "float32 .* got torch.float16"),
        ("key", resized(3), r"with dim=64, got \[2, 70, 2, 65\]"),
        ("value", resized(1), r"with frames=70, got \[2, 71, 2, 64\]"),
        ("bias", resized(1), r"with frames=70, got \[2, 71\]"),
        ("lengths", resized(0), r"with audios=2, got \[3\]"),
        ("lengths", torch.Tensor.long, "int32 .* got torch.int64"),
    ],
)
def test_a_compiler_is_told_what_is_wrong(argument, change, text):
    real = problem()
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in real.items()}
        given[argument] = change(given[argument])
        with pytest.raises(RuntimeError, match=f"{argument} must be .*{text}"):
            attend(given)


@pytest.mark.parametrize("joint", [True, False])
def test_fakes_have_the_sizes_of_the_real(joint):
    real = problem(joint=joint)
    with FakeTensorMode() as mode:
        faked = attend({name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in real.items()})
        shape = faked.shape, faked.dtype, faked.stride()
    output = attend(real)
    assert shape == (output.shape, output.dtype, output.stride())
