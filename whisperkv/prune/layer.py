"""A layer of the cache whose audio has been pruned: every head of every row keeps tokens of its own."""

import torch
from transformers.cache_utils import CacheLayerMixin

from .. import compat, ops
from . import in_torch
from .base import places, ranks
from .running import running

FEW, MORE, LONG = 16, 64, 512  # slots for the tokens to come, each time that they run out; more where heads are long


class PrunedLayer(CacheLayerMixin):
    """Keys and values [rows, slots, dim]. Head h of a row has lengths[row, h] of the slots from offsets[row, h] on, the
    oldest first, and room for some more. Lengths that others see count every token that was ever given."""

    is_sliding = False
    is_croppable = True

    def __init__(self, keys, values, offsets, lengths, logical):
        super().__init__()
        self.keys, self.values = keys, values
        self.bias = None  # float32 [rows, slots], added to the logits, or None
        self.scores = None  # float32 [rows, slots], of audio that may still go; inf of all else
        self.heard = 0  # audio tokens that a row was ever given, int64 [rows, 1]
        self.offsets, self.lengths = offsets, lengths  # int32 [rows, kv_heads]
        self.logical = logical
        self.tail = 0  # tokens at the end that crop() may take away
        self.passed = None  # keys and values of the pass, where it holds audio that is to be pruned
        self.spare = 0  # tokens for which every head has room
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    @classmethod
    def gather(cls, keys, values, index, logical):
        """Of keys and values [rows, kv_heads, tokens, dim], the tokens that index [rows, kv_heads, most] names,
        ascending, -1 behind the last."""
        there = index >= 0
        lengths = there.sum(-1, dtype=torch.int32)
        spare = spare_of(lengths)
        offsets, slots = rooms(lengths, spare)
        rows, _, _, dim = keys.shape
        layer = cls(
            keys.new_zeros(rows, slots, dim), values.new_zeros(rows, slots, values.shape[-1]), offsets, lengths, logical
        )
        layer.spare = spare
        gather = ops.gather_kept if ops.prunes(keys) else in_torch.gather_kept
        gather(
            keys, values, index.int(), layer.starts, lengths, layer.keys.view(rows * slots, -1),
            layer.values.view(rows * slots, -1),
        )  # fmt: skip
        return layer

    @property
    def starts(self):
        """int32 [rows, kv_heads]: where each head's slots begin in the flat [rows * slots]."""
        rows, slots = self.keys.shape[:2]
        return self.offsets + torch.arange(0, rows * slots, slots, dtype=torch.int32, device=self.device)[:, None]

    def slots(self, place):
        """Where in the flat [rows * slots] the place-th tokens of each head stand."""
        return self.starts.long()[..., None] + place

    def tokens(self):
        """(places, whether a head has a token there, its slot), [rows, kv_heads, most] each; of what is not there that
        of another."""
        place = torch.arange(int(self.lengths.max()), device=self.device).expand(*self.lengths.shape, -1)
        last = self.lengths.long()[..., None] - 1
        return place, place <= last, self.slots(place.minimum(last).clamp(min=0))

    # What transformers asks of a layer

    def lazy_initialization(self, key_states, value_states): ...

    def update(self, key_states, value_states, *args, **kwargs):
        """Add tokens. What comes back is only they: our attention knows the others."""
        run = running()
        if run is None or not run.attends_to(self):
            raise RuntimeError(
                "the audio in this cache was pruned: call whisperkv.prune.apply(model, ...) to go on with it"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "no gradient can pass through a cache whose audio was pruned: go on under torch.no_grad()"
            )
        queries = key_states.shape[2]
        if queries > self.spare:
            self._grow(queries)
        visible = run.visible_of(queries)
        place = self.lengths.long()[..., None] + torch.arange(queries, device=self.device)
        if visible is None:
            to, added = self.slots(place), queries
            for ours, new in ((self.keys, key_states), (self.values, value_states)):
                ours.view(-1, ours.shape[-1]).index_copy_(0, to.flatten(), new.reshape(-1, new.shape[-1]))
        else:
            there = visible[:, None, :].expand_as(place)
            added = visible.sum(-1, dtype=torch.int32)[:, None]
            to = self.slots(place - (queries - added.long())[..., None])[there]
            for ours, new in ((self.keys, key_states), (self.values, value_states)):
                ours.view(-1, ours.shape[-1])[to] = new[there]
        if run.audio is not None:
            self.passed = key_states, value_states
        self.lengths = self.lengths + added
        self.spare -= queries
        self.logical += queries
        self.tail = self.tail + queries if visible is None else 0
        return key_states, value_states

    def keep(self, place, least=0):
        """Of each head's tokens keep those at these places: int64 [rows, kv_heads, most], ascending, -1 behind.
        Room for `least` tokens to come is made."""
        there = place >= 0
        old, lengths = self.slots(place)[there], there.sum(-1, dtype=torch.int32)
        spare = max(spare_of(lengths), least)
        self.offsets, slots = rooms(lengths, spare)
        rows = self.keys.shape[0]
        held = {name: getattr(self, name) for name in ("keys", "values", "bias", "scores")}
        new = None
        for name, was in held.items():
            if was is None:
                continue
            ours = was.new_full((rows, slots, *was.shape[2:]), torch.inf if name == "scores" else 0)
            setattr(self, name, ours)
            if new is None:
                new = self.slots(torch.arange(place.shape[-1], device=place.device).expand_as(place))[there]
            ours.view(-1, *ours.shape[2:])[new] = was.view(-1, *was.shape[2:])[old]
        self.lengths, self.spare = lengths, spare

    def keep_of_last(self, stays, visible):
        """Of the tokens of the last pass keep some: bool [rows, kv_heads, tokens], and which of them have entered."""
        before = self.lengths.long() - visible.sum(-1)[:, None]
        old = torch.arange(int(before.max()), device=self.device).expand(*before.shape, -1)
        new = (visible.cumsum(-1) - 1)[:, None] + before[..., None]
        kept = torch.cat([old < before[..., None], stays], -1)
        order = places(kept)
        self.keep(torch.cat([old, new], -1).gather(-1, order.clamp(min=0)).masked_fill(order < 0, -1))

    def keep_best(self, scores, visible, counts):
        """Of all audio so far keep that of the highest scores, so many tokens of each row, [rows, 1]. Of the tokens of
        the last pass these are the scores, [rows, kv_heads, tokens], inf of text; `visible` of them have entered.
        How much audio each head now has, [rows, kv_heads]."""
        if self.scores is None:
            self.scores = self.keys.new_full(self.keys.shape[:2], torch.inf, dtype=torch.float32)
        there = visible[:, None].expand_as(scores)
        place = self.lengths.long()[..., None] - visible.sum(-1)[:, None, None] + (visible.cumsum(-1) - 1)[:, None]
        self.scores.view(-1)[self.slots(place)[there]] = scores[there]
        _, filled, slots = self.tokens()
        held = self.scores.view(-1)[slots]
        is_audio = filled & held.isfinite()
        stays = is_audio & (ranks(held.masked_fill(~is_audio, -torch.inf)) < counts[..., None])
        self.keep(places(filled & ~is_audio | stays))
        return stays.sum(-1)

    def _grow(self, queries):
        place, filled, _ = self.tokens()
        self.keep(place.masked_fill(~filled, -1), queries)

    def hold(self, place, kept):
        """Let the tokens at these places, as in keep(), be what a pruner has made of them."""
        there = place >= 0
        to = self.slots(place)[there]
        self.keys.view(-1, self.keys.shape[-1])[to] = kept.keys[there].to(self.keys.dtype)
        self.values.view(-1, self.values.shape[-1])[to] = kept.values[there].to(self.values.dtype)
        if kept.counts is not None:
            if self.bias is None:
                self.bias = torch.zeros(self.keys.shape[:2], device=self.device)
            self.bias.view(-1)[to] = kept.counts[there].float().log()

    def get_seq_length(self):
        return self.logical

    def get_mask_sizes(self, query_length):
        return self.logical + query_length, 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, argument):
        remove = compat.tokens_to_remove(argument, self.logical)
        if remove > self.tail:
            raise ValueError(
                f"{remove} tokens cannot be taken from a cache whose audio was pruned: only the last {self.tail} stand "
                "behind it"
            )
        self.lengths, self.logical = self.lengths - remove, self.logical - remove
        self.tail -= remove
        self.spare += remove

    def _of_rows(self, function):
        self.keys, self.values = function(self.keys), function(self.values)
        self.offsets, self.lengths = function(self.offsets), function(self.lengths)
        self.bias, self.scores = (None if each is None else function(each) for each in (self.bias, self.scores))
        self.heard = function(self.heard) if isinstance(self.heard, torch.Tensor) else self.heard

    def reorder_cache(self, beam_idx):
        self._of_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats):
        self._of_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        self._of_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self):
        """Before the next pass a new layer takes its place."""
        self.keys, self.values, self.bias = (
            None if each is None else each[:, :0] for each in (self.keys, self.values, self.bias)
        )
        self.logical = self.tail = 0

    def offload(self):
        raise NotImplementedError("a cache whose audio was pruned stays where it is: leave out the offloading")

    def bytes_full(self):
        """What transformers would have held."""
        rows, heads = self.lengths.shape
        width = self.keys.shape[-1] + self.values.shape[-1]
        return rows * heads * self.logical * width * self.keys.element_size()

    def bytes(self):
        held = (self.keys, self.values, self.offsets, self.lengths) + tuple(
            each for each in (self.bias, self.scores) if each is not None
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def spare_of(lengths):
    return MORE if lengths.numel() and int(lengths.max()) >= LONG else FEW


def rooms(lengths, spare):
    """Where each head's slots begin, [rows, kv_heads], and how many slots a row has."""
    ends = (lengths.long() + spare).cumsum(-1)
    return (ends - lengths.long() - spare).int(), int(ends[:, -1].max()) if ends.numel() else 0
