"""simulate_eviction against a brute-force twin, and against what the ops themselves would have kept."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from whisperkv import EvictionConfig, _numpy, attention_kept, simulate_eviction

POLICIES = [name for name, *_ in _numpy.POLICIES]
HEADS, DIM = 3, 8


def recorded(steps, tokens, seed=0):
    """Random attention of a full cache and the keys behind it."""
    random = np.random.default_rng([seed, steps, tokens])
    weights = np.exp(2 * random.standard_normal((steps, HEADS, tokens)))
    weights *= (np.arange(tokens) <= tokens - steps + np.arange(steps)[:, None])[:, None]
    weights /= weights.sum(-1, keepdims=True)
    return weights.astype(np.float32), random.standard_normal((tokens, HEADS, DIM)).astype(np.float32)


def brute_force(attention, config, keys, worth=None):
    """Lists and dicts; worth(token, score) ranks the tokens if given."""
    steps, _, tokens = attention.shape
    prompt = tokens - steps
    pinned = prompt if config.pin_prompt else 0
    norm = {t: float((keys[t].astype(np.float64) ** 2).sum()) for t in range(tokens)}
    ranks = {
        "heavy_hitter": lambda t, score: score,
        "magnitude": lambda t, score: -norm[t],
        "window": lambda t, score: t,
    }
    worth = worth or ranks[config.policy]
    held, score, kept = [], {}, np.zeros((steps, tokens), bool)
    for token in range(tokens):
        if len(held) == config.budget:
            unpinned = [t for t in held if t >= pinned]
            old = [t for t in unpinned if t <= token - config.recent]
            held.remove(min(old, key=lambda t: (worth(t, score[t]), t)) if old else min(unpinned))
        held.append(token)
        score[token] = 0.0
        if token >= prompt:
            kept[token - prompt, held] = True
            weights = attention[token - prompt].astype(np.float64)
            share = (weights / weights[:, held].sum(-1, keepdims=True)).sum(0)
        for t in held:
            score[t] = config.decay * score[t] + (share[t] if token >= prompt else 0.0)
    return kept


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pin_prompt", [True, False])
@pytest.mark.parametrize(("steps", "tokens"), [(1, 1), (40, 44), (30, 30), (60, 72), (5, 25)])
def test_brute_force_agrees(policy, pin_prompt, steps, tokens):
    attention, keys = recorded(steps, tokens)
    for recent, heavy, decay in ((1, 0, 1.0), (4, 0, 0.98), (4, 6, 0.98), (10, 10, 0.5), (20, 200, 0.98)):
        config = EvictionConfig(policy, recent=recent, heavy=heavy, decay=decay, pin_prompt=pin_prompt)
        if pin_prompt and tokens - steps >= config.budget:
            continue
        kept = simulate_eviction(attention, config, keys)
        np.testing.assert_array_equal(kept, brute_force(attention, config, keys))
        assert kept.dtype == bool and kept.shape == (steps, tokens)
        assert (kept.sum(1) == np.minimum(np.arange(tokens - steps, tokens) + 1, config.budget)).all()
        assert kept[np.arange(steps), np.arange(tokens - steps, tokens)].all()  # a step sees its own token
        assert ((kept[1:] & ~kept[:-1]).sum(1) == 1).all()  # and nothing else that the step before did not


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_what_the_cache_does(policy):
    """Real queries and keys through compact_attention: with the weights of a full cache, the same tokens are kept."""
    random, tokens, prompt, scale = np.random.default_rng(5), 50, 4, DIM**-0.5
    query, key, value = (random.standard_normal((tokens, HEADS, DIM)).astype(np.float32) for _ in range(3))
    logits = np.einsum("qhd,khd->qhk", query.astype(np.float64), key.astype(np.float64)) * scale
    logits[~(np.arange(tokens) <= np.arange(tokens)[:, None])[:, None].repeat(HEADS, 1)] = -np.inf
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention = (attention / attention.sum(-1, keepdims=True))[prompt:]
    config = EvictionConfig(policy, recent=6, heavy=8)
    kept = simulate_eviction(attention, config, key)

    slots = config.budget
    keys, values = (np.zeros((1, HEADS, slots, DIM), np.float32) for _ in range(2))
    cursor, positions = np.array([[0], [0], [0], [prompt]], np.int32), np.zeros((1, slots), np.int32)
    scores = np.zeros((1, slots), np.float32)
    for token in range(tokens):
        new = [x[None, token : token + 1] for x in (query, key, value)]
        _, weights = _numpy.compact_attention(*new, keys, values, cursor, scale, True)
        if token < prompt:
            weights[:] = 0
        number = POLICIES.index(policy)
        _numpy.score_evict(weights, keys, cursor, positions, scores, number, slots, config.recent, config.decay)
        if token >= prompt:
            assert set(np.flatnonzero(kept[token - prompt])) == set(positions[0, : cursor[0, 0]].tolist())


@pytest.mark.parametrize("with_keys", [True, False])
def test_a_function_as_policy(with_keys):
    attention, keys = recorded(30, 33)
    calls = []

    def youngest_even(scores, positions, slot_keys, values):
        assert scores.shape == positions.shape == (1, 10) and values is None
        if with_keys:
            assert slot_keys.shape == (1, HEADS, 10, DIM)
            np.testing.assert_array_equal(slot_keys[0], keys[positions[0]].swapaxes(0, 1))
        else:
            assert slot_keys is None
        calls.append(1)
        return (positions % 2) * 1000.0 - positions

    config = EvictionConfig(youngest_even, recent=4, heavy=6)
    kept = simulate_eviction(attention, config, keys if with_keys else None)
    np.testing.assert_array_equal(
        kept, brute_force(attention, config, keys, worth=lambda t, score: (t % 2) * 1000.0 - t)
    )
    assert len(calls) == 24

    like_heavy_hitter = EvictionConfig(lambda scores, positions, slot_keys, values: scores, recent=4, heavy=6)
    want = simulate_eviction(attention, EvictionConfig(recent=4, heavy=6))
    np.testing.assert_array_equal(simulate_eviction(attention, like_heavy_hitter), want)
    all_nan = EvictionConfig(lambda scores, *_: np.full(scores.shape, np.nan), recent=4, heavy=6)
    want = simulate_eviction(attention, EvictionConfig("window", recent=4, heavy=6))
    np.testing.assert_array_equal(simulate_eviction(attention, all_nan), want)


def test_share_of_attention():
    attention, _ = recorded(40, 44)
    shares = [
        attention_kept(attention, simulate_eviction(attention, EvictionConfig(recent=8, heavy=heavy)))
        for heavy in (0, 16, 100)
    ]
    assert shares[0].shape == (40,)
    assert shares[0].mean() < shares[1].mean() < shares[2].mean()
    np.testing.assert_allclose(shares[2], 1, rtol=1e-6)
    kept = np.zeros((40, 44), bool)
    kept[:, 2:4] = True
    want = attention[:, :, 2:4].sum(-1, dtype=np.float64).mean(1)
    np.testing.assert_allclose(attention_kept(attention, kept), want, rtol=1e-5)


def test_a_head_that_looked_only_at_evicted_tokens():
    attention = np.zeros((20, 2, 20), np.float32)
    attention[:, :, 0] = 1  # only ever at the first token, which a window drops
    kept = simulate_eviction(attention, EvictionConfig("window", recent=4, heavy=0))
    assert kept[-1].tolist() == [False] * 16 + [True] * 4
    assert attention_kept(attention, kept).tolist() == [1.0] * 4 + [0.0] * 16
    assert simulate_eviction(attention, EvictionConfig(recent=3, heavy=1))[
        :, 0
    ].all()  # a heavy hitter, if there is one


def test_torch_is_not_needed():
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import numpy as np
from whisperkv import EvictionConfig, attention_kept, simulate_eviction
attention = np.tril(np.ones((50, 50)))[:, None] / np.arange(1, 51)[:, None, None]
for heavy in (0, 8, 16):
    config = EvictionConfig(recent=16, heavy=heavy)
    print(config.budget, attention_kept(attention, simulate_eviction(attention, config))[-1].round(2))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(_numpy.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines() == ["16 0.32", "24 0.48", "32 0.64"], result.stderr


def test_lists_and_other_dtypes_will_do():
    attention, keys = recorded(10, 12)
    config = EvictionConfig("magnitude", recent=2, heavy=3)
    want = simulate_eviction(attention, config, keys)
    np.testing.assert_array_equal(simulate_eviction(attention.tolist(), config, keys.tolist()), want)
    np.testing.assert_array_equal(
        simulate_eviction(attention.astype(np.float64), config, keys.astype(np.float64)), want
    )


ATTENTION, KEYS = recorded(10, 14)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (r"attention must have shape \[steps, heads, tokens\], not \[3, 14\]", (ATTENTION[0],)),
        (r"attention must have shape .*, not \[0, 3, 14\]", (ATTENTION[:0],)),
        ("attention has 10 steps for 5 tokens", (ATTENTION[:, :, :5],)),
        ("attention must hold weights of 0 or more; it has NaN", (np.where(ATTENTION > 0.5, np.nan, ATTENTION),)),
        ("attention must hold weights of 0 or more", (-ATTENTION,)),
        ("step 0 looks at token 5, but it is the step of token 4; the last step", (np.ones((10, 2, 14)),)),
        (r"keys must be given for the policy 'magnitude': an array \[14, 3, dim\]", (ATTENTION, "magnitude")),
        (
            r"keys must have shape \[14, 3, dim\] to go with attention, not \[13, 3, 8\]",
            (ATTENTION, "magnitude", KEYS[1:]),
        ),
        ("keys must be finite", (ATTENTION, "magnitude", KEYS * np.inf)),
        ("must return 6 numbers, one a slot; got shape .3.", (ATTENTION, lambda *_: [1, 2, 3])),
    ],
)
def test_errors_say_what_is_wrong(text, arguments):
    attention, policy, keys = [*arguments, *["window", None][len(arguments) - 1 :]]
    with pytest.raises(ValueError, match=text):
        simulate_eviction(attention, EvictionConfig(policy, recent=4, heavy=2), keys)


def test_a_pinned_prompt_must_leave_room():
    with pytest.raises(ValueError, match="keeps 4 tokens, which a pinned prompt of 4 fills"):
        simulate_eviction(ATTENTION, EvictionConfig(recent=2, heavy=2))
    assert simulate_eviction(ATTENTION, EvictionConfig(recent=2, heavy=2, pin_prompt=False)).sum() == 40


def test_kept_must_go_with_attention():
    with pytest.raises(ValueError, match=r"kept must be bool of shape \[10, 14\], not float64 \[10, 14\]"):
        attention_kept(ATTENTION, np.ones((10, 14)))
    with pytest.raises(ValueError, match=r"kept must be bool of shape \[10, 14\], not bool \[9, 14\]"):
        attention_kept(ATTENTION, np.ones((9, 14), bool))
