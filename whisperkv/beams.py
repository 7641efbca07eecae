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


class Tables:
    """All layers of a cache ask for the same change of the same table, one after another: the first one makes it."""

    def __init__(self):
        self._asked, self._made = (), None

    def __reduce__(self):
        return Tables, ()

    def reordered(self, sources, rows, live):
        return self._get(reordered, sources, rows, live)

    def resized(self, sources, slots):
        return self._get(resized, sources, slots)

    def begun(self, rows, slots, live):
        return self._get(begun, rows, slots, live)

    def _get(self, make, *asked):
        asked = (make, *asked)
        if len(asked) != len(self._asked) or not all(map(_is_same, asked, self._asked)):
            self._asked, self._made = asked, make(*asked[1:])
        return self._made


def _is_same(a, b):
    return a is b or (isinstance(a, int) and a == b)


def begun(rows, slots, live):
    """The first table: each row goes on from that of `rows`."""
    return reordered(own_rows(len(rows), slots, rows.device), rows, live)


def resized(sources, slots):
    """The same for more slots, or fewer."""
    table = own_rows(len(sources), slots, sources.device)
    kept = min(slots, sources.shape[1])
    table[:, :kept] = sources[:, :kept]
    return table


def gathered(slots, sources):
    """Slots [rows, heads, slots, head_dim] that have moved to their own rows."""
    places = torch.arange(slots.shape[2], device=slots.device)
    return slots.transpose(1, 2)[sources.long(), places].transpose(1, 2)
