"""Accuracy of the cross-attention cache in every format: 30 s windows, and single utterances padded to 30 s.

A configuration is written   format [group] [padding|silence] [policy recent+heavy ...]
for example                  "int8", "latent_int4 64", "model padding", "latent_int4 padding heavy_hitter 64+32",
or "full", which is transformers. What follows the trim is of the self-attention cache, as in eviction.py.

NLL: nats a token of the full model's own greedy transcript, forced through the cache: in one pass of the decoder, or
token by token where tokens are evicted. The interval is that of a paired bootstrap over the audios.
"""

import audio
import decoding
import eviction
import models
import tables
from audio import errors, interval
from tqdm import tqdm

import whisperkv
from whisperkv import CrossConfig
from whisperkv.config import FORMATS, TRIMS

CONFIGS = [
    "full",
    *FORMATS,
    "int4 64",
    "int4 128",
    "latent_int4 64",
    "latent_int4 128",
    "model padding",
    "model silence",
    "latent_int4 padding",
    "latent_int4 padding heavy_hitter 64+32",
]
QUICK = ["full", "model", "int4 64", "latent_int4 padding", "latent_int4 padding heavy_hitter 16+8"]
SETS = {"windows": audio.windows, "utterances": audio.utterances}

COLUMNS = {
    "model": ("model", ""),
    "config": ("cross cache", ""),
    "wer": ("WER %", ".2f"),
    "more": ("more than full", "+.2f"),
    "least": ("95 % from", "+.2f"),
    "most": ("to", "+.2f"),
    "nll": ("NLL", ".4f"),
    "loops": ("loops", "d"),
    "same": ("same text", "d"),
    "audios": ("of", "d"),
    "tokens": ("tokens", "d"),
    "kept": ("frames kept", ".2f"),
    "kib": ("cross cache, KiB an audio", ".0f"),
    "kib_transformers": ("transformers", ".0f"),
    "smaller": ("times smaller", ".1f"),
}


def parsed(text):
    """The arguments of patch() that a text describes; None for "full", which is not patched."""
    if text == "full":
        return None
    form, *rest = text.split()
    group = int(rest.pop(0)) if rest and rest[0].isdecimal() else CrossConfig.group
    trim = rest.pop(0) if rest and rest[0] in TRIMS else CrossConfig.trim
    return {"cross": CrossConfig(form, trim, group=group), "eviction": eviction.parsed(" ".join(rest) or "full")}


def measured(model, processor, tasks, settings):
    """One row, and the texts: decode the tasks, and force their transcripts, with these caches."""
    config = model.config
    theirs = 2 * config.decoder_layers * config.max_source_positions * config.d_model * model.dtype.itemsize
    texts, total, count, tokens, audios, frames, kept, size = [], 0.0, 0, 0, 0, 0, 0, 0
    at_once = settings is None or settings["eviction"] is None
    likelihood = decoding.negative_log_likelihood_at_once if at_once else decoding.negative_log_likelihood
    if settings is not None:
        whisperkv.patch(model, **settings)
    for task in tasks:
        sequences = decoding.generate(model, task.features)
        texts += processor.batch_decode(sequences, skip_special_tokens=True)
        tokens += sum(len(decoding.transcript_tokens(model, sequence)) for sequence in sequences)
        audios += len(sequences)
        if settings is not None:
            stats = whisperkv.stats(model)
            assert not stats.note, stats.note
            frames, kept = frames + stats.audios * stats.frames, kept + stats.frames_kept
            size += stats.cross_bytes
            assert stats.cross_bytes_transformers == theirs * len(sequences)
        for forced in task.forced:
            loss, length = likelihood(model, *forced)
            total, count = total + loss, count + length
    whisperkv.unpatch(model)
    kib = (theirs if settings is None else size / audios) / 1024
    return {
        "nll": total / count,
        "loops": sum(map(decoding.loops, texts)),
        "audios": audios,
        "tokens": tokens,
        "kept": kept / frames if frames else 1.0,
        "kib": kib,
        "kib_transformers": theirs / 1024,
        "smaller": theirs / 1024 / kib,
    }, texts


def main(args):
    tables.pin(args)
    configs = args.configs or (QUICK if args.quick else CONFIGS)
    for config in configs:
        parsed(config)  # a mistake shows before an hour has gone
    speeches = {name: SETS[name](args.data)[: 3 if args.quick else None] for name in args.sets}
    done = {name: tables.Table(f"formats-{name}", COLUMNS, args) for name in args.sets}
    progress = tqdm(total=len(args.models) * len(args.sets) * len(configs), unit="row")
    for model_name in args.models:
        model, processor = models.load(model_name, args.base)
        decoding.remember_encoder(model)
        if args.listen:
            whisperkv.listen(processor)
        for name in args.sets:
            progress.set_description(f"{model_name}, {name}: full, for the texts")
            tasks = eviction.window_tasks(model, processor, speeches[name], args.batch)
            forced = [transcript for task in tasks for _, _, transcripts in task.forced for transcript in transcripts]
            full = processor.batch_decode(forced, skip_special_tokens=True)
            wrong_full, words = errors(speeches[name], full)
            for config in configs:
                progress.set_description(f"{model_name}, {name}: {config}")
                row, texts = measured(model, processor, tasks, parsed(config))
                wrong, _ = errors(speeches[name], texts)
                least, most = interval(wrong - wrong_full, words)
                row |= {"texts": texts} if args.texts else {}
                done[name].add(
                    model=model_name,
                    config=f"{config}, heard by Silero" if args.listen and "silence" in config else config,
                    wer=float(100 * wrong.sum() / words.sum()),
                    more=float(100 * (wrong - wrong_full).sum() / words.sum()),
                    least=least,
                    most=most,
                    same=sum(map(str.__eq__, texts, full)),
                    **row,
                )
                progress.update()
    progress.close()
    for name, heard in speeches.items():
        seconds = sum(speech.seconds for speech in heard)
        words = sum(len(audio.normalized(speech.text).split()) for speech in heard)
        print(f"\n{len(heard)} {name}, {seconds:.0f} s, {words} words\n\n{done[name].path.stem}\n\n{done[name]}")
    print(f"\nAn audio loops if {decoding.LOOP}.")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET", help="of %(choices)s")
    parser.add_argument("--configs", nargs="+", metavar="CONFIG", help="see above (default: all that are of interest)")
    parser.add_argument("--batch", type=int, default=12, help="audios decoded together (default: 12)")
    parser.add_argument("--listen", action="store_true", help="let Silero find the silence, not the energy")
    parser.add_argument("--texts", action="store_true", help="put the transcripts into the JSON lines as well")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
