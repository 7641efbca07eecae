"""`whisperkv demo`: the comparison of one recording, from nothing."""

from pathlib import Path
from typing import Annotated

import typer

from ._evaluating import SHOWN, comparison, complaint, option

REPEAT, SHORT = 5, 60  # passes, of a recording of up to so many seconds


def demo(
    audio: Annotated[
        str | None, typer.Argument(help="A recording of any length.", show_default="a clip of 29 s")
    ] = None,
    out: Annotated[Path, typer.Option(help="The report. Beside it stand the same names with .json and .csv.")] = Path(
        "whisperkv-demo/report.html"
    ),
    beams: option.Beams = 5,
    threads: option.Threads = None,
) -> None:
    """Compare on a spoken clip, or your recording, with tiny.en: transformers alone, lossless, fastest and smallest.

    Shows what each heard, a table of accuracy, speed and memory, and the path of a report with charts.
    """
    with complaint("demo"):
        from ..demo import CLIP
        from ..transcription.audio import seconds_of

        chosen = audio or str(CLIP)
        if out.parent == Path("whisperkv-demo"):
            out.parent.mkdir(exist_ok=True)
        seconds = seconds_of(chosen)
        repeat = REPEAT if seconds is not None and seconds <= SHORT else 1
        bad = comparison(
            [chosen], SHOWN, "tiny.en", out, "cpu", None, with_texts=True, beams=beams, repeat=repeat, threads=threads
        )
    if bad:
        raise typer.Exit(1)
