"""What outlives the workers. It stands alone, so that its process needs no torch."""

from collections import Counter
from collections.abc import Sequence


class Ledger:
    """An actor that knows how often each recording was begun and not ended, as its worker died."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def tries(self, keys: Sequence[str]) -> list[int]:
        return [self._begun[key] for key in keys]

    def begin(self, keys: Sequence[str]) -> None:
        self._begun.update(keys)

    def end(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._begun.pop(key, None)
