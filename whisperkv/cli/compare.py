"""`whisperkv compare`: the unpatched model beside any number of settings."""

from pathlib import Path
from typing import Annotated

import typer

from ._evaluating import SHOWN, comparison, complaint, option


def compare(
    audio: option.Audio,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="lossless, fastest, smallest, or FIELD=VALUE,... as "
            "weights=int8,cross=latent_int8,trim=padding,recent=64,heavy=32. Once for each; default: the three names."
        ),
    ] = None,
    model: option.Model = "tiny.en",
    out: Annotated[Path, typer.Option(help="The report. Beside it stand the same names with .json and .csv.")] = Path(
        "report.html"
    ),
    language: option.Language = None,
    batch: option.Batch = 8,
    beams: option.Beams = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Timed passes; their median counts.")] = 1,
    count: option.Count = None,
    threads: option.Threads = None,
    device: option.Device = "cpu",
) -> None:
    """Measure settings on your own audio: words, likelihood, speed and memory.

    Prints a table, and writes an HTML report with charts and a word diff of each recording. Without references the
    unpatched model's text is what the settings are held against.
    """
    with complaint("compare"):
        bad = comparison(
            audio, setting or SHOWN, model, out, device, count,
            language=language, batch=batch, beams=beams, repeat=repeat, threads=threads,
        )  # fmt: skip
    if bad:
        raise typer.Exit(1)
