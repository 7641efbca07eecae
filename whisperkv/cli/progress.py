"""What a user sees while recordings are transcribed, on stderr, and how it ends."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..transcription.audio import seconds_of

if TYPE_CHECKING:  # it brings torch, and this module is there for `whisperkv --help` too
    from ..transcription.engine import News


class Progress:
    """A bar with the speed and the time left, where stderr is a terminal; errors and the last line in any case.

    As a context it turns errors of settings and models into one line and the exit code 2, and Ctrl-C into 130.
    """

    def __init__(self, command: str) -> None:
        self.command, self.console = command, Console(stderr=True)
        self.skipped = self.done = self.failed_before = 0
        self.remedy = "the same command with --skip-existing goes on"  # after Ctrl-C
        self.failed: list[str] = []
        self.exit_code = 0
        self._lengths: list[float | None] = []
        self._heard: list[float] = []  # seconds of each recording
        self._start: float | None = None
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """Where somebody is watching."""
        if self.console.is_terminal:
            self.console.print(f"[dim]{escape(text)}")

    def begin(self, names: list[str], lengths: list[float | None] | None = None) -> None:
        """lengths: the seconds of each, if they are known."""
        self._lengths = lengths or [seconds_of(name) for name in names]
        self._heard = [0.0] * len(names)
        known = None if None in self._lengths else sum(each or 0.0 for each in self._lengths)
        self._start = time.perf_counter()
        self._task = self._bar.add_task(f"0/{len(names)}", total=known, speed="")
        self._bar.start()

    def tell(self, news: News) -> None:
        heard, done = self._heard, news.transcript
        assert self._start is not None, "begin() comes first"
        if done is None:
            heard[news.number] = max(heard[news.number], news.segments[-1].end)
        elif done.error is None:
            heard[news.number] = done.duration
            self.done += 1
            self.say(f"{news.name or 'the array'}: {done.duration:.0f} s")
        else:
            self.fail(news.name, done.error)
            heard[news.number] = self._lengths[news.number] or 0.0
        speed = f"{sum(heard) / (time.perf_counter() - self._start):.0f}x real time"
        count = f"{self.done + len(self.failed)}/{len(heard)}"
        self._bar.update(self._task, completed=sum(heard), description=count, speed=speed)

    def fail(self, name: str, error: Exception) -> None:
        name = "standard input" if name == "-" else name
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{name}: {error.strerror}; give the path of a recording or a folder"
        self.failed.append(name)
        self.console.print(
            escape(text if text.startswith(name) else f"{name}: {text}"), soft_wrap=True, highlight=False
        )

    def __enter__(self) -> Progress:
        self._before = signal.signal(signal.SIGTERM, interrupt)
        return self

    def __exit__(self, kind, error, trace):
        signal.signal(signal.SIGTERM, self._before)
        self._bar.stop()
        if isinstance(error, KeyboardInterrupt):
            self._sum_up(f"interrupted; {self.remedy}")
            raise typer.Exit(130)
        if isinstance(error, BrokenPipeError):
            sys.stdout = open("/dev/null", "w")  # nobody reads on; Python would complain of it again at the end
            raise typer.Exit(1)
        if isinstance(error, (ImportError, OSError, ValueError, TypeError)):
            self.console.print(f"whisperkv {self.command}: {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2)
        if error is None:
            self.exit_code = 1 if self.failed or self.failed_before else 0
            self._sum_up("")

    def _sum_up(self, why):
        parts = [
            f"{self.done} of {self.done + len(self.failed)} recordings done"
            if not why
            else f"{self.done} recordings done"
        ]
        if self._start is not None and self.done:
            seconds, heard = time.perf_counter() - self._start, sum(self._heard)
            parts.append(f"{heard:.0f} s of audio in {seconds:.1f} s, {heard / seconds:.1f} times real time")
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{self.skipped} were there already"] if self.skipped else []
        parts += [f"{self.failed_before} had failed before; --retry_failed tries again"] if self.failed_before else []
        parts += [why] if why else []
        self.console.print(escape("; ".join(parts)), soft_wrap=True, highlight=False)


def interrupt(number, frame):
    raise KeyboardInterrupt
