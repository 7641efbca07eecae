"""patch(model) against transformers: equal windows in every mode of generate(), and how far the logits differ.

The cross-attention cache is that of "model", and in some modes also the exact "latent". bfloat16 is measured as well,
where identity is not promised: both round every step, in another order.
"""

import audio
import decoding
import models
import tables
import torch
from tqdm import tqdm

import whisperkv
from whisperkv import CrossConfig

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
ROUNDED_MODES = LATENT_MODES = ("greedy", "beam 5")  # also in bfloat16, and with the latent format
SEED = 1
TABLES = ("lossless", "lossless-logits")
DTYPES = ("float32", "bfloat16")

COLUMNS = {
    "model": ("model", ""),
    "dtype": ("dtype", ""),
    "mode": ("mode", ""),
    "format": ("cross-attention", ""),
    "equal": ("equal", "d"),
    "items": ("of", "d"),
    "tokens": ("tokens", "d"),
    "decodes": ("caches filled", "d"),
    "wer_transformers": ("WER % transformers", ".2f"),
    "wer": ("WER % whisperkv", ".2f"),
}
LARGEST = ("largest", "largest_eager", "error_transformers", "error")
LOGIT_COLUMNS = {
    "model": ("model", ""),
    "dtype": ("dtype", ""),
    "steps": ("tokens forced", "d"),
    "largest": ("largest difference of a logit", ".2g"),
    "largest_eager": ("transformers: sdpa against eager", ".2g"),
    "error_transformers": ("largest error against wider arithmetic: transformers", ".2g"),
    "error": ("whisperkv", ".2g"),
    "mean_transformers": ("mean error: transformers", ".3g"),
    "mean": ("whisperkv", ".3g"),
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
    """Rows of the first table, one for each format."""
    whisperkv.unpatch(model)
    theirs, their_texts = run(model, processor, speeches, dtype, *MODES[mode])
    for form in ("model", "latent") if mode in LATENT_MODES else ("model",):
        whisperkv.patch(model, cross=CrossConfig(form))
        ours, our_texts = run(model, processor, speeches, dtype, *MODES[mode])
        stats = whisperkv.stats(model)
        assert not stats.note, stats.note
        whisperkv.unpatch(model)
        yield {
            "format": form,
            "equal": sum(a == b for a, b in zip(theirs, ours)),
            "items": len(ours),
            "tokens": sum(len(tokens) for tokens, _ in ours),
            "decodes": stats.decodes,
            "wer_transformers": audio.word_error_rate(speeches, their_texts),
            "wer": audio.word_error_rate(speeches, our_texts),
        }


def logits(model, exact, processor, speeches, dtype):
    """One row of the second table: the greedy transcript of transformers, forced through both caches.

    exact  the same weights in wider arithmetic, to tell whose rounding is the worse
    """
    row = dict.fromkeys(("steps", *LARGEST, "mean_transformers", "mean", "same_choice"), 0)
    start = decoding.start_tokens(model, processor)
    for group in decoding.batches(speeches, 6):
        features = decoding.features_of(processor, group, dtype)
        transcripts = [decoding.transcript_tokens(model, tokens) for tokens in decoding.generate(model, features)]
        given = (features, [start] * len(group), transcripts)
        right = list(decoding.forced(exact, *given))
        theirs = list(decoding.forced(model, *given))
        model.set_attn_implementation("eager")
        eager = list(decoding.forced(model, *given))
        model.set_attn_implementation("sdpa")
        whisperkv.patch(model)
        ours = list(decoding.forced(model, *given))
        whisperkv.unpatch(model)
        for step in zip(right, theirs, eager, ours):
            alive = step[0][2]
            truth, a, e, b = (logits[alive].to(right[0][0].dtype) for logits, _, _ in step)
            row["steps"] += len(a)
            row["same_choice"] += int((a.argmax(-1) == b.argmax(-1)).sum())
            for key, x, y in zip(LARGEST, (a, a, a, b), (b, e, truth, truth)):
                row[key] = max(row[key], float((x - y).abs().max()))
            row["mean_transformers"] += float((a - truth).abs().mean(-1).sum())
            row["mean"] += float((b - truth).abs().mean(-1).sum())
    for key in ("mean_transformers", "mean"):
        row[key] /= row["steps"]
    row["same_choice"] /= row["steps"] / 100
    return row


def widened(model, name, base):
    """The same weights in float64, or those of bfloat16 in float32, behind the same encoder states."""
    dtype = torch.float64 if model.dtype == torch.float32 else torch.float32
    exact = models.load(name, base)[0].to(dtype)
    exact.load_state_dict({key: value.to(dtype) for key, value in model.state_dict().items()})
    encoder = model.get_encoder()

    def states(features, *args, **kwargs):
        output = encoder(features)
        output.last_hidden_state = output.last_hidden_state.to(dtype)
        return output

    exact.get_encoder().forward = states
    return exact


def main(args):
    tables.pin(args)
    most = 3 if args.quick else None
    speeches, recordings = audio.windows(args.data, most), audio.recordings(args.data, most and 2)
    table, logit_table = tables.Table("lossless", COLUMNS, args), tables.Table("lossless-logits", LOGIT_COLUMNS, args)
    rounded = [mode for mode in args.modes if mode in ROUNDED_MODES]
    rows = (len(args.modes) + 1) * ("float32" in args.dtypes) + (len(rounded) + 1) * ("bfloat16" in args.dtypes)
    progress = tqdm(total=len(args.models) * rows, unit="row")
    for name in args.models:
        for dtype, modes in ((torch.float32, args.modes), (torch.bfloat16, rounded)):
            if str(dtype).removeprefix("torch.") not in args.dtypes:
                continue
            model, processor = models.load(name, args.base, dtype)
            decoding.remember_encoder(model)
            label = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
            if "lossless-logits" in args.tables:
                progress.set_description(f"{name} {label['dtype']}: logits")
                exact = widened(model, name, args.base)
                logit_table.add(**label, **logits(model, exact, processor, speeches, dtype))
                progress.update()
            for mode in modes if "lossless" in args.tables else ():
                progress.set_description(f"{name} {label['dtype']}: {mode}")
                items = recordings if MODES[mode][0] else speeches
                for row in compared(model, processor, items, dtype, mode):
                    table.add(**label, mode=mode, **row)
                progress.update()
    progress.close()
    print(
        f"\n{len(speeches)} windows, {len(recordings)} recordings. "
        "Equal: every token, and every time that was asked for.\n"
    )
    print(f"lossless\n\n{table}\n\nlossless-logits\n\n{logit_table}\n")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES, metavar="MODE", help="of %(choices)s")
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES, metavar="TABLE", help="of %(choices)s")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, metavar="DTYPE", help="of %(choices)s")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
