"""What whisperkv's settings do to transcripts, beside the unpatched model in float32.

windows     36 of up to 29.5 s: WER and its difference from the unpatched model's with the 95 % interval of a paired
            bootstrap over the audios, teacher-forced NLL of the unpatched model's text, loops
utterances  100 of some 7 s: the same
speechless  30 clips of noise, hum, chords and melodies: how many texts are the unpatched model's, words, loops
short       30 pieces of a second or less: the same
noisy       30 utterances with white noise 15 dB below them: all of it
foreign     30 sentences of five other languages by a synthesizer, for multilingual models: all of it

Greedy, no timestamps, in the audio's language, at most TOKENS tokens. Settings that this build does not know are left
out, with a line.
"""

import copy
import sys
from itertools import groupby

import audio
import clips
import decoding
import models
import tables
import torch
from audio import errors, interval
from foreign import foreign
from settings import OURS, apply, unknown
from tqdm import tqdm

import whisperkv
from whisperkv.features import log_mel

FULL = "unpatched"
TOKENS = 200
KINDS = ("windows", "utterances", "speechless", "short", "noisy", "foreign")
COLUMNS = {
    "model": ("model", ""), "kind": ("audio", ""), "setting": ("setting", ""), "wer": ("WER %", ".2f"),
    "difference": ("difference", "+.2f"), "low": ("95 % from", "+.2f"), "high": ("to", "+.2f"), "nll": ("NLL", ".4f"),
    "same": ("same text", "d"), "same_words": ("same words", "d"), "audios": ("of", "d"), "words": ("words", "d"),
    "loops": ("loops", "d"), "own_loops": ("of its own", "d"),
}  # fmt: skip


def audios_of(kind, args):
    utterances = audio.utterances(args.data)
    most = 3 if args.quick else None
    if kind == "windows":
        return audio.windows(args.data, most)
    if kind == "utterances":
        return utterances[: most or 100]
    if kind == "foreign":
        return foreign(most or 30)
    if kind == "speechless":
        return clips.speechless(most or 30)
    return getattr(clips, kind)(utterances, most or 30)


def groups_of(items, speeches, batch):
    """(language, items) of every batch of one language: an item stands for each of the speeches."""
    for language, pairs in groupby(zip(speeches, items), key=lambda pair: pair[0].language):
        for group in decoding.batches([item for _, item in pairs], batch):
            yield language, group


@torch.no_grad()
def heard(model, processor, speeches, batch, transcripts=None):
    """(texts, tokens, nats a token of the transcripts; None: of the tokens), the encoder's work done once for both"""
    texts, tokens, nats, count = [], [], 0.0, 0
    for language, group in groups_of(range(len(speeches)), speeches, batch):
        features = log_mel([speeches[number].samples for number in group], processor)
        states = model.get_encoder()(features)
        options = {"max_new_tokens": TOKENS, **decoding.language_options(model, language)}
        found = decoding.generate(model, features, encoder_outputs=copy.copy(states), **options)
        texts += [text.strip() for text in processor.batch_decode(found, skip_special_tokens=True)]
        tokens += [decoding.transcript_tokens(model, row) for row in found]
        forced = [(transcripts or tokens)[number] for number in group]
        starts = [decoding.start_tokens(model, processor, language)] * len(group)
        nats += float(decoding.nats_of_each_at_once(model, features, starts, forced, states).sum())
        count += sum(map(len, forced))
    return texts, tokens, nats / count


def compared(texts, full):
    """With the unpatched model's."""
    said, wanted = ([audio.normalized(text).split() for text in each] for each in (texts, full))
    stuck, stuck_too = (list(map(decoding.loops, each)) for each in (texts, full))
    return {
        "same": sum(map(str.__eq__, texts, full)),
        "same_words": sum(map(list.__eq__, said, wanted)),
        "words": sum(map(len, said)),
        "loops": sum(stuck),
        "own_loops": sum(one and not other for one, other in zip(stuck, stuck_too)),
    }


def rows(model, processor, speeches, batch, settings, progress):
    """One for each setting, the unpatched model first."""
    spoken, transcripts = bool(speeches[0].text), None
    for name, patch in {FULL: None, **settings}.items():
        progress.set_description(name)
        whisperkv.unpatch(model)
        if patch is not None:
            apply(model, patch)
        texts, tokens, nll = heard(model, processor, speeches, batch, transcripts)
        if patch is None:
            full, transcripts = texts, tokens
        row = {"setting": name, "nll": nll, "audios": len(texts), "texts": texts, **compared(texts, full)}
        if spoken:
            wrong, words = errors(speeches, texts)
            if patch is None:
                wrong_in_full = wrong
            row["wer"] = 100 * wrong.sum() / words.sum()
            row["difference"] = 100 * (wrong - wrong_in_full).sum() / words.sum()
            row["low"], row["high"] = interval(wrong - wrong_in_full, words)
        yield row
        progress.update()
    whisperkv.unpatch(model)


def main(args):
    tables.pin(args)
    settings = {name: patch for name, patch in OURS.items() if not args.settings or name in args.settings}
    for name, why in [(name, unknown(patch)) for name, patch in settings.items()]:
        if why:
            print(f"left out: {name}: {why}", file=sys.stderr)
            del settings[name]
    table = tables.Table("accuracy", COLUMNS, args)
    with tqdm(total=len(args.models) * len(args.kinds) * (1 + len(settings)), unit="row") as progress:
        for model_name in args.models:
            model, processor = models.load(model_name, args.base)
            for kind in args.kinds:
                if kind == "foreign" and not model.generation_config.is_multilingual:
                    continue
                speeches = audios_of(kind, args)
                for row in rows(model, processor, speeches, args.batch, settings, progress):
                    table.add(**{"model": model_name, "kind": kind, **row})
    print(f"{table}\n\nA text loops if {decoding.LOOP}.")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help="of %(choices)s")
    parser.add_argument("--settings", nargs="+", choices=OURS, metavar="NAME", help="of %(choices)s")
    parser.add_argument("--batch", type=int, default=8, help="audios decoded together (default: 8)")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
