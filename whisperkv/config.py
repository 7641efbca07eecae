"""What the user chooses. Checked here, before any model is touched."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from ._numpy import POLICIES

MOST = 2**31 - 1  # the kernels count in 32 bits


class _Config:
    _HINT = ""

    def __new__(cls, *args: Any, **given: Any):
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # its heirs are dataclasses
        for name in given:
            if name not in names:
                raise TypeError(f"{cls.__name__} has no {name!r}, it takes {', '.join(names)}{cls._HINT}")
        return super().__new__(cls)

    def _refuse(self, field, allowed):
        raise ValueError(f"{type(self).__name__}.{field} must be {allowed}; got {getattr(self, field)!r}")

    def _check_calibration(self, wanted, why):
        if self.calibration is None:
            if wanted:
                self._refuse("calibration", f"the path of a file that whisperkv.lowrank.calibrate() wrote, as {why}")
            return
        if not isinstance(self.calibration, (str, os.PathLike)):
            self._refuse("calibration", "the path of a file, or None")

    def _is_whole(self, field, least):
        value = getattr(self, field)
        return not isinstance(value, bool) and isinstance(value, Integral) and least <= value <= MOST


@dataclass(frozen=True)
class EvictionConfig(_Config):
    """How many tokens the self-attention cache keeps for each sequence, and which.

    policy      "heavy_hitter": the `recent` newest tokens and those that attention has dwelt on most;
                "magnitude": the newest and those of the smallest key norm;
                "window": the newest only;
                or a function of (scores, positions, keys, values), tensors of one layer with shapes [rows, slots],
                [rows, slots] and [rows, heads, slots, head_dim] twice, that returns one number a slot, [rows, slots].
                The slot of the lowest number is overwritten. `scores` holds the attention received so far;
                or "all": no token is evicted, and recent, heavy and decay are not asked for.
    recent      newest tokens that are never evicted, the one being decoded included; 1 or more.
    heavy       further tokens to keep; 0 or more. recent + heavy slots are all that a sequence ever takes.
    decay       how much of the attention received so far still counts at the next token, above 0 to 1.
    pin_prompt  keep the start tokens and the prompt whatever their score. They take their slots out of the budget.
    keep        of the numbers of a token's keys and values, the share that each layer holds, as one low-rank latent of
                both: up to 0.5, which is all that there is to them, or 1 for keys and values as they are.
    calibration the file that whisperkv.lowrank.calibrate() wrote for this model; needed where keep is below 1.
    """

    policy: str | Callable[..., Any] = "heavy_hitter"
    recent: int = 64
    heavy: int = 32
    decay: float = 0.95
    pin_prompt: bool = True
    keep: float = 1.0
    calibration: str | os.PathLike[str] | None = None

    _HINT = ": recent + heavy are the budget"

    def __post_init__(self) -> None:
        names = [*(name for name, *_ in POLICIES), "all"]
        if self.policy not in names and not callable(self.policy):
            self._refuse("policy", f"one of {', '.join(map(repr, names))}, or a function")
        for field, least in (("recent", 1), ("heavy", 0)):
            if not self._is_whole(field, least):
                self._refuse(field, f"a whole number of tokens, {least} or more and up to {MOST}")
        if self.budget > MOST:
            self._refuse("heavy", f"{MOST - int(self.recent)} or less, as recent + heavy go up to {MOST}")
        if isinstance(self.decay, bool) or not isinstance(self.decay, Real) or not 0 < self.decay <= 1:
            self._refuse("decay", "a number above 0 and up to 1")
        if not isinstance(self.pin_prompt, bool):
            self._refuse("pin_prompt", "True or False")
        is_number = not isinstance(self.keep, bool) and isinstance(self.keep, Real)
        if not is_number or not (0 < self.keep <= 0.5 or self.keep == 1):
            self._refuse(
                "keep", "above 0 and up to 0.5 (keys and values are made of one state, half their size), or 1 for all"
            )
        self._check_calibration(self.is_low_rank, f"keep={self.keep!r} reads one")
        if self.calibration is not None and not self.is_low_rank:
            self._refuse("calibration", f"None where keep is {self.keep!r}, which reads none")
        if self.is_low_rank and self.policy == "magnitude":
            self._refuse("policy", 'another one with keep below 1: "magnitude" looks at keys, which are not there then')

    @property
    def is_low_rank(self) -> bool:
        return self.keep < 1

    @property
    def evicts(self) -> bool:
        return self.policy != "all"

    @property
    def budget(self) -> int:
        """Slots a sequence takes at most."""
        return int(self.recent) + int(self.heavy)

    def check_prompt(self, tokens: int) -> None:
        """Raise if a prompt of so many tokens is pinned and leaves no slot for the transcript."""
        if self.pin_prompt and tokens >= self.budget:
            raise ValueError(
                f"EvictionConfig(recent={self.recent}, heavy={self.heavy}) keeps {self.budget} tokens, which a pinned "
                f"prompt of {tokens} fills: raise heavy to {tokens - self.recent + 1} or more, or set pin_prompt=False"
            )


FORMATS = {"model": 0, "int8": 8, "int4": 4, "latent": 0, "latent_int8": 8, "latent_int4": 4}  # bits of a number
CALIBRATED = {"latent_int4": 4, "latent_int3": 3, "latent_int2": 2}  # and of those with a calibration, on average
TRIMS = ("off", "padding", "silence")


@dataclass(frozen=True)
class CrossConfig(_Config):
    """How the cross-attention cache holds an audio.

    format       "model": keys and values as the model computes them. Lossless;
                 "int8", "int4": the same as codes of so many bits;
                 "latent": the encoder's output, one copy for all layers, of which attention makes what it needs: exact
                 up to rounding, and smaller by twice the number of layers;
                 "latent_int8", "latent_int4": that copy as codes;
                 "latent_int4", "latent_int3", "latent_int2" with a calibration: that copy in a basis where some
                 channels say more than others, as codes that have so many bits on average, the smallest there is.
    trim         "off": all frames are kept;
                 "padding": of the padding after the speech, every 4th frame is kept;
                 "silence": and of the silent stretches inside the audio, every 4th. Energy finds them, or Silero VAD
                 once the processor is passed to whisperkv.listen(). A frame that is kept counts for those that are not.
    merge        of the pairs of neighbouring frames that trim leaves, the share that become one frame each inside the
                 encoder, the most alike first: 0 is none; 0.5 leaves three quarters of the frames, 1 half of them.
    share_beams  rows with the same encoder output (beams, returned sequences) share one cache. Lossless.
    group        frames that share a scale, in the formats of codes: 16, 32, 64, 128 or a multiple of 256. Smaller
                 groups are more exact and larger in memory.
    calibration  the file that whisperkv.lowrank.calibrate() wrote for this model.
    """

    format: str = "model"
    trim: str = "off"
    share_beams: bool = True
    group: int = 256
    merge: float = 0.0
    calibration: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.format not in tuple(FORMATS | CALIBRATED):  # a list, say, is not hashable
            self._refuse("format", f"one of {', '.join(map(repr, FORMATS | CALIBRATED))}")
        if self.trim not in TRIMS:
            self._refuse("trim", f"one of {', '.join(map(repr, TRIMS))}")
        if not isinstance(self.share_beams, bool):
            self._refuse("share_beams", "True or False")
        if not self._is_whole("group", 16) or self.group not in (16, 32, 64, 128) and self.group % 256:
            self._refuse("group", f"16, 32, 64, 128 or a multiple of 256 frames, up to {MOST}")
        if isinstance(self.merge, bool) or not isinstance(self.merge, Real) or not 0 <= self.merge <= 1:
            self._refuse("merge", "a number from 0 to 1")
        self._check_calibration(self.format not in FORMATS, f"{self.format!r} reads one")
        if self.calibration is not None and self.format not in CALIBRATED:
            self._refuse("calibration", f"None for {self.format!r}: {', '.join(map(repr, CALIBRATED))} read one")

    @property
    def is_mixed(self) -> bool:
        """Whether the channels have bits of their own."""
        return self.calibration is not None

    @property
    def keeps_all(self) -> bool:
        """Whether every frame of the encoder has its own place in the cache."""
        return self.trim == "off" and self.merge == 0

    @property
    def is_latent(self) -> bool:
        return self.format.startswith("latent")

    @property
    def bits(self) -> int:
        """Of a number in the cache; 0 if it is not a code."""
        return (FORMATS | CALIBRATED)[self.format]
