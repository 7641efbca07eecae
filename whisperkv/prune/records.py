"""What a prompt's pruning left, in plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PruneStats:
    """The cache of the last prompt that held audio. str() of it is a small table."""

    rows: int = 0  # sequences, beams included
    tokens: int = 0  # of the longest row's prompt, padding left out
    audio_tokens: int = 0  # of the row that has most
    kept: tuple[tuple[float, ...], ...] = ()  # audio tokens a row keeps, of each layer and head of keys and values
    bytes: int = 0  # keys and values of the prompt
    bytes_full: int = 0  # what transformers would have held
    prompts: int = 0  # pruned since apply()
    note: str = ""  # why the last prompt was left as it was, if it was

    def __str__(self):
        kept = [value for layer in self.kept for value in layer]
        lines = [f"{self.rows} rows of {self.tokens} tokens, {self.audio_tokens} of them audio"]
        if kept:
            lines.append(
                f"audio tokens kept a head: {sum(kept) / len(kept):.1f} ({min(kept):.1f} to {max(kept):.1f}) in "
                f"{len(self.kept)} layers"
            )
            lines.append(
                f"cache {self.bytes / 1e6:.2f} MB, transformers {self.bytes_full / 1e6:.2f} MB "
                f"({self.bytes / self.bytes_full:.2f}x)"
            )
        return "\n".join(lines + ([self.note] if self.note else []))
