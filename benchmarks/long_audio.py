"""Long recordings: windows of speech in batches beside one window after another, ours and transformers'. WER and time.

Recordings of ten minutes are joined from LibriSpeech: pauses between utterances, and noise under all of it.
Insertions in pauses, loops and lost words all count as word errors.
"""

import time

import audio
import decoding
import models
import numpy
import tables
import torch

import whisperkv
from whisperkv.transcription.transcribing import FAST

RATE = audio.RATE
COLUMNS = {
    "model": ("model", ""),
    "audio": ("audio", ""),
    "way": ("way", ""),
    "wer": ("WER %", ".2f"),
    "deleted": ("deleted", "d"),
    "inserted": ("inserted", "d"),
    "loops": ("loops", "d"),
    "seconds": ("seconds", ".1f"),
    "rtfx": ("times real time", ".1f"),
}
KINDS = {  # pauses in seconds, drawn between these; noise in dB below the speech, None for none
    "plain": ((0.3, 0.8), None),
    "pauses": ((0.5, 12.0), None),
    "pauses and noise": ((0.5, 12.0), 15),
}
WAYS = {
    "windows of speech": {"vad": True},
    "windows of speech, one at a time": {"vad": True, "batch_size": 1},
    "sequential": {"vad": False},
    "sequential, conditioned": {"vad": False, "condition_on_previous_text": True},
}
TRANSFORMERS = "sequential, by transformers' generate()"


def joined(speeches, pauses, noise, seconds, seed=0):
    """One recording of so many seconds (or as many as there are): utterances, pauses, and brown noise of a constant
    level."""
    random = numpy.random.default_rng(seed)
    pieces, texts, total = [], [], 0.0
    for speech in speeches:
        pause = numpy.zeros(int(random.uniform(*pauses) * RATE), numpy.float32)
        if total and total + speech.seconds + len(pause) / RATE > seconds:
            break
        pieces += [speech.samples, pause]
        texts.append(speech.text)
        total += speech.seconds + len(pause) / RATE
    samples = numpy.concatenate(pieces)
    if noise is not None:
        brown = numpy.cumsum(random.standard_normal(len(samples)))
        brown -= numpy.convolve(brown, numpy.ones(800) / 800, "same")  # no drift
        level = numpy.sqrt(numpy.mean(numpy.concatenate(pieces[::2]) ** 2)) * 10 ** (-noise / 20)
        samples = samples + (brown * level / brown.std()).astype(numpy.float32)
    return audio.Speech("all", samples.astype(numpy.float32), " ".join(texts))


def by_transformers(model, processor, speech):
    features = decoding.long_features_of(processor, [speech])
    tokens = decoding.generate(
        model, features.pop("input_features"), **features, return_timestamps=True,
        condition_on_prev_tokens=False, temperature=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), compression_ratio_threshold=1.35,
        logprob_threshold=-1.0, no_speech_threshold=0.6,
    )  # fmt: skip
    return processor.batch_decode(tokens, skip_special_tokens=True)[0]


def ours(model, processor, samples, options):
    given = {"language": "en"} | options if model.generation_config.is_multilingual else options
    return whisperkv.transcribe(samples, model=model, processor=processor, **given).text


def row_of(speech, text, seconds):
    import jiwer

    found = jiwer.process_words(audio.normalized(speech.text), audio.normalized(text))
    return {
        "wer": 100 * found.wer,
        "deleted": found.deletions,
        "inserted": found.insertions,
        "loops": int(decoding.loops(text)),
        "seconds": seconds,
        "rtfx": speech.seconds / seconds,
        "text": text,
    }


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of a recording (default: %(default)s)")
    parser.add_argument("--audio", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="of %(choices)s")
    parser.add_argument("--ways", nargs="+", default=[*WAYS, TRANSFORMERS], metavar="WAY")
    parser.add_argument("--lossless", action="store_true", help="patch(model) instead of the fastest settings")
    return parser


def main(args):
    tables.pin(args)
    if args.quick:
        args.seconds, args.models, args.audio = 45, args.models[:1], args.audio[-1:]
    speeches = audio.utterances(args.data)
    table = tables.Table("long-audio-lossless" if args.lossless else "long-audio", COLUMNS, args)
    for name in args.models:
        model, processor = models.load(name, args.base)
        whisperkv.patch(model) if args.lossless else whisperkv.patch(model, cross=FAST, weights="int8")
        for kind in args.audio:
            speech = joined(speeches, *KINDS[kind], args.seconds)
            for way in args.ways:
                torch.manual_seed(0)
                start = time.perf_counter()
                if way == TRANSFORMERS:
                    text = by_transformers(model, processor, speech)
                else:
                    text = ours(model, processor, speech.samples, WAYS[way])
                table.add(model=name, audio=kind, way=way, **row_of(speech, text, time.perf_counter() - start))
    print(table)


if __name__ == "__main__":
    main(arguments().parse_args())
