"""Files to texts by whisperkv.transcribe() beside faster-whisper and the pipeline of transformers: what users run.

utterances  100 files of some 7 s
hour        one file of an hour, joined from the same utterances again and again, with short pauses

Each tool is a process of its own, called as in workers/whole_files.py: greedy, English, batches of 8, all else as the
tool has it. Needs the environments of `make engines`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import audio
import jiwer
import long_audio
import numpy
import tables
from tqdm import tqdm
from workers import prepare
from workers.whole_files import TOOLS

COLUMNS = {
    "model": ("model", ""), "files": ("files", ""), "tool": ("tool", ""), "threads": ("threads", "d"),
    "seconds": ("seconds", ".1f"), "rtfx": ("times real time", ".1f"), "loading": ("loading, s", ".1f"),
    "peak": ("memory, MB", ".0f"), "wer": ("WER %", ".2f"),
}  # fmt: skip


def hour(speeches, seconds):
    """The utterances in another order each time."""
    random, order = numpy.random.default_rng(0), []
    while sum(each.seconds for each in order) < seconds:
        order += [speeches[number] for number in random.permutation(len(speeches))]
    return [long_audio.joined(order, (0.3, 0.8), None, seconds)]


def run(tool, model, threads, files):
    is_theirs = tool.startswith("faster-whisper")
    python = prepare.python_of("faster-whisper") if is_theirs else sys.executable
    folder = prepare.folder(model, "ctranslate2" if is_theirs else "transformers")
    for needed in (python, folder):
        if not Path(needed).exists():
            raise SystemExit(f"{needed}: not there: make engines")
    script = Path(__file__).parent / "workers" / "whole_files.py"
    command = [python, script, tool, folder, str(threads), *files]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{tool}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args):
    import soundfile

    table = tables.Table(f"whole-files-{args.threads}", COLUMNS, args)
    speeches = audio.utterances(args.data)
    sets = {"utterances": speeches[: 4 if args.quick else 100], "hour": hour(speeches, 60 if args.quick else 3600)}
    progress = tqdm(total=len(args.models) * len(args.files) * len(args.tools), unit="row")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.files:
            paths = [Path(folder, f"{name}-{number}.flac") for number in range(len(sets[name]))]
            for path, speech in zip(paths, sets[name]):
                soundfile.write(path, speech.samples, audio.RATE)
            wanted = [audio.normalized(speech.text) for speech in sets[name]]
            seconds = sum(speech.seconds for speech in sets[name])
            for model in args.models:
                for tool in args.tools:
                    progress.set_description(f"{model}, {name}: {tool}")
                    found = run(tool, model, args.threads, paths)
                    texts = list(map(audio.normalized, found.pop("texts")))
                    row = {**found, "peak": found["peak"] / 1e6, "rtfx": seconds / found["seconds"]}
                    row["wer"] = 100 * jiwer.wer(wanted, texts)
                    table.add(model=model, files=name, tool=tool, threads=args.threads, **row, texts=texts)
                    progress.update()
    progress.close()
    print(table)


def arguments():
    parser = tables.arguments(__doc__)
    sets, tools = ("utterances", "hour"), list(TOOLS)
    parser.add_argument("--files", nargs="+", default=sets, choices=sets, metavar="SET", help="of %(choices)s")
    parser.add_argument("--tools", nargs="+", default=tools, choices=tools, metavar="TOOL", help="of %(choices)s")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
