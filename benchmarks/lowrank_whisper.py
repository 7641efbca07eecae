"""Accuracy of Whisper's low-rank caches: 30 s windows, and single utterances padded to 30 s.

A configuration is written   format [keep]
for example                  "latent_int4" (as it is without a calibration), "calibrated_int3", "model 0.25" (the share
of a token's keys and values that the self-attention's cache keeps), "calibrated_int3 0.25". "trained_int2 0.125" was
taught by MLATrainer, in 2 bits and an eighth, --epochs times through what it was calibrated on; "trained 0.125" with
the audio in 4 bits, and is measured with the audio as it is.

The speakers are two halves. What is measured on one half was calibrated on the other: on its windows, and on every
fifth of its utterances alone, whose padding is heard too. With --synthetic on speech by espeak-ng too.

NLL: nats a token of the full model's own greedy transcript, forced through the caches in one pass of the decoder. The
interval is that of a paired bootstrap over the audios.
"""

import tempfile
from pathlib import Path

import audio
import decoding
import eviction
import models
import synthetic
import tables
from audio import errors, interval
from tqdm import tqdm

import whisperkv
from whisperkv import CrossConfig, EvictionConfig, lowrank
from whisperkv.calibration import rank_of
from whisperkv.lowrank import calibrate

CONFIGS = [
    "full",
    "latent_int4",
    "calibrated_int4",
    "calibrated_int3",
    "calibrated_int2",
    "model 0.5",
    "model 0.25",
    "model 0.1875",
    "model 0.125",
    "calibrated_int3 0.25",
    "calibrated_int2 0.1875",
]
QUICK = ["full", "latent_int4", "calibrated_int3 0.25"]
SETS = {"windows": audio.windows, "utterances": audio.utterances}
ALONE = 5  # every so-many-th utterance is heard alone

COLUMNS = {
    "model": ("model", ""),
    "config": ("caches", ""),
    "wer": ("WER %", ".2f"),
    "more": ("more than full", "+.2f"),
    "least": ("95 % from", "+.2f"),
    "most": ("to", "+.2f"),
    "nll": ("NLL", ".4f"),
    "loops": ("loops", "d"),
    "same": ("same text", "d"),
    "audios": ("of", "d"),
    "cross": ("cross cache, times below fp16 K/V", ".1f"),
    "own": ("self cache, times below K/V of its slots", ".1f"),
}


def parsed(text, calibration):
    """The arguments of patch() that a text describes; None for "full", which is not patched."""
    if text == "full":
        return None
    form, *keep = text.split()
    own = form.startswith(("calibrated_", "trained_"))
    form = f"latent_{form.partition('_')[2]}" if own else "model" if form == "trained" else form
    cross = CrossConfig(form, calibration=calibration if own else None)
    low = EvictionConfig("all", keep=float(keep[0]), calibration=calibration) if keep else None
    return {"cross": cross, "eviction": low}


def halves(speeches):
    """Two lists of numbers: those of every other speaker."""
    speakers = sorted({speech.speaker for speech in speeches})
    return [[i for i, speech in enumerate(speeches) if speakers.index(speech.speaker) % 2 == half] for half in (0, 1)]


def prepared(model, configs, folder, args):
    """{configuration: of each half the file that was made of the other}"""
    files = {config: [] for config in configs}
    windows, utterances = audio.windows(args.data), audio.utterances(args.data)
    made = synthetic.recordings(args.synthetic) if args.synthetic else []
    for half in (0, 1):
        together = [windows[i].samples for i in halves(windows)[1 - half]]
        alone = [utterances[i].samples for i in halves(utterances)[1 - half]]
        plain = calibrate(model, together + alone[::ALONE] + made, Path(folder, f"{half}.safetensors"))
        for config in configs:
            files[config].append(plain)
            if not config.startswith("trained"):
                continue
            cross, low = parsed(config, plain).values()
            ratio = 1 / low.keep if low else 1
            lowrank.convert_to_mla(model, ratio, calibration=str(plain), cache_bits=cross.bits or 4, verbose=False)
            lowrank.MLATrainer(model, None).train(alone + made, args.epochs)
            files[config][half] = Path(folder, f"{half} {config}.safetensors")
            files[config][half].write_bytes(model.lowrank.calibration)
            lowrank.restore(model)
    return files


def measured(model, processor, tasks, settings):
    """(texts, loss, its tokens, bytes of the cross caches, audios, how much smaller the self-attention's is)"""
    texts, total, count, size, audios, slot = [], 0.0, 0, 0, 0, None
    if settings is not None:
        whisperkv.patch(model, **settings)
    for task in tasks:
        sequences = decoding.generate(model, task.features)
        texts += processor.batch_decode(sequences, skip_special_tokens=True)
        if settings is not None:
            stats = whisperkv.stats(model)
            assert not stats.note, stats.note
            size, audios = size + stats.cross_bytes, audios + stats.audios
        for forced in task.forced:
            loss, length = decoding.negative_log_likelihood_at_once(model, *forced)
            total, count = total + loss, count + length
    if settings is not None and settings["eviction"] is not None:
        slot = 2 * model.config.d_model / rank_of(settings["eviction"].keep, model.config.d_model)
    whisperkv.unpatch(model)
    return texts, total, count, size, audios, slot


def main(args):
    tables.pin(args)
    configs = args.configs or (QUICK if args.quick else CONFIGS)
    for config in configs:
        parsed(config, "a file")  # a mistake shows before an hour has gone
    speeches = {name: SETS[name](args.data)[: 12 if args.quick else None] for name in args.sets}
    done = {name: tables.Table(f"lowrank-{name}", COLUMNS, args) for name in args.sets}
    progress = tqdm(total=len(args.models) * len(args.sets) * len(configs), unit="row")
    for model_name in args.models:
        model, processor = models.load(model_name, args.base)
        config = model.config
        theirs = 2 * config.decoder_layers * config.max_source_positions * config.d_model * 2
        with tempfile.TemporaryDirectory() as folder:
            files = prepared(model, configs, folder, args)
            decoding.remember_encoder(model)
            for name in args.sets:
                order = halves(speeches[name])
                heard = [[speeches[name][i] for i in numbers] for numbers in order]
                progress.set_description(f"{model_name}, {name}: full, for the texts")
                tasks = [eviction.window_tasks(model, processor, each, args.batch) for each in heard]
                both = [speech for each in heard for speech in each]
                full = [t for each in tasks for task in each for _, _, said in task.forced for t in said]
                full = processor.batch_decode(full, skip_special_tokens=True)
                wrong_full, words = errors(both, full)
                for text in configs:
                    progress.set_description(f"{model_name}, {name}: {text}")
                    rows = [
                        measured(model, processor, its, parsed(text, file)) for its, file in zip(tasks, files[text])
                    ]
                    texts = [t for row in rows for t in row[0]]
                    loss, count, size, audios = (sum(row[i] for row in rows) for i in range(1, 5))
                    wrong, _ = errors(both, texts)
                    least, most = interval(wrong - wrong_full, words)
                    done[name].add(
                        model=model_name,
                        config=text,
                        wer=float(100 * wrong.sum() / words.sum()),
                        more=float(100 * (wrong - wrong_full).sum() / words.sum()),
                        least=least,
                        most=most,
                        nll=loss / count,
                        loops=sum(map(decoding.loops, texts)),
                        same=sum(map(str.__eq__, texts, full)),
                        audios=len(texts),
                        cross=theirs * audios / size if size else None,
                        own=rows[0][5],
                    )
                    progress.update()
    progress.close()
    for name, heard in speeches.items():
        seconds = sum(speech.seconds for speech in heard)
        print(f"\n{len(heard)} {name}, {seconds:.0f} s\n\n{done[name].path.stem}\n\n{done[name]}")
    print(f"\nAn audio loops if {decoding.LOOP}.")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET", help="of %(choices)s")
    parser.add_argument("--configs", nargs="+", metavar="CONFIG", help="see above (default: all that are of interest)")
    parser.add_argument(
        "--synthetic", type=int, nargs="?", const=2, metavar="EVERY",
        help="calibrate and train on speech by espeak-ng too: on each EVERY-th of its passages (default: 2)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=3, help="of training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=6, help="audios decoded together (default: 6)")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
