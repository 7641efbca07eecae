"""The self-attention cache: a fixed number of slots a row, in which a new token takes the place of the evicted one.

Positions are added to Whisper's embeddings before the cache, so the slots may stand in any order. Nothing is
concatenated or gathered from step to step; only beams, batches that change and rollbacks move tokens about.
"""

from operator import is_

import torch
from transformers.cache_utils import CacheLayerMixin

from . import ops
from .beams import gathered
from .compat import tokens_to_remove
from .evicting import FAR, Evicting
from .graph_memory import apart
from .slots import LIVE, PINNED, SEEN, SLOT, Shared, advance, picked, slots_for
from .views import View

_READS_ATTENTION = {name for name, reads_attention, _ in ops.POLICIES if reads_attention}
_BUFFERS = ("key_slots", "value_slots", "cursor", "positions", "scores")


class SelfCacheLayer(Evicting, CacheLayerMixin):
    """One decoder layer's keys and values.

    key_slots, value_slots  [rows, heads, slots, head_dim]; of low rank [rows, 1, slots, rank] and of no channels
    cursor                  int32 [4, rows]: where each row stands, see whisperkv.h
    sources                 int32 [rows, slots]: the row that holds each slot, see beams.py; empty while that is its own
    positions, scores       [rows, slots] of every token, and what the policy thinks of it; with eviction only
    padding                 int [rows]: left padding of the first pass; None if no row has some
    seen                    tokens that went in, padding included: the logical length
    live                    slots in use, in the row that has most
    low_rank                what a token's keys and values are made of, if latents are held in their place
    home, index             where the buffers of all layers are while graphs are replayed, and which of them this one is
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    max_cache_len = 0  # so generate() in transformers 5.10 never keeps a static cache with our layers for its next call

    def __init__(self, eviction=None, limit=448, padding=None, shared=None, index=0, low_rank=None):
        self.index, self.shared, self.low_rank = index, shared or Shared(), low_rank
        self.eviction, self.limit = eviction, limit
        self.budget = limit if eviction is None else min(eviction.budget, limit)
        # The policy's name in C: a function of the user's is given the attention received so far.
        self.policy = "heavy_hitter" if eviction is None or callable(eviction.policy) else eviction.policy
        self.reads_attention = eviction is not None and self.policy in _READS_ATTENTION
        self.reset()
        self.padding = padding

    def __getstate__(self):
        """Copies and pickles have buffers of their own."""
        return {**vars(self), "home": None, **{name: apart(getattr(self, name)) for name in _BUFFERS}}

    # What attention calls

    def attend(self, query, key, value, scale, want_weights=False):
        """New tokens [rows, tokens, heads, head_dim] enter and attend: output of the same shape, and the weights
        over the slots [rows, heads, tokens, slots] if they are wanted or the policy needs them."""
        tokens, dtype = query.shape[1], query.dtype
        self._make_room(key.transpose(1, 2), tokens, value.shape[-1])
        query, key, value = (tensor.to(self.dtype) for tensor in (query, key, value))  # autocast may come and go
        output, weights = ops.compact_attention(
            query,
            key,
            value,
            self.key_slots,
            self.value_slots,
            self.cursor,
            self.sources,
            scale,
            want_weights or self.reads_attention,
        )
        if self.eviction is None:
            self._advance(tokens)
        else:
            self._evict(weights, tokens)
        self.count(tokens)
        if self.is_ranked and tokens == 1 and self.live == self.budget:
            self._choose()
        return output.to(dtype), weights

    def make_room(self, tokens):
        """Make the slots of the next tokens ready. Several are attended in full: a pass over a prompt, or one that
        checks an assistant's guesses, may leave more than the budget, and the pass after it settles that."""
        if self.eviction is None:
            if self.live + tokens > self.slots:
                self._resize(self._slots_for(self.live + tokens))
            return
        self.views.dismiss()
        if self.slots > self.budget:
            self._settle()
        if tokens > 1 or self.slots < min(self.live + tokens, self.budget):
            self._resize(self._slots_for(self.live + tokens))
            self.cursor[SLOT] = self.cursor[LIVE]

    def count(self, tokens):
        """Bring Python's own numbers up to the cursor. A graph that is replayed moves the cursor alone."""
        self.seen += tokens
        self.live = min(self.live + tokens, self._most(tokens))

    def update(self, key_states, value_states, *args, **kwargs):
        """The interface of transformers: keys and values [rows, heads, tokens, head_dim] in, all of them out."""
        if self.eviction is not None or self.low_rank is not None:
            does = "evicts tokens" if self.low_rank is None else "holds latents"
            raise RuntimeError(
                f"this cache {does}, so only whisperkv's own attention can read it: "
                "patch the model again, or start from a fresh cache"
            )
        tokens, start = key_states.shape[2], self.live
        self._make_room(key_states, tokens)
        self._bring_together()
        if self.padding is not None:
            return self._update_padded(key_states, value_states)
        self.key_slots[:, :, start : start + tokens] = key_states
        self.value_slots[:, :, start : start + tokens] = value_states
        self._advance(tokens)
        self.count(tokens)
        if start == 0:
            return key_states, value_states
        return tuple(slots[:, :, : self.live].to(key_states.dtype) for slots in (self.key_slots, self.value_slots))

    @property
    def is_exact(self):
        """Whether the slots are just the tokens in order, as transformers would hold them."""
        return self.eviction is None and self.padding is None

    def full_weights(self, weights):
        """Weights over slots as weights over all tokens seen: 0 for those evicted and for padding."""
        if self.is_exact:
            return weights[..., : self.seen]
        positions = self._positions() + self._padding()[:, None]  # columns of the full width
        columns = positions.where(self._alive(), self.seen).long()  # dead slots go to one column too many
        rows, heads, tokens, _ = weights.shape
        full = weights.new_zeros(rows, heads, tokens, self.seen + 1)
        full.scatter_(-1, columns[:, None, None, :].expand(weights.shape), weights)
        return full[..., :-1]

    # What transformers calls

    def lazy_initialization(self, key_states, value_states, value_dim=None):
        rows, heads, tokens, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self._slots_for(tokens)
        dims = head_dim, head_dim if value_dim is None else value_dim
        self.key_slots, self.value_slots = (key_states.new_empty(rows, heads, slots, dim) for dim in dims)
        self.cursor = torch.zeros(4, rows, dtype=torch.int32, device=self.device)
        if self.padding is not None:
            self.cursor[SEEN] = -self._padding()
        self.sources = self.cursor.new_empty(0, 0)
        if self.eviction is not None:
            self.positions = torch.zeros(rows, slots, dtype=torch.int32, device=self.device)
            self.scores = torch.zeros(rows, slots, device=self.device)
            self.eviction.check_prompt(tokens - (0 if self.padding is None else int(self.padding.min())))
            if self.eviction.pin_prompt:
                self.cursor[PINNED] = tokens + self.cursor[SEEN]
        self.is_initialized = True
        self._note_slots()

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        if self.padding is not None and self.eviction is None:
            return self.seen + query_length, 0
        return self.live + query_length, self.seen - self.live

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    @property
    def batch_size(self):
        return self.cursor.shape[1] if self.is_initialized else -1

    max_batch_size = batch_size

    def reset(self):
        self.views.dismiss()
        self.key_slots = self.value_slots = self.cursor = self.positions = self.scores = self.padding = None
        self.home = None
        self.seen = self.live = 0
        self.is_initialized = False

    def crop(self, tokens_to_keep_or_remove):
        self.remove(tokens_to_remove(tokens_to_keep_or_remove, self.seen))

    def remove(self, count):
        """Forget the newest tokens."""
        if count == 0 or not self.is_initialized:
            return
        if count == self.seen:
            return self.reset()
        self.views.dismiss()
        self.seen -= count
        self.cursor[SEEN] -= count
        if self.eviction is None:
            self._bring_together()
            self.live -= count
            self.cursor[LIVE] = self.cursor[SLOT] = self.cursor[SEEN].clamp(min=0)
            return
        stays = self._alive() & (self.positions < self.cursor[SEEN, :, None])
        self.cursor[PINNED] = torch.minimum(self.cursor[PINNED], self.cursor[SEEN])
        self._keep(self.positions.masked_fill(~stays, FAR).argsort(dim=-1, stable=True), stays.sum(-1))
        self.live = int(self.cursor[LIVE].max())
        self._choose()

    def reorder_cache(self, beam_idx):
        if not self.is_initialized:
            return
        rows = beam_idx.to(self.device)
        if rows.is_cpu and torch.equal(rows, torch.arange(self.batch_size)):  # elsewhere the host would have to wait
            return
        self.views.dismiss()
        if self.is_home and len(rows) == self.batch_size:
            self.home.reorder_slots(self.index, beam_idx, self.live)
            self._select_padding(rows)
        elif self.is_exact and len(rows) == self.batch_size:
            tables = self.shared.tables  # rows are the same tensor for all layers
            if self.sources.numel() == 0:
                self.sources = tables.begun(rows, self.slots, self.live)
            else:
                self.sources = tables.reordered(self.sources, rows, self.live)
            self._note_slots()
        else:
            self._bring_together()
            self.key_slots = self.shared.spare.reordered(self.key_slots, rows)
            if self.low_rank is None:
                self.value_slots = self.shared.spare.reordered(self.value_slots, rows)
            else:
                self.value_slots = self.value_slots[rows]
            self._select_state(rows)
            self._note_slots()

    def batch_select_indices(self, indices):
        if not self.is_initialized:
            return
        self.views.dismiss()
        self._bring_together()
        rows = torch.arange(self.batch_size, device=self.device)[indices]  # numbers or a mask
        self.key_slots, self.value_slots = self.key_slots[rows], self.value_slots[rows]
        self._select_state(rows)

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self):
        """The slots are written in place where they are: there is nothing to bring back."""

    prefetch = offload

    @property
    def keys(self):
        """[rows, heads, tokens, head_dim] in the order of the transcript; rows that hold less start with zeros."""
        return self._view(0)

    @property
    def values(self):
        return self._view(1)

    # What views.py calls

    @property
    def heads(self):
        return self.key_slots.shape[1] if self.low_rank is None else self.low_rank.up.shape[1]

    @property
    def head_dim(self):
        return self.key_slots.shape[3] if self.low_rank is None else self.low_rank.up.shape[2]

    def floats(self, part, rows, tokens):
        if self.low_rank is not None:
            return self.low_rank.rebuilt(part, self._held(self.key_slots, rows, tokens))
        return self._held((self.key_slots, self.value_slots)[part], rows, tokens)

    def _held(self, slots, rows, tokens):
        if self.sources.numel():
            slots = gathered(slots, self.sources)
        every = rows == tuple(range(self.batch_size))
        if self.is_exact and every:
            held = slots[:, :, :tokens]
            return held if self.home is None else held.clone()  # what is at home is another cache's one day
        rows = torch.tensor(rows, device=self.device)
        if self.is_exact:
            return slots[:, :, :tokens][rows]
        return self._in_order(slots, rows)[:, :, :tokens]

    # What graphs.py calls

    @property
    def buffers(self):
        return self.key_slots, self.value_slots, self.cursor, self.positions, self.scores

    @property
    def joined(self):
        """Weight and bias of the query's, key's and value's projections in one, in a captured step that has them."""
        joined = self.home and self.home.joined
        return joined and joined.of_layer[self.index]

    @property
    def is_home(self):
        """Whether all buffers are where graphs expect them: what changes their shape leaves with a new buffer."""
        return self.home is not None and all(map(is_, self.buffers, self.home.of_layer[self.index]))

    def move_to(self, home):
        """Let the buffers of the home be this layer's."""
        for name, there in zip(_BUFFERS, home.of_layer[self.index]):
            if there is not None:
                there.copy_(getattr(self, name))
            setattr(self, name, there)
        if home.sources is not None:  # one table for all layers
            if self.index == 0:
                home.sources.copy_(self.sources)
            self.sources = home.sources
        self.home = home
        self._note_slots()

    def leave(self):
        for name in _BUFFERS:
            setattr(self, name, apart(getattr(self, name)))
        self.sources = apart(self.sources)
        self.home = None

    # How it works

    @property
    def slots(self):
        return self.key_slots.shape[2]

    @property
    def views(self):
        return self.shared.views

    def _slots_for(self, tokens):
        if self.eviction is not None and self.shared.is_captured:
            return max(self.budget, tokens)
        return slots_for(tokens, self.budget, self.shared.is_captured)

    def _note_slots(self):
        """For stats(), which keep no cache alive."""
        record = self.shared.record
        if record is not None:
            record.slots, record.spare_bytes = self.slots, self.shared.spare.nbytes + self.sources.nbytes

    def _bring_together(self):
        """Every slot into its own row."""
        if self.sources.numel() == 0:
            return
        slots = self.key_slots, self.value_slots
        self.key_slots, self.value_slots = (gathered(each, self.sources).contiguous() for each in slots)
        self.sources = self.sources.new_empty(0, 0)

    def _most(self, tokens):
        """Slots that are in use after a pass over so many tokens, at most."""
        return self.slots if self.eviction is None or tokens > 1 else min(self.budget, self.slots)

    def _padding(self):
        """int32 [rows]: columns of left padding that came before each row's first token."""
        if self.padding is None:
            return torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        return self.padding.to(self.device, torch.int32)

    def _positions(self):
        if self.positions is not None:
            return self.positions
        slots = torch.arange(self.slots, dtype=torch.int32, device=self.device)
        return slots.expand(self.batch_size, -1)

    def _alive(self):
        slots = torch.arange(self.slots, dtype=torch.int32, device=self.device)
        return slots < self.cursor[LIVE, :, None]

    def _make_room(self, key_states, tokens, value_dim=None):
        if self.is_initialized:
            self.make_room(tokens)
        else:
            self.lazy_initialization(key_states, key_states, value_dim)

    def _resize(self, slots):
        """Other buffers of so many slots, with the same tokens in them."""
        used = min(self.live, slots)

        def resized(old, side):
            shape = (*old.shape[:side], slots, *old.shape[side + 1 :])
            new = old.new_zeros(shape)
            new.narrow(side, 0, used).copy_(old.narrow(side, 0, used))
            return new

        if slots != self.slots:
            self.key_slots, self.value_slots = resized(self.key_slots, 2), resized(self.value_slots, 2)
            if self.sources.numel():
                self.sources = self.shared.tables.resized(self.sources, slots)
            if self.eviction is not None:
                self.positions, self.scores = resized(self.positions, 1), resized(self.scores, 1)
            self._note_slots()

    def _advance(self, tokens):
        if self.home is None or not self.home.captures:
            advance(self.cursor, tokens, self.padding is not None)

    def _select_state(self, rows):
        self.cursor = self.cursor[:, rows].contiguous()
        self._select_padding(rows)
        if self.eviction is not None:
            self.positions, self.scores = self.positions[rows], self.scores[rows]

    def _select_padding(self, rows):
        if self.padding is not None:
            self.padding = self.padding[rows.to(self.padding.device)]

    def _view(self, part):
        if not self.is_initialized:
            return None
        return View(self, part, tuple(range(self.batch_size)), self.seen if self.eviction is None else self.live)

    def _in_order(self, slots, rows):
        width = self.seen if self.eviction is None else self.live
        alive = self._alive()[rows]
        order = self._positions()[rows].masked_fill(~alive, -1).argsort(dim=-1, stable=True)  # dead slots first
        order = torch.nn.functional.pad(order, (max(width - order.shape[1], 0), 0))[:, -width:]
        used = torch.arange(width, device=self.device) >= width - self.cursor[LIVE, rows, None]
        return picked(slots[rows], order).masked_fill(~used[:, None, :, None], 0)

    def _update_padded(self, key_states, value_states):
        for row, (_, slot, seen, _) in enumerate(self.cursor.T.tolist()):
            skip = max(-seen, 0)
            count = max(key_states.shape[2] - skip, 0)
            self.key_slots[row, :, slot : slot + count] = key_states[row, :, skip:]
            self.value_slots[row, :, slot : slot + count] = value_states[row, :, skip:]
        self._advance(key_states.shape[2])
        self.count(key_states.shape[2])
        return self.keys, self.values
