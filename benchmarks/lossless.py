"""patch(model) against transformers: equal windows in every mode of generate(), and how far the logits differ.

bfloat16 is measured as well, where identity is not promised: both round every step, in another order.
"""

import audio
import decoding
import models
import tables
import torch
from tqdm import tqdm

import whisperkv

FALLBACK = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "logprob_threshold": -1.0,
    "compression_ratio_threshold": 1.35,  # of tokens, as the model cards of Whisper advise
    "no_speech_threshold": 0.6,
    "return_timestamps": True,
    "return_segments": True,
}
# mode: (whether whole recordings rather than windows, how many at once, options of generate)
MODES = {
    "greedy": (False, 12, {}),
    "beam 5": (False, 4, {"num_beams": 5}),
    "sampling, seeded": (False, 12, {"do_sample": True, "temperature": 0.8}),
    "segment timestamps": (False, 12, {"return_timestamps": True, "return_segments": True}),
    "word timestamps": (False, 4, {"return_token_timestamps": True}),
    "prompt lookup": (False, 1, {"prompt_lookup_num_tokens": 3}),
    "long-form, fallback": (True, 10, {**FALLBACK, "condition_on_prev_tokens": False}),
    "long-form, fallback, previous text": (True, 10, {**FALLBACK, "condition_on_prev_tokens": True}),
}
ROUNDED_MODES = ("greedy", "beam 5")  # in bfloat16
SEED = 1

COLUMNS = {
    "model": ("model", ""),
    "dtype": ("dtype", ""),
    "mode": ("mode", ""),
    "equal": ("equal", "d"),
    "items": ("of", "d"),
    "tokens": ("tokens", "d"),
    "decodes": ("caches filled", "d"),
    "wer_transformers": ("WER % transformers", ".2f"),
    "wer": ("WER % whisperkv", ".2f"),
}
LOGIT_COLUMNS = {
    "model": ("model", ""),
    "dtype": ("dtype", ""),
    "steps": ("tokens forced", "d"),
    "largest": ("largest difference of a logit", ".2g"),
    "error_transformers": ("mean error against float32: transformers", ".4f"),
    "error": ("whisperkv", ".4f"),
    "same_choice": ("same best token, %", ".3f"),
}


def run(model, processor, speeches, dtype, long, batch, options):
    """What generate() makes of each: (tokens, and times if asked for), and the texts."""
    found, texts = [], []
    words = options.get("return_token_timestamps", False)
    model.set_attn_implementation("eager" if words else "sdpa")  # only eager attention hands out its weights
    for group in decoding.batches(speeches, batch):
        torch.manual_seed(SEED)
        if long:
            inputs = decoding.long_features_of(processor, group, dtype)
            output = decoding.generate(model, inputs.pop("input_features"), **inputs, **options)
        else:
            output = decoding.generate(model, decoding.features_of(processor, group, dtype), **options)
        output = {"sequences": output} if isinstance(output, torch.Tensor) else output
        texts += processor.batch_decode(output["sequences"], skip_special_tokens=True)
        for row, sequence in enumerate(output["sequences"]):
            tokens, times = decoding.transcript_tokens(model, sequence), None
            if "segments" in output:
                times = [(float(s["start"]), float(s["end"]), s["tokens"].tolist()) for s in output["segments"][row]]
            elif words:
                times = output["token_timestamps"][row].tolist()[: len(tokens) - 1]
            found.append((tokens, times))
    model.set_attn_implementation("sdpa")
    return found, texts


def compared(model, processor, speeches, dtype, mode):
    """One row of the first table."""
    whisperkv.unpatch(model)
    theirs, their_texts = run(model, processor, speeches, dtype, *MODES[mode])
    whisperkv.patch(model)
    ours, our_texts = run(model, processor, speeches, dtype, *MODES[mode])
    stats = whisperkv.stats(model)
    assert not stats.note, stats.note
    whisperkv.unpatch(model)
    return {
        "equal": sum(a == b for a, b in zip(theirs, ours)),
        "items": len(ours),
        "tokens": sum(len(tokens) for tokens, _ in ours),
        "decodes": stats.decodes,
        "wer_transformers": audio.word_error_rate(speeches, their_texts),
        "wer": audio.word_error_rate(speeches, our_texts),
    }


def logits(model, processor, speeches, dtype, exact=None):
    """One row of the second table: the greedy transcript of transformers, forced through both caches.

    exact  the same weights in float32, to tell whose rounding is the worse
    """
    row = {"steps": 0, "largest": 0.0, "same_choice": 0, "error_transformers": 0.0, "error": 0.0}
    start = decoding.start_tokens(model, processor)
    for group in decoding.batches(speeches, 6):
        features = decoding.features_of(processor, group, dtype)
        whisperkv.unpatch(model)
        transcripts = [decoding.transcript_tokens(model, tokens) for tokens in decoding.generate(model, features)]
        given = (features, [start] * len(group), transcripts)
        theirs = list(decoding.forced(model, *given))
        truth = [step for step, _, _ in decoding.forced(exact, *given)] if exact else [None] * len(theirs)
        whisperkv.patch(model)
        for (their_logits, _, alive), (our_logits, _, _), right in zip(theirs, decoding.forced(model, *given), truth):
            a, b = their_logits[alive], our_logits[alive]
            row["steps"] += len(a)
            row["largest"] = max(row["largest"], float((a - b).abs().max()))
            row["same_choice"] += int((a.argmax(-1) == b.argmax(-1)).sum())
            if exact:
                row["error_transformers"] += float((a - right[alive]).abs().mean(-1).sum())
                row["error"] += float((b - right[alive]).abs().mean(-1).sum())
    whisperkv.unpatch(model)
    for key in ("error_transformers", "error"):
        row[key] = row[key] / row["steps"] if exact else None
    row["same_choice"] *= 100 / row["steps"]
    return row


def same_weights_in_float32(model, name, base):
    """A float32 model of the rounded weights, that is given the rounded model's encoder states."""
    exact, _ = models.load(name, base)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    encoder = model.get_encoder()

    def states(features, *args, **kwargs):
        output = encoder(features)
        output.last_hidden_state = output.last_hidden_state.float()
        return output

    exact.get_encoder().forward = states
    return exact


def main(args):
    tables.pin(args)
    most = 3 if args.quick else None
    speeches, recordings = audio.windows(args.data, most), audio.recordings(args.data, most and 2)
    table, logit_table = tables.Table("lossless", COLUMNS, args), tables.Table("lossless-logits", LOGIT_COLUMNS, args)
    rounded = [mode for mode in args.modes if mode in ROUNDED_MODES]
    progress = tqdm(total=len(args.models) * (len(args.modes) + len(rounded) + 2), unit="row")
    for name in args.models:
        for dtype, modes in ((torch.float32, args.modes), (torch.bfloat16, rounded)):
            model, processor = models.load(name, args.base, dtype)
            decoding.remember_encoder(model)
            label = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
            progress.set_description(f"{name} {label['dtype']}: logits")
            exact = None if dtype == torch.float32 else same_weights_in_float32(model, name, args.base)
            logit_table.add(**label, **logits(model, processor, speeches, dtype, exact))
            progress.update()
            for mode in modes:
                progress.set_description(f"{name} {label['dtype']}: {mode}")
                items = recordings if MODES[mode][0] else speeches
                table.add(**label, mode=mode, **compared(model, processor, items, dtype, mode))
                progress.update()
    progress.close()
    print(
        f"\n{len(speeches)} windows, {len(recordings)} recordings. Equal: every token, and every time that was asked for.\n"
    )
    print(f"lossless\n\n{table}\n\nlossless-logits\n\n{logit_table}\n")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE", help="of %(choices)s")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
