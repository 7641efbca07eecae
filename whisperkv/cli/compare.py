"""`whisperkv compare`: the unpatched model beside any number of settings."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ._evaluating import audios_of, complaint, option, progress


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
    beams: Annotated[int, typer.Option(min=1, help="Of beam search; 1 is greedy.")] = 1,
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
        from ..evaluation import Options, compare_each, markdown, parsed, write_csv, write_json, write_report

        settings = [parsed(text) for text in setting or ("lossless", "fastest", "smallest")]
        if out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out must end in .html; got {out}")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"--out: {out.absolute().parent}: no such folder")
        audios, bad = audios_of(audio, count)
        options = Options(language, batch, beams, repeat=repeat, threads=threads)
        windows = sum(len(each.windows) for each in audios)
        runs = 1 + sum(each.is_patched for each in settings)
        results = []
        try:
            with progress() as steps:
                steps.begin("", runs * (1 + repeat) * windows)
                for found in compare_each(model, audios, settings, options, steps.name, steps.advance, device):
                    results.append(found)
        finally:  # what is done is kept, whatever came
            if results:
                title = f"{Path(model).name}: {len(audios)} recording{'s' * (len(audios) != 1)} compared"
                write_report(results, out, title)
                write_json(results, out.with_suffix(".json"))
                write_csv(results, out.with_suffix(".csv"))
                print(markdown(results))
                names = ", ".join(str(out.with_suffix(ending)) for ending in (out.suffix, ".json", ".csv"))
                print(f"written: {names}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)
