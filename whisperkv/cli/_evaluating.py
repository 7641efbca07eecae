"""What `compare`, `tune` and `bench` have in common."""

import sys
from contextlib import contextmanager
from typing import Annotated

import typer


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
    Model = Annotated[str, typer.Option(help="tiny.en, base, a folder (transformers' or CTranslate2's) or a hub id.")]
    Language = Annotated[
        str | None,
        typer.Option(help="As en, de. Default: what the model hears at the beginning of the first recording."),
    ]
    Batch = Annotated[int, typer.Option(min=1, help="Windows of 30 s decoded together.")]
    Count = Annotated[int | None, typer.Option(min=1, help="Take only so many recordings.")]
    Threads = Annotated[int | None, typer.Option(min=1, help="Of torch. Default: as many as it takes.")]
    Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


@contextmanager
def complaint(command):
    """What can go wrong, as one line and an exit code of 2; 130 after Ctrl-C."""
    try:
        yield
    except (ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"whisperkv {command}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"whisperkv {command}: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


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
        raise ValueError(f"none of {len(samples)} recordings can be read")
    return audios, bad


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
