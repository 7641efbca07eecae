"""Neighbouring frames merged: likelihood by the share of the pairs and the layer before which they become one, and the
encoder's time.

windows     the longest ones of up to 29.5 s, with and without trim
utterances  single ones of some 7 s, with trim

NLL: nats a token of the lossless model's own greedy transcript. Encoder: CPU time of a full window on one thread, the
settings taken by turns, the median of them.
"""

import time
from statistics import median

import audio
import decoding
import models
import tables
import torch
from tqdm import tqdm

import whisperkv
from whisperkv import CrossConfig, encoder
from whisperkv.features import log_mel
from whisperkv.merge import merging_layer

TOKENS = 200
KINDS = {"windows": ("off", "padding"), "utterances": ("padding",)}  # with which trims
COLUMNS = {
    "model": ("model", ""), "kind": ("audio", ""), "trim": ("trim", ""), "layer": ("before layer", "d"),
    "share": ("merge", ".2f"), "frames": ("frames", ".0f"), "nll": ("NLL", ".4f"), "tokens": ("tokens", "d"),
}  # fmt: skip
TIMES = {
    "model": ("model", ""), "weights": ("weights", ""), "share": ("merge", ".2f"), "frames": ("frames in the end", "d"),
    "ms": ("encoder, ms", ".0f"), "ratio": ("of that without", ".2f"),
}  # fmt: skip


def cases(trims, layers):
    """(trim, layer, share)"""
    middle = merging_layer(layers)
    yield from ((trims[0], middle, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    for layer in sorted({0, middle - 1, middle + 1} - {middle}):
        yield from ((trims[0], layer, share) for share in (0.5, 1.0))
    for trim in trims[1:]:
        yield from ((trim, middle, share) for share in (0.0, 0.5, 1.0))


def speeches_of(kind, args):
    most = 2 if args.quick else args.audios
    if kind == "windows":
        return sorted(audio.windows(args.data), key=lambda speech: -speech.seconds)[:most]
    found = audio.utterances(args.data)
    return found[:: max(len(found) // most, 1)][:most]


class Judge:
    """What a setting makes of these audios."""

    def __init__(self, model, processor, speeches, batch):
        self.model, self.start = model, decoding.start_tokens(model, processor)
        self.features = [
            log_mel([speech.samples for speech in group], processor) for group in decoding.batches(speeches, batch)
        ]
        whisperkv.patch(model)
        found = [decoding.generate(model, features, max_new_tokens=TOKENS) for features in self.features]
        self.transcripts = [[decoding.transcript_tokens(model, row) for row in rows] for rows in found]

    def row(self, trim, layer, share):
        encoder.merging_layer = lambda layers: layer
        whisperkv.patch(self.model, cross=CrossConfig(trim=trim, merge=share))
        total, count, frames, audios = 0.0, 0, 0, 0
        for features, transcripts in zip(self.features, self.transcripts):
            prompts = [self.start] * len(transcripts)
            nats, tokens = decoding.negative_log_likelihood_at_once(self.model, features, prompts, transcripts)
            stats = whisperkv.stats(self.model)
            total, count = total + nats, count + tokens
            frames, audios = frames + stats.frames_kept, audios + stats.audios
        encoder.merging_layer = merging_layer
        return {"frames": frames / audios, "nll": total / count, "tokens": count}


@torch.no_grad()
def times(model, features, weights, turns):
    """Seconds of each share, and the frames that are left."""
    shares = (0.0, 0.5, 1.0)
    seconds, frames = {share: [] for share in shares}, {}
    for turn in range(turns + 1):  # the first packs the matrices
        for share in shares:
            whisperkv.patch(model, cross=CrossConfig(merge=share), weights=weights)
            model.get_encoder()(features)
            began = time.process_time()
            states = model.get_encoder()(features).last_hidden_state
            if turn:
                seconds[share].append(time.process_time() - began)
            frames[share] = 1 + int((states[0].diff(dim=0) != 0).any(-1).sum())
    return [(share, frames[share], median(each)) for share, each in seconds.items()]


def main(args):
    tables.pin(args)
    table = tables.Table("merging", COLUMNS, args)
    clock = tables.Table("merging-encoder", TIMES, args)
    for model_name in args.models:
        model, processor = models.load(model_name, args.base)
        longest = max(audio.windows(args.data), key=lambda speech: speech.seconds)
        for weights in ("model", "int8") * args.times:
            found = times(model, log_mel([longest.samples], processor), weights, 1 if args.quick else 7)
            for share, frames, each in found:
                row = {"share": share, "frames": frames, "ms": 1e3 * each, "ratio": each / found[0][2]}
                clock.add(model=model_name, weights=weights, **row)
        for kind in args.kinds:
            judge = Judge(model, processor, speeches_of(kind, args), args.batch)
            for trim, layer, share in tqdm([*cases(KINDS[kind], model.config.encoder_layers)], f"{model_name}, {kind}"):
                row = judge.row(trim, layer, share)
                table.add(model=model_name, kind=kind, trim=trim, layer=layer, share=share, **row)
        whisperkv.unpatch(model)
    print(f"{table}\n\n{clock}")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, metavar="KIND", help="of %(choices)s")
    parser.add_argument("--audios", type=int, default=12, help="of each kind (default: 12)")
    parser.add_argument("--batch", type=int, default=6, help="audios decoded together (default: 6)")
    parser.add_argument("--no-times", dest="times", action="store_false", help="leave out the encoder's time")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
