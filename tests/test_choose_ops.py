"""The op that picks tokens, against a sort."""

import pytest
import reference
import torch
from conftest import DEVICE, SEED
from drawn import given, settings, st
from test_ops import ISAS, check_values_on

from whisperkv import ops, searches

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not ops.chooses(torch.empty(0)), reason="with the kernels for CUDA torch.topk does it"
)


def scores_of(audios, beams, vocabulary, kind="", seed=SEED):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(audios, beams, vocabulary, generator=random)
    added = -torch.rand(audios, beams, generator=random) * 9
    draw = torch.rand(scores.shape, generator=random)
    if kind == "ties":
        scores, added = (scores * 2).round(), added.round()
    elif kind == "flat":
        scores, added = torch.zeros_like(scores), torch.zeros_like(added)
    elif kind == "suppressed":
        scores = scores.masked_fill(draw < 0.7, -torch.inf)
    elif kind == "nothing left":
        scores = torch.full_like(scores, -torch.inf)
    elif kind == "wild":
        for part, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
            scores = scores.masked_fill((draw > part * 0.03) & (draw < part * 0.03 + 0.03), value)
    elif kind == "rising":
        scores = scores.sort(-1).values
    elif kind == "nan":
        scores = torch.full_like(scores, torch.nan)
    return scores, added


KINDS = ["", "ties", "flat", "suppressed", "nothing left", "wild", "rising", "nan"]


def check(scores, added, count):
    values, places = ops.choose_tokens(scores, added, count)
    wanted, wanted_places = reference.choose_tokens(scores, added, count)
    assert places.dtype == torch.int64 and torch.equal(places, wanted_places)
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


class TestValues:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "audios, beams, vocabulary, count",
        [
            (1, 1, 51865, 1),
            (2, 5, 51865, 11),
            (1, 1, 1, 1),
            (3, 4, 5, 20),
            (2, 3, 7, 10),
            (1, 2, 128, 4),
            (1, 2, 300, 256),
        ],
    )
    def test_shapes(self, kind, audios, beams, vocabulary, count):
        check(*scores_of(audios, beams, vocabulary, kind), count)

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 3), st.integers(1, 6), st.integers(1, 700), st.sampled_from(KINDS), st.floats(0, 1),
        st.integers(0, 2**31),
    )  # fmt: skip
    def test_drawn(self, audios, beams, vocabulary, kind, part, seed):
        count = 1 + int(part * (beams * vocabulary - 1) * 0.2)
        check(*scores_of(audios, beams, vocabulary, kind, seed), count)

    def test_every_place_is_seen(self):
        for place in range(0, 300):
            scores = torch.zeros(1, 1, 300)
            scores[0, 0, place] = 1
            assert ops.choose_tokens(scores, torch.zeros(1, 1), 1)[1].item() == place

    @pytest.mark.parametrize("kind", KINDS)
    def test_as_torch_chooses(self, kind):
        """Also of equal scores: it is asked."""
        scores, added = scores_of(3, 5, 2000, kind)
        ours = searches.best_continuations(scores.flatten(0, 1), added, 10)
        theirs = (scores + added[..., None]).flatten(1).topk(10)
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
        rows = scores.flatten(0, 1)
        assert torch.equal(searches.best_tokens(rows), rows.argmax(-1))


def test_thread_count_does_not_matter():
    scores, added = scores_of(4, 5, 51865, "ties")
    wanted, before = ops.choose_tokens(scores, added, 11), torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, ops.choose_tokens(scores, added, 11), wanted))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    check_values_on(isa, __file__)


BAD = [
    (0, torch.Tensor.half, "scores must be float32, got float16"),
    (0, lambda t: t[0], r"scores must be \[audios, beams, vocabulary\], got \[3, 50\]"),
    (0, lambda t: t.transpose(1, 2), "scores must be contiguous|added must be"),
    (0, lambda t: t.to("meta"), "choose_tokens"),
    (0, lambda t: t.requires_grad_(), "scores requires grad"),
    (1, torch.Tensor.double, "added must be float32, got float64"),
    (1, lambda t: t[:, :2], r"added must be \[audios=2, beams=3\], got \[2, 2\]"),
    (2, lambda _: 0, r"count must be in 1\.\.150, got 0"),
    (2, lambda _: 151, r"count must be in 1\.\.150, got 151"),
]


@pytest.mark.parametrize("place, change, text", BAD)
def test_bad_input(place, change, text):
    arguments = [*scores_of(2, 3, 50), 4]
    arguments[place] = change(arguments[place])
    with pytest.raises((RuntimeError, NotImplementedError), match=text) as error:
        ops.choose_tokens(*arguments)
    assert "choose_tokens" in str(error.value)
    check(*scores_of(2, 3, 50), 4)


def test_more_than_can_be_counted():
    """The best of every beam: 2^31 beams times 2^31 of 16 bytes each are 0 in 64 bits. Nothing here is ever touched."""
    try:
        scores, added = torch.empty(1, 1 << 31, 1), torch.empty(1, 1 << 31)
    except RuntimeError:
        pytest.skip("the system promises no 16 GB")
    with pytest.raises(RuntimeError, match="choose_tokens: no memory for the"):
        ops.choose_tokens(scores, added, 1 << 31)


def test_opcheck():
    torch.library.opcheck(ops.choose_tokens, (*scores_of(2, 3, 50), 4))
