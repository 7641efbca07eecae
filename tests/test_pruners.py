"""Each pruner alone: what it keeps of audio whose good and bad parts are known."""

import dataclasses
import math

import pytest
import torch
from speech_models import lengths, make, mels

from whisperkv import prune
from whisperkv.prune import BasePruner, Meta
from whisperkv.prune.base import kept_of, places
from whisperkv.prune.hearing import silent_tokens
from whisperkv.prune.pruners import PRUNERS, pruner_of
from whisperkv.prune.pruners.merge import Merge
from whisperkv.prune.saliency import SaliencyHead, train

HEADS, DIM, WIDTH = 2, 8, 12


def meta(audio=(20, 12), **others):
    most = max(audio)
    present = torch.arange(most) < torch.tensor(audio)[:, None]
    given = dict(
        layer=0, layers=2, present=present, tokens=torch.arange(most).expand(len(audio), -1) + 3,
        clip=torch.zeros(len(audio), most, dtype=torch.int64), seen=torch.full(present.shape, 5.0),
        embeddings=torch.randn(len(audio), most, WIDTH, generator=torch.Generator().manual_seed(0)), rate=25,
    )  # fmt: skip
    return Meta(**{**given, **others})


def kept(pruner, of, budget, received=None):
    rows, audio = of.present.shape
    k, v = torch.randn(2, rows, HEADS, audio, DIM, generator=torch.Generator().manual_seed(1)).unbind(0)
    if received is None:
        received = torch.ones(rows, HEADS, audio)
    of = dataclasses.replace(of, attended=received.sum(1))
    scores = pruner.score(k, v, received, of)
    assert scores.shape == (rows, HEADS, audio)
    chosen = pruner.select(scores.masked_fill(~of.present[:, None], -math.inf), budget)
    return k, v, chosen


@pytest.mark.parametrize("name", sorted(PRUNERS))
@pytest.mark.parametrize("budget", [0.25, 0.5, 1.0, 3])
def test_budgets_are_kept(name, budget):
    pruner = pruner_of(name, {})
    heard = dict(silent=torch.zeros(2, 20, dtype=torch.bool), since=torch.arange(20).expand(2, -1))
    given = meta(**heard) if pruner.needs_silence else meta()
    k, _, chosen = kept(pruner, given, budget)
    count = (chosen >= 0).sum(-1)
    if name == "head_l1":
        heads = (count > 0).sum(-1)
        assert (heads == min(2, math.ceil(2 * budget) if isinstance(budget, float) else budget)).all()
        assert set(count.flatten().tolist()) <= {0, 20, 12}
        return
    expected = [math.ceil(n * budget) if isinstance(budget, float) else min(n, budget) for n in (20, 12)]
    assert count.tolist() == [[n] * HEADS for n in expected]
    ascending = chosen.masked_fill(chosen < 0, 99)
    assert (ascending.diff(dim=-1)[chosen[..., 1:] >= 0] > 0).all()
    assert given.present[:, None].expand(-1, HEADS, -1).gather(2, chosen.clamp(min=0))[chosen >= 0].all()


def test_random_is_by_seed_and_layer():
    def drawn(seed, layer):
        return kept(pruner_of("random", {"seed": seed}), meta(layer=layer), 0.5)[2]

    assert torch.equal(drawn(0, 0), drawn(0, 0))
    assert not torch.equal(drawn(0, 0), drawn(1, 0)) and not torch.equal(drawn(0, 0), drawn(0, 1))


def test_stride_is_even():
    _, _, chosen = kept(pruner_of("stride", {}), meta([100]), 0.25)
    gaps = chosen[0, 0].diff()
    assert gaps.min() >= 2 and gaps.max() <= 7


def test_attention_counts_for_those_who_could_see():
    received = torch.zeros(1, HEADS, 20)
    received[0, 0, 4], received[0, 0, 9], received[0, 1, 7] = 6.0, 5.0, 1.0
    seen = torch.full((1, 20), 10.0)
    seen[0, 9] = 2.0
    _, _, chosen = kept(pruner_of("token_attn_recency", {"recency": 0.0}), meta([20], seen=seen), 1, received)
    assert chosen[0, :, 0].tolist() == [9, 9]
    _, _, late = kept(pruner_of("token_attn_recency", {"recency": 1.0}), meta([20]), 2)
    assert late[0].tolist() == [[18, 19]] * 2


def test_head_l1_keeps_the_heads_that_look():
    received = torch.ones(1, HEADS, 20)
    received[0, 1] = 2.0
    _, _, chosen = kept(pruner_of("head_l1", {}), meta([20]), 0.5, received)
    assert chosen[0, 1].tolist() == list(range(20)) and (chosen[0, 0] == -1).all()


@pytest.mark.parametrize("tokens", ["merge", "stride", Merge()])
def test_head_l1_and_a_pruner_of_tokens(tokens):
    received = torch.ones(1, HEADS, 20)
    received[0, 1] = 2.0
    pruner = pruner_of("head_l1", {"tokens": tokens, "heads": 1})
    k, v, chosen = kept(pruner, meta([20]), 0.5, received)
    alone = pruner_of(tokens, {})
    _, _, wanted = kept(alone, meta([20]), 0.5, received)
    assert torch.equal(chosen[0, 1], wanted[0, 1]) and (chosen[0, 0] == -1).all()
    made, right = pruner.apply(k, v, chosen), alone.apply(k, v, wanted)
    assert torch.equal(made.keys[0, 1], right.keys[0, 1]) and torch.equal(made.values[0, 1], right.values[0, 1])


def test_head_l1_and_a_pruner_in_a_model():
    """One head of two, with half of its tokens; and the same text with all heads and tokens."""
    model, inputs = make("qwen2_audio")
    whole = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with prune.apply(model, "head_l1", budget=1.0, tokens="merge", heads=1.0):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), whole)
    with prune.apply(model, "head_l1", budget=0.5, tokens="merge", heads=0.5):
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
        audio = prune.stats(model).audio_tokens
        for layer in prune.stats(model).kept:
            assert 0 < sum(layer) <= math.ceil(audio / 2)  # of all heads, the mean of the rows


def test_head_l1_says_what_it_cannot():
    with pytest.raises(ValueError, match="tokens must be a pruner that chooses tokens"):
        pruner_of("head_l1", {"tokens": "head_l1"})
    with pytest.raises(ValueError, match="head_l1: heads must be a share above 0"):
        pruner_of("head_l1", {"heads": 0.0})
    with pytest.raises(ValueError, match="pruner must be one of"):
        pruner_of("head_l1", {"tokens": "nothing"})


class TestOfMerging:
    def keys(self, groups=4, size=5):
        """Groups of equal tokens, other ones in each head."""
        return torch.randn(1, HEADS, groups, DIM, generator=torch.Generator().manual_seed(3)).repeat_interleave(size, 2)

    def chosen(self, keys, budget, **given):
        of = meta([keys.shape[2]] * len(keys), **given)
        return Merge().select(Merge().score(keys, None, None, of), budget)

    def test_the_alike_become_one(self):
        keys = self.keys()
        chosen = self.chosen(keys, 4)
        assert chosen[0].tolist() == [[0, 5, 10, 15]] * HEADS
        values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(4))
        made = Merge().apply(keys, values, chosen)
        assert torch.allclose(made.keys, keys[:, :, ::5], atol=1e-6)
        assert torch.allclose(made.values, values.view(1, HEADS, 4, 5, DIM).mean(3), atol=1e-6)
        assert (made.counts == 5).all()

    def test_clips_stay_apart(self):
        clip = (torch.arange(20) >= 12).long()[None]
        assert self.chosen(torch.zeros(1, HEADS, 20, DIM), 2, clip=clip)[0, 0].tolist() == [0, 12]

    def test_all_kept_is_unchanged(self):
        k, v, chosen = kept(Merge(), meta([20, 20]), 1.0)
        made = Merge().apply(k, v, chosen)
        there = chosen >= 0
        assert torch.equal(made.keys[there], k[there]) and (made.counts == 1).all()

    def test_rows_and_heads_of_their_own(self):
        keys = torch.randn(3, HEADS, 40, DIM, generator=torch.Generator().manual_seed(6))
        together = self.chosen(keys, 0.4)
        for row in range(3):
            for head in range(HEADS):
                alone = self.chosen(keys[row : row + 1, head : head + 1], 0.4)
                assert torch.equal(alone[0, 0], together[row, head])

    @pytest.mark.parametrize("seed", range(4))
    def test_as_one_pair_after_the_other(self, seed):
        keys = torch.randn(1, 1, 60, DIM, generator=torch.Generator().manual_seed(seed)).cumsum(2)
        for budget in (30, 12, 5):
            groups = [[token] for token in range(60)]

            def cost(a, b):
                means = [keys[0, 0, group].mean(0) for group in (a, b)]
                return (means[0] - means[1]).square().sum().item() * len(a) * len(b) / (len(a) + len(b))

            while len(groups) > budget:
                costs = [cost(a, b) for a, b in zip(groups, groups[1:])]
                best = costs.index(min(costs))
                groups[best : best + 2] = [groups[best] + groups[best + 1]]
            ours = self.chosen(keys, budget)[0, 0].tolist()
            assert (
                len(set(ours) - {group[0] for group in groups}) <= budget // 10
            )  # pairs that overtake others are rare

    def test_close_to_the_best_partition(self):
        """Against the exact best cut into groups, found by dynamic programming."""
        keys = torch.randn(1, 1, 24, DIM, generator=torch.Generator().manual_seed(5)).cumsum(2)

        def loss(start, end):
            group = keys[0, 0, start:end]
            return (group - group.mean(0)).square().sum().item()

        best = [[math.inf] * 9 for _ in range(25)]
        best[0][0] = 0.0
        for end in range(1, 25):
            for groups in range(1, 9):
                best[end][groups] = min(best[start][groups - 1] + loss(start, end) for start in range(end))
        edges = [*self.chosen(keys, 8)[0, 0].tolist(), 24]
        ours = sum(loss(a, b) for a, b in zip(edges, edges[1:]))
        even = sum(loss(a, a + 3) for a in range(0, 24, 3))
        assert best[24][8] <= ours + 1e-6 and ours < 1.35 * best[24][8] and ours < even

    def test_what_is_no_number(self):
        keys = self.keys()
        keys[0, 0, 7] = torch.nan
        assert (self.chosen(keys, 0.5) >= 0).sum(-1).tolist() == [[10] * HEADS]


class TestOfSilence:
    def speech(self):
        """Two clips of 2 s: loud noise for the first half, then silence; the second is loud to its end."""
        features = 0.05 * mels(2)
        features[0, :, :100] += 2 + mels(1, seed=7)[0, :, :100]
        features[1] += 2 + mels(1, seed=8)[0]
        features[1, :, ::40] -= 2.5
        return features

    def test_tokens_of_silence(self):
        silent = silent_tokens(self.speech(), torch.ones(2, 50, dtype=torch.bool))
        assert silent[0, 27:].all() and not silent[0, :24].any() and not silent[1].any()

    def test_two_clips_of_a_row(self):
        audio = torch.arange(101)[None] != 50
        silent = silent_tokens(self.speech(), audio)
        assert silent[0, 27:50].all() and not silent[0, 50:].any()

    def test_windows_of_one_clip(self):
        silent = silent_tokens(self.speech(), torch.ones(1, 100, dtype=torch.bool))
        assert silent[0, 27:50].all() and not silent[0, 50:].any()

    def test_cannot_be_told(self):
        audio = torch.ones(1, 51, dtype=torch.bool)
        assert silent_tokens(None, audio) is None and silent_tokens(self.speech(), audio) is None
        with pytest.raises(ValueError, match="choose another pruner"):
            kept(pruner_of("chunk_vad", {}), meta(), 0.5)
        with pytest.raises(ValueError, match="take window"):
            kept(pruner_of("streaming_anchor", {}), meta(), 0.5)

    @pytest.mark.parametrize("name", ["chunk_vad", "token_saliency"])
    def test_silence_goes_first(self, name):
        settings = {"saliency": 0.9} if name == "token_saliency" else {}
        given = meta([50, 50], silent=silent_tokens(self.speech(), torch.ones(2, 50, dtype=torch.bool)))
        _, _, chosen = kept(pruner_of(name, settings), given, 0.5)
        assert (chosen[0] < 28).all()


@pytest.fixture(scope="module")
def trained():
    model, inputs = make("qwen2_audio")
    features = TestOfSilence().speech()
    given = {
        "input_ids": torch.tensor([[1, 9] + [7] * 50 + [30, 31]] * 2), "input_features": features,
        "feature_attention_mask": lengths(200, 200),
    }  # fmt: skip
    return model, given, *train(model, [given], steps=200)


class TestOfTheHead:
    def test_it_learns(self, trained):
        *_, right = trained
        assert right >= 0.8

    def test_saved_and_used(self, trained, tmp_path):
        model, given, head, _ = trained
        head.save(tmp_path / "head.safetensors")
        with (
            torch.no_grad(),
            prune.apply(model, "token_saliency", budget=20, head=tmp_path / "head.safetensors", saliency=1.0),
        ):
            model(**given)
            assert prune.stats(model).kept[0] == (20.0, 20.0)
        again = SaliencyHead.load(tmp_path / "head.safetensors")
        looks = torch.randn(3, head.width)
        assert torch.equal(again(looks), head(looks))

    def test_same_seed_same_bits(self, trained):
        model, given, head, _ = trained
        again, _ = train(model, [given], steps=200)
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))

    def test_bad_files(self, tmp_path):
        (tmp_path / "no.safetensors").write_bytes(b"what is this")
        with pytest.raises(ValueError, match="no saliency head"):
            prune.apply(make("qwen2_audio")[0], "token_saliency", head=tmp_path / "no.safetensors")
        with pytest.raises(FileNotFoundError):
            pruner_of("token_saliency", {"head": tmp_path / "none"})
        with pytest.raises(TypeError, match="a file or a function"):
            pruner_of("token_saliency", {"head": 3})
        with pytest.raises(ValueError, match="have 12"):
            kept(pruner_of("token_saliency", {"head": SaliencyHead(9)}), meta(), 0.5)

    def test_nothing_to_learn(self):
        model, inputs = make("qwen2_audio")
        with pytest.raises(ValueError, match="must hold audio"):
            train(model, [])
        flat = {**inputs, "input_features": torch.zeros_like(inputs["input_features"])}
        with pytest.raises(ValueError, match="speech and silence"):
            train(model, [flat])


def test_places():
    chosen = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    assert places(chosen).tolist() == [[0, 2], [2, -1], [-1, -1]]
    assert kept_of(torch.tensor([0, 1, 10]), 0.3).tolist() == [0, 1, 3]
    with pytest.raises(NotImplementedError, match="score"):
        BasePruner().score(None, None, None, None)
