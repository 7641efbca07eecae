"""transcribe(): recordings to segments and words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperForConditionalGeneration

from ..config import CrossConfig, EvictionConfig
from ..patching import patch, stats
from .engine import News, run
from .loading import load
from .results import Segment, Transcript
from .settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    Audio = str | PathLike[str] | NDArray[np.floating]

FAST = CrossConfig("latent_int8", trim="padding")


def prepared(
    model: Any = "tiny.en",
    processor: Any = None,
    *,
    device: str | None = None,
    eviction: EvictionConfig | None = None,
    cross: CrossConfig | None = None,
    weights: str | None = None,
    lossless: bool = False,
) -> tuple[Any, Any]:
    """`(model, processor)`, loaded if a name is given, and patched: the keywords of transcribe()."""
    if lossless and (eviction or cross or weights):
        given = next(name for name, one in (("eviction", eviction), ("cross", cross), ("weights", weights)) if one)
        raise ValueError(f"lossless=True is patch(model) and nothing else: leave out {given}")
    is_loaded = not isinstance(model, (str, PathLike))
    if is_loaded and processor is None:
        raise ValueError("processor must be given with a loaded model: WhisperProcessor.from_pretrained(...)")
    if is_loaded and not isinstance(model, WhisperForConditionalGeneration):
        raise TypeError(
            f"model must be a name, a folder, a hub id or a WhisperForConditionalGeneration; got {type(model).__name__}"
        )
    if not is_loaded:
        loaded, its = load(str(model), device)
        model, processor = loaded, processor or its
    if lossless:
        return patch(model), processor
    if is_loaded and not (eviction or cross or weights) and _is_patched(model):
        return model, processor
    is_fast = model.device.type == "cpu" and model.dtype == torch.float32
    return patch(model, eviction, cross or FAST, weights or ("int8" if is_fast else "model")), processor


def _is_patched(model):
    try:
        stats(model)
    except ValueError:
        return False
    return True


class Options(TypedDict, total=False):
    """The keywords of transcribe(), for type checkers."""

    model: Any
    processor: Any
    device: str | None
    eviction: EvictionConfig | None
    cross: CrossConfig | None
    weights: str | None
    lossless: bool
    language: str | None
    task: str
    beam_size: int
    temperature: float | Sequence[float]
    initial_prompt: str | None
    condition_on_previous_text: bool
    word_timestamps: bool
    vad: bool
    batch_size: int
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None
    seed: int
    errors: str


@overload
def transcribe(  # type: ignore[overload-overlap]  # a str is a sequence of str too, and a path here
    audio: Audio, *, stream: Literal[False] = False, **given: Unpack[Options]
) -> Transcript: ...
@overload
def transcribe(  # type: ignore[overload-overlap]
    audio: Audio, *, stream: Literal[True], **given: Unpack[Options]
) -> Iterator[Segment]: ...
@overload
def transcribe(
    audio: Sequence[Audio], *, stream: Literal[False] = False, **given: Unpack[Options]
) -> list[Transcript]: ...
@overload
def transcribe(audio: Iterable[Audio], *, stream: Literal[True], **given: Unpack[Options]) -> Iterator[Transcript]: ...
def transcribe(
    audio: Any,
    *,
    stream: bool = False,
    model: Any = "tiny.en",
    processor: Any = None,
    device: str | None = None,
    eviction: EvictionConfig | None = None,
    cross: CrossConfig | None = None,
    weights: str | None = None,
    lossless: bool = False,
    language: str | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    initial_prompt: str | None = None,
    condition_on_previous_text: bool = False,
    word_timestamps: bool = False,
    vad: bool = True,
    batch_size: int = 8,
    compression_ratio_threshold: float | None = 2.4,
    logprob_threshold: float | None = -1.0,
    no_speech_threshold: float | None = 0.6,
    seed: int = 0,
    errors: str = "raise",
) -> Any:
    """Transcribe one recording or many, of any length.

    audio      a path, "-" for standard input, or an array (float, mono, 16 kHz): returns a Transcript with `segments`,
               `words`, `text` and `language`. A list of them: returns a list; their windows are decoded together.
    stream     give out what is known as soon as it is: an iterator of the segments of one recording; of several, of
               their transcripts as they are done, in any order
    errors     "raise" what is wrong with a recording; "return" a Transcript with its `error` and go on with the others

    model      a name ("tiny.en", "base", "large-v3"), a folder of transformers or faster-whisper, a hub id, or a
               loaded Whisper, with its `processor`. A loaded one stays patched, so that a second call begins at once;
               one that is patched already stays as it is, unless settings are given. unpatch(model) undoes it.
    device     None is a GPU if there is one
    eviction, cross, weights
               as in patch(). None is fast: no eviction, CrossConfig("latent_int8", trim="padding") and, on a CPU,
               "int8"
    lossless   patch(model) alone: the tokens of transformers

    language   "de" or "german"; None: a multilingual model hears it in the first window
    task       "transcribe", or "translate" into English
    beam_size  1 is greedy
    temperature
               at which a window is decoded; where the text repeats itself or the model is unsure, at the next one
    initial_prompt
               text that sets the tone: of every window with vad, of the first one without
    condition_on_previous_text
               without vad: each window continues the text before it
    word_timestamps
               when each word was said
    vad        True: Silero finds the speech, whose windows are decoded together. False: one after another, as Whisper
               was made to: each begins where the phrases of the last one end
    batch_size windows decoded together
    compression_ratio_threshold, logprob_threshold, no_speech_threshold
               when a text repeats itself, is unsure, and is of silence (left out, if it is unsure too); None: never
    seed       of the temperatures above 0
    """
    if errors not in ("raise", "return"):
        raise ValueError(f"errors must be 'raise' or 'return'; got {errors!r}")
    wanted = Settings(
        language, task, beam_size, temperature, initial_prompt, condition_on_previous_text, word_timestamps, vad,
        batch_size, compression_ratio_threshold, logprob_threshold, no_speech_threshold, seed,
    )  # fmt: skip
    is_one = isinstance(audio, (str, PathLike, np.ndarray))
    whisper, its = prepared(
        model, processor, device=device, eviction=eviction, cross=cross, weights=weights, lossless=lossless
    )
    news = run(whisper, its, [audio] if is_one else audio, wanted)
    if is_one and stream:
        return (segment for each in _raised(news, errors) for segment in each.segments)
    done = (each for each in _raised(news, errors) if each.transcript)
    if not is_one and stream:
        return (each.transcript for each in done)
    found = [each.transcript for each in sorted(done, key=lambda each: each.number)]
    return found[0] if is_one else found


def _raised(news: Iterator[News], errors: str) -> Iterator[News]:
    for each in news:
        if errors == "raise" and each.transcript and each.transcript.error:
            raise each.transcript.error
        yield each
