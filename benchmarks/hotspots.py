"""Where the time of a transcription goes: log-mel, encoder and the rest, each sampled by Linux's perf, by function.

Each part is in a loop of its own. CPU time: others on the machine hardly matter. The lines are those that take SMALLEST
of their part or more; the rest is summed. Install perf (apt-get install linux-perf) and let it look (sysctl
kernel.perf_event_paranoid=2, or lower).
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

import audio
import decoding
import models
import tables
import torch
from settings import OURS, apply
from transformers.modeling_outputs import BaseModelOutput

import whisperkv
from whisperkv.features import log_mel

FULL, SMALLEST = "transformers", 0.03
SETTINGS = ("patch(model)", "int8", "int8, latent_int8, trim")
SETS = {"utterances": audio.utterances, "windows": audio.windows}
AUDIOS, SECONDS = 10, 8  # how long each part is looked at
COLUMNS = {
    "model": ("model", ""), "audio": ("audio", ""), "batch": ("batch", "d"), "beams": ("beams", "d"),
    "setting": ("setting", ""), "part": ("part", ""), "milliseconds": ("ms an audio", ".2f"),
    "where": ("where its time goes", ""),
}  # fmt: skip


class Samples:
    """What this process does inside the with statement, by perf: [(share, library, function)], the largest first."""

    def __enter__(self):
        self.file = tempfile.NamedTemporaryFile(suffix=".perf")
        command = ["perf", "record", "-q", "-F", "499", "-p", str(os.getpid()), "-o", self.file.name]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        time.sleep(0.5)  # until it looks
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate()[1].decode()
        command = ["perf", "report", "-i", self.file.name, "--stdio", "--no-children", "-q", "-t", "|"]
        found = subprocess.run([*command, "-F", "overhead,dso,symbol"], capture_output=True, text=True)
        lines = [line.split("|") for line in found.stdout.splitlines() if line.count("|") == 2]
        if not lines:
            raise SystemExit(f"perf saw nothing: {said or found.stderr}")
        self.found = [(float(share.strip(" %")) / 100, library.strip(), name.strip()) for share, library, name in lines]


def short(symbol):
    """Of a name of C++ what a person would look for."""
    name = symbol.split("] ")[-1]
    kernel = re.search(r"\w+_kernel\b", name) if "<" in name else None
    return kernel[0] if kernel else re.split(r"[<(]", name)[0].split("::")[-1]


def told(found):
    """One line of the largest, others summed by library."""
    large = [f"{short(name)} ({library}) {share:.0%}" for share, library, name in found if share >= SMALLEST]
    others = {}
    for share, library, _ in found:
        if share < SMALLEST:
            others[library] = others.get(library, 0) + share
    rest = [f"others of {library} {share:.0%}" for library, share in others.items() if share >= SMALLEST / 3]
    return ", ".join(large + sorted(rest, key=lambda line: -float(line.split()[-1].strip("%"))))


def parts(model, processor, batches, beams, is_ours):
    """{part: what does it for all audios once}"""

    def mel(speeches):
        samples = [one.samples for one in speeches]
        if is_ours:
            return log_mel(samples, processor)
        return processor(samples, sampling_rate=audio.RATE, return_tensors="pt").input_features

    features = [mel(each) for each in batches]
    with torch.no_grad():
        heard = [model.get_encoder()(one) for one in features]

    def rest():
        for states, one in zip(heard, features):
            given = BaseModelOutput(last_hidden_state=states.last_hidden_state)
            whole = states if is_ours else given
            found = decoding.generate(model, one, encoder_outputs=whole, num_beams=beams, max_new_tokens=200)
            processor.batch_decode(found, skip_special_tokens=True)

    return {
        "log-mel": lambda: [mel(each) for each in batches],
        "encoder": lambda: [model.get_encoder()(one) for one in features],
        "the rest": rest,
    }


def rows(model, processor, batches, beams, settings, seconds):
    for setting in (FULL, *settings):
        whisperkv.unpatch(model)
        if setting != FULL:
            apply(model, OURS[setting])
        for part, work in parts(model, processor, batches, beams, setting != FULL).items():
            with torch.no_grad():
                work()
                with Samples() as samples:
                    turns, begin = 0, time.process_time()
                    while time.process_time() - begin < seconds:
                        work()
                        turns += 1
                    taken = (time.process_time() - begin) / turns / sum(map(len, batches))
            yield {"setting": setting, "part": part, "milliseconds": 1e3 * taken, "where": told(samples.found),
                   "found": [each for each in samples.found if each[0] > 0.002]}  # fmt: skip
    whisperkv.unpatch(model)


def main(args):
    tables.pin(args)
    if shutil.which("perf") is None:
        raise SystemExit("perf is not installed: apt-get install linux-perf")
    table = tables.Table("hotspots", COLUMNS, args)
    speeches = SETS[args.audio](args.data)[: 2 if args.quick else AUDIOS]
    batches = decoding.batches(speeches, args.batch)
    for name in args.models:
        model, processor = models.load(name, args.base)
        for beams in args.beams:
            for row in rows(model, processor, batches, beams, args.settings, 1 if args.quick else SECONDS):
                table.add(model=name, audio=args.audio, batch=args.batch, beams=beams, **row)
    print(table)


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--audio", default="utterances", choices=SETS, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="audios decoded together (default: 1)")
    parser.add_argument("--beams", type=int, nargs="+", default=[1], help="of the search (default: 1)")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=OURS, metavar="NAME", help="of %(choices)s")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
