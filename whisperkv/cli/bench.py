"""whisperkv bench."""

import sys
from typing import Annotated

import typer

from ._evaluating import complaint


def bench(
    audio: Annotated[
        str | None, typer.Argument(help="A recording of any length.", show_default="a clip of 29 s")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name, folder or hub id, as of transcribe.")
    ] = "tiny.en",
    beam_size: Annotated[int, typer.Option("--beam_size", min=1, help="1 is greedy.")] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the CPU.", show_default="all cores")
    ] = None,
) -> None:
    """Measure this machine: transformers alone beside whisperkv, lossless, fastest and smallest, the same recording."""
    with complaint("bench"):
        import torch
        import transformers

        from .. import demo
        from ..evaluation.turns import in_turns, written
        from ..transcription.audio import RATE, read_audio
        from ..transcription.loading import load
        from .info import processor_name

        if threads is not None:
            torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        samples = read_audio(audio or demo.CLIP)
        whisper, processor = load(model, "cpu")
        best = in_turns(whisper, processor, samples, beam_size, lambda text: print(text, file=sys.stderr))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{processor_name()}, {torch.get_num_threads()} thread(s), {versions}")
    print(f"{audio or 'the demo clip'}: {len(samples) / RATE:.1f} s of audio; {model}, {beam_size} beam(s)\n")
    print(written(best))
    if len(samples) > 30 * RATE:
        print("(caches and evicted tokens: of the last window of 30 s)")
