"""What the workers share: requests and answers as JSON lines, clocks, and memory. Only NumPy beside the standard
library, as every engine has an environment of its own.

A worker is a script that ends with serve(Engine). An Engine has

  imports()             what it needs; what the process holds after it is the worker's baseline
  load(**settings)      {"version": text}
  transcribe(audios, beams, most, least)
                        a batch of float32 arrays at 16 kHz, at most `most` tokens each and at least `least` where the
                        engine can be told -> {"texts": [...], "mel": seconds, "encoder": seconds, "tokens": [...]};
                        None for what it cannot tell
"""

import functools
import json
import os
import sys
import traceback
from time import perf_counter

import numpy

PARTS = ("mel", "encoder")


def serve(engine):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print
    worker = _Worker(engine)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class _Worker:
    def __init__(self, engine):
        self.engine = engine

    def load(self, audio, **settings):
        """`audio`: a file of numpy.savez, its arrays named by their numbers."""
        self.engine.imports()
        with numpy.load(audio) as held:
            self.audios = [held[str(number)] for number in range(len(held))]
        self.baseline = memory("VmRSS")
        return self.engine.load(**settings)

    def transcribe(self, rows, batch, beams, most, least):
        """All rows, `batch` at a time, from samples to text."""
        forget_peak()
        texts, tokens, parts, start = [], [], dict.fromkeys(PARTS, 0.0), perf_counter()
        for first in range(0, len(rows), batch):
            found = self.engine.transcribe(
                [self.audios[row] for row in rows[first : first + batch]], beams, most, least
            )
            texts += found["texts"]
            tokens += found["tokens"] or []
            for part in PARTS:
                known = parts[part] is not None and found[part] is not None
                parts[part] = parts[part] + found[part] if known else None
        total, peak = perf_counter() - start, memory("VmHWM")
        rest = None if None in parts.values() else total - sum(parts.values())
        return {
            **parts,
            "decoder": rest,
            "total": total,
            "texts": texts,
            "tokens": tokens,
            "peak": peak,
            "over": peak - self.baseline,
        }

    def likelihood(self, rows, transcripts, batch):
        """Of given tokens; only some engines can."""
        nats, count = 0.0, 0
        for first in range(0, len(rows), batch):
            audios = [self.audios[row] for row in rows[first : first + batch]]
            more = self.engine.likelihood(audios, transcripts[first : first + batch])
            nats, count = nats + more[0], count + more[1]
        return {"nats": nats, "count": count}


class Clock:
    """with clock: seconds inside add up."""

    seconds = 0.0

    def __enter__(self):
        self.start = perf_counter()

    def __exit__(self, *_):
        self.seconds += perf_counter() - self.start

    def around(self, function):
        """The same function, its time counted."""

        @functools.wraps(function)  # generate() looks at the arguments of an encoder
        def timed(*args, **options):
            with self:
                return function(*args, **options)

        return timed

    def read(self):
        """Seconds since the last reading."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def memory(field):
    """Bytes: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return 1024 * int(line.split()[1])


def forget_peak():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak is then that of all that ran before, too
