"""Settings side by side on the same recordings, the unpatched model first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from .children import Job, apart
from .hearing import Audio
from .measuring import Options, measure
from .metrics import normalizer
from .results import Result, norm_name, result
from .settings import UNPATCHED, Setting, parsed


def compare(
    model: str | tuple[Any, Any],
    audios: Sequence[Audio],
    settings: Sequence[str | Setting] = ("lossless", "fastest", "smallest"),
    options: Options | None = None,
    on_setting: Callable[[str], None] = lambda name: None,
    on_window: Callable[[int], None] = lambda windows: None,
    device: str = "cpu",
) -> list[Result]:
    """The unpatched model and each setting on the same recordings.

    model       a name, folder or hub's id: each setting is then measured in a process of its own, so that its memory is
                its own. Or (model, processor) that are loaded: everything happens here
    audios      heard(read(data))
    settings    texts as `fastest` or "weights=int8,recent=64,heavy=32", or Settings
    on_setting  told the name of what comes next
    on_window   told how many windows are done
    """
    return list(compare_each(model, audios, settings, options, on_setting, on_window, device))


def compare_each(
    model: str | tuple[Any, Any],
    audios: Sequence[Audio],
    settings: Sequence[str | Setting] = ("lossless", "fastest", "smallest"),
    options: Options | None = None,
    on_setting: Callable[[str], None] = lambda name: None,
    on_window: Callable[[int], None] = lambda windows: None,
    device: str = "cpu",
) -> Iterator[Result]:
    """The same, each Result as soon as it is there."""
    chosen = [parsed(each) if isinstance(each, str) else each for each in settings]
    names = [each.name for each in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"setting {twice!r} is named twice: name each once")
    first = parsed(UNPATCHED)
    chosen = [first, *(each for each in chosen if each.is_patched)]
    options = options or Options()
    if not audios:
        raise ValueError("there is no recording to compare on")
    known, baseline = [audio for audio in audios if audio.text], None
    for setting in chosen:
        on_setting(setting.name)
        given = baseline.tokens if baseline else None
        if isinstance(model, str):
            measured = apart(Job(model, device, list(audios), setting, options, given), on_window)
        else:
            measured = measure(*model, audios, setting, options, given, on_window)
        baseline = baseline or measured
        language = baseline.about["language"]
        options = replace(options, language=language)  # found once, for all
        normalize = normalizer(language, measured.spellings)
        if known and not any(normalize(audio.text).split() for audio in known):
            raise ValueError("no reference has a word left after Whisper's normalizer: nothing can be compared")
        norm = norm_name(language, measured.spellings)
        yield result(measured, baseline, audios, options, name_of(model), normalize, norm)


def name_of(model: str | tuple[Any, Any]) -> str:
    """A model's name in signatures."""
    if isinstance(model, str):
        return model
    whisper, _ = model
    return whisper.name_or_path or type(whisper).__name__
