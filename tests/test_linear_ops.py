"""The ops of matrices against their slow twins in reference.py, and all that can go wrong around them."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from reference import AS_BFLOAT16, AS_FINE_INT8, AS_FLOAT32, AS_INT8
from test_ops import ISAS, ON_CUDA, assert_same_bits, check_values_on, copy, resized, settings, st, strided
from test_ops import given as drawn
from torch._subclasses import FakeTensorMode

from whisperkv import ops

pytestmark = pytest.mark.skipif(ON_CUDA, reason="the ops are the CPU's alone")

NONE = torch.empty(0)
FORMATS = {"float32": AS_FLOAT32, "bfloat16": AS_BFLOAT16, "int8": AS_INT8, "fine int8": AS_FINE_INT8}
LINEAR = (
    "x", "norm_weight", "norm_bias", "weight", "bias", "residual", "format", "outputs", "epsilon", "activation",
)  # fmt: skip


def problem(
    rows=5, inputs=48, outputs=70, format=AS_FLOAT32, norm=True, bias=True, residual=0, activation=1, stride=0, seed=0
):
    """All arguments of the op by name; the weight is the model's own."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    x = normal(rows * (inputs + stride) + inputs) * 3 + 1
    return dict(
        x=x.as_strided((rows, inputs), (inputs + stride, 1)),
        norm_weight=normal(inputs) if norm else NONE,
        norm_bias=normal(inputs) if norm else NONE,
        weight=normal(outputs, inputs) / inputs**0.5,
        bias=normal(outputs) if bias else NONE,
        residual=normal(residual, outputs) if residual else NONE,
        format=format, outputs=outputs, epsilon=1e-5, activation=activation,
    )  # fmt: skip


def multiply(given, packed):
    weight = ops.pack_matrix(given["weight"], given["format"]) if packed else given["weight"]
    return ops.linear(*((given | {"weight": weight})[name] for name in LINEAR))


def check(given):
    before = copy(given)
    wanted = reference.linear(*(given[name] for name in LINEAR))
    for packed in (True, False) if given["format"] == AS_FLOAT32 else (True,):
        output = multiply(given, packed)
        for name in LINEAR[:6]:
            assert_same_bits(given[name], before[name])
        assert_near(given, output, wanted)


def assert_near(given, output, wanted):
    assert output.is_contiguous() and output.dtype == torch.float32
    # A number that lies between two codes may go to either, where norms differ in their last bits.
    apart = {AS_FLOAT32: 2e-5, AS_BFLOAT16: 2e-2, AS_INT8: 4e-2, AS_FINE_INT8: 4e-2}[given["format"]]
    apart *= max(1.0, lost_by_norm(given) / 16)
    torch.testing.assert_close(output, wanted, rtol=apart, atol=apart)
    assert (output - wanted).abs().mean() < apart / 4 if output.numel() else True


def lost_by_norm(given):
    """How many times larger a rounding error is once a row is normalized: few numbers may lie close together."""
    x = given["x"]
    if not given["norm_weight"].numel() or not x.numel():
        return 0.0
    return float((x.abs().amax(-1) / (x.var(-1, correction=0) + given["epsilon"]).sqrt()).nan_to_num(0, 0).amax())


# rows, inputs, outputs
SHAPES = {
    "one number": (1, 1, 1),
    "nothing whole": (3, 7, 5),
    "a panel": (1, 64, 32),
    "over a panel": (2, 66, 33),
    "rows of a block": (12, 65, 40),
    "and some": (17, 130, 100),
    "a swath": (192, 48, 33),
    "over a swath": (193, 20, 64),
    "packed first": (97, 33, 31),
    "a head": (1, 512, 1000),
    "beams": (5, 384, 96),
}


class TestValues:
    @pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_shapes(self, shape, format):
        rows, inputs, outputs = shape
        check(problem(rows, inputs, outputs, format, residual=rows))

    @settings(max_examples=100, deadline=None)
    @drawn(
        rows=st.integers(0, 40), inputs=st.integers(1, 140), outputs=st.integers(1, 140),
        format=st.sampled_from(list(FORMATS.values())), norm=st.booleans(), bias=st.booleans(),
        residual=st.integers(0, 7), activation=st.sampled_from([0, 1]), stride=st.sampled_from([0, 3, -1]),
        seed=st.integers(0, 2**31),
    )  # fmt: skip
    def test_any_problem(self, rows, inputs, **others):
        check(problem(rows, inputs, **others | {"stride": max(others["stride"], 1 - inputs)}))

    def test_gelu_is_that_of_torch(self):
        x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 60.0, -60.0])])[:, None]
        got = ops.linear(x, NONE, NONE, torch.ones(1, 1), NONE, NONE, AS_FLOAT32, 1, 0.0, 1)
        torch.testing.assert_close(got.double(), torch.nn.functional.gelu(x.double()), rtol=4e-7, atol=1.2e-6)

    @pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    def test_what_is_not_finite_spoils_its_own(self, bad, format):
        """A row, or an output, and nothing else."""
        given = problem(20, 70, 70, format, norm=False, bias=False, activation=0)
        want = multiply(given, True)
        spoilt = copy(given)
        spoilt["x"] = spoilt["x"].contiguous()
        spoilt["x"][3, 69] = bad
        got = multiply(spoilt, True)
        others = torch.arange(20) != 3
        assert_same_bits(got[others], want[others])
        assert not got[3].isfinite().any()
        spoilt = copy(given)
        spoilt["weight"][65, 0] = bad
        got = multiply(spoilt, True)
        others = torch.arange(70) != 65
        assert_same_bits(got[:, others], want[:, others])
        assert not got[:, 65].isfinite().any()

    @pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
    def test_zeros(self, format):
        given = problem(4, 40, 40, format, norm=False, bias=False, activation=0)
        assert not multiply(given | {"x": torch.zeros(4, 40)}, True).any()
        assert not multiply(given | {"weight": torch.zeros(40, 40)}, True).any()

    def test_bytes_are_exact(self):
        """Whole numbers whose largest is 127 are their own codes, in every instruction set."""
        draw = torch.Generator().manual_seed(1)
        x, weight = (torch.randint(-127, 128, (9, 200), generator=draw).float() for _ in range(2))
        x[:, 0] = weight[:, 0] = 127
        got = ops.linear(x, NONE, NONE, ops.pack_matrix(weight, AS_INT8), NONE, NONE, AS_INT8, 9, 0.0, 0)
        assert torch.equal(got, x @ weight.T)

    @pytest.mark.parametrize(
        "of_x, of_weight", [((), ()), ((3, 3, 3, 3), ()), ((), (0, 49, 49)), ((7, 7), (7, 9, 7, 7))]
    )
    def test_fine_bytes_are_exact(self, of_x, of_weight):
        """So they are where the largest is so many times 127 in units that are entered again so often."""
        draw = torch.Generator().manual_seed(1)
        x, weight = (torch.randint(-127, 128, (count, 200), generator=draw).float() for count in (9, 40))
        x[:, ::4] = weight[:, 2::4] = 127
        for rows, units in ((x, of_x), (weight, of_weight)):
            for unit in units:
                rows[:, 4 * unit : 4 * unit + 4] += torch.randint(-127, 128, (len(rows), 4), generator=draw)
                rows[:, 4 * unit + 2] = 127 * (1 + units.count(unit))
        got = ops.linear(x, NONE, NONE, ops.pack_matrix(weight, AS_FINE_INT8), NONE, NONE, AS_FINE_INT8, 40, 0.0, 0)
        assert torch.equal(got, x @ weight.T)

    def test_one_large_number_leaves_the_others_their_codes(self):
        """Where it alone is large, the others are off by a fifth of what they would be."""
        draw = torch.Generator().manual_seed(1)
        x, weight = (torch.rand(count, 512, generator=draw) - 0.5 for count in (8, 64))
        x[:, 100], weight[:, 300] = 2.4, -2.4
        want = x.double() @ weight.double().T
        got = ops.linear(x, NONE, NONE, ops.pack_matrix(weight, AS_FINE_INT8), NONE, NONE, AS_FINE_INT8, 64, 0.0, 0)
        as_bytes = [(rows / (2.4 / 127)).round() * (2.4 / 127) for rows in (x.double(), weight.double())]
        assert (got - want).abs().mean() < (as_bytes[0] @ as_bytes[1].T - want).abs().mean() / 4

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_of_other_dtypes(self, dtype):
        weight = torch.randn(40, 24).to(dtype)
        for format in FORMATS.values():
            assert_same_bits(ops.pack_matrix(weight, format), ops.pack_matrix(weight.float(), format))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_bits_do_not_depend_on_threads(format):
    given = problem(400, 256, 300, format, residual=100)
    threads = torch.get_num_threads()
    for packed in (True, False) if format == AS_FLOAT32 else (True,):
        outputs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outputs.append(multiply(given, packed))
        torch.set_num_threads(threads)
        assert_same_bits(outputs[0], outputs[1])
        assert_same_bits(outputs[0], outputs[2])


@pytest.mark.parametrize("format", [AS_INT8, AS_FINE_INT8])
def test_a_row_alone_has_the_bits_that_it_has_among_others(format):
    given = problem(30, 128, 64, format)
    whole = multiply(given, True)
    for row in (0, 11, 29):
        assert_same_bits(multiply(given | {"x": given["x"][row : row + 1]}, True), whole[row : row + 1])


BAD = {
    "x: dtype": (dict(x=lambda t: t.double()), "x must be float32, got float64"),
    "x: columns": (dict(x=lambda t: strided(t)), "x must have rows whose numbers lie side by side"),
    "norm: short": (dict(norm_weight=lambda t: t[:-1]), "norm_weight must be [inputs=48], got [47]"),
    "norm without bias": (dict(norm_bias=lambda t: NONE), "norm_bias must be [inputs=48]"),
    "weight: inputs": (dict(weight=resized(1)), "weight must be [outputs=70, inputs=48], got [70, 49]"),
    "weight: outputs": (dict(weight=resized(0)), "weight must be [outputs=70, inputs=48], got [71, 48]"),
    "bias": (dict(bias=resized(0)), "bias must be [outputs=70], got [71]"),
    "residual": (dict(residual=lambda t: torch.ones(5, 71)), "residual must be [other rows, outputs=70]"),
    "format": (dict(format=lambda f: 4), "format must be in 0..3, got 4"),
    "not packed": (dict(format=lambda f: AS_INT8), "weight must come from pack_matrix for this format"),
    "outputs": (dict(outputs=lambda o: 0), "outputs must be in 1..2147483647, got 0"),
    "epsilon": (dict(epsilon=lambda e: torch.nan), "epsilon must be finite, got nan"),
    "activation": (dict(activation=lambda a: 2), "activation must be in 0..1, got 2"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    changes, message = case
    given = problem()
    given |= {name: change(given[name]) for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.linear(*(given[name] for name in LINEAR))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_panels_of_another_size(format):
    given = problem(format=format)
    panels = ops.pack_matrix(given["weight"], format)
    for wrong in (panels[1:], panels[:, :-32], ops.pack_matrix(given["weight"], (format + 1) % 4)):
        with pytest.raises(RuntimeError, match=re.escape("weight must be [panels=3, words=")):
            ops.linear(*((given | {"weight": wrong.contiguous()})[name] for name in LINEAR))


def test_no_gradients_pass():
    given = problem()
    for name in ("x", "weight", "bias", "norm_bias"):
        wants = given | {name: given[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"{name} requires grad"):
            ops.linear(*(wants[each] for each in LINEAR))
        with torch.no_grad():
            ops.linear(*(wants[each] for each in LINEAR))
    with pytest.raises(RuntimeError, match="weight requires grad"):
        ops.pack_matrix(given["weight"].clone().requires_grad_(), AS_INT8)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_opcheck(format):
    given = problem(format=format, residual=5)
    torch.library.opcheck(ops.pack_matrix, (given["weight"], format))
    given["weight"] = ops.pack_matrix(given["weight"], format)
    torch.library.opcheck(ops.linear, tuple(given[name] for name in LINEAR))


def test_fakes_refuse_what_the_op_refuses():
    with FakeTensorMode():
        x, weight = torch.empty(3, 8), torch.empty(5, 9)
        with pytest.raises(RuntimeError, match="inputs"):
            ops.linear(x, torch.empty(0), torch.empty(0), weight, torch.empty(0), torch.empty(0), 0, 5, 0.0, 0)


def test_many_threads_at_once():
    given = problem(40, 128, 128, AS_FINE_INT8)
    want = multiply(given, True)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: multiply(given, True), range(40)):
            assert_same_bits(got, want)
