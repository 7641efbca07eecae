"""Which tokens a layer of the self-attention cache forgets, and which slot the next one takes."""

import torch

from . import ops
from .slots import LIVE, PINNED, SEEN, SLOT, picked

FAR = torch.iinfo(torch.int32).max
_POLICY = {name: number for number, (name, *_) in enumerate(ops.POLICIES)}


class Evicting:
    """What SelfCacheLayer does with its slots where its EvictionConfig says so."""

    @property
    def is_ranked(self):
        """Whether a function of the user's says which slot is overwritten next."""
        return self.eviction is not None and callable(self.eviction.policy)

    @property
    def _worth(self):
        """[rows, slots]: the lowest is the first to go."""
        return self._ranking() if self.is_ranked else self.scores

    def _evict(self, weights, tokens):
        eviction = self.eviction
        if weights.dim() < 4:  # neither wanted nor read: of the right shape is enough
            weights = weights.new_zeros(()).expand(len(self.key_slots), self.heads, tokens, self.slots)
        keys = self.key_slots if self.low_rank is None else self.key_slots.expand(-1, self.heads, -1, -1)  # not read
        ops.score_evict(
            weights, keys, self.cursor, self.positions, self.scores,
            _POLICY[self.policy], self._most(tokens), eviction.recent, eviction.decay,
        )  # fmt: skip

    def _ranking(self):
        """What the user's function says each slot is worth: float [rows, slots]."""
        policy = self.eviction.policy
        slots = self.key_slots, self.value_slots
        if self.low_rank is not None:
            slots = (self.low_rank.rebuilt(part, self.key_slots) for part in (0, 1))
        ranking = policy(self.scores, self.positions, *slots)
        if not isinstance(ranking, torch.Tensor) or ranking.shape != self.scores.shape:
            given = tuple(ranking.shape) if isinstance(ranking, torch.Tensor) else type(ranking).__name__
            raise ValueError(
                f"EvictionConfig.policy: {getattr(policy, '__name__', policy)} must return a tensor of shape "
                f"{tuple(self.scores.shape)} (rows, slots); got {given}"
            )
        return ranking.float()

    def _protection(self):
        """[rows, slots]: 3 pinned, 2 among the newest, 1 free to go, 0 dead."""
        newest = self.positions > self.cursor[SEEN, :, None] - self.eviction.recent
        pinned = self.positions < self.cursor[PINNED, :, None]
        return (1 + newest.int()).masked_fill(pinned, 3).masked_fill(~self._alive(), 0)

    def _settle(self):
        """Back to the budget after a pass over several tokens."""
        protection = self._protection()
        worth = self._worth.where(protection == 1, self.positions.float())
        order = worth.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(1, protection.gather(1, order).argsort(dim=-1, descending=True, stable=True))
        kept = order[:, : self.budget]
        alive = protection.gather(1, kept) > 0
        in_order = self.positions.gather(1, kept).masked_fill(~alive, FAR).argsort(dim=-1, stable=True)
        self._keep(kept.gather(1, in_order), alive.sum(-1))
        self.live = min(self.live, self.budget)
        self._resize(self._slots_for(self.live))
        self._choose()

    def _keep(self, order, live):
        """Slots become those listed in order [rows, kept], of which the first `live` [rows] are in use."""
        self.key_slots, self.value_slots = picked(self.key_slots, order), picked(self.value_slots, order)
        self.positions, self.scores = self.positions.gather(1, order), self.scores.gather(1, order)
        self.cursor[LIVE] = live

    def _choose(self):
        """Point each full row at the slot that is worth least, as score_evict does for the policies in C."""
        protection = self._protection()
        unpinned, free = (protection == 1) | (protection == 2), protection == 1
        worth = torch.nan_to_num(self._worth, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        lowest = worth.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
        candidates = (free & (worth == lowest)).where(free.any(-1, keepdim=True), unpinned)
        oldest = self.positions.masked_fill(~candidates, FAR).argmin(-1).int()
        self.cursor[SLOT] = oldest.where(self.cursor[LIVE] >= self.budget, self.cursor[LIVE])
