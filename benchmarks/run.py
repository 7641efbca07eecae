"""Runs the benchmarks, one after the other: python benchmarks/run.py [lossless formats eviction steps cross] ...

Arguments that are not known here go to each benchmark; see their own --help. Times (steps, cross) are taken on one
thread and on two.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import tables

HERE = Path(__file__).parent
BENCHMARKS = ("lossless", "formats", "eviction", "steps", "cross")
TIMES = ("steps", "cross")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    args, others = parser.parse_known_args()
    unknown = set(args.benchmarks) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    print(json.dumps(tables.machine(None), indent=1), flush=True)
    cores = len(os.sched_getaffinity(0))
    for name in args.benchmarks or BENCHMARKS:
        for threads in (1, 2) if name in TIMES and cores > 1 else (1,):
            print(f"\n## {name}, {threads} thread{'s' * (threads > 1)}", flush=True)
            subprocess.run([sys.executable, HERE / f"{name}.py", "--threads", str(threads), *others], check=True)


if __name__ == "__main__":
    main()
