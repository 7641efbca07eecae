"""Which row holds each slot of the self-attention cache: beams trade places by this table, and nothing else moves.

It is for caches without eviction and padding, whose rows all have as many tokens: a slot that has been written is never
written again, so any row may go on reading it.
"""

import torch


def own_rows(rows, slots, device):
    """int32 [rows, slots]: each slot is in its own row."""
    return torch.arange(rows, dtype=torch.int32, device=device)[:, None].repeat(1, slots)


def reordered(sources, rows, live):
    """The table once each row goes on from that of `rows`, of whose slots the first `live` are in use. Those to come
    are a row's own."""
    table = own_rows(len(rows), sources.shape[1], sources.device)
    table[:, :live] = sources[:, :live].index_select(0, rows)
    return table


def gathered(slots, sources):
    """Slots [rows, heads, slots, head_dim] that have moved to their own rows."""
    places = torch.arange(slots.shape[2], device=slots.device)
    return slots.transpose(1, 2)[sources.long(), places].transpose(1, 2)
