"""The table with which this began: what a smaller self-attention cache does to memory, words, likelihood and speed.

full            patch(model), which keeps every token
window 128      the newest 128 tokens
heavy 64+32     the newest 64 tokens, and the 32 that attention has dwelt on most
heavy 32+16     the same with half as much

beside transformers itself, on LibriSpeech joined to windows of up to 29.5 s, each setting in a process of its own.
Greedy, no timestamps, English. Intervals are of 95 %, by a paired bootstrap over the windows.
"""

import json

import audio
import models
import tables
from tqdm import tqdm

from whisperkv import evaluation

SETTINGS = {
    "unpatched": "transformers",
    "lossless": "full",
    "policy=window,recent=128,heavy=0": "window 128",
    "recent=64,heavy=32": "heavy 64+32",
    "recent=32,heavy=16": "heavy 32+16",
}
COLUMNS = {
    "model": ("model", ""), "cache": ("cache", ""), "own": ("self cache, MB", ".2f"),
    "smaller": ("of transformers'", ".2f"), "both": ("both caches, MB", ".1f"), "peak": ("peak memory, MB", ".0f"),
    "wer": ("WER %", ".2f"), "low": ("difference from", "+.2f"), "high": ("to", "+.2f"), "nll": ("NLL", ".4f"),
    "loops": ("loops", "d"), "rtfx": ("RTFx", ".1f"),
}  # fmt: skip


def named(results, folder, name):
    """What a result says of itself, by the model's name in place of where its weights lie, and without the texts."""
    told = json.loads(json.dumps(results.to_dict()).replace(folder, name))
    return {key: value for key, value in told.items() if key != "files"}


def rows(results, folder, name):
    for each in results:
        low, high = each.wer_difference_interval or (None, None)
        yield {
            "cache": SETTINGS[each.setting],
            "own": each.self_bytes / 1e6,
            "smaller": each.self_bytes / each.self_bytes_transformers,
            "both": each.cache_bytes / 1e6,
            "peak": each.peak_memory / 1e6,
            "wer": each.wer,
            "low": low,
            "high": high,
            "nll": each.nll,
            "loops": each.loops,
            "rtfx": each.rtfx,
            "result": named(each, folder, name),
        }


def main(args):
    tables.pin(args)
    speeches = audio.windows(args.data, 3 if args.quick else args.count)
    audios = [evaluation.Audio(f"window {n}", one.text, [one.samples]) for n, one in enumerate(speeches)]
    options = evaluation.Options("en", args.batch, repeat=args.repeat, threads=args.threads)
    table, lines = tables.Table("original", COLUMNS, args), {}
    with tqdm(total=len(args.models) * len(SETTINGS) * (1 + args.repeat) * len(audios), unit="window") as progress:
        for name in args.models:
            folder = str(args.base or models.base_folder()) if name == "base" else name
            results = evaluation.compare(
                folder,
                audios,
                [each for each in SETTINGS if each != "unpatched"],
                options,
                lambda setting: progress.set_description(f"{name}: {SETTINGS[setting]}"),
                progress.update,
            )
            for row in rows(results, folder, name):
                table.add(model=name, **row)
            lines |= named(results[-1], folder, name)["signatures"]
    print(f"{table}\n")
    print("\n".join(f"    {line}" for line in lines.values()))


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--count", type=int, help="windows (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="windows decoded together (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="timed passes; their median counts (default: 3)")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
