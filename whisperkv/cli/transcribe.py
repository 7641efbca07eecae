"""whisperkv transcribe."""

from typing import Annotated, Any

import typer

from .arguments import Forgiving
from .progress import Progress

SETTINGS = {"cls": Forgiving}


def _panel(title):
    """An option of that part of the help: its names, what it says, and what its default means."""

    def option(*names, default=True, **given):
        help, *names = names[::-1]
        return typer.Option(*names[::-1], help=help, rich_help_panel=title, show_default=default, **given)

    return option


_file, _speech, _text = _panel("Input and output"), _panel("What is heard"), _panel("Subtitles")
_doubt, _fast = _panel("When a text is doubtful"), _panel("Speed and memory")
_bulk = _panel("Many recordings")
_COUNT = {"min": 1, "metavar": "N"}


def transcribe(
    audio: Annotated[
        list[str], typer.Argument(help="Recordings, folders of them, or - for standard input.", show_default=False)
    ],
    model: Annotated[
        str,
        _file(
            "--model",
            "-m",
            "tiny.en (English alone), base, large-v3 ..., a folder (transformers, faster-whisper) or a hub id.",
        ),
    ] = "tiny.en",
    output_dir: Annotated[
        str | None,
        _file("--output_dir", "-o", "Where the files go; - is standard output.", default="here; - for standard input"),
    ] = None,
    output_format: Annotated[
        str | None,
        _file(
            "--output_format",
            "-f",
            "txt, vtt, srt, tsv, json or all; with --ray, parquet or jsonl too.",
            default="all; txt on standard output",
        ),
    ] = None,
    skip_existing: Annotated[bool, _file("--skip-existing", "Leave out recordings whose files are there.")] = False,
    ray: Annotated[
        str | None,
        _bulk("--ray", "By Ray: local, or a cluster's address. Takes manifests and Parquet, too.", default="no"),
    ] = None,
    workers: Annotated[
        int | None, _bulk("--workers", "Models at once, each of so many --threads.", default="as many as fit", **_COUNT)
    ] = None,
    retry_failed: Annotated[bool, _bulk("--retry_failed", "Those again that failed in a run before.")] = False,
    language: Annotated[str | None, _speech("--language", "-l", "As de or german.", default="heard")] = None,
    task: Annotated[str, _speech("--task", "transcribe, or translate into English.")] = "transcribe",
    initial_prompt: Annotated[str | None, _speech("--initial_prompt", "Text that sets tone and spelling.")] = None,
    vad: Annotated[
        bool, _speech("--vad/--no_vad", "Find the speech (Silero) and decode it in batches, or window after window.")
    ] = True,
    condition_on_previous_text: Annotated[
        bool, _speech("--condition_on_previous_text", "With --no_vad: each window continues the text before it.")
    ] = False,
    word_timestamps: Annotated[bool, _speech("--word_timestamps", "When each word was said.")] = False,
    max_line_width: Annotated[int | None, _text("--max_line_width", "Characters of a line.", **_COUNT)] = None,
    max_line_count: Annotated[int | None, _text("--max_line_count", "Lines of a subtitle.", **_COUNT)] = None,
    max_words_per_line: Annotated[int | None, _text("--max_words_per_line", "Words of a line.", **_COUNT)] = None,
    highlight_words: Annotated[bool, _text("--highlight_words", "Underline each word as it is spoken.")] = False,
    temperature: Annotated[float, _doubt("--temperature", "Of the first attempt; 0 takes the likeliest words.")] = 0.0,
    temperature_increment_on_fallback: Annotated[
        float, _doubt("--temperature_increment_on_fallback", "By how much it rises with each attempt; 0: one only.")
    ] = 0.2,
    compression_ratio_threshold: Annotated[
        float, _doubt("--compression_ratio_threshold", "Doubtful: a text that zlib makes so many times shorter.")
    ] = 2.4,
    logprob_threshold: Annotated[
        float, _doubt("--logprob_threshold", "Doubtful: tokens of a lower log probability on average.")
    ] = -1.0,
    no_speech_threshold: Annotated[
        float, _doubt("--no_speech_threshold", "A doubtful text is left out where silence is likelier than this.")
    ] = 0.6,
    device: Annotated[str | None, _fast("--device", "cpu or cuda.", default="a GPU if there is one")] = None,
    threads: Annotated[int | None, _fast("--threads", "Of the CPU.", default="all cores", **_COUNT)] = None,
    batch_size: Annotated[int, _fast("--batch_size", "Windows decoded together.", **_COUNT)] = 8,
    beam_size: Annotated[int, _fast("--beam_size", "Beams of the search; 1 is greedy.", **_COUNT)] = 1,
    lossless: Annotated[bool, _fast("--lossless", "Nothing that changes a word: patch(model) alone.")] = False,
    weights: Annotated[str | None, _fast("--weights", "model, bfloat16 or int8.", default="int8 on a CPU")] = None,
    cross: Annotated[
        str | None,
        _fast(
            "--cross", "The audio's cache: model, int8, int4, latent, latent_int8, latent_int4.", default="latent_int8"
        ),
    ] = None,
    trim: Annotated[str | None, _fast("--trim", "Frames left out: off, padding, silence.", default="padding")] = None,
    recent: Annotated[
        int | None, _fast("--recent", "Newest tokens that stay in the cache.", default="all", **_COUNT)
    ] = None,
    heavy: Annotated[int | None, _fast("--heavy", "Further tokens that stay.", default="0", metavar="N")] = None,
    policy: Annotated[
        str | None, _fast("--policy", "Which: heavy_hitter, magnitude or window.", default="heavy_hitter")
    ] = None,
) -> None:
    """Transcribe recordings of any length into txt, vtt, srt, tsv and json.

    Each recording's files are written as soon as it is done. After an interruption, the same command with
    `--skip-existing` goes on; with `--ray` it always does. The exit code is 0 if all went well, 1 if a recording
    failed, 2 for a wrong option, 130 after Ctrl-C. Options have openai-whisper's names, as
    `--condition_on_previous_text` and `--temperature_increment_on_fallback`, and take its values (`--word_timestamps
    True`).
    """
    with Progress("transcribe") as progress:
        import torch

        from ..config import CrossConfig, EvictionConfig
        from ..transcription.files import check_writable, plan, transcribe_files
        from ..transcription.settings import Settings
        from ..transcription.transcribing import prepared
        from ..transcription.writers import Layout, formats

        if threads is not None:
            torch.set_num_threads(threads)
        to_stdout = output_dir == "-" or output_dir is None and audio == ["-"]
        layout = Layout(max_line_width, max_line_count, max_words_per_line, highlight_words)
        if layout.needs_words and not word_timestamps:
            raise ValueError("--max_line_width and its kin cut subtitles between words: add --word_timestamps")
        rising = temperature_increment_on_fallback
        steps = int((1 - temperature) / rising + 1e-6) if rising > 0 else 0
        temperatures = tuple(round(temperature + rising * step, 6) for step in range(max(steps, 0) + 1))
        settings = Settings(
            language, task, beam_size, temperatures, initial_prompt, condition_on_previous_text, word_timestamps, vad,
            batch_size, compression_ratio_threshold, logprob_threshold, no_speech_threshold,
        )  # fmt: skip
        eviction = held = None
        if not (recent is heavy is policy is None):
            eviction = EvictionConfig(policy or "heavy_hitter", 64 if recent is None else recent, heavy or 0)
        if cross or trim:
            held = CrossConfig(cross or "latent_int8", trim or "padding")
        patching: dict[str, Any] = {
            "model": model, "device": device, "eviction": eviction, "cross": held, "weights": weights,
            "lossless": lossless,
        }  # fmt: skip
        if ray is not None:
            if to_stdout:
                raise ValueError("--ray writes into a folder: name it by --output_dir")
            from ..bulk.running import Bulk

            progress.remedy = "the same command goes on"
            bulk = Bulk(
                audio, output_dir or ".", settings, patching=patching, output_format=output_format or "all",
                layout=layout, ray=ray, workers=workers, threads=threads, retry_failed=retry_failed,
            )  # fmt: skip
            progress.say(f"starting Ray and loading {model}")
            with bulk:
                progress.skipped, progress.failed_before = bulk.skipped, len(bulk.failed_before)
                if bulk.left:
                    progress.begin([item.audio for item in bulk.left], [item.seconds for item in bulk.left])
                    for news in bulk.news():
                        progress.tell(news)
        else:
            given = {"--workers": workers, "--retry_failed": retry_failed or None}
            alone = next((name for name, value in given.items() if value is not None), None)
            if alone:
                raise ValueError(f"{alone} is of Ray: add --ray local")
            if output_format in ("parquet", "jsonl"):
                raise ValueError(f"--output_format {output_format} is written by Ray: add --ray local")
            wanted = formats(output_format or ("txt" if to_stdout else "all"))
            if to_stdout and len(wanted) > 1:
                raise ValueError(f"--output_format {output_format}: standard output takes one format; choose one")
            jobs = plan(audio, "-" if to_stdout else output_dir or ".")
            left = [job for job in jobs if not (skip_existing and job.is_written(wanted))]
            progress.skipped = len(jobs) - len(left)
            if left:
                check_writable(left)
                progress.say(f"loading {model}")
                whisper, processor = prepared(**patching)
                progress.begin([job.source for job in left])
                for news in transcribe_files(left, whisper, processor, settings, wanted, layout):
                    progress.tell(news)
    raise typer.Exit(progress.exit_code)
