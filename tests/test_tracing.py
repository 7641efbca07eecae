"""trace(): what it records is what generate() gives out itself, step by step and row by row."""

import numpy as np
import pytest
import torch

import whisperkv
from whisperkv import EvictionConfig, attention_kept, patch, simulate_eviction, trace, unpatch


def features(rows, seed=1):
    return torch.randn(rows, 8, 100, generator=torch.Generator().manual_seed(seed))


def generated(model, given, **options):
    """(trace, tokens)"""
    with trace(model) as recorded:
        tokens = model.generate(given, **{"max_new_tokens": 20, "min_new_tokens": 20, **options})
    return recorded, tokens


def weights_of(model, tokens, given):
    """What each layer's heads look at, [layers, rows, heads, tokens, tokens], in one pass over them all."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(given, decoder_input_ids=torch.tensor(tokens), output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return torch.stack(output.decoder_attentions).numpy()


@pytest.mark.parametrize("patched", [False, True])
def test_the_weights_of_every_layer_and_row(small, patched):
    if patched:
        patch(small)
    recorded, _ = generated(small, features(3))
    (decode,) = recorded
    assert decode.rows == 3 and decode.layers == 2 and len(recorded) == 1
    unpatch(small)
    right = weights_of(small, [decode.tokens(row) for row in range(3)], features(3))
    for layer in range(2):
        for row in range(3):
            found = decode.attention(layer, row)
            steps, heads, tokens = found.shape
            assert (steps, heads, tokens) == (19, 4, decode.prompt(row) + 19) and found.dtype == np.float32
            assert np.allclose(found, right[layer, row, :, -steps:].transpose(1, 0, 2), atol=2e-3)
            held = decode.kept(layer, row)
            assert (held == np.tri(steps, tokens, tokens - steps, dtype=bool)).all()
    assert (recorded.attention(1, 2) == decode.attention(1, 2)).all() and recorded.tokens(2) == decode.tokens(2)


def test_what_was_set_is_set_again(small):
    patch(small)
    before = small.config._attn_implementation, small.config.output_attentions
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in small.modules()]
    plain = small.generate(features(2), max_new_tokens=10)
    with pytest.raises(ZeroDivisionError), trace(small):
        assert small.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert (small.config._attn_implementation, small.config.output_attentions) == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in small.modules()] == hooks
    recorded, tokens = generated(small, features(2), max_new_tokens=10, min_new_tokens=None)
    assert torch.equal(tokens, plain) and torch.equal(small.generate(features(2), max_new_tokens=10), plain)
    with pytest.raises(TypeError, match="patches"), trace("tiny.en"):
        pass


def test_what_a_patched_model_keeps(small):
    """A window keeps what simulate_eviction() says, in every layer, and its weights are on nothing else."""
    config = EvictionConfig("window", recent=8, heavy=0)
    patch(small, config)
    recorded, _ = generated(small, features(2))
    unpatch(small)
    full, _ = generated(small, features(2))
    for layer in range(2):
        held, weights = recorded.kept(layer, 1), recorded.attention(layer, 1)
        assert (held == simulate_eviction(full.attention(layer, 1), config)).all() and held.sum(1).max() == 8
        assert ((weights > 0).any(1) <= held).all() and np.allclose(weights.sum(-1), 1, atol=1e-5)
    heavy = EvictionConfig(recent=4, heavy=4)
    patch(small, heavy)
    recorded, _ = generated(small, features(1))
    held = recorded.kept(1)
    assert (held.sum(1) <= 8).all() and held[-1].sum() == 8 and held[:, 0].all()
    assert not (held[1:] & ~held[:-1])[:, : held.shape[1] - len(held)].any(), "what was evicted does not come back"


def test_keys_for_magnitude(small):
    recorded, _ = generated(small, features(1))
    keys = recorded.keys(1)
    assert keys.shape == (len(recorded.tokens()), 4, 16)
    config = EvictionConfig("magnitude", recent=4, heavy=4)
    kept = simulate_eviction(recorded.attention(1), config, keys)
    norms = np.square(keys).sum((1, 2))
    old = np.flatnonzero(kept[-1])[:-4]
    gone = np.setdiff1d(np.arange(1, len(norms) - 5), old)
    assert norms[old[old > 0]].max() <= norms[gone].max()
    assert 0 < attention_kept(recorded.attention(1), kept).min() < 1


@pytest.mark.parametrize("patched", [False, True])
def test_beams_are_followed(small, patched):
    """What a row holds is the attention of the very tokens that led to it."""
    if patched:
        patch(small)
    recorded, _ = generated(small, features(2), num_beams=3)
    unpatch(small)
    (decode,) = recorded
    moved = [one for one in decode.passes if one.order is not None and one.order.tolist() != list(range(6))]
    assert decode.rows == 6 and moved
    right = weights_of(small, [decode.tokens(row) for row in range(6)], features(2).repeat_interleave(3, 0))
    for row in range(6):
        found = decode.attention(1, row)
        assert np.allclose(found, right[1, row, :, -len(found) :].transpose(1, 0, 2), atol=2e-3)


def test_padding_on_both_sides(small):
    """A short prompt beside a long one, and rows that end early."""
    prompt = torch.tensor([[0, 0, 3, 7, 9], [3, 5, 7, 9, 11]])
    given = {"decoder_input_ids": prompt, "decoder_attention_mask": (prompt != 0).long()}
    states, tokens = features(2), [21, 33, 2, 2, 2]  # the second goes on
    with trace(small) as recorded, torch.no_grad():
        cache, ids, mask = None, given["decoder_input_ids"], given["decoder_attention_mask"]
        for token in tokens:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = small(
                states, decoder_input_ids=ids, decoder_attention_mask=mask, decoder_position_ids=positions,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, ids = output.past_key_values, torch.tensor([[token], [40 + token]])
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    assert recorded.tokens(0) == [3, 7, 9, 21, 33] and len(recorded.tokens(1)) == 9
    right = weights_of(small, [recorded.tokens(0)], states[:1])
    found = recorded.attention(0, 0)
    assert found.shape == (2, 4, 5) and np.allclose(found, right[0, 0, :, -2:].transpose(1, 0, 2), atol=2e-3)
    assert recorded.kept(0, 0).tolist() == [[True] * 4 + [False], [True] * 5]


def test_tokens_that_are_taken_back(small):
    """As an assistant's are."""
    states, ids = features(1), torch.tensor([[3, 5, 7]])
    with trace(small) as recorded, torch.no_grad():
        cache = small(states, decoder_input_ids=ids, use_cache=True).past_key_values
        small(states, decoder_input_ids=torch.tensor([[9, 11, 13]]), past_key_values=cache)
        cache.crop(-2)
        small(states, decoder_input_ids=torch.tensor([[15]]), past_key_values=cache)
    assert recorded.tokens() == [3, 5, 7, 9, 15] and len(recorded) == 1
    right = weights_of(small, [recorded.tokens()], states)
    assert np.allclose(recorded.attention(1), right[1, 0, :, -2:].transpose(1, 0, 2), atol=2e-3)


def test_bytes_over_time(small):
    patch(small, EvictionConfig(recent=8, heavy=0))
    recorded, _ = generated(small, features(2))
    ours, held = recorded.cache_bytes(), whisperkv.stats(small)
    assert ours[-1].tolist() == [held.self_bytes, held.cross_bytes]
    unpatch(small)
    recorded, _ = generated(small, features(2))
    theirs = recorded.cache_bytes()
    assert theirs.shape == (20, 2) and (np.diff(theirs[:, 0]) == 2 * 2 * 2 * 64 * 4).all()
    assert theirs[-1].tolist() == [held.self_bytes_transformers, held.cross_bytes_transformers]


def test_what_cannot_be_shown(small):
    with trace(small) as recorded:
        pass
    with pytest.raises(ValueError, match="nothing was decoded"):
        recorded.attention()
    recorded, _ = generated(small, features(1), max_new_tokens=1, min_new_tokens=1)
    with pytest.raises(ValueError, match="ended with its prompt"):
        recorded.attention()
    with pytest.raises(IndexError, match="row must be from 0 to 0; got 1"):
        recorded.tokens(1)


def test_each_window_of_real_speech(tiny_en, speech):
    """With real weights, and on: what the README does by hand no more."""
    model, processor = tiny_en
    given = processor(speech[0][: 8 * 16000], sampling_rate=16000, return_tensors="pt").input_features
    try:
        with trace(patch(model)) as recorded:
            model.generate(given, max_new_tokens=24)
            model.generate(given, max_new_tokens=6)
    finally:
        unpatch(model)
    assert [len(decode.passes) for decode in recorded] == [24, 6]
    attention = recorded[0].attention(layer=2)
    assert np.allclose(attention.sum(-1), 1, atol=1e-4)
    shares = [
        attention_kept(attention, simulate_eviction(attention, EvictionConfig(recent=8, heavy=heavy))).mean()
        for heavy in (4, 8, 16)
    ]
    assert 0.3 < shares[0] < shares[1] < shares[2] <= 1
