"""Whole transcriptions by every engine: same audio, same threads, same options, turn by turn in one run.

Each engine is a process of its own (workers/), in an environment of its own where it needs one; `make engines` sets all
of them up and converts the weights. What cannot be loaded is left out, with a line that says why.

Every engine gets float32 samples at 16 kHz in memory and gives back text: no timestamps, no fallback to other
temperatures, English, at most TOKENS tokens an audio, tokens that are no speech suppressed. Each is pinned to as many
cores as it has threads. A turn transcribes all audios once; engines take turns, the other way round the next time;
medians of the turns. The first batch, before them, warms up.

Columns, seconds for all audios:
log-mel      samples to features: whisperkv by log_mel(), transformers and ONNX Runtime (optimum) by transformers'
             extractor, the others by their own. OpenVINO, whisper.cpp: as they count it themselves
encoder      features to states. The keys and values of cross-attention are made here by whisper.cpp, and by the others
             in the decoder's first pass, if at all
decoder      all the rest: passes of the decoder, output head, search, tokens to text
total        samples to text
first token  the first batch's total where one token is asked for
memory       the most that the process held while it transcribed, and what of that came after its imports
WER          % after Whisper's normalizer; only with real weights
NLL          nats a token of transformers' own float32 greedy text, forced; only transformers and whisperkv
loops        texts that got stuck
same texts   as transformers' in float32, by the same search

whisper.cpp, OpenVINO and faster-whisper's own transcribe() take one audio after the other, whatever the batch. OpenVINO
computes in bfloat16 where the processor can, as it does unless told otherwise; its int8 are the weights.
small and large-v3-turbo have random weights: speed only, a fixed number of tokens (--tokens).
"""

import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median

import audio
import decoding
import models
import numpy
import tables
import torch
from settings import OURS, unknown
from workers import prepare

TOKENS, FIXED = 200, 32  # most, of text; of random weights
PATIENCE = 1800  # seconds for one answer
REFERENCE = "transformers float32"
TIMES = ("mel", "encoder", "decoder", "total")
COLUMNS = {
    "model": ("model", ""), "threads": ("threads", "d"), "batch": ("batch", "d"), "beams": ("beams", "d"),
    "engine": ("engine", ""), "mel": ("log-mel", ".2f"), "encoder": ("encoder", ".2f"), "decoder": ("decoder", ".2f"),
    "total": ("total", ".2f"), "ratio": ("times as fast", ".2f"), "first": ("first token", ".3f"),
    "peak": ("memory, MB", ".0f"), "over": ("of it its own", ".0f"), "wer": ("WER %", ".2f"), "nll": ("NLL", ".4f"),
    "loops": ("loops", "d"), "same": ("same texts", "d"),
}  # fmt: skip


def engines():
    """{name: (environment or None for this one, script, settings of load())}; MODEL becomes the model's folder."""
    files = prepare.folder
    found = {
        REFERENCE: (None, "torch", lambda model: {"folder": files(model, "transformers")}),
        "transformers bfloat16": (
            None, "torch", lambda model: {"folder": files(model, "transformers"), "dtype": "bfloat16"},
        ),
    }  # fmt: skip
    for name, patch in OURS.items():
        found[f"whisperkv {name}"] = (
            None, "torch", lambda model, patch=patch: {"folder": files(model, "transformers"), "patch": patch},
        )  # fmt: skip
    for kind in ("float32", "int8"):
        for batched in (False, True):
            found[f"faster-whisper {kind}{', batched' * batched}"] = (
                "faster-whisper", "ctranslate2", lambda model, kind=kind, batched=batched: {
                    "folder": files(model, "ctranslate2"), "compute_type": kind, "batched": batched,
                },
            )  # fmt: skip
    for form in ("f16", "q8_0"):
        found[f"whisper.cpp {form}"] = (
            "whispercpp", "ggml", lambda model, form=form: {"file": files(model, f"ggml-{form}.bin")},
        )  # fmt: skip
    for environment, name in (("openvino", "OpenVINO int8"), ("onnx", "ONNX Runtime int8")):
        found[name] = (
            environment, environment, lambda model, environment=environment: {
                "folder": files(model, f"{environment}-int8"), "multilingual": not model.endswith(".en"),
            },
        )  # fmt: skip
    return found


class Worker:
    """One engine with one model in a process of its own."""

    def __init__(self, name, model, audios, threads, cores):
        environment, script, settings = engines()[name]
        python = sys.executable if environment is None else prepare.python_of(environment)
        if not Path(python).exists():
            raise Gone(f"{python}: no such environment: make engines")
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings(model).items()}
        for key in ("folder", "file"):
            if key in settings and not Path(settings[key]).exists():
                raise Gone(f"{settings[key]}: not there: make engines")
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
        self.process = subprocess.Popen(
            [python, Path(prepare.__file__).parent / f"{script}_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **limits, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.about = self.ask("load", audio=str(audios), threads=threads, **settings)

    def ask(self, do, **request):
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            raise Gone(f"the process ended ({self.process.wait()}): {said[-1] if said else 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            raise Gone(answer["error"])
        return answer

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Gone(Exception):
    """An engine that cannot be measured, and why."""


class Team:
    """The workers of one model. Where memory is short, the one that has waited longest ends, and begins anew later."""

    def __init__(self, names, model, audios, threads, cores, spare):
        self.begin = lambda name: Worker(name, model, audios, threads, cores)
        self.names, self.spare, self.out, self.running = list(names), spare, {}, {}

    def ask(self, name, do, **request):
        """None from one that is out."""
        if name in self.out:
            return None
        try:
            if name not in self.running:
                self.make_room()
                self.running[name] = self.begin(name)
                if "warm" in request:
                    self.running[name].ask(do, **request["warm"])
            self.running[name] = self.running.pop(name)  # the last that was asked
            request.pop("warm", None)
            return self.running[name].ask(do, **request)
        except Gone as error:
            self.out[name] = str(error)
            print(f"left out: {name}: {error}", file=sys.stderr)
            if name in self.running:
                self.running.pop(name).close()
            return None

    def make_room(self):
        while self.running and available() < self.spare:
            self.running.pop(next(iter(self.running))).close()

    def close(self):
        for worker in self.running.values():
            worker.close()


def available():
    """Bytes of memory that this machine could still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measure(args, model, threads, speeches, table):
    cores = [core for core in sorted(os.sched_getaffinity(0)) if core >= args.core][:threads]
    rows, real = list(range(len(speeches))), model in models.REAL
    with tempfile.TemporaryDirectory() as room:
        file = Path(room, "audios.npz")
        numpy.savez(file, **{str(row): speech.samples for row, speech in enumerate(speeches)})
        team = Team(args.engines, model, file, threads, cores, args.spare * 2**30)
        try:
            likelihoods = forced(args, team, rows) if real else {}
            for batch in args.batch:
                for beams in args.beams:
                    options = {"batch": batch, "beams": beams}
                    options |= {"most": TOKENS, "least": 0} if real else {"most": args.tokens, "least": args.tokens}
                    found = turns(args, team, rows, options)
                    for row in table_rows(found, speeches if real else None):
                        row["nll"] = likelihoods.get(row["engine"])
                        table.add(**{"model": model, "threads": threads, "batch": batch, "beams": beams, **row})
        finally:
            team.close()
    return team.out


def turns(args, team, rows, options):
    """{engine: its answers, each with the seconds of the first token}"""
    found = {name: [] for name in team.names}
    first = {"rows": rows[: options["batch"]], **options, "most": 1, "least": 0}
    warm = {"rows": rows[: options["batch"]], **options}
    for name in team.names:
        team.ask(name, "transcribe", **warm)
    for turn in range(args.repeat):
        for name in team.names[:: -1 if turn % 2 else 1]:
            answer = team.ask(name, "transcribe", rows=rows, warm=warm, **options)
            alone = team.ask(name, "transcribe", **first)
            if answer and alone:
                found[name].append({**answer, "first": alone["total"]})
                print(f"turn {turn + 1}, {options}: {name}: {answer['total']:.2f} s", file=sys.stderr, flush=True)
    return {name: answers for name, answers in found.items() if answers}


def table_rows(found, speeches):
    """speeches  None where the text says nothing"""
    middle = {name: {key: middle_of(answers, key) for key in (*TIMES, "first")} for name, answers in found.items()}
    for name, answers in found.items():
        last, reference = answers[-1], found.get(REFERENCE)
        row = {"engine": name, **middle[name], "peak": last["peak"] / 1e6, "over": last["over"] / 1e6}
        row["least"] = min(answer["total"] for answer in answers)  # less disturbed
        row["turns"] = len(answers)
        if reference:
            row["ratio"] = middle[REFERENCE]["total"] / middle[name]["total"]
        if speeches:
            row["wer"] = audio.word_error_rate(speeches, last["texts"])
            row["loops"] = sum(map(decoding.loops, last["texts"]))
            if reference:
                pairs = zip(reference[-1]["texts"], last["texts"])
                row["same"] = sum(theirs.strip() == ours.strip() for theirs, ours in pairs)
        yield row


def middle_of(answers, key):
    values = [answer[key] for answer in answers]
    return None if None in values else median(values)


def forced(args, team, rows):
    """{engine: NLL} of the reference's greedy text; greedy or not does not matter here."""
    options = {"batch": 8, "beams": 1, "most": TOKENS, "least": 0}
    reference = team.ask(REFERENCE, "transcribe", rows=rows, **options) if REFERENCE in team.names else None
    found = {}
    for name in team.names if reference else ():
        if engines()[name][1] != "torch":
            continue
        answer = team.ask(name, "likelihood", rows=rows, transcripts=reference["tokens"], batch=8)
        if answer:
            found[name] = answer["nats"] / answer["count"]
    return found


def chosen_engines(args):
    """The names that were asked for, without those that this build cannot do."""
    names = [name for name in engines() if not args.engines or any(part in name for part in args.engines)]
    for name, patch in OURS.items():
        if (full := f"whisperkv {name}") in names and (why := unknown(patch)):
            names.remove(full)
            print(f"left out: {full}: {why}", file=sys.stderr)
    return names


def speeches_of(args):
    if args.audio == "windows":
        return audio.windows(args.data, args.count)
    return audio.utterances(args.data)[: args.count]


def arguments():
    parser = tables.arguments(__doc__)
    for action in parser._actions:
        if action.dest == "models":
            action.choices = prepare.ALL
        if action.dest == "threads":
            action.nargs, action.default, action.help = "+", [1], "of every engine, on as many cores (default: 1)"
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="audios at once (default: 1 8)")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5], help="1 is greedy (default: 1 5)")
    parser.add_argument("--audio", choices=("utterances", "windows"), default="utterances", help="of some 7 s, or 30 s")
    parser.add_argument("--count", type=int, default=20, help="audios (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=FIXED, help="an audio, of random weights (default: %(default)s)")
    parser.add_argument("--engines", nargs="+", metavar="TEXT", help="only those whose names have one of these in them")
    parser.add_argument("--spare", type=float, default=6, metavar="GB", help="memory to leave free (default: 6)")
    return parser


def main(args):
    if args.quick:
        args.count, args.repeat, args.batch, args.beams = 2, 1, args.batch[:1], args.beams[:1]
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # this whisperkv in the workers
    torch.set_num_threads(1)
    args.engines = chosen_engines(args)
    speeches = speeches_of(args)
    wanted, args.threads = args.threads, args.threads[0]
    table, out = tables.Table(f"engines-{args.audio}", COLUMNS, args), {}
    for threads in wanted:
        for model in args.models:
            out |= {f"{name} ({model})": why for name, why in measure(args, model, threads, speeches, table).items()}
    with open(table.path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *table.rows[0].keys() - COLUMNS.keys()])
        writer.writeheader()
        writer.writerows(table.rows)
    print(table)
    for name, why in out.items():
        print(f"\nleft out: {name}: {why}")


if __name__ == "__main__":
    main(arguments().parse_args())
