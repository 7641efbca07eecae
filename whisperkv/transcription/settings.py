"""How a recording is to be transcribed. Checked before anything is loaded or read."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class Settings:
    """The keywords of transcribe() that say how to decode; see there."""

    language: str | None = None
    task: str = "transcribe"
    beam_size: int = 1
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    initial_prompt: str | None = None
    condition_on_previous_text: bool = False
    word_timestamps: bool = False
    vad: bool = True
    batch_size: int = 8
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.language is not None:
            code = str(self.language).lower()
            code = TO_LANGUAGE_CODE.get(code, code)
            if code not in LANGUAGES:
                raise ValueError(f"language must be a code or a name, as 'de' or 'german'; got {self.language!r}")
            object.__setattr__(self, "language", code)
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}; got {self.task!r}")
        for name in ("beam_size", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}")
        given = self.temperature
        temperatures = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        if not temperatures or not all(isinstance(one, (int, float)) and 0 <= one <= 2 for one in temperatures):
            raise ValueError(f"temperature must be numbers from 0 to 2, one or several; got {given!r}")
        object.__setattr__(self, "temperature", temperatures)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.temperature  # type: ignore[return-value]  # __post_init__ made it one

    def check_model(self, is_multilingual: bool) -> None:
        """Raise if it cannot do what is asked."""
        if is_multilingual:
            return
        if self.language not in (None, "en"):
            raise ValueError(f"language={self.language!r}: this model knows English alone; choose one without .en")
        if self.task != "transcribe":
            raise ValueError(f"task={self.task!r}: this model only transcribes; choose one without .en")
