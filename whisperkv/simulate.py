"""Eviction tried out on recorded attention weights. NumPy and the C kernels; torch is not needed."""

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _numpy
from .config import EvictionConfig

LIVE, SLOT, SEEN, PINNED = range(4)  # rows of the cursor, as in whisperkv.h
_POLICY = {name: number for number, (name, *_) in enumerate(_numpy.POLICIES)}
_READS_KEYS = {name for name, _, reads_key_norm in _numpy.POLICIES if reads_key_norm}


def simulate_eviction(attention: ArrayLike, config: EvictionConfig, keys: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Which tokens a self-attention cache under `config` would have held at each step: bool [steps, tokens].

    attention  [steps, heads, tokens], what a full cache gave in one layer: step s decodes token tokens - steps + s and
               attends to all up to and including it. The tokens before the first step are the prompt.
    config     an EvictionConfig. A function as its policy is given NumPy arrays, (scores [1, slots],
               positions [1, slots], keys [1, heads, slots, dim] or None, None), and returns one number a slot.
    keys       [tokens, heads, dim], the layer's keys. The policy "magnitude" needs them.

    Row s of the result holds the tokens that step s attended to, its own included. What is left of a step's attention
    is scaled back to a sum of 1, exactly as softmax over the tokens kept would have given it. The prompt's own
    attention is not known: its tokens enter one by one with a score of 0.

        with whisperkv.trace(model) as recorded:
            model.generate(features)
        attention = recorded.attention(layer=0)
        for heavy in (0, 16, 32, 64):
            config = EvictionConfig(recent=32, heavy=heavy)
            share = attention_kept(attention, simulate_eviction(attention, config))
            print(config.budget, share.mean(), share.min())
    """
    if not isinstance(config, EvictionConfig):
        raise TypeError(f"config must be an EvictionConfig, as EvictionConfig(recent=32, heavy=16); got {config!r}")
    attention = _checked_attention(attention)
    steps, heads, tokens = attention.shape
    prompt = tokens - steps
    if not config.evicts:
        return np.arange(tokens) <= prompt + np.arange(steps)[:, None]
    keys = _checked_keys(keys, config.policy, tokens, heads)
    config.check_prompt(prompt)

    own = callable(config.policy)  # a function is given the attention received so far
    policy = _POLICY["heavy_hitter" if own else config.policy]
    slots = min(config.budget, tokens)
    cursor = np.zeros((4, 1), np.int32)
    cursor[PINNED] = prompt if config.pin_prompt else 0
    positions, scores = np.zeros((1, slots), np.int32), np.zeros((1, slots), np.float32)
    slot_keys = np.zeros((1, heads, slots, 1 if keys is None else keys.shape[2]), np.float32)
    kept = np.zeros((steps, tokens), bool)

    for token in range(tokens):
        slot = cursor[SLOT, 0]
        live = max(cursor[LIVE, 0], slot + 1)
        positions[0, slot] = token
        if keys is not None:
            slot_keys[0, :, slot] = keys[token]
        weights = np.zeros((1, heads, 1, slots), np.float32)
        if token >= prompt:
            held = positions[0, :live]
            kept[token - prompt, held] = True
            weights[0, :, 0, :live] = _renormalised(attention[token - prompt][:, held])
        _numpy.score_evict(
            weights, slot_keys, cursor, positions, scores, policy, config.budget, config.recent, config.decay
        )
        if own and live == config.budget:
            worth = config.policy(scores, positions, None if keys is None else slot_keys, None)  # type: ignore[operator]
            cursor[SLOT] = _lowest(_checked_worth(worth, config.policy, live), positions[0], token + 1, prompt, config)
    return kept


def attention_kept(attention: ArrayLike, kept: ArrayLike) -> NDArray[np.float64]:
    """The share of each step's attention that fell on kept tokens, over all heads: [steps].

    attention [steps, heads, tokens] of the full cache, kept [steps, tokens] from simulate_eviction.
    """
    attention, kept = _checked_attention(attention), _array(kept, "kept", "True and False")
    steps, _, tokens = attention.shape
    if kept.dtype != bool or kept.shape != (steps, tokens):
        raise ValueError(f"kept must be bool of shape [{steps}, {tokens}], not {kept.dtype} {list(kept.shape)}")
    total = attention.sum((1, 2), dtype=np.float64)
    return (attention * kept[:, None]).sum((1, 2), dtype=np.float64) / np.where(total > 0, total, 1)


def _renormalised(weights):
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)  # a head that looked only at evicted tokens gives 0 to all


def _lowest(worth, positions, seen, prompt, config):
    """The slot of the next token, as score_evict chooses it for the policies in C."""
    unpinned = positions >= (prompt if config.pin_prompt else 0)
    free = unpinned & (positions <= seen - config.recent)
    if not free.any():
        return np.where(unpinned, positions, np.iinfo(np.int32).max).argmin()
    worth = np.where(free & ~np.isnan(worth), worth, np.inf)
    return np.where(free & (worth == worth.min()), positions, np.iinfo(np.int32).max).argmin()


def _array(values, name, allowed):
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal lengths, tensors that NumPy cannot read
        raise TypeError(f"{name} must be an array of {allowed}; of this {type(values).__name__}: {error}") from error


def _numbers(values, name):
    values = _array(values, name, "real numbers")
    if not np.can_cast(values.dtype, np.float32, "same_kind"):
        raise TypeError(f"{name} must be an array of real numbers; got one of {values.dtype}")
    return values.astype(np.float32)


def _checked_attention(attention):
    attention = _numbers(attention, "attention")
    if attention.ndim != 3 or 0 in attention.shape:
        raise ValueError(f"attention must have shape [steps, heads, tokens], not {list(attention.shape)}")
    steps, _, tokens = attention.shape
    if steps > tokens:
        raise ValueError(f"attention has {steps} steps for {tokens} tokens; there is at most one step a token")
    if not np.isfinite(attention).all() or attention.min() < 0:
        raise ValueError("attention must hold weights of 0 or more; it has NaN, infinite or negative ones")
    later = np.arange(tokens) > tokens - steps + np.arange(steps)[:, None]
    if (attention.max(1) * later).any():
        step, token = np.argwhere(attention.max(1) * later)[0]
        raise ValueError(
            f"attention: step {step} looks at token {token}, but it is the step of token {tokens - steps + step}; "
            "the last step must be that of the last token"
        )
    _warn_of_evicted(attention)
    return attention


def _warn_of_evicted(attention):
    """Softmax gives every token something, so one that no head looks at any more was evicted. What is merely too little
    for float16 comes back."""
    looked_at = (attention > 0).any(1)  # [steps, tokens]
    gone = np.logical_or.accumulate(looked_at) & ~looked_at
    if gone[-1].any() and not (gone[:-1] & looked_at[1:]).any():
        warnings.warn(
            f"attention was recorded while tokens were evicted: {gone[-1].sum()} were looked at, and from some step on "
            "by no head. What a full cache gives cannot be told from it: record with whisperkv.patch(model), without "
            "an EvictionConfig, or unpatched",
            stacklevel=4,
        )


def _checked_keys(keys, policy, tokens, heads):
    if keys is None:
        if policy in _READS_KEYS:
            raise ValueError(f"keys must be given for the policy {policy!r}: an array [{tokens}, {heads}, dim]")
        return None
    keys = _numbers(keys, "keys")
    if keys.ndim != 3 or keys.shape[:2] != (tokens, heads) or not keys.shape[2]:
        raise ValueError(f"keys must have shape [{tokens}, {heads}, dim] to go with attention, not {list(keys.shape)}")
    if not np.isfinite(keys).all():
        raise ValueError("keys must be finite; they hold NaN or infinity")
    return keys


def _checked_worth(worth, policy, slots):
    name = getattr(policy, "__name__", policy)
    worth = _numbers(worth, f"config.policy: what {name} returns")
    if worth.size != slots:
        raise ValueError(
            f"config.policy: {name} must return {slots} numbers, one a slot; got shape {list(worth.shape)}"
        )
    return worth.reshape(slots)
