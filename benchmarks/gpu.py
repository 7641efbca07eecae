"""Everything that is measured on a GPU, beside torch and transformers, in one process and turn by turn.

ops       each op alone, beside torch's scaled_dot_product_attention (as transformers calls it, over keys and values of
          every beam, and with the beams as queries over shared ones), flash_attn where it is installed, and the
          bandwidth that this card reached in a plain read or copy. Other memory is read before each call
steps     a token through the decoder and the output head, at the length of a usual transcript; random weights
generate  whole calls from the encoder's output, by the clock on the wall, with peak memory and the size of the caches;
          and tiny.en with real weights in float32, whose tokens must be those of transformers. kvpress, where it is
          installed, is tried as well; it was not made for Whisper
memory    the largest batch that decodes its first tokens

Times of ops and steps are medians by CUDA events. What does not fit, compile or run stands in the tables as such. Rows
go to gpu-*.jsonl, targets and ratios to gpu.md, as they are found: a table that is not measured now keeps its old rows.
What the targets are about is measured first, and after --minutes nothing new is begun.
"""

import argparse
import json
from importlib.util import find_spec
from math import inf
from pathlib import Path
from time import perf_counter

import models
import tables
import torch
from gpu_decodes import generate, memory, steps
from gpu_ops import op
from tqdm import tqdm

QUICK = {"tiny": ("tiny", 1)}  # a decoder of so many layers
BATCHES, QUICK_BATCHES, BEAMS = (1, 8, 32, 128), (1, 2), (1, 5)
ROUNDS, OP_ROUNDS = 2, 20  # runs of some steps, or of generate(); calls of an op
WORK = {"ops": op, "steps": steps, "generate": generate, "memory": memory}

OPS = {"shape": "large-v3", "dtype": "float16", "batch": 32, "beams": 1, "op": "cross_attention"}
ONE = {"shape": "large-v3", "batch": 1, "beams": 1, "way": "model"}
BEAM = {"shape": "large-v3", "batch": 32, "beams": 5, "way": "latent_int4"}
REAL = {"shape": "tiny.en", "dtype": "float32", "way": "model"}
TARGETS = [  # what; the table, row and column where it stands; how much it must be
    ("cross_attention, large-v3, batch 32, `model`: share of bandwidth", "ops", {**OPS, "way": "model"}, "share", 0.75),
    ("the same, `int8`: times as fast as `model`", "ops", {**OPS, "way": "int8"}, "to_model", 1.7),
    ("the same, `latent`: times as fast as SDPA over all keys and values", "ops", {**OPS, "way": "latent"}, "ratio", 1),
    ("step of large-v3, batch 1: times as fast as transformers", "steps", ONE, "ratio", 8),
    ("the same: times as fast as its static cache, compiled", "steps", ONE, "to_static", 1),
    ("generate() of large-v3, batch 1: times as fast", "generate", ONE, "ratio", 4),
    ("generate() of large-v3, batch 32, 5 beams, `latent_int4`: times as fast", "generate", BEAM, "ratio", 5),
    ("the same: caches, times smaller", "generate", BEAM, "smaller", 10),
    ("tiny.en, float32, greedy: share of rows with the same tokens", "generate", {**REAL, "beams": 1}, "same", 1),
    ("the same with 5 beams", "generate", {**REAL, "beams": 5}, "same", 1),
]  # fmt: skip
LINES = ("shape", "dtype", "batch", "beams")
VIEWS = [  # heading; table, which of its rows, column
    ("cross_attention: times as fast as SDPA", "ops", {"op": "cross_attention"}, "ratio", ".2f"),
    ("cross_attention: times as fast as SDPA, beams folded", "ops", {"op": "cross_attention"}, "ratio_shared", ".2f"),
    ("cross_attention: share of the bandwidth", "ops", {"op": "cross_attention"}, "share", ".2f"),
    ("compact_attention: times as fast as SDPA", "ops", {"op": "compact_attention"}, "ratio", ".2f"),
    ("compact_attention: share of the bandwidth", "ops", {"op": "compact_attention"}, "share", ".2f"),
    ("score_evict: µs", "ops", {"op": "score_evict"}, "us", ".1f"),
    ("steps: times as fast as transformers", "steps", {}, "ratio", ".2f"),
    ("steps: ms", "steps", {}, "ms", ".3f"),
    ("steps: GB beside the weights, at most", "steps", {}, "peak", ".2f"),
    ("generate: times as fast as transformers", "generate", {}, "ratio", ".2f"),
    ("generate: seconds", "generate", {}, "seconds", ".3f"),
    ("generate: GB beside the weights, at most", "generate", {}, "peak", ".2f"),
    ("generate: caches, times smaller", "generate", {}, "smaller", ".1f"),
    ("generate: share of rows with the tokens of transformers", "generate", {"dtype": "float32"}, "same", ".2f"),
    ("memory: largest batch", "memory", {}, "largest", "d"),
]  # fmt: skip


def report(rows, device):
    """Markdown of {table: rows}: the targets, then the ratios."""
    lines = ["# On a CPU, to see that the script runs: no number here is a GPU's", ""]
    if device.type == "cuda":
        about = tables.machine(torch.get_num_threads())
        sorts = ("driver", "cuda", "torch", "transformers", "python", "cpu")
        lines = [f"# {about['gpu']}", "", ", ".join(f"{each} {about[each]}" for each in sorts), ""]
        lines += ["| target | at least | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(target(rows, *each))} |" for each in TARGETS] + [""]
        lines += [f"{peer} is not installed here." for peer in ("flash_attn", "kvpress") if not find_spec(peer)] + [""]
    for heading, table, where, column, form in VIEWS:
        lines += view(heading, matching(rows[table], where), column, form)
    return "\n".join(lines)


def matching(rows, where):
    return [row for row in rows if where.items() <= row.items()]


def target(rows, what, table, where, column, least):
    found = [row[column] for row in matching(rows[table], where) if row.get(column) is not None]
    if not found:
        return what, f"{least}", "not measured", ""
    return what, f"{least}", f"{found[0]:.2f}", "met" if found[0] >= least else "**missed**"


def view(heading, rows, column, form):
    """A line for each shape, dtype and batch, and a column for each way. What has failed says why."""
    if not any(row.get(column) is not None for row in rows):
        return []
    sides, ways = [each for each in LINES if each in rows[0]], list(dict.fromkeys(row["way"] for row in rows))
    cells = {}
    for row in rows:
        value = row.get(column)
        text = (row.get("note") or "-") if value is None else format(value, form)
        cells.setdefault(tuple(str(row.get(each, "-")) for each in sides), {})[row["way"]] = text
    lines = [[*sides, *ways], ["---"] * (len(sides) + len(ways))]
    lines += [[*key, *(line.get(way, "-") for way in ways)] for key, line in cells.items()]
    return [f"## {heading}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def main(args):
    prefix, rows = "quick-" if args.quick else "", {}
    for name in WORK:
        path = args.results / f"{prefix}gpu-{name}.jsonl"
        rows[name] = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.is_file() else []
    for name in args.tables:
        table, end = tables.Table(f"gpu-{name}", {}, args), perf_counter() + 60 * args.minutes
        rows[name] = table.rows
        with torch.no_grad():
            for row in tqdm(WORK[name](args), desc=name, unit="row"):
                table.add(**row)
                (args.results / f"{prefix}gpu.md").write_text(report(rows, args.device))
                if perf_counter() > end:
                    print(f"{name}: {args.minutes:g} minutes are over, the rest is not measured")
                    break
    print(report(rows, args.device))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(WORK), choices=WORK, metavar="TABLE", help="of %(choices)s")
    parser.add_argument(
        "--shapes", nargs="+", choices=models.DECODERS, metavar="SHAPE", help="of %(choices)s (default: all)"
    )
    parser.add_argument(
        "--compiled", nargs="*", type=int, default=[1], metavar="BATCH",
        help="where transformers' static cache is compiled and measured too, a minute or so each (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="NAME=FOLDER", help="faster-whisper folders, as tiny.en=FOLDER"
    )
    parser.add_argument("--speech", metavar="FILE", help="float32 samples at 16 kHz (.npy), where soundfile is missing")
    parser.add_argument("--minutes", type=float, default=inf, help="for a table, after which no more rows are begun")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cuda (default), or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="a small shape and a few calls, to see that it runs")
    parser.add_argument("--results", type=Path, default=tables.RESULTS, metavar="FOLDER", help="for what is found")
    args = parser.parse_args()
    if args.device.type == "cpu" and not args.quick:
        parser.error("--device cpu only shows that the script runs: add --quick")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: nothing is measured (--device cpu --quick shows that the script runs)")
    args.weights = dict(each.split("=", 1) for each in args.weights)
    args.shapes = QUICK if args.quick else {each: models.DECODERS[each] for each in args.shapes or models.DECODERS}
    args.batches, args.beams = QUICK_BATCHES if args.quick else BATCHES, BEAMS
    args.rounds, args.op_rounds = (1, 2) if args.quick else (ROUNDS, OP_ROUNDS)
    args.threads = torch.get_num_threads()
    return args


if __name__ == "__main__":
    main(arguments())
