"""The slow, obvious PyTorch version of every op. Every kernel, device and dtype is held against it."""

import torch

LIVE, SLOT, SEEN, PINNED = range(4)  # rows of the cursor, int32 [4, rows]


def heavy_hitter(score, attention, key_norm, position, decay, is_new):
    return decay * score + attention


def magnitude(score, attention, key_norm, position, decay, is_new):
    return -key_norm if is_new else score


def window(score, attention, key_norm, position, decay, is_new):
    return position


POLICIES = [heavy_hitter, magnitude, window]  # the order of WKV_POLICIES


def compact_attention(query, key, value, keys, values, cursor, scale, want_weights):
    """query, key, value: [rows, tokens, heads, dim]; keys, values: [rows, heads, slots, dim], written in place."""
    rows, tokens, heads, dim = query.shape
    slots = keys.shape[2]
    output = torch.zeros_like(query)
    weights = torch.zeros(rows, heads, tokens, slots)
    for row in range(rows):
        live, slot = int(cursor[LIVE, row]), int(cursor[SLOT, row])
        for token in range(tokens):
            if int(cursor[SEEN, row]) + token < 0:
                continue
            keys[row, :, slot] = key[row, token]
            values[row, :, slot] = value[row, token]
            live = max(live, slot + 1)
            logits = torch.einsum("hd,hsd->hs", query[row, token].float() * scale, keys[row, :, :live].float())
            weight = torch.softmax(logits, -1)
            weights[row, :, token, :live] = weight
            output[row, token] = torch.einsum("hs,hsd->hd", weight, values[row, :, :live].float()).to(output.dtype)
            slot += 1
    return output, weights if want_weights else torch.empty(0)


def score_evict(weights, keys, cursor, positions, scores, policy, budget, recent, decay):
    """weights: [rows, heads, tokens, slots]; cursor [4, rows], positions and scores [rows, slots], written in place.
    More than one token must fit the budget, as compact_attention has appended them all."""
    rows, heads, tokens, slots = weights.shape
    for row in range(rows):
        live, slot, seen, pinned = (int(x) for x in cursor[:, row])
        for token in range(tokens):
            if seen >= 0:
                positions[row, slot] = seen
                live = max(live, slot + 1)
                for s in range(live):
                    is_new = s == slot
                    scores[row, s] = POLICIES[policy](
                        0.0 if is_new else float(scores[row, s]),
                        float(weights[row, :, token, s].sum()),
                        float(keys[row, :, s].float().square().sum()) if is_new else 0.0,
                        float(positions[row, s]),
                        decay,
                        is_new,
                    )
            seen += 1
            slot = next_slot(positions[row, :live].tolist(), scores[row, :live].tolist(), seen, pinned, budget, recent)
        cursor[:, row] = torch.tensor([live, slot, seen, pinned], dtype=cursor.dtype)


def next_slot(positions, scores, seen, pinned, budget, recent):
    live = len(positions)
    if live < budget:
        return live
    unpinned = [s for s in range(live) if positions[s] >= pinned]
    evictable = [s for s in unpinned if positions[s] <= seen - recent]
    if evictable:
        numbers = [s for s in evictable if scores[s] == scores[s]] or evictable
        return min(numbers, key=lambda s: (scores[s] if scores[s] == scores[s] else 0.0, positions[s]))
    if unpinned:
        return min(unpinned, key=lambda s: positions[s])
    return max(range(live), key=lambda s: positions[s])
