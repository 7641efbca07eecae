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


def compact_attention(query, key, value, keys, values, cursor, sources, scale, want_weights):
    """query, key, value: [rows, tokens, heads, dim]; keys, values: [rows, heads, slots, dim], written in place. Slot s
    of row r is read from row sources[r, s]; of an empty table, from its own. Of latents there are no values, and heads
    share those of a KV head."""
    rows, tokens, heads, dim = query.shape
    slots = keys.shape[2]
    output = torch.zeros_like(query)
    weights = torch.zeros(rows, heads, tokens, slots)
    for row in range(rows):
        live, slot = int(cursor[LIVE, row]), int(cursor[SLOT, row])
        source = sources[row].long() if sources.numel() else torch.full((slots,), row)
        for token in range(tokens):
            if int(cursor[SEEN, row]) + token < 0:
                continue
            keys[row, :, slot] = key[row, token]
            if values.numel():
                values[row, :, slot] = value[row, token]
            source[slot] = row
            live = max(live, slot + 1)
            held = (keys, values if values.numel() else keys)
            its_keys, its_values = (x[source[:live], :, torch.arange(live)].float() for x in held)
            its_keys, its_values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (its_keys, its_values))
            logits = torch.einsum("hd,shd->hs", query[row, token].float() * scale, its_keys)
            weight = torch.softmax(logits, -1)
            weights[row, :, token, :live] = weight
            output[row, token] = torch.einsum("hs,shd->hd", weight, its_values).to(output.dtype)
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


# Cross-attention: one cache for each audio, of floats or of codes

TILE, CHANNELS = 16, 32  # frames side by side; packed channels are padded to a multiple of this


def pack_frames(states, lengths, bits, group):
    """states: [audios, frames, heads, dim]. Codes [audios, heads, tiles, 2 * bits, channels] as bytes, and scales
    [audios, heads, groups, 2, channels]: step, least. An infinity or NaN makes the step of its channel and group NaN.
    """
    audios, frames, heads, dim = states.shape
    levels, channels = 2**bits - 1, -(-dim // CHANNELS) * CHANNELS
    codes = torch.zeros(audios, heads, -(-frames // TILE) * TILE, channels, dtype=torch.uint8)
    scales = torch.zeros(audios, heads, -(-frames // group), 2, channels)
    for audio, length in enumerate(lengths.tolist()):
        for first in range(0, length, group):
            some = slice(first, min(first + group, length))
            x = states[audio, some].float().transpose(0, 1)  # [heads, some, dim]
            low = x.amin(1)
            step = (x.amax(1) - low) * (1 / levels)
            step[~x.isfinite().all(1)] = torch.nan
            inverse = torch.where(step > 0, 1 / step, 0)
            code = ((x - low[:, None]) * inverse[:, None]).nan_to_num(0).clamp(0, levels)
            codes[audio, :, some, :dim] = (code + 0.5).to(torch.uint8)
            scales[audio, :, first // group, 0, :dim], scales[audio, :, first // group, 1, :dim] = step, low
    pieces = codes.view(audios, heads, -1, TILE, channels // 4, 4).transpose(3, 4)  # 16 frames of 4 channels
    if bits == 4:
        pieces = pieces[:, :, :, 0::2] | pieces[:, :, :, 1::2] << 4
    return pieces.reshape(audios, heads, -1, 2 * bits, channels), scales


def unpack_codes(codes, frames):
    """uint8 [audios, heads, frames, channels]"""
    audios, heads, tiles, strip, channels = codes.shape
    if strip == 16:
        pieces = codes.view(audios, heads, tiles, channels // 4, TILE, 4)
    else:
        both = codes.view(audios, heads, tiles, channels // 8, TILE, 4)
        pieces = torch.stack([both & 15, both >> 4], 4).flatten(3, 4)
    return pieces.transpose(3, 4).reshape(audios, heads, tiles * TILE, channels)[:, :, :frames]


def of_frames(scales, frames, group):
    """step and least of each frame, [audios, heads, frames, channels]"""
    return scales.repeat_interleave(group, 2)[:, :, :frames].unbind(3)


def unpack_frames(codes, scales, frames, group, dim):
    """float32 [audios, heads, frames, dim]"""
    step, low = of_frames(scales, frames, group)
    return (unpack_codes(codes, frames) * step + low)[..., :dim]


def unpack_mixed(codes, bits_of, frames):
    """uint8 [audios, heads, frames, channels], of codes of mixed bits: [audios, heads, tiles, bytes]. The bits of a
    block of 32 channels are planes of 8, 4, 2 and 1 bits, the lowest bits first."""
    blocks, start = [], 0
    for bits in bits_of[::CHANNELS].int().tolist():
        block = torch.zeros(*codes.shape[:3], 8, TILE, 4, dtype=torch.uint8)  # quads of channels
        below = 0
        for plane in (8, 4, 2, 1):
            for piece in range(plane if bits & plane else 0):
                line = codes[..., start : start + 4 * TILE].unflatten(-1, (TILE, 4))
                start += 4 * TILE
                for i in range(8 // plane):
                    block[:, :, :, piece * 8 // plane + i] |= (line >> plane * i & (1 << plane) - 1) << below
            below += plane if bits & plane else 0
        blocks.append(block.transpose(3, 4).flatten(4).flatten(2, 3))
    return torch.cat(blocks, -1)[:, :, :frames]


def read_codes(codes, scales, frames, group, bits=None):
    """Codes less their middle, and for each frame steps, and leasts of the middle: float64
    [audios, heads, frames, channels]. `bits` of each channel, where they are mixed."""
    step, low = of_frames(scales.double(), frames, group)
    middle = 2.0 ** (codes.shape[3] // 2 - 1) if bits is None else 2.0 ** (bits.double() - 1)
    unpacked = unpack_codes(codes, frames) if bits is None else unpack_mixed(codes, bits, frames)
    return unpacked.double() - middle, step, low + middle * step


def read_both(keys, values, key_scales, value_scales, frames, group):
    """The same of keys and of values, which are one where bits are mixed."""
    if keys.dim() == 4:
        return [read_codes(keys, key_scales, frames, group, value_scales)] * 2
    return [read_codes(*each, frames, group) for each in ((keys, key_scales), (values, value_scales))]


def cross_attention(
    query, keys, values, key_scales, value_scales, owner, lengths, bias, counters, frames, group, scale, want_weights
):  # fmt: skip
    """query: [rows, tokens, heads, dim]; keys, values: [audios, heads, frames, dim], or codes. What is packed is
    unpacked, so the kernels, which round queries and weights too, are held to it loosely, and tightly to
    cross_attention_in_bytes. bias: [audios, frames], added to the logits, or empty. Counters are for CUDA alone."""
    rows, tokens, heads, dim = query.shape
    if keys.dtype == torch.uint8:
        both = read_both(keys, values, key_scales, value_scales, frames, group)
        keys, values = ((code * step + low)[..., :dim].float() for code, step, low in both)
    frames = keys.shape[2]
    output, weights = torch.zeros_like(query), torch.zeros(rows, heads, tokens, frames)
    for row, audio in enumerate(owner.tolist()):
        length = int(lengths[audio])
        logits = torch.einsum("thd,hfd->htf", query[row].float() * scale, keys[audio, :, :length].float())
        if bias.numel():
            logits += bias[audio, :length]
        weights[row, :, :, :length] = weight = torch.softmax(logits, -1)
        output[row] = torch.einsum("htf,hfd->thd", weight, values[audio, :, :length].float()).to(output.dtype)
    return output, weights if want_weights else torch.empty(0)


def round_to_bytes(x):
    """Whole numbers within 127 and what one of them is worth, for the last side."""
    unit = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / unit.clamp(min=1e-300)), unit


def cross_attention_in_bytes(
    query, keys, values, key_scales, value_scales, owner, lengths, bias, counters, frames, group, scale, want_weights
):  # fmt: skip
    """The same of a packed cache with the roundings of the kernels, in float64: in each block of frames the query,
    times the steps of the keys, becomes bytes, and so do the weights. Codes count from the middle, which is added
    exactly."""
    dim, block = query.shape[-1], min(group, 256)
    both = read_both(keys, values, key_scales, value_scales, frames, group)
    output, weights = torch.zeros(query.shape, dtype=torch.float64), torch.zeros(*query.shape[:3], frames)
    for row, audio in enumerate(owner.tolist()):
        x, length, parts, mixes = query[row].double() * scale, int(lengths[audio]), [], []
        for first in range(0, length, block):
            some = slice(first, min(first + block, length))
            (k, k_step, k_low), (v, v_step, v_low) = (
                (code[audio, :, some, :dim], step[audio, :, first, :dim], low[audio, :, first, :dim])
                for code, step, low in both
            )
            folded, unit = round_to_bytes(x * k_step)
            offset = (x * k_low).sum(-1, keepdim=True)
            parts.append(offset + unit * torch.einsum("thd,hfd->thf", folded, k))
            if bias.numel():
                parts[-1] += bias[audio, some]
            weight = (parts[-1] - parts[-1].amax(-1, keepdim=True)).exp()
            rounded, unit = round_to_bytes(weight)
            mixed = unit * v_step * torch.einsum("thf,hfd->thd", rounded, v)
            mixes.append((mixed + v_low * weight.sum(-1, keepdim=True), parts[-1].amax(-1)))
        logits = torch.cat(parts, -1)
        weights[row, ..., :length] = logits.softmax(-1)
        top = logits.amax(-1)
        total = (logits - top[..., None]).exp().sum(-1)
        output[row] = sum(mixed * ((its - top).exp() / total)[..., None] for mixed, its in mixes)
    return output.to(query.dtype), weights.transpose(1, 2).contiguous() if want_weights else torch.empty(0)


# The encoder's self-attention

FLOAT32, BFLOAT16, BYTES = range(3)  # how its numbers are multiplied


def rounded(x, precision, side, middle=0):
    """What the products are made of: numbers in bfloat16, or in bytes that share a unit along a side and count from
    the middle."""
    if precision == FLOAT32:
        return x
    if precision == BFLOAT16:
        return x.bfloat16().double()
    unit = (x - middle).abs().amax(side, keepdim=True) / 127
    return torch.where(unit > 0, torch.round((x - middle) / unit) * unit + middle, x)


def encoder_attention(query, key, value, bias, lengths, scale, precision):
    """query, key, value: [audios, frames, heads, dim], in float64 but for the roundings. Weights of frames are not
    rounded here, so the kernels are held to this a little loosely."""
    audios, frames, _, _ = query.shape
    output = torch.zeros(query.shape)
    for audio in range(audios):
        length = int(lengths[audio]) if lengths.numel() else frames
        q, k = (rounded(x[audio, :length].double(), precision, -1) for x in (query, key))
        v = value[audio, :length].double()
        v = rounded(v, precision, 0, (v.amax(0) + v.amin(0)) / 2)
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        logits = logits + bias[audio, :length] if bias.numel() else logits
        output[audio, :length] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).float()
    return output


# How the numbers of a matrix are read
AS_FLOAT32, AS_BFLOAT16, AS_INT8, AS_FINE_INT8 = range(4)


def as_read(x, format, together=1):
    """Rows of numbers as a product of that format sees them; so many together enter the same units again."""
    if format == AS_BFLOAT16:
        return x.bfloat16().float()
    if format == AS_FLOAT32:
        return x
    step = steps_of(x, together) if format == AS_FINE_INT8 else x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, x * 0)


def steps_of(x, together):
    """[rows, 1], when four times the four numbers that hold up the steps most are entered again, for as much less."""
    rows, inputs = x.shape
    whole = torch.nn.functional.pad(x.abs().float(), (0, -inputs % 4 + 4, 0, -rows % together))  # a unit of zeros too
    sizes = whole.view(-1, together, whole.shape[1] // 4, 4).amax(-1)  # [groups, together, units]
    entered = torch.ones_like(sizes[:, :1])
    for _ in range(4):
        top, unit = (sizes / entered).topk(2)
        first, second, unit = top[..., 0], top[..., 1], unit[..., 0]
        times = entered.expand_as(sizes).gather(-1, unit[..., None])[..., 0]
        gain = (1 - torch.maximum(first * times / (times + 1), second) / first).nan_to_num(0)
        gain = ((unit[:, None] == unit[:, :, None]) * gain[:, None]).sum(-1)  # of all rows that this unit holds up
        best = unit.gather(1, gain.argmax(1, keepdim=True))
        entered.scatter_add_(-1, best[..., None], torch.ones_like(best[..., None], dtype=entered.dtype))
    return (sizes / entered).amax(-1).view(-1, 1)[:rows].to(x.dtype) / 127


def linear(x, norm_weight, norm_bias, weight, bias, residual, format, outputs, epsilon, activation):
    """As the op, but the weight is the model's own [outputs, inputs] in every format."""
    x, weight = x.double(), weight.double()
    if norm_weight.numel():
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight.double(), norm_bias.double(), epsilon)
    y = as_read(x, format) @ as_read(weight, format, together=32).T
    if bias.numel():
        y = y + bias
    if activation:
        y = torch.nn.functional.gelu(y)
    if residual.numel():
        y = y + residual[torch.arange(len(y)) % len(residual)]
    return y.float()


# Pruned caches: heads / kv_heads query heads share a KV head, whose kept tokens own a range of slots


def gather_kept(keys, values, index, starts, lengths, kept_keys, kept_values):
    """keys, values: [rows, kv_heads, tokens, dim]; index: [rows, kv_heads, most]; kept_*: [slots, dim], written in
    place."""
    for row, head in torch.cartesian_prod(*map(torch.arange, starts.shape)).tolist():
        start, length = int(starts[row, head]), int(lengths[row, head])
        tokens = index[row, head, :length].long()
        kept_keys[start : start + length] = keys[row, head, tokens]
        kept_values[start : start + length] = values[row, head, tokens]


def ragged_attention(query, keys, values, starts, lengths, bias, scale):
    """query: [rows, heads, queries, dim], the last tokens of what stands in keys, values: [slots, dim]; bias: [slots],
    or empty. [rows, queries, heads, dim]; zeros where nothing is seen."""
    rows, heads, queries, dim = query.shape
    group = heads // starts.shape[1]
    output = torch.zeros(rows, queries, heads, dim, dtype=query.dtype)
    for row, head, j in torch.cartesian_prod(*map(torch.arange, (rows, heads, queries))).tolist():
        start, length = int(starts[row, head // group]), int(lengths[row, head // group])
        slots = slice(start, start + max(length - (queries - 1 - j), 0))
        logits = keys[slots].double() @ query[row, head, j].double() * scale
        logits = logits + bias[slots] if bias.numel() else logits
        output[row, j, head] = (logits.softmax(0) @ values[slots].double()).to(query.dtype)
    return output


def attention_received(query, positions, keys, visible, scale):
    """query: [rows, heads, queries, dim], query j that of token positions[j]; keys: [rows, kv_heads, tokens, dim];
    visible: [rows, tokens]. [rows, kv_heads, tokens]: sums of softmax weights."""
    rows, heads, queries, dim = query.shape
    group = heads // keys.shape[1]
    received = torch.zeros(keys.shape[:3], dtype=torch.float64)
    for row, head, j in torch.cartesian_prod(*map(torch.arange, (rows, heads, queries))).tolist():
        position, its = int(positions[j]), head // group
        seen = visible[row, : position + 1].bool()
        if seen[-1]:
            logits = keys[row, its, : position + 1][seen].double() @ query[row, head, j].double() * scale
            received[row, its, : position + 1][seen] += logits.softmax(0)
    return received.float()


def choose_tokens(scores, added, count):
    """Sorted: NaN first, then from the largest on, of equal ones the first."""
    totals = (scores + added[..., None]).flatten(1)
    order = totals.sort(dim=-1, descending=True, stable=True)  # NaN counts as the largest
    return order.values[:, :count], order.indices[:, :count]


def decoder_step(
    x, sources, owner, lengths, bias, caches, heard, weights, format, heads, hidden, frames, group, is_latent, policy,
    budget, recent, decay, epsilon, scale,
):  # fmt: skip
    """As the op, but the weights are the model's own in every format. x: [rows, width]. Of each layer,
    caches: keys, values, cursor, positions, scores; heard: keys and values of the audio, and their scales; weights:
    weight and bias of fourteen norms and matrices, and after those of all layers of the last norm. Of latents the keys
    are all, and key, value and key_up are what makes them and what is made of them."""
    nothing, counters = torch.empty(0), torch.empty(0, dtype=torch.int32)

    def multiply(y, weight, bias, norm=(nothing, nothing), activation=0):
        return linear(y, *norm, weight, bias, nothing, format, len(weight), epsilon, activation)

    for layer in range(len(caches) // 5):
        keys, values, cursor, positions, scores = caches[5 * layer : 5 * layer + 5]
        parts = weights[28 * layer : 28 * layer + 28]
        norm_self, query, key, value, out, norm_cross, cross_query, cross_key, cross_value, cross_out, *more = zip(
            parts[::2], parts[1::2]
        )
        norm_hidden, first, second, key_up = more
        if values.shape[-1]:
            new = (multiply(x, *each, norm_self).unflatten(1, (1, heads, -1)) for each in (query, key, value))
            mixed, attention = compact_attention(*new, keys, values, cursor, sources, scale, True)
        else:
            latent = multiply(x, *key, norm_self)[:, None, None]
            asked = multiply(x, *query, norm_self).unflatten(1, (heads, -1))
            of_keys, of_values, its_bias = (each.unflatten(0, (heads, -1)) for each in (key_up[0], *value))
            asked = torch.stack([multiply(asked[:, h], of_keys[h], nothing) for h in range(heads)], 1)
            mixed, attention = compact_attention(
                asked[:, None], latent, nothing, keys, values, cursor, sources, scale, True
            )
            mixed = torch.stack([multiply(mixed[:, 0, h], of_values[h], its_bias[h]) for h in range(heads)], 1)
        x = x + multiply(mixed.flatten(1), *out)
        if policy < 0:
            cursor[SEEN] += 1
            cursor[LIVE] = cursor[SLOT] = cursor[SEEN].clamp(min=0)
        else:
            score_evict(attention, keys, cursor, positions, scores, policy, budget, recent, decay)
        if heard:
            audio = *heard[4 * layer : 4 * layer + 4], owner, lengths, bias, counters, frames, group, scale, False
            attend = cross_attention_in_bytes if audio[0].dtype == torch.uint8 else cross_attention
            asked = multiply(x, *cross_query, norm_cross).unflatten(1, (heads, -1))
            if is_latent:
                of_keys, of_values, its_bias = (each.unflatten(0, (heads, -1)) for each in (cross_key[0], *cross_value))
                asked = torch.stack([multiply(asked[:, h], of_keys[h], nothing) for h in range(heads)], 1)
                mixed = attend(asked[:, :, None], *audio)[0][:, :, 0]
                mixed = torch.stack([multiply(mixed[:, h], of_values[h], its_bias[h]) for h in range(heads)], 1)
            else:
                mixed = attend(asked[:, None], *audio)[0]
            x = x + multiply(mixed.flatten(1), *cross_out)
        x = x + multiply(multiply(x, *first, norm_hidden, 1), *second)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], *weights[-2:], epsilon)
