"""Times of decode steps over Whisper's low-rank caches beside those that they would replace, taken turn by turn."""

import copy
import tempfile
from pathlib import Path

import audio
import models
import tables
import torch
from steps import RUN, Decode, Turns, medians
from tqdm import tqdm

import whisperkv
from whisperkv import CrossConfig, EvictionConfig
from whisperkv.lowrank import calibrate

ROWS, TOKENS = (1, 8), (32, 200)
HEARD = 12  # utterances that the calibration hears

# What is measured, and beside what.
PAIRS = {
    "latent_int4 with calibration": ({"cross": "latent_int4"}, {"cross": "latent_int4!"}),
    "latent_int3": ({"cross": "latent_int4"}, {"cross": "latent_int3!"}),
    "latent_int2": ({"cross": "latent_int4"}, {"cross": "latent_int2!"}),
    "keep=0.5": ({}, {"keep": 0.5}),
    "keep=0.25": ({}, {"keep": 0.25}),
    "keep=0.125": ({}, {"keep": 0.125}),
    "latent_int3, keep=0.25": ({"cross": "latent_int4"}, {"cross": "latent_int3!", "keep": 0.25}),
}
COLUMNS = {
    "model": ("model", ""),
    "pair": ("caches", ""),
    "weights": ("weights", ""),
    "rows": ("batch", "d"),
    "tokens": ("tokens", "d"),
    "theirs": ("before, ms", ".3f"),
    "ours": ("low rank, ms", ".3f"),
    "ratio": ("ratio", ".2f"),
}


def settings_of(given, file, weights):
    """The arguments of patch(). A format with ! reads the file."""
    form = given.get("cross", "model")
    cross = CrossConfig(form.rstrip("!"), calibration=file if form.endswith("!") else None)
    keep = given.get("keep")
    return {
        "cross": cross,
        "eviction": keep and EvictionConfig("all", keep=keep, calibration=file),
        "weights": weights,
    }


def main(args):
    tables.pin(args)
    table = tables.Table(f"lowrank-steps-{args.threads}", COLUMNS, args)
    rounds, pairs = (1, dict(list(PAIRS.items())[1:2])) if args.quick else (3, PAIRS)
    progress = tqdm(total=len(args.models) * len(args.weights) * len(pairs) * len(ROWS) * len(TOKENS), unit="row")
    for name in args.models:
        model, _ = models.load(name, args.base)
        with tempfile.TemporaryDirectory() as folder:
            heard = [speech.samples for speech in audio.utterances(args.data)[:: 100 // HEARD]]
            file = calibrate(model, heard, Path(folder, "file"), verbose=False)
            twin = copy.deepcopy(model, {id(each): each for each in model.parameters()})  # the same weights
            for weights in args.weights:
                for pair, (before, after) in pairs.items():
                    whisperkv.patch(twin, **settings_of(before, file, weights))
                    whisperkv.patch(model, **settings_of(after, file, weights))
                    for rows in ROWS:
                        states = torch.randn(rows, 1500, model.config.d_model)
                        for tokens in TOKENS:
                            times = [[], []]
                            for _ in range(rounds):
                                turns = Turns(*(Decode(each, states, tokens + 8 - RUN) for each in (twin, model)))
                                for _ in range(RUN):
                                    turns.take(times)
                            sizes = dict(weights=weights, rows=rows, tokens=tokens)
                            table.add(model=name, pair=pair, **sizes, **medians(times))
                            progress.update()
    progress.close()
    print(f"\nms a step\n\n{table}")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--weights", nargs="+", default=["model", "int8"], help="as of patch() (default: model int8)")
    return parser


if __name__ == "__main__":
    with torch.no_grad():
        main(arguments().parse_args())
