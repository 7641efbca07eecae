"""One setting on recordings: what it writes, how likely it finds a given text, how long it takes, what it holds."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..features import log_mel
from . import memory
from .decoding import batches, language_options, nats_of_each, nats_of_each_at_once, start_tokens, transcript_tokens
from .hearing import RATE, Audio
from .settings import Setting


@dataclass
class Options:
    """How all settings of a comparison are decoded."""

    language: str | None = None  # None: that of the first window, as the model hears it
    batch: int = 8  # windows together
    beams: int = 1
    most: int | None = None  # tokens a window; None is as many as the model can
    repeat: int = 1  # passes that are timed; their median counts
    threads: int | None = None  # of torch; None leaves them as they are


@dataclass
class Measured:
    """Of one setting, by audio and window. A child process gives it back."""

    setting: Setting
    texts: list[list[str]]
    tokens: list[list[int]]  # of each window, all audios together
    nats: list[list[float]]  # of the given text of each window, by audio
    lengths: list[list[int]]  # tokens of it
    taken: list[float]  # seconds of each pass over all audios
    held: dict[str, float]  # the batch whose caches were largest, see CACHES
    before: int  # bytes that the process held with the model and no more
    peak: int  # at most, while it decoded
    about: dict[str, Any] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)  # British and American, of the model's tokenizer
    note: str = ""

    def __add__(self, more: "Measured") -> "Measured":
        """The same setting on further audios."""
        return replace(
            self,
            texts=self.texts + more.texts,
            tokens=self.tokens + more.tokens,
            nats=self.nats + more.nats,
            lengths=self.lengths + more.lengths,
            taken=[one + other for one, other in zip(self.taken, more.taken)],
            held=larger(self.held, more.held),
            peak=max(self.peak, more.peak),
            note=self.note or more.note,
        )


CACHES = (
    "self_bytes", "self_bytes_transformers", "cross_bytes", "cross_bytes_transformers", "weight_bytes", "evicted",
    "frames_share",
)  # fmt: skip


def language_of(model: Any, processor: Any, audios: Sequence[Audio], language: str | None) -> str:
    """The language that was asked for, or that of the first window."""
    if not model.generation_config.is_multilingual:
        if language not in (None, "en"):
            raise ValueError(f"language must be 'en', as this model knows English alone; got {language!r}")
        return "en"
    if language is not None:
        known = sorted(token[2:-2] for token in model.generation_config.lang_to_id)
        if language not in known:
            raise ValueError(f"language must be one of {', '.join(known)}; got {language!r}")
        return language
    features = log_mel(audios[0].windows[:1], processor).to(model.device, model.dtype)
    with torch.no_grad():
        token = int(model.detect_language(features)[0])
    return next(name[2:-2] for name, each in model.generation_config.lang_to_id.items() if each == token)


def measure(
    model: Any,
    processor: Any,
    audios: Sequence[Audio],
    setting: Setting,
    options: Options,
    given: Sequence[list[int]] | None = None,
    on_window: Callable[[int], None] = lambda windows: None,
) -> Measured:
    """The model with that setting on all audios. It is unpatched afterwards.

    given      tokens of each window, whose likelihood is wanted; None: those that it writes itself
    on_window  told how many windows are done, from time to time; each is decoded 1 + repeat times
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    windows = [window for audio in audios for window in audio.windows]
    if not windows:
        raise ValueError("there is no recording to measure")
    language = language_of(model, processor, audios, options.language)
    groups = batches(sorted(range(len(windows)), key=lambda index: -len(windows[index])), options.batch)
    run = _Run(model, processor, windows, setting, options, language)
    before = memory.held(model.device)
    setting.apply(model)
    try:
        run.decode(groups[0])  # packs the matrices, warms up
        memory.forget(model.device)
        taken = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            for group in groups:
                run.decode(group)
                on_window(len(group))
            _wait(model)
            taken.append(time.perf_counter() - start)
        peak = memory.most(model.device)
        nats = torch.zeros(len(windows), dtype=torch.float64)
        tokens = run.tokens if given is None else list(given)
        for group in groups:
            nats[list(group)] = run.likelihood(group, tokens)
            on_window(len(group))
    finally:
        Setting("", is_patched=False).apply(model)
    ends = torch.tensor([len(audio.windows) for audio in audios]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return Measured(
        setting,
        [run.texts[start:end] for start, end in zip(starts, ends)],
        run.tokens,
        [nats[start:end].tolist() for start, end in zip(starts, ends)],
        [[len(each) for each in tokens[start:end]] for start, end in zip(starts, ends)],
        taken,
        run.held,
        before,
        peak,
        {"language": language, **about(model)},
        getattr(processor.tokenizer, "english_spelling_normalizer", None) or {},
        run.note,
    )


def about(model: Any) -> dict[str, Any]:
    """Where figures come from."""
    import transformers

    import whisperkv

    from .. import ops

    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "isa": ops.ISA,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "whisperkv": whisperkv.__version__,
    }


class _Run:
    def __init__(self, model, processor, windows, setting, options, language):
        self.model, self.processor, self.windows, self.setting = model, processor, windows, setting
        self.start = start_tokens(model, processor, language)
        self.options = {**language_options(model, language), "num_beams": options.beams}
        if options.most is not None:
            self.options["max_new_tokens"] = options.most
        self.texts: list[str] = [""] * len(windows)
        self.tokens: list[list[int]] = [[]] * len(windows)
        self.held: dict[str, float] = {}
        self.note = ""

    def features(self, group):
        """As each makes them: transformers by its extractor, which fills up to 30 s first, whisperkv without."""
        audios = [self.windows[index] for index in group]
        if self.setting.is_patched:
            features = log_mel(audios, self.processor)
        else:
            features = self.processor(audios, sampling_rate=RATE, return_tensors="pt").input_features
        return features.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def decode(self, group):
        found = self.model.generate(self.features(group), **self.options)
        texts = self.processor.batch_decode(found, skip_special_tokens=True)
        for index, row, text in zip(group, found, texts):
            self.texts[index], self.tokens[index] = text.strip(), transcript_tokens(self.model, row)
        held = self._held(len(group), max(len(self.tokens[index]) for index in group) - 1)
        self.held = larger(self.held, held)

    @torch.no_grad()
    def likelihood(self, group, tokens):
        """Nats of each window's given text."""
        way = nats_of_each_at_once if self.setting.eviction is None else nats_of_each
        return way(self.model, self.features(group), [self.start] * len(group), [tokens[index] for index in group])

    def _held(self, audios, tokens):
        if self.setting.is_patched:
            from ..patching import stats

            found = stats(self.model)
            self.note = self.note or found.note
            if found.rows:
                share = found.frames_kept / max(found.audios * found.frames, 1)
                return {**{name: getattr(found, name) for name in CACHES[:-1]}, "frames_share": share}
        config = self.model.config
        token = 2 * config.decoder_layers * config.d_model * self.model.dtype.itemsize
        rows = audios * self.options["num_beams"]
        own = rows * token * (len(self.start) + tokens)
        cross = rows * token * config.max_source_positions
        return dict(zip(CACHES, (own, own, cross, cross, 0, 0, 1.0)))


def larger(one, other):
    """Of two batches' CACHES."""
    return max(filter(None, (one, other)), key=lambda held: held["self_bytes"] + held["cross_bytes"])


def _wait(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
