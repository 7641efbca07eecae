"""What formats.py and eviction.py measured: nats a token beside the full cache, against what the cache takes.

    python benchmarks/accuracy_plot.py FOLDER          formats.svg and eviction.svg go there

Readable on white and on dark pages, as engines_plot.py's.
"""

import argparse
import re
from pathlib import Path

from engines_plot import OURS, THEIRS, prepared, read

RESULTS = Path(__file__).parent / "results"
BUDGETS = {"heavy_hitter": re.compile(r"heavy_hitter (\d+)\+(\d+), decay 0\.95$"),
           "magnitude": re.compile(r"magnitude (\d+)\+(\d+)$"),
           "window": re.compile(r"window (\d+)()$")}  # fmt: skip


def rows_of(name, model):
    return [row for row in read(RESULTS / name, "config") if row["model"] == model]


def beside_full(rows):
    """{config: nats a token more than the full cache's}"""
    full = next(row["nll"] for row in rows if row["config"] == "full")
    return {row["config"]: row["nll"] - full for row in rows}


def formats(model="tiny.en"):
    """[(name, times smaller, nats more)] of all frames and all tokens; a number in a name is a group of frames"""
    rows = rows_of("formats-windows.jsonl", model)
    more = beside_full(rows)
    known = [row for row in rows if re.fullmatch(r"(?!full)\w+( \d+)?", row["config"])]
    return [(row["config"], row["smaller"], more[row["config"]]) for row in known]


def budgets(model="tiny.en"):
    """{policy: [(slots, nats more)]}, the prompt pinned"""
    more = beside_full(rows_of("eviction.jsonl", model))
    found = {}
    for policy, form in BUDGETS.items():
        matches = ((form.match(config), nats) for config, nats in more.items())
        slots = ((sum(int(number or 0) for number in match.groups()), nats) for match, nats in matches if match)
        found[policy] = sorted(slots)
    return found


def axes(pyplot, across, height):
    figure, panel = pyplot.subplots(figsize=(8, height))
    panel.set_xlabel(across)
    panel.set_ylabel("nats a token more")
    panel.axhline(0, color=THEIRS[0], linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})


def draw(folder):
    pyplot = prepared()
    figure, panel = axes(pyplot, "times smaller than transformers' cache of the audio", 3.6)
    for name, smaller, nats in formats():
        panel.plot(smaller, nats, "o", color=OURS[1])
        panel.annotate(name, (smaller, nats), xytext=(5, 3), textcoords="offset points")
    panel.set_xscale("log")
    panel.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    panel.minorticks_off()
    panel.margins(x=0.12, y=0.12)
    save(figure, folder / "formats.svg")

    figure, panel = axes(pyplot, "slots of a sequence", 2.8)
    for (policy, points), colour in zip(budgets().items(), (OURS[0], OURS[2], THEIRS[1])):
        panel.plot(*zip(*points), "o-", color=colour, label=policy)
    panel.set_xticks(sorted({slots for points in budgets().values() for slots, _ in points}))
    panel.legend(frameon=False)
    save(figure, folder / "eviction.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    draw(parser.parse_args().folder)


if __name__ == "__main__":
    main()
