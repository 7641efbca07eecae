"""python -m whisperkv.prune: what a speech LLM answers when part of the audio is pruned out of its cache."""

import argparse
import json
import sys
import time
from ast import literal_eval
from pathlib import Path

import torch
import transformers

from ..transcription.audio import RATE, read_audio
from ..transcription.loading import device_of
from . import apply, names, stats
from .base import check_budget
from .loading import inputs_of, load
from .pruners import pruner_of, streaming


def main(arguments=None, prog="python -m whisperkv.prune"):
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", required=True, help="folder or hub id of a speech LLM")
    parser.add_argument("--audio", required=True, nargs="+", help="WAV, FLAC, OGG or MP3, of any length")
    parser.add_argument("--prompt", default="Transcribe the audio.", help="what is asked of it (default: %(default)s)")
    parser.add_argument("--pruner", help=f"{', '.join(names())} (default: merge; with --stream streaming_anchor)")
    parser.add_argument("--budget", default="0.5", help="audio tokens that stay: a share, as 0.5, or a number, as 200")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the pruner")
    parser.add_argument(
        "--seed", type=int, default=0, help="of pruners that draw, and of sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--out", help="JSON lines, one a recording: file, text, tokens kept, bytes (default: text only)"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read the audio in pieces and prune as they arrive; print words as they come",
    )
    parser.add_argument("--max-new-tokens", type=int, default=444)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    options = parser.parse_args(arguments)
    try:
        budget = _number("--budget", options.budget)
        check_budget(budget)
        pruner = _pruner(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        device = device_of(options.device)
        if options.out and not Path(options.out).absolute().parent.is_dir():
            raise ValueError(f"--out: {Path(options.out).absolute().parent}: no such folder; make it, or name another")
        model, processor = load(options.model, device)
    except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    out = open(options.out, "w") if options.out else None
    failed = 0
    for file in options.audio:
        try:
            record = answer(model, processor, file, pruner, budget, options)
        except (ImportError, OSError, ValueError) as error:
            told = str(error)
            print(told if told.startswith(file) else f"{file}: {told}", file=sys.stderr)
            failed += 1
            continue
        if not options.stream:
            print(record["text"], flush=True)
        if out:
            print(json.dumps(record), file=out, flush=True)
    if out:
        out.close()
    return 1 if failed else 0


def _number(name, text):
    try:
        return literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(f"{name} must be a number, as 0.5 or 200; got {text!r}") from None


def _pruner(options):
    settings = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE; got {setting!r}")
        try:
            settings[name] = literal_eval(value)
        except (SyntaxError, ValueError):
            settings[name] = value  # a file, say
    pruner = pruner_of(options.pruner or ("streaming_anchor" if options.stream else "merge"), settings)
    if options.stream and not pruner.streams:
        raise ValueError(f"--stream is for {', '.join(streaming())}; got --pruner {options.pruner}")
    if hasattr(pruner, "seed") and "seed" not in settings:
        pruner.seed = options.seed
    return pruner


def answer(model, processor, file, pruner, budget, options):
    samples = read_audio(file)
    inputs = inputs_of(processor, samples, options.prompt).to(model.device, dtype=model.dtype)
    tokenizer = getattr(processor, "tokenizer", processor)
    streamer = (
        transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if options.stream else None
    )
    torch.manual_seed(options.seed)
    with torch.no_grad(), apply(model, pruner, budget=budget, stream=options.stream):
        begin = time.perf_counter()
        tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, streamer=streamer)
        seconds = time.perf_counter() - begin
        held = stats(model)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{file}: {len(samples) / RATE:.1f} s of audio in {seconds:.1f} s\n{held}", file=sys.stderr)
    return {
        "file": str(file),
        "text": text,
        "audio_seconds": round(len(samples) / RATE, 3),
        "audio_tokens": held.audio_tokens,
        "kept": [list(layer) for layer in held.kept],
        "bytes": held.bytes,
        "bytes_full": held.bytes_full,
        "pruner": repr(pruner),
        "budget": budget,
        "seed": options.seed,
        "note": held.note,
    }


if __name__ == "__main__":
    sys.exit(main())
