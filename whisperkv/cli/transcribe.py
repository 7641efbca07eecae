"""whisperkv transcribe."""

from typing import Annotated

import typer

from .arguments import Forgiving
from .progress import Progress

SETTINGS = {"cls": Forgiving}


def transcribe(
    audio: Annotated[
        list[str], typer.Argument(help="Recordings, folders of them, or - for standard input.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="tiny.en, base, large-v3 ..., a folder (transformers or faster-whisper), or a hub id."
        ),
    ] = "tiny.en",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda.", show_default="a GPU if there is one")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the CPU.", show_default="all cores")
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output_dir",
            "-o",
            help="Where the files go; - is standard output.",
            show_default="here; - for standard input",
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--output_format", "-f", help="txt, vtt, srt, tsv, json or all.", show_default="all; txt on standard output"
        ),
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out recordings whose files are there.")
    ] = False,
    language: Annotated[
        str | None, typer.Option("--language", "-l", help="As de or german.", show_default="heard")
    ] = None,
    task: Annotated[str, typer.Option("--task", help="transcribe, or translate into English.")] = "transcribe",
    vad: Annotated[
        bool,
        typer.Option(
            "--vad/--no_vad",
            help="Find the speech with Silero and decode it in batches, or go on from window to window.",
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Windows decoded together.")] = 8,
    beam_size: Annotated[int, typer.Option("--beam_size", min=1, help="1 is greedy.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest words.")] = 0.0,
    temperature_increment_on_fallback: Annotated[
        float,
        typer.Option(
            "--temperature_increment_on_fallback",
            help="By how much it rises when a text repeats itself or is unsure; 0: never.",
        ),
    ] = 0.2,
    compression_ratio_threshold: Annotated[
        float,
        typer.Option(
            "--compression_ratio_threshold", help="A text that zlib makes so many times shorter repeats itself."
        ),
    ] = 2.4,
    logprob_threshold: Annotated[
        float,
        typer.Option(
            "--logprob_threshold", help="A text whose tokens have a lower log probability on average is unsure."
        ),
    ] = -1.0,
    no_speech_threshold: Annotated[
        float,
        typer.Option("--no_speech_threshold", help="An unsure text is left out if silence is likelier than this."),
    ] = 0.6,
    initial_prompt: Annotated[
        str | None, typer.Option("--initial_prompt", help="Text that sets tone and spelling.")
    ] = None,
    condition_on_previous_text: Annotated[
        bool,
        typer.Option(
            "--condition_on_previous_text/--no_condition_on_previous_text",
            help="With --no_vad: each window continues the text before it.",
        ),
    ] = False,
    word_timestamps: Annotated[
        bool, typer.Option("--word_timestamps/--no_word_timestamps", help="When each word was said.")
    ] = False,
    max_line_width: Annotated[
        int | None, typer.Option("--max_line_width", min=1, help="Characters of a line of vtt and srt.")
    ] = None,
    max_line_count: Annotated[int | None, typer.Option("--max_line_count", min=1, help="Lines of a subtitle.")] = None,
    max_words_per_line: Annotated[
        int | None, typer.Option("--max_words_per_line", min=1, help="Words of a line.")
    ] = None,
    highlight_words: Annotated[
        bool, typer.Option("--highlight_words/--no_highlight_words", help="Underline each word as it is spoken.")
    ] = False,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Nothing that changes a word: patch(model) alone.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option("--weights", help="model, bfloat16 or int8.", show_default="int8 on a CPU")
    ] = None,
    cross: Annotated[
        str | None,
        typer.Option(
            "--cross",
            help="How the audio is held: model, int8, int4, latent, latent_int8 or latent_int4.",
            show_default="latent_int8",
        ),
    ] = None,
    trim: Annotated[
        str | None, typer.Option("--trim", help="Frames left out: off, padding or silence.", show_default="padding")
    ] = None,
    recent: Annotated[
        int | None, typer.Option("--recent", help="Newest tokens that stay in the cache.", show_default="all")
    ] = None,
    heavy: Annotated[int | None, typer.Option("--heavy", help="Further tokens that stay.", show_default="0")] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Which: heavy_hitter, magnitude or window.", show_default="heavy_hitter"),
    ] = None,
) -> None:
    """Transcribe recordings of any length into txt, vtt, srt, tsv and json.

    Each recording's files are written as soon as it is done. After an interruption, the same command with
    --skip-existing goes on. The exit code is 0 if all went well, 1 if a recording failed, 2 for a wrong option, 130
    after Ctrl-C.
    """
    import torch

    from ..config import CrossConfig, EvictionConfig
    from ..transcription.files import plan, transcribe_files
    from ..transcription.settings import Settings
    from ..transcription.transcribing import prepared
    from ..transcription.writers import Layout, formats

    if threads is not None:
        torch.set_num_threads(threads)
    to_stdout = output_dir == "-" or output_dir is None and audio == ["-"]
    with Progress("transcribe") as progress:
        layout = Layout(max_line_width, max_line_count, max_words_per_line, highlight_words)
        if layout.needs_words and not word_timestamps:
            raise ValueError("--max_line_width and its kin cut subtitles between words: add --word_timestamps")
        wanted = formats(output_format or ("txt" if to_stdout else "all"))
        if to_stdout and len(wanted) > 1:
            raise ValueError(f"--output_format {output_format}: standard output takes one format; choose one")
        rising = temperature_increment_on_fallback
        steps = int((1 - temperature) / rising + 1e-6) if rising > 0 else 0
        settings = Settings(
            language, task, beam_size, tuple(temperature + rising * step for step in range(max(steps, 0) + 1)),
            initial_prompt, condition_on_previous_text, word_timestamps, vad, batch_size,
            compression_ratio_threshold, logprob_threshold, no_speech_threshold,
        )  # fmt: skip
        jobs = plan(audio, "-" if to_stdout else output_dir or ".")
        left = [job for job in jobs if not (skip_existing and job.is_written(wanted))]
        progress.skipped = len(jobs) - len(left)
        if left:
            eviction = held = None
            if not (recent is heavy is policy is None):
                eviction = EvictionConfig(policy or "heavy_hitter", 64 if recent is None else recent, heavy or 0)
            if cross or trim:
                held = CrossConfig(cross or "latent_int8", trim or "padding")
            progress.say(f"loading {model}")
            whisper, processor = prepared(
                model, device=device, eviction=eviction, cross=held, weights=weights, lossless=lossless
            )
            progress.begin([job.source for job in left])
            for news in transcribe_files(left, whisper, processor, settings, wanted, layout):
                progress.tell(news)
    raise typer.Exit(progress.exit_code)
