"""What a converted model is: plain numbers and names, as they stand in its file."""

from dataclasses import asdict, dataclass, field
from typing import Any

METHODS = ("auto", "separate", "xkv", "joint", "decoupled_rope")
SHARES = ("latents", "bases")
BITS = (8, 4, 3, 2)


@dataclass
class Latents:
    """How one layer holds its tokens.

    kind    "separate": a latent for keys and one for values; "joint": one for both; "shared": one for keys and values
            of all layers of a group
    keys    numbers of a token's latent from which keys are rebuilt
    values  the same of values; where one latent serves both it is counted in each
    group   the layers that share a basis or a token's latent, this one among them
    turned  of each head's rotary pairs those that go on being rotated; None: all that there are
    widths  bits of the code of each number; None: the numbers themselves
    """

    kind: str
    keys: int
    values: int
    group: list[int]
    turned: list[int] | None = None
    widths: list[int] | None = None
    positions_in: int = 0  # the layer of the cache that holds the tokens' positions

    @property
    def width(self) -> int:
        """Numbers of a token's latent; of a group's, where it is shared."""
        return self.keys + self.values if self.kind == "separate" else self.keys

    @property
    def is_shared(self) -> bool:
        return self.kind == "shared"


@dataclass
class LowRank:
    """A conversion: what was asked for, and how each converted layer holds its tokens."""

    architecture: str
    method: str
    ratio: float
    layers: dict[int, Latents]
    share: str = ""
    calibrated: bool = False
    originals: dict[int, dict[str, Any]] | None = field(default=None, repr=False)  # modules that were taken out

    def __repr__(self) -> str:
        codes = {bits for each in self.layers.values() if each.widths for bits in [sum(each.widths) / each.width]}
        parts = [f"{self.architecture}, {self.method!r}"]
        parts += [f"share={self.share!r}"] if self.share else []
        parts += [f"{self.ratio:.3g} times fewer numbers in {len(self.layers)} layers"]
        parts += [f"codes of {max(codes):.3g} bits"] if codes else []
        parts += ["calibrated" if self.calibrated else "not calibrated"]
        parts += ["can be restored"] if self.originals is not None else []
        return f"LowRank({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "method": self.method,
            "ratio": self.ratio,
            "share": self.share,
            "calibrated": self.calibrated,
            "layers": {str(number): asdict(each) for number, each in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "LowRank":
        layers = {int(number): Latents(**each) for number, each in given["layers"].items()}
        return cls(**{**given, "layers": layers})


def record_of(model: Any) -> LowRank:
    """The conversion that a model has been through."""
    record = getattr(model, "lowrank", None)
    if getattr(record, "architecture", None) == "whisper":
        raise ValueError(
            "this is for language models. A Whisper's latents take other settings by restore(model) and "
            "convert_to_mla(model, ...) anew"
        )
    if not isinstance(record, LowRank):
        raise ValueError(f"{type(model).__name__} holds no latents: call whisperkv.lowrank.convert_to_mla(model) first")
    return record
