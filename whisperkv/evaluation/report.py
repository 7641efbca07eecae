"""One self-contained HTML page of a comparison: a table, charts, and where the words of each recording differ."""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from . import plot
from .results import MARKDOWN, Result, between

TEMPLATE = Path(__file__).parents[1] / "data" / "report.html"
SHOWN = 200  # recordings; those that differ most come first


def write_report(results: Sequence[Result], path: str | PathLike[str], title: str = "Whisper, compared") -> None:
    """The page of what compare() has found, the unpatched model first. It needs no network."""
    if not results:
        raise ValueError("results must hold one at least")
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("jinja2 is not installed: pip install whisperkv[cli]") from error
    first, *others = results
    world = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    world.filters["loose"] = lambda name: name.replace(",", ",\u200b")  # may break there
    page = world.from_string(TEMPLATE.read_text(encoding="utf-8"))
    files = _files(results)
    text = page.render(
        title=title,
        first=first,
        results=results,
        others=[(each, _summary(each, first)) for each in others],
        length=_length(first.seconds),
        columns=list(MARKDOWN),
        rows=[(each, _cells(each)) for each in results],
        charts=_charts(results),
        files=files[:SHOWN],
        hidden=len(files[SHOWN:]),
        same=first.audios - len(files),
        given=first.signatures.get("wer", "").startswith("WER|reference:given"),
    )
    Path(path).write_text(text, encoding="utf-8")


def _cells(result):
    values = ((get(result), form) for form, get in MARKDOWN.values())
    cells = ["–" if value is None else format(value, form) for value, form in values]
    return [cell.replace(" (", "\n(") for cell in cells]


def _summary(result, first):
    """What a setting changes, in a sentence."""
    parts = [
        f"{result.rtfx / first.rtfx:.1f} times the speed",
        f"caches of {plot.size(result.cache_bytes)} instead of {plot.size(first.cache_bytes)}",
        f"NLL {between(result.nll_difference, result.nll_difference_interval, '+.4f')}",
    ]
    if result.wer_difference is not None:
        parts.append(f"WER {between(result.wer_difference, result.wer_difference_interval, '+.2f')} points")
    if result.loops > first.loops:
        parts.append(f"{result.loops} recording{'s loop' if result.loops > 1 else ' loops'}, {first.loops} unpatched")
    return "; ".join(parts)


def _charts(results):
    """[(caption, <svg>)]"""
    names = [each.setting for each in results]
    found = []
    if results[0].wer is not None:
        found.append(("Word error rate against the bytes of both caches", plot.tradeoff(results, "wer")))
    found += [
        ("Likelihood of the unpatched model's text against the bytes of both caches", plot.tradeoff(results, "nll")),
        ("Seconds of audio in a second", plot.bars(names, [each.rtfx for each in results])),
        ("Both caches, MB", plot.bars(names, [each.cache_bytes / 1e6 for each in results], form=".2f")),
        ("Peak of the memory, MB", plot.bars(names, [each.peak_memory / 1e6 for each in results], form=".0f")),
    ]
    return [(caption, _inline(figure, f"chart{number}")) for number, (caption, figure) in enumerate(found)]


def _inline(figure, prefix):
    """An <svg> whose text takes the page's colour and whose ids are its own."""
    text = plot.svg(figure).replace(plot.GREY, "currentColor")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return re.sub(r'href="#', f'href="#{prefix}-', text)


def _files(results):
    """[(name, seconds, [(setting, File)])] of the recordings whose texts differ, those that differ most first."""
    found = []
    for files in zip(*(each.files for each in results)):
        texts = {file.text for file in files}
        wrong = any(file.errors for file in files)
        if len(texts) > 1 or wrong:
            spread = max(file.errors or 0 for file in files) - (files[0].errors or 0)
            found.append((spread, len(texts), files))
    found.sort(key=lambda each: each[:2], reverse=True)
    settings = [each.setting for each in results]
    return [(files[0].name, _length(files[0].seconds), _grouped(settings, files)) for *_, files in found]


def _grouped(settings, files):
    """[(the settings that wrote the same, their File)]"""
    found: dict[str, list] = {}
    for setting, file in zip(settings, files):
        found.setdefault(file.text, []).append((setting, file))
    return [(", ".join(setting for setting, _ in pairs), pairs[0][1]) for pairs in found.values()]


def _length(seconds):
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
