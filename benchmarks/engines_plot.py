"""The bars of what engines.py measured: seconds of each engine, log-mel, encoder and the rest, one panel a case.

    python benchmarks/engines_plot.py benchmarks/results/engines-utterances.jsonl engines.svg [--batch 1] [--beams 1]

Readable on white and on dark pages: the background is transparent, the text of a middle grey.
"""

import argparse
import json
from pathlib import Path

GREY = "#8b949e"
OURS, THEIRS = ("#0b5d9e", "#2f81c7", "#7ab8ea"), ("#6b6257", "#9a8f82", "#c9bfb3")  # log-mel, encoder, the rest
PARTS = ("mel", "encoder", "decoder")
LABELS = ("log-mel", "encoder", "decoder and search")


def read(path, kind="engine"):
    """The rows that say which engine, or which of another kind, they are of."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [row for row in rows if kind in row]


def prepared():
    """pyplot, for pictures that are the same file whenever they are drawn."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({
        "text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "svg.fonttype": "none",
        "axes.edgecolor": GREY, "svg.hashsalt": "whisperkv", "font.size": 9,
    })  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def draw(rows, path):
    pyplot = prepared()
    cases = list(dict.fromkeys((row["model"], row["batch"], row["beams"], row["threads"]) for row in rows))
    groups = [[row for row in rows if case_of(row) == case] for case in cases]
    height = 0.3 + sum(0.7 + 0.24 * len(group) for group in groups)  # inches
    figure, panels = pyplot.subplots(
        len(groups), 1, figsize=(8, height), squeeze=False, height_ratios=[2 + len(group) for group in groups]
    )
    for case, group, panel in zip(cases, groups, panels[:, 0]):
        bars(panel, sorted(group, key=lambda row: row["total"]))
        panel.set_title("{}, batch {}, {} beam(s), {} thread(s)".format(*case), loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("seconds")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height))
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in THEIRS]
    figure.legend(keys, LABELS, loc="upper right", ncols=3, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def case_of(row):
    return row["model"], row["batch"], row["beams"], row["threads"]


def bars(panel, rows):
    for place, row in enumerate(rows):
        colours = OURS if row["engine"].startswith("whisperkv") else THEIRS
        parts = [row[part] for part in PARTS]
        if None in parts:
            parts, colours = [row["total"]], colours[1:2]
        left = 0.0
        for part, colour in zip(parts, colours):
            panel.barh(place, part, left=left, color=colour, height=0.7)
            left += part
        panel.text(left, place, f" {row['total']:.2f}", va="center")
    panel.set_yticks(range(len(rows)), [row["engine"] for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.12)
    for side in panel.spines.values():
        side.set_visible(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines of engines.py")
    parser.add_argument("picture", type=Path, help="SVG")
    for name in ("batch", "beams", "threads"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help="only these")
    parser.add_argument("--models", nargs="+", help="only these")
    args = parser.parse_args()
    wanted = {"batch": args.batch, "beams": args.beams, "threads": args.threads, "model": args.models}
    rows = [row for row in read(args.rows) if all(not only or row[key] in only for key, only in wanted.items())]
    if not rows:
        parser.error(f"{args.rows} has no such row")
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
