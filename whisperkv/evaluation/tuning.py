"""tune(): the fastest or the smallest setting whose words and likelihood stay within bounds, by successive halving."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .comparing import name_of
from .hearing import Audio
from .measuring import Measured, Options, measure
from .metrics import normalizer
from .results import Result, between, norm_name, result
from .settings import NAMED, UNPATCHED, Setting, made, parsed

GOALS = ("speed", "memory")
EVICTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "heavy_hitter", "recent": 64, "heavy": 32},
    {"policy": "heavy_hitter", "recent": 32, "heavy": 16, "decay": 0.9},
    {"policy": "window", "recent": 64, "heavy": 0},
    {"policy": "window", "recent": 48, "heavy": 0},
    {"policy": "magnitude", "recent": 64, "heavy": 32},
)
AUDIOS: tuple[dict[str, Any], ...] = (
    {},
    {"cross": "latent_int8"},
    {"cross": "int8", "trim": "padding"},
    {"cross": "latent_int8", "trim": "padding"},
    {"cross": "latent_int4", "trim": "padding"},
    {"cross": "latent_int4", "trim": "silence"},
    {"cross": "latent_int8", "trim": "padding", "merge": 0.5},
    {"cross": "latent_int4", "trim": "padding", "merge": 0.5},
    {"cross": "latent_int4", "trim": "silence", "merge": 0.5},
)
WEIGHTS = ("model", "bfloat16", "int8")
LEAST, GROW, STAY = 4, 3, 4  # recordings of the first round; more in each; settings that go on at least
FEW = 10  # recordings from which on an interval says something
UNSEEN = 3  # errors that may yet come where none was seen, at 95 %


@dataclass
class Entry:
    """A setting that was tried, after the last round that it was in."""

    setting: Setting
    result: Result
    audios: int  # that it has heard
    share: float  # of the unpatched model's seconds or bytes


@dataclass
class Tuned:
    """What tune() has found."""

    setting: Setting  # the best that is within the bounds, by the whole of its intervals
    goal: str
    entries: list[Entry]  # the unpatched model first, then all that were tried, the best last
    advice: str = ""  # what more audio might show

    @property
    def python(self) -> str:
        """The line that sets it."""
        return self.setting.python

    @property
    def options(self) -> str | None:
        """Of `whisperkv transcribe`, or None if it has none for some of this."""
        return self.setting.options

    @property
    def finalists(self) -> list[Entry]:
        """Those that have heard all recordings."""
        most = max(entry.audios for entry in self.entries)
        return [entry for entry in self.entries if entry.audios == most]


def candidates(model: Any, count: int, seed: int = 0) -> list[Setting]:
    """So many settings of all policies, budgets, formats, trims, merges and weights; the named ones are among them."""
    named = [parsed(name) for name in NAMED]
    is_plain = model.device.type == "cpu" and str(model.dtype) == "torch.float32"
    found, known = [], {(each.eviction, each.cross, each.weights) for each in named}
    for eviction, audio, weights in product(EVICTIONS, AUDIOS, WEIGHTS if is_plain else WEIGHTS[:1]):
        setting = made("", weights, **eviction, **audio)
        if (setting.eviction, setting.cross, setting.weights) not in known:
            found.append(made(setting.text, weights, **eviction, **audio))
    random.Random(seed).shuffle(found)
    usable = [each for each in named if is_plain or each.weights == "model"]
    return [*usable, *found][: max(count, len(usable))]


def rounds(audios: int, settings: int) -> Iterator[tuple[int, int]]:
    """(recordings heard so far, settings that stay) of each round."""
    sizes = [audios]
    while sizes[0] >= LEAST * GROW:
        sizes.insert(0, -(-sizes[0] // GROW))
    for heard in sizes[:-1]:
        settings = max(-(-settings // GROW), STAY)
        yield heard, settings
    yield audios, settings


def tune(
    model: Any,
    processor: Any,
    audios: Sequence[Audio],
    within_wer: float = 0.3,
    within_nll: float = 0.01,
    goal: str = "speed",
    count: int = 48,
    options: Options | None = None,
    name: str = "",
    on_round: Callable[[str, int], None] = lambda name, windows: None,
    on_window: Callable[[int], None] = lambda windows: None,
    on_entry: Callable[[Entry], None] = lambda entry: None,
) -> Tuned:
    """The fastest or the smallest setting on these recordings.

    within_wer  points of word error rate beyond the unpatched model's that are borne
    within_nll  nats a token beyond the unpatched model's that are borne
    goal        "speed": the least time; "memory": the fewest bytes of both caches and of packed weights
    name        of the model, for the signatures
    count       settings that are tried; many on few recordings first, then few on many
    on_round    told what comes next, and how many windows that is; on_window how many are done
    on_entry    told of each setting, as soon as it is measured on the recordings of a round

    A setting counts as within a bound if the whole 95 % interval of its difference is: little audio proves little.
    Where no word has changed, three may yet, so that a bound of 0.3 points takes 1000 words at least.
    """
    if goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}; got {goal!r}")
    for field, bound in (("within_wer", within_wer), ("within_nll", within_nll)):
        if not (isinstance(bound, (int, float)) and bound >= 0):
            raise ValueError(f"{field} must be a number of 0 or more; got {bound!r}")
    if count < 1:
        raise ValueError(f"count must be 1 or more; got {count!r}")
    audios = units_of(audios)
    random.Random(0).shuffle(audios)
    options, name = options or Options(), name or name_of((model, processor))
    unpatched, alive = parsed(UNPATCHED), candidates(model, count)
    settings = {each.name: each for each in [unpatched, *alive]}
    so_far: dict[str, Measured] = {}
    entries: dict[str, Entry] = {}
    begun, plan = 0, list(rounds(len(audios), len(alive)))
    for number, (heard, stay) in enumerate(plan, 1):
        fresh = audios[begun:heard]
        windows = sum(len(each.windows) for each in fresh)
        given = None
        on_round(f"round {number} of {len(plan)}: {len(alive)} settings", 2 * windows * (1 + len(alive)))
        for setting in [unpatched, *alive]:
            measured = measure(model, processor, fresh, setting, options, given, on_window)
            given = measured.tokens if given is None else given
            options = replace(options, language=measured.about["language"])  # found once, for all
            before = so_far.get(setting.name)
            so_far[setting.name] = measured if before is None else before + measured
            entries[setting.name] = _entry(setting, so_far, audios[:heard], options, goal, name)
            on_entry(entries[setting.name])
        begun = heard
        possible = [each for each in alive if not _is_out(entries[each.name].result, within_wer, within_nll)]
        possible.sort(key=lambda each: _rank(entries[each.name], within_wer, within_nll))
        if number < len(plan):
            kept = possible[:stay]
            sure = next(each for each in alive if each.name == "lossless")
            alive = [*kept, *([] if sure in kept else [sure])]
    finalists = [entries[each.name] for each in alive]  # all recordings heard
    proven = [each for each in finalists if _is_within(each.result, within_wer, within_nll)]
    best = min(proven, key=lambda each: each.share, default=entries["lossless"])
    advice = _advice(finalists, best, within_wer, within_nll, len(audios))
    order = sorted(entries.values(), key=lambda each: (each.setting.is_patched, each.audios, -each.share))
    return Tuned(settings[best.setting.name], goal, order, advice)


def units_of(audios: Sequence[Audio]) -> list[Audio]:
    """What intervals are drawn over: recordings, or their windows where there are no references."""
    if any(audio.text for audio in audios):
        return list(audios)
    return [
        Audio(f"{audio.name}, window {number}", "", [window])
        for audio in audios
        for number, window in enumerate(audio.windows, 1)
    ]


def _entry(setting, so_far, audios, options, goal, model):
    measured, baseline = so_far[setting.name], so_far[UNPATCHED]
    language, spellings = measured.about["language"], measured.spellings
    normalize, norm = normalizer(language, spellings), norm_name(language, spellings)
    found = result(measured, baseline, audios, options, model, normalize, norm)
    return Entry(setting, found, len(audios), _cost(measured, goal) / _cost(baseline, goal))


def _cost(measured, goal):
    if goal == "speed":
        return measured.taken[0]
    return sum(measured.held[name] for name in ("self_bytes", "cross_bytes", "weight_bytes"))


def _differences(result, within_wer, within_nll):
    """(difference, interval, bound) of what is known."""
    found = [(result.nll_difference, result.nll_difference_interval, within_nll)]
    if result.wer_difference is not None:
        edges = result.wer_difference_interval
        if edges is not None:
            edges = edges[0], max(edges[1], 100 * UNSEEN / result.words)
        found.append((result.wer_difference, edges, within_wer))
    return found


def _is_out(result, *bounds):
    """Whether it is surely beyond a bound."""
    return any(edges is not None and edges[0] > bound for _, edges, bound in _differences(result, *bounds))


def _is_within(result, *bounds):
    """Whether it is surely within all. What changed nothing at all is, however little audio there was."""
    if result.setting == "lossless":
        return True
    enough = result.audios >= FEW
    return enough and all(edges is not None and edges[1] <= bound for _, edges, bound in _differences(result, *bounds))


def _rank(entry, *bounds):
    beyond = any(value > bound for value, _, bound in _differences(entry.result, *bounds))
    return beyond, entry.share


def _advice(finalists, best, within_wer, within_nll, audios):
    """What may be better, and how much audio would show whether it is."""
    bounds = within_wer, within_nll
    open_ones = [each for each in finalists if each.share < best.share and not _is_out(each.result, *bounds)]
    if not open_ones:
        return ""
    hope = min(open_ones, key=lambda each: (_rank(each, *bounds)[0], each.share))
    needed = [FEW]
    for value, edges, bound in _differences(hope.result, *bounds):
        if edges is not None and edges[0] <= bound < edges[1] and value != bound:
            width = edges[1] - value if value < bound else value - edges[0]
            needed.append(math.ceil(audios * (width / (bound - value)) ** 2))
    wer = between(hope.result.wer_difference, hope.result.wer_difference_interval, "+.2f")
    nll = between(hope.result.nll_difference, hope.result.nll_difference_interval, "+.4f")
    more = f"Some {max(needed)}" if max(needed) > audios else "More"
    return (
        f"{hope.setting.text} takes {hope.share:.3f} of what the unpatched model takes, less still, but {audios} "
        f"recordings are too few to be sure of it: WER {wer or 'unknown'} points, NLL {nll}. {more} would tell."
    )
