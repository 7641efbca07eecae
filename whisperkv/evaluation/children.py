"""A setting measured in a process of its own, which holds nothing of what ran before."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..transcription.loading import load
from .hearing import Audio
from .measuring import Measured, Options, measure
from .settings import Setting


@dataclass
class Job:
    """What a child is told."""

    model: str
    device: str
    audios: list[Audio]
    setting: Setting
    options: Options
    given: list[list[int]] | None = None  # tokens of each window, whose likelihood is wanted


def apart(job: Job, on_window: Callable[[int], None] = lambda windows: None) -> Measured:
    """measure() in a child. What is raised there is raised here."""
    room = str(Path(__file__).parents[2])  # this whisperkv and no other
    path = os.pathsep.join(filter(None, (room, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.children"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            try:
                pickle.dump(job, child.stdin)
                child.stdin.close()
            except BrokenPipeError:
                pass  # what the child has said is told below
            while True:
                kind, what = pickle.load(child.stdout)
                if kind == "windows":
                    on_window(what)
                elif kind == "error":
                    raise what
                else:
                    return what  # type: ignore[no-any-return]
        except EOFError:
            log.seek(0)
            said = log.read().strip().splitlines()
            why = f"{job.setting.name}: the process ended ({child.wait()}): {said[-1] if said else 'it said nothing'}"
            raise RuntimeError(why) from None
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print

    def say(kind, what):
        pickle.dump((kind, what), answers)
        answers.flush()

    job = pickle.load(sys.stdin.buffer)
    try:
        model, processor = load(job.model, job.device)
        say(
            "measured",
            measure(
                model, processor, job.audios, job.setting, job.options, job.given, lambda count: say("windows", count)
            ),
        )
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        say("error", error)


if __name__ == "__main__":
    main()
