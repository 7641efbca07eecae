"""What a decode put into its caches: plain numbers, so that looking at them keeps no cache alive."""

from dataclasses import dataclass

from .config import EvictionConfig


@dataclass(frozen=True)
class Stats:
    """The caches of one decode, in bytes, beside what transformers would have held. str() of it is a small table."""

    rows: int = 0  # sequences decoded together, beams included
    tokens: int = 0  # length of the longest, prompt included
    audios: int = 0  # that they decode
    frames: int = 0  # that the encoder gives for each
    frames_kept: int = 0  # of those of all audios together
    evicted: int = 0  # tokens that each layer has evicted, over all rows
    self_bytes: int = 0
    self_bytes_transformers: int = 0
    cross_bytes: int = 0
    cross_bytes_transformers: int = 0
    weight_bytes: int = 0  # of packed copies of matrices, beside the model's own
    decodes: int = 0  # caches filled since patch(): one for each chunk of long audio and each attempt at it
    note: str = ""  # why the last decode was left to transformers, if it was

    def __str__(self):
        kept = f"{self.frames_kept} of {self.audios * self.frames} frames kept"
        lines = [f"{self.rows} rows of {self.audios} audios, {self.tokens} tokens, {self.evicted} evicted, {kept}"]
        for name, ours, theirs in (
            ("self-attention", self.self_bytes, self.self_bytes_transformers),
            ("cross-attention", self.cross_bytes, self.cross_bytes_transformers),
        ):
            ratio = f" ({ours / theirs:.2f}x)" if theirs else ""
            lines.append(f"{name:<16} {ours / 1e6:10.2f} MB   transformers {theirs / 1e6:10.2f} MB{ratio}")
        if self.weight_bytes:
            lines.append(f"{'packed weights':<16} {self.weight_bytes / 1e6:10.2f} MB")
        return "\n".join(lines + ([self.note] if self.note else []))


@dataclass
class DecodeRecord:
    """Of one cache, kept by its layers and brought up to date before each pass of the decoder."""

    layers: int
    width: int  # heads * head_dim
    item_size: int
    rows: int
    padding: int  # left padding, over all rows
    frames: int
    eviction: EvictionConfig | None
    rank: int | None = None  # numbers of a token in a layer, if they are not all
    audios: int = 0
    frames_kept: int = 0
    cross_bytes: int = 0
    tokens: int = 0
    slots: int = 0  # that each row has
    spare_bytes: int = 0  # what reordering beams takes beside them

    def stats(self, decodes, note) -> Stats:
        token = 2 * self.layers * self.rows * self.width * self.item_size  # keys and values
        ours = token if self.rank is None else self.layers * self.rows * self.rank * self.item_size
        state, evicted = 4 * 4 * self.rows, 0  # the cursor
        if self.eviction is not None:
            state += 2 * 4 * self.slots * self.rows  # positions and scores
            held = max(self.eviction.budget, self.slots)  # more than the budget until the pass after a long prompt
            evicted = max(self.rows * (self.tokens - held) - self.padding, 0)
        return Stats(
            rows=self.rows,
            tokens=self.tokens,
            audios=self.audios,
            frames=self.frames,
            frames_kept=self.frames_kept,
            evicted=evicted,
            self_bytes=ours * self.slots + self.layers * state + self.spare_bytes,
            self_bytes_transformers=token * self.tokens,
            cross_bytes=self.cross_bytes,
            cross_bytes_transformers=token * self.frames,
            decodes=decodes,
            note=note,
        )
