"""simulate_eviction against a brute-force twin, and against what the ops themselves would have kept."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from whisperkv import CrossConfig, EvictionConfig, _numpy, attention_kept, simulate_eviction

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


NOT_NUMBERS = {
    "object": np.full((10, 3, 14), None),
    "complex64": ATTENTION.astype(np.complex64),
    "<U4": np.full((10, 3, 14), "0.25"),
    "datetime64": np.zeros((10, 3, 14), "datetime64[s]"),
}


@pytest.mark.parametrize("dtype", NOT_NUMBERS)
def test_what_holds_no_numbers_is_named(dtype):
    config, wrong = EvictionConfig("magnitude", recent=4, heavy=2), NOT_NUMBERS[dtype]
    with pytest.raises(TypeError, match=f"attention must be an array of real numbers; got one of {dtype}"):
        simulate_eviction(wrong, config, KEYS)
    with pytest.raises(TypeError, match=f"attention must be an array of real numbers; got one of {dtype}"):
        attention_kept(wrong, np.ones((10, 14), bool))
    with pytest.raises(TypeError, match=f"keys must be an array of real numbers; got one of {dtype}"):
        simulate_eviction(ATTENTION, config, wrong)
    with pytest.raises(ValueError, match=f"kept must be bool of shape .*, not {dtype}"):
        attention_kept(ATTENTION, wrong)
    config = EvictionConfig(lambda scores, *_: wrong.ravel()[:6], recent=4, heavy=2)
    with pytest.raises(TypeError, match=f"config.policy: what .*lambda.* returns must be .* got one of {dtype}"):
        simulate_eviction(ATTENTION, config)


def test_what_is_no_array_is_named():
    config, ragged = EvictionConfig("magnitude", recent=4, heavy=2), [[[1.0]], [[1.0, 0.5], [0.2]]]
    with pytest.raises(TypeError, match="attention must be an array of real numbers; of this list: "):
        simulate_eviction(ragged, config, KEYS)
    with pytest.raises(TypeError, match="keys must be an array of real numbers; of this list: "):
        simulate_eviction(ATTENTION, config, ragged)
    with pytest.raises(TypeError, match="kept must be an array of True and False; of this list: "):
        attention_kept(ATTENTION, ragged)
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="attention must be an array of real numbers; of this Tensor: .*numpy"):
        simulate_eviction(torch.ones(3, 1, 3, requires_grad=True), config)


@pytest.mark.parametrize("config", [96, "window", {"recent": 4}, CrossConfig(), None, EvictionConfig], ids=repr)
def test_what_is_no_config_is_named(config):
    with pytest.raises(TypeError, match=r"config must be an EvictionConfig, as EvictionConfig\(recent=.*; got"):
        simulate_eviction(ATTENTION, config)


def test_a_recording_of_an_evicting_decode(small):
    """What it gives would be 1.0 for every larger budget, so it is not taken without a word."""
    torch = pytest.importorskip("torch")
    from transformers.generation.utils import GenerationMixin

    from whisperkv import patch

    small.set_attn_implementation("eager")
    audio = torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(3))

    def record():
        options = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_attentions=True)
        steps = [step[1][0, :, 0] for step in GenerationMixin.generate(small, audio, **options).decoder_attentions[1:]]
        tokens = steps[-1].shape[-1]
        return np.stack([np.pad(step, ((0, 0), (0, tokens - step.shape[-1]))) for step in steps])

    config = EvictionConfig(recent=12, heavy=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prepare in (lambda: small, lambda: patch(small)):
            prepare()
            full = record()
            for full in (full, full.astype(np.float16)):  # where some weights are 0 for a while
                assert attention_kept(full, simulate_eviction(full, config)).min() < 0.9
    patch(small, EvictionConfig(recent=8, heavy=4))
    evicting = record()
    evicted = evicting.shape[2] - 12
    text = f"recorded while tokens were evicted: {evicted} were looked at.*patch.model., without an EvictionConfig"
    with pytest.warns(UserWarning, match=text) as seen:
        kept = simulate_eviction(evicting, EvictionConfig("window", recent=40))
    with pytest.warns(UserWarning, match=text):
        assert attention_kept(evicting, kept).min() == 1.0
    assert seen[0].filename == __file__


def test_kept_must_go_with_attention():
    with pytest.raises(ValueError, match=r"kept must be bool of shape \[10, 14\], not float64 \[10, 14\]"):
        attention_kept(ATTENTION, np.ones((10, 14)))
    with pytest.raises(ValueError, match=r"kept must be bool of shape \[10, 14\], not bool \[9, 14\]"):
        attention_kept(ATTENTION, np.ones((9, 14), bool))
