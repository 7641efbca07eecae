"""What the benchmarks share: the arguments, the machine's description, and a table that is saved as it grows."""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
import transformers
from audio import DATA
from device import driver
from models import REAL

import whisperkv.ops
from whisperkv.evaluation.results import table

RESULTS = Path(__file__).parent / "results"


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=REAL, choices=REAL, metavar="MODEL", help="of %(choices)s")
    parser.add_argument(
        "--base", metavar="FOLDER", help="faster-whisper folder of base; default: from its PyPI packages"
    )
    parser.add_argument("--data", default=DATA, metavar="FOLDER", help="that holds librispeech/ (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on as many cores (default: 1)")
    parser.add_argument("--core", type=int, default=0, help="the first of the cores (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a few windows and steps only, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for the JSON lines")
    return parser


def pin(args):
    """This process to as many cores as it has threads."""
    available = sorted(os.sched_getaffinity(0))
    cores = [core for core in available if core >= args.core][: args.threads]
    if len(cores) < args.threads:
        raise SystemExit(f"{args.threads} threads from core {args.core}: this process may use the cores {available}")
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(args.threads)


def machine(threads):
    """Where the numbers come from."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
        "l3": fields.get("cache size"),
        "flags": [flag for flag in flags if flag in ("avx2", "fma") or flag.startswith(("avx512", "avx_", "amx"))],
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": whisperkv.ops.ISA,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "whisperkv": whisperkv.__version__,
        **gpu(),
    }


def gpu():
    """Nothing, where there is none."""
    if not torch.cuda.is_available():
        return {}
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "gpu_memory": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


class Table:
    """Rows that stand in a file of JSON lines as soon as they are known, the machine first, and print as Markdown.

    columns  {key: (heading, format)}
    """

    def __init__(self, name, columns, args):
        self.columns, self.rows = columns, []
        args.results.mkdir(parents=True, exist_ok=True)
        self.path = args.results / f"{'quick-' if args.quick else ''}{name}.jsonl"
        self.path.write_text(json.dumps({"machine": machine(args.threads)}) + "\n")

    def add(self, **row):
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def __str__(self):
        headings, forms = zip(*self.columns.values())
        return table(headings, [[row.get(key) for key in self.columns] for row in self.rows], forms)
