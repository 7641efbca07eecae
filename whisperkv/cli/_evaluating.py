"""What `compare`, `demo`, `tune` and `bench` have in common."""

import signal
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .progress import interrupt

SHOWN = ("lossless", "fastest", "smallest")  # settings
WORDS = 100  # of each text


class option:
    """Arguments and options that both take."""

    Audio = Annotated[
        list[str],
        typer.Argument(
            metavar="AUDIO|DATASET...",
            help="Recordings, folders of them (with NAME.txt beside NAME.wav, or as LibriSpeech's), or manifests "
            "(.tsv, .csv, .jsonl) with audio and text.",
        ),
    ]
    Model = Annotated[
        str, typer.Option(help="tiny.en (English alone), base, a folder (transformers' or CTranslate2's) or a hub id.")
    ]
    Language = Annotated[
        str | None,
        typer.Option(help="As en, de. Default: what the model hears at the beginning of the first recording."),
    ]
    Batch = Annotated[int, typer.Option("--batch", "--batch_size", min=1, help="Windows of 30 s decoded together.")]
    Beams = Annotated[int, typer.Option("--beams", "--beam_size", min=1, help="Of the search; 1 is greedy.")]
    Count = Annotated[int | None, typer.Option(min=1, help="Take only so many recordings.")]
    Threads = Annotated[int | None, typer.Option(min=1, help="Of torch. Default: as many as it takes.")]
    Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


@contextmanager
def complaint(command):
    """What can go wrong, as one line and an exit code of 2; 130 after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
        is_path = isinstance(error, OSError) and error.filename is not None
        what = f"{error.filename}: {error.strerror}; check the path" if is_path else error
        print(f"whisperkv {command}: {what}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"whisperkv {command}: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def audios_of(paths, count):
    """(the recordings in memory, those that could not be read). Each bad one is named, and the rest goes on."""
    from ..evaluation import heard, read

    samples = [sample for path in paths for sample in read(path)][:count]
    bad = []

    def note(sample, error):
        bad.append(sample)
        print(f"left out: {sample.name}: {error}", file=sys.stderr)

    audios = heard(samples, note)
    if not audios:
        raise ValueError(f"none of {len(samples)} recordings can be read: give others")
    return audios, bad


def comparison(audio, settings, model, out, device, count, with_texts=False, **options):
    """Measure and show, on stdout and in the report `out`. Returns the recordings that could not be read.

    with_texts  print what was heard, rather than how each figure was made
    """
    from ..evaluation import Options, compare_each, parsed, write_csv, write_json, write_report
    from ..evaluation.results import beside

    chosen = [parsed(text) for text in settings]
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must end in .html; got {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: {out.absolute().parent}: no such folder; make it first, or name another")
    audios, bad = audios_of(audio, count)
    given = Options(**options)
    windows = sum(len(each.windows) for each in audios)
    runs = 1 + sum(each.is_patched for each in chosen)
    results = []
    try:
        with progress() as steps:
            steps.begin("", runs * (1 + given.repeat) * windows)
            for found in compare_each(model, audios, chosen, given, steps.name, steps.advance, device):
                results.append(found)
    finally:  # what is done is kept, whatever came
        if results:
            title = f"{Path(model).name}: {len(audios)} recording{'s' * (len(audios) != 1)} compared"
            write_report(results, out, title)
            write_json(results, out.with_suffix(".json"))
            write_csv(results, out.with_suffix(".csv"))
            if with_texts:
                print("\n".join(texts_of(results)))
            print(beside(results))
            if not with_texts:
                print("\n".join(("", *(f"    {line}" for line in results[-1].signatures.values()))))
            print(f"\nThe report: {out} ({out.with_suffix('.json').name} and {out.with_suffix('.csv').name} beside it)")
    return bad


def texts_of(results):
    """What was heard in the first recording, each text once, as lines."""
    found = {}
    for each in results:
        found.setdefault(each.files[0].text, []).append(each.setting)
    for text, settings in found.items():
        yield f"{', '.join(settings)}:"
        words = text.split()
        short = " ".join(words[:WORDS]) + " ..." * (len(words) > WORDS)
        yield textwrap.fill(short or "(nothing)", 100, initial_indent="  ", subsequent_indent="  ") + "\n"


class Steps:
    """A bar on stderr."""

    def __init__(self, shown):
        self.shown, self.task = shown, shown.add_task("", total=None)

    def name(self, what):
        """Say what comes next."""
        self.shown.update(self.task, description=what)

    def begin(self, what, total):
        """Start anew."""
        self.shown.reset(self.task, description=what, total=total)

    def advance(self, count):
        self.shown.advance(self.task, count)


@contextmanager
def progress():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    parts = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*parts, console=Console(stderr=True), transient=True) as shown:
        yield Steps(shown)
