"""The self cache by itself: what it holds after any mix of passes, reorderings, selections and rollbacks."""

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from whisperkv import EvictionConfig
from whisperkv.cache import SelfCacheLayer
from whisperkv.compat import _CROP_TAKES_LENGTH
from whisperkv.slots import LIVE, Shared, slots_for

HEADS, DIM = 2, 8


def crop(layer, count):
    layer.crop(layer.get_seq_length() - count if _CROP_TAKES_LENGTH else -count)


def tokens(rows, count, seed=0):
    """query, key, value [rows, count, heads, dim]"""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, count, HEADS, DIM, generator=generator) for _ in range(3)]


def attend(layer, query, key, value, a, b, want_weights=False):
    return layer.attend(*(x[:, a:b].contiguous() for x in (query, key, value)), 0.3, want_weights)


def feed(layer, query, key, value, start=0, stop=None):
    """One pass over the first tokens up to start, then one token at a time; outputs joined."""
    outputs = [attend(layer, query, key, value, 0, start)[0]] if start else []
    outputs += [attend(layer, query, key, value, t, t + 1)[0] for t in range(start, stop or query.shape[1])]
    return torch.cat(outputs, 1)


def full_attention(query, key, value, padding=None):
    """What a full cache gives, [rows, tokens, heads, dim]; padding tokens give 0."""
    count = query.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    if padding is not None:
        allowed = allowed & (torch.arange(count) >= padding[:, None])[:, None, None]
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.3
    weights = weights.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def held(layer):
    """positions in use, a set for each row"""
    return [set(p[:n].tolist()) for p, n in zip(layer.positions, layer.cursor[LIVE].tolist())]


def random_policy(scores, positions, keys, values):
    return torch.sin(positions.float() * 12.9898)


POLICIES = ["heavy_hitter", "magnitude", "window", random_policy]


@pytest.mark.parametrize("start", [0, 1, 5, 70])
def test_without_eviction_is_full_attention(start):
    query, key, value = tokens(3, 150)
    layer = SelfCacheLayer()
    torch.testing.assert_close(feed(layer, query, key, value, start), full_attention(query, key, value))
    assert layer.get_seq_length() == 150 and layer.slots == 192
    torch.testing.assert_close(layer.keys, key.transpose(1, 2))
    torch.testing.assert_close(layer.values, value.transpose(1, 2))


def test_update_is_a_dynamic_layer():
    """transformers' own attention can use the layer; our attention can go on from there, and the reverse."""
    query, key, value = tokens(2, 90)
    ours, theirs = SelfCacheLayer(), DynamicLayer()
    for a, b in ((0, 60), (60, 61), (61, 70)):
        got = ours.update(key[:, a:b].transpose(1, 2), value[:, a:b].transpose(1, 2))
        want = theirs.update(key[:, a:b].transpose(1, 2), value[:, a:b].transpose(1, 2))
        for x, y in zip(got, want):
            assert torch.equal(x, y)
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    rest = feed(ours, query[:, 70:], key[:, 70:], value[:, 70:])
    torch.testing.assert_close(rest, full_attention(query, key, value)[:, 70:])


def test_left_padding_takes_no_slot():
    padding = torch.tensor([0, 4, 9])
    query, key, value = tokens(3, 30)
    layer = SelfCacheLayer(padding=padding)
    got = feed(layer, query, key, value, 12)
    torch.testing.assert_close(got, full_attention(query, key, value, padding))
    assert layer.cursor[LIVE].tolist() == [30, 26, 21]
    keys = key.transpose(1, 2).clone()
    for row, pad in enumerate(padding):
        keys[row, :, :pad] = 0
    torch.testing.assert_close(layer.keys, keys)
    more = SelfCacheLayer(padding=padding)
    more.update(key[:, :12].transpose(1, 2), value[:, :12].transpose(1, 2))
    assert torch.equal(more.keys, keys[:, :, :12])
    more.key_slots[1:, :, 8:] = torch.nan  # what free slots hold must not show
    assert torch.equal(more.keys, keys[:, :, :12])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 3, 5])])
def test_eviction_keeps_what_it_must(policy, padding):
    config = EvictionConfig(policy, recent=6, heavy=8)
    query, key, value = tokens(3, 60)
    layer = SelfCacheLayer(config, padding=padding)
    feed(layer, query, key, value, 7, 60)
    seen = [60] * 3 if padding is None else (60 - padding).tolist()
    prompt = [7] * 3 if padding is None else (7 - padding).tolist()
    for row, positions in enumerate(held(layer)):
        assert len(positions) == config.budget == layer.slots
        assert positions >= set(range(seen[row] - 6, seen[row])) | set(range(prompt[row]))
    assert layer.get_seq_length() == 60
    # each slot holds the key of the position that it claims
    for row in range(3):
        pad = 0 if padding is None else int(padding[row])
        for slot, position in enumerate(layer.positions[row].tolist()):
            assert torch.equal(layer.key_slots[row, :, slot], key[row, position + pad])


def test_window_holds_the_newest():
    query, key, value = tokens(2, 50)
    layer = SelfCacheLayer(EvictionConfig("window", recent=8, heavy=4, pin_prompt=False))
    got = feed(layer, query, key, value, 3)
    assert held(layer) == [set(range(38, 50))] * 2
    want = full_attention(query[:, 38:], key[:, 38:], value[:, 38:])[:, -1]
    torch.testing.assert_close(got[:, -1], want)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_longer_than_the_budget_is_attended_in_full_then_reduced(policy):
    query, key, value = tokens(2, 45)
    layer = SelfCacheLayer(EvictionConfig(policy, recent=6, heavy=4, pin_prompt=False))
    got = feed(layer, query, key, value, 40)
    torch.testing.assert_close(got[:, :40], full_attention(query, key, value)[:, :40])
    assert all(len(p) == 10 and p >= set(range(39, 45)) for p in held(layer))
    assert layer.slots == 10


def test_a_pinned_prompt_that_fills_the_budget_is_refused():
    query, key, value = tokens(1, 10)
    with pytest.raises(ValueError, match="raise heavy"):
        feed(SelfCacheLayer(EvictionConfig(recent=6, heavy=4)), query, key, value, 10)


def test_budget_larger_than_the_transcript_changes_nothing():
    query, key, value = tokens(2, 40)
    layer = SelfCacheLayer(EvictionConfig(recent=64, heavy=32))
    torch.testing.assert_close(feed(layer, query, key, value, 3), full_attention(query, key, value))


@pytest.mark.parametrize("config", [None, EvictionConfig(recent=6, heavy=6)])
def test_reorder_select_repeat(config):
    """Rows moved about go on as if they had been decoded in their new place from the start."""
    query, key, value = tokens(4, 40)
    layer = SelfCacheLayer(config)
    feed(layer, query, key, value, 3, 25)
    layer.reorder_cache(torch.tensor([2, 2, 0, 1]))
    layer.batch_select_indices(torch.tensor([True, False, True, True]))
    layer.batch_repeat_interleave(2)
    order = torch.tensor([2, 2, 0, 0, 1, 1])
    assert layer.batch_size == 6
    got = feed(layer, *(x[order, 25:] for x in (query, key, value)))
    straight = SelfCacheLayer(config)
    want = feed(straight, query[order], key[order], value[order], 3)[:, 25:]
    assert torch.equal(got, want)
    assert torch.equal(layer.cursor, straight.cursor) and torch.equal(layer.keys, straight.keys)


def test_reordering_to_the_same_order_copies_nothing():
    layer = SelfCacheLayer()
    feed(layer, *tokens(3, 5))
    before = layer.key_slots.data_ptr()
    layer.reorder_cache(torch.arange(3))
    assert layer.key_slots.data_ptr() == before


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 2])])
def test_crop_without_eviction(padding):
    query, key, value = tokens(2, 30)
    layer = SelfCacheLayer(padding=padding)
    feed(layer, query, key, value, 4, 20)
    crop(layer, 6)
    crop(layer, 0)
    assert layer.get_seq_length() == 14
    got = feed(layer, *(x[:, 14:] for x in (query, key, value)))
    torch.testing.assert_close(got, full_attention(query, key, value, padding)[:, 14:])


@pytest.mark.parametrize("policy", POLICIES)
def test_guesses_taken_back_leave_the_evicted_ones_in_place(policy):
    """A pass over an assistant's guesses evicts nothing until it is known which of them stay."""
    config = EvictionConfig(policy, recent=6, heavy=6)
    query, key, value = tokens(2, 40)
    wrong = tokens(2, 40, seed=1)
    layer, straight = SelfCacheLayer(config), SelfCacheLayer(config)
    feed(layer, query, key, value, 3, 20)
    feed(straight, query, key, value, 3, 20)
    before = held(layer)
    attend(layer, *wrong, 20, 24)
    crop(layer, 4)
    assert held(layer) == before
    got = attend(layer, query, key, value, 20, 21)[0]
    want = attend(straight, query, key, value, 20, 21)[0]
    if policy in ("window", "magnitude", random_policy):  # heavy_hitter has seen the attention of the guesses
        torch.testing.assert_close(got, want)
    assert layer.slots == 12 and all(len(p) == 12 for p in held(layer))


def test_full_weights():
    query, key, value = tokens(2, 30)
    padding = torch.tensor([0, 2])
    layer = SelfCacheLayer(EvictionConfig("window", recent=6, heavy=4, pin_prompt=False), padding=padding)
    feed(layer, query, key, value, 4, 29)
    _, weights = attend(layer, query, key, value, 29, 30, want_weights=True)
    full = layer.full_weights(weights)
    assert full.shape == (2, HEADS, 1, 30)
    torch.testing.assert_close(full.sum(-1), torch.ones(2, HEADS, 1))
    assert (full[..., 20:] > 0).all() and (full[..., :20] == 0).all()


@pytest.mark.parametrize("config", [None, EvictionConfig(recent=6, heavy=6)])
def test_copies_are_independent(config):
    query, key, value = tokens(2, 40)
    layer = SelfCacheLayer(config)
    feed(layer, query, key, value, 3, 30)
    rest = [x[:, 30:] for x in (query, key, value)]
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    want = feed(layer, *rest)
    for other in copies:
        assert torch.equal(feed(other, *rest), want)


def test_reset_starts_anew():
    layer = SelfCacheLayer(EvictionConfig(recent=6, heavy=6))
    first = feed(layer, *tokens(2, 40), start=3)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(feed(layer, *tokens(2, 40), start=3), first)


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_and_nan_scores_still_leave_a_slot(policy):
    query, key, value = tokens(2, 40)
    key[0, 10] = torch.nan
    layer = SelfCacheLayer(EvictionConfig(policy, recent=6, heavy=6))
    feed(layer, query, key, value, 3)
    assert all(len(p) == 12 for p in held(layer))
    straight = SelfCacheLayer(EvictionConfig(policy, recent=6, heavy=6))
    feed(straight, query[1:], key[1:], value[1:], 3)
    assert held(straight)[0] == held(layer)[1]  # the other row is as if it were alone


def test_a_policy_of_the_wrong_shape_is_named():
    def lopsided(scores, positions, keys, values):
        return scores[:, :3]

    with pytest.raises(
        ValueError, match=r"lopsided must return a tensor of shape \(2, 12\) \(rows, slots\); got \(2, 3\)"
    ):
        feed(SelfCacheLayer(EvictionConfig(lopsided, recent=6, heavy=6)), *tokens(2, 20), start=3)


def test_the_python_choice_is_the_c_choice():
    """A function that returns what a policy in C would score picks the same slots."""
    query, key, value = tokens(3, 80)
    for name, twin in (
        ("heavy_hitter", lambda scores, positions, keys, values: scores),
        ("window", lambda scores, positions, keys, values: positions),
        ("magnitude", lambda scores, positions, keys, values: -keys.square().sum((1, 3))),
    ):
        layers = [SelfCacheLayer(EvictionConfig(policy, recent=6, heavy=9, decay=0.9)) for policy in (name, twin)]
        outputs = [feed(layer, query, key, value, 4) for layer in layers]
        assert torch.equal(*outputs), name
        assert held(layers[0]) == held(layers[1])


@pytest.mark.parametrize("policy", [None, "heavy_hitter", "magnitude", "window", random_policy])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 3])])
def test_no_step_waits_for_the_device(policy, padding):
    """Tensors without data: to look into one raises, and so does to mix it with one of the CPU."""
    config = policy and EvictionConfig(policy, recent=6, heavy=4, pin_prompt=False)
    query, key, value = (x.to("meta") for x in tokens(2, 100))
    layer = SelfCacheLayer(config)
    feed(layer, query, key, value, 20, 21)
    if padding is not None:
        layer.padding = padding.to("meta")
    for start in range(21, 81, 20):
        feed(layer, *(x[:, start : start + 20] for x in (query, key, value)))
        layer.reorder_cache(torch.tensor([1, 0], device="meta"))
    assert layer.keys.shape == (2, HEADS, 81 if config is None else 10, DIM)


def test_slots_for():
    assert [slots_for(n, 448) for n in (1, 16, 17, 100, 128, 129, 448)] == [16, 16, 32, 112, 128, 192, 448]
    assert [slots_for(n, 448, is_captured=True) for n in (1, 64, 65, 448)] == [64, 64, 128, 448]
    assert [slots_for(n, 90) for n in (3, 80, 81, 200)] == [16, 80, 90, 200]


def test_beams_move_no_slots():
    """They are reordered by a table that all layers share, and what leaves the table behind finds the same tokens."""
    shared, moved = Shared(), Shared()
    by_table = [SelfCacheLayer(shared=shared, index=index) for index in range(2)]
    by_hand = [SelfCacheLayer(padding=torch.zeros(6, dtype=torch.int32), shared=moved) for _ in range(2)]
    query, key, value = tokens(6, 40)
    generator = torch.Generator().manual_seed(5)
    for token in range(40):
        outputs = [attend(layer, query, key, value, token, token + 1)[0] for layer in (*by_table, *by_hand)]
        assert all(torch.equal(output, outputs[0]) for output in outputs[1:])
        if token > 3:
            places = [layer.key_slots.data_ptr() for layer in by_table]
            rows = torch.randint(6, (6,), generator=generator)
            for layer in (*by_table, *by_hand):
                layer.reorder_cache(rows)
            assert places == [layer.key_slots.data_ptr() for layer in by_table]
            assert by_table[0].sources is by_table[1].sources and shared.spare.nbytes == 0 < moved.spare.nbytes
    for ours, theirs in zip(by_table, by_hand):
        assert torch.equal(ours.keys[:], theirs.keys[:]) and torch.equal(ours.values[2], theirs.values[2])
        ours.remove(5), theirs.remove(5)
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor([0, 3, 5]))
        assert torch.equal(ours.keys, theirs.keys) and ours.sources.numel() == 0
        ours.reorder_cache(torch.tensor([1, 1, 0])), theirs.reorder_cache(torch.tensor([1, 1, 0]))
        several = [x[:3, 35:].contiguous() for x in (key, value)]
        got, want = (layer.update(*(x.transpose(1, 2) for x in several)) for layer in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_one_layer_alone_may_be_reordered():
    shared = Shared()
    layers = [SelfCacheLayer(shared=shared, index=index) for index in range(2)]
    query, key, value = tokens(3, 10)
    for layer in layers:
        feed(layer, query, key, value, stop=8)
    rows = torch.tensor([2, 2, 0])
    before = [layer.keys.clone() for layer in layers]
    layers[1].reorder_cache(rows)
    assert torch.equal(layers[0].keys, before[0]) and torch.equal(layers[1].keys, before[1][rows])
    layers[1].reorder_cache(rows)
    layers[0].reorder_cache(rows)
    assert torch.equal(layers[0].keys, before[0][rows]) and torch.equal(layers[1].keys, before[1][rows][rows])


@pytest.mark.parametrize("policy", ["heavy_hitter", "window", "magnitude"])
def test_the_budget_is_taken_as_it_is_needed(policy):
    """Growing to it changes nothing of what is kept."""
    small = SelfCacheLayer(EvictionConfig(policy, recent=30, heavy=20))
    whole = SelfCacheLayer(EvictionConfig(policy, recent=30, heavy=20), shared=Shared(is_captured=True))
    query, key, value = tokens(2, 80)
    sizes = []
    for token in range(80):
        a, b = (attend(layer, query, key, value, token, token + 1)[0] for layer in (small, whole))
        assert torch.equal(a, b)
        sizes.append(small.slots)
    assert sorted(set(sizes)) == [16, 32, 48, 50] and sizes == sorted(sizes) and whole.slots == 50
    assert torch.equal(small.positions, whole.positions) and torch.equal(small.cursor, whole.cursor)
