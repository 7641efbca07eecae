"""`whisperkv tune`: the settings for your own audio."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ._evaluating import audios_of, complaint, option, progress


class Goal(str, Enum):
    speed = "speed"
    memory = "memory"


def tune(
    audio: option.Audio,
    within_wer: Annotated[float, typer.Option(min=0, help="Points of word error rate that may be lost.")] = 0.3,
    within_nll: Annotated[float, typer.Option(min=0, help="Nats a token that may be lost.")] = 0.01,
    goal: Annotated[Goal, typer.Option("--for", help="The least time, or the fewest bytes.")] = Goal.speed,
    model: option.Model = "tiny.en",
    out: Annotated[
        Path, typer.Option(help="The plot (.svg, .png or .pdf). All that was tried stands beside it as .json.")
    ] = Path("tuned.svg"),
    settings: Annotated[int, typer.Option(min=1, help="How many are tried.")] = 48,
    language: option.Language = None,
    batch: option.Batch = 8,
    count: option.Count = None,
    threads: option.Threads = None,
    device: option.Device = "cpu",
) -> None:
    """Find the fastest or smallest settings that keep the words of your own audio.

    Many settings are tried on a few recordings, the best on more. What is chosen is within both bounds by the whole of
    its 95 % intervals. Prints the lines of Python that set it.
    """
    with complaint("tune"):
        if out.suffix.lower() not in (".svg", ".png", ".pdf"):
            raise ValueError(f"--out must end in .svg, .png or .pdf; got {out}")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"--out: {out.absolute().parent}: no such folder")
        from transformers import logging

        from ..evaluation import Options, plot
        from ..evaluation import tune as tuned
        from ..evaluation.results import between, table
        from ..transcription.loading import load

        logging.set_verbosity_error()
        audios, bad = audios_of(audio, count)
        whisper, processor = load(model, device)
        tried = {}
        try:
            with progress() as steps:
                found = tuned(
                    whisper, processor, audios, within_wer, within_nll, goal.value, settings,
                    Options(language, batch, threads=threads), model, steps.begin, steps.advance,
                    lambda entry: tried.update({entry.setting.name: entry}),
                )  # fmt: skip
            tried = {each.setting.name: each for each in found.entries}
            plot.search(found.entries, goal.value, within_nll, found.setting.name).savefig(out)
            print(f"written: {out}", file=sys.stderr)
        finally:  # what is done is kept, whatever came
            if tried:
                write_tried(tried.values(), out.with_suffix(".json"))
    share = {"speed": "seconds", "memory": "bytes"}[goal.value]
    rows = [
        (
            each.setting.text,
            each.share,
            between(each.result.wer_difference, each.result.wer_difference_interval, "+.2f"),
            between(each.result.nll_difference, each.result.nll_difference_interval, "+.4f"),
            each.result.loops,
        )
        for each in found.finalists
    ]
    headings = ("setting", f"{share}, share", "WER difference (95 %)", "NLL difference (95 %)", "loops")
    print(table(headings, rows, ("", ".3f", "", "", "d")))
    bounds = f"{within_wer:g} points of WER and {within_nll:g} nats"
    print(f"\nThe best for {goal.value} within {bounds}: {found.setting.text}")
    if found.advice:
        print(found.advice)
    names = [name for name in ("CrossConfig", "EvictionConfig", "patch") if f"{name}(" in found.python]
    print(f"\n    from whisperkv import {', '.join(names)}\n\n    {found.python}\n")
    if found.options:
        print(f"    whisperkv transcribe {found.options} ...\n")
    if bad:
        raise typer.Exit(1)


def write_tried(entries, path):
    tried = [
        {"setting": each.setting.text, "share": each.share, "heard": each.audios, **each.result.to_dict()}
        for each in entries
    ]
    path.write_text(json.dumps(tried, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path}", file=sys.stderr)
