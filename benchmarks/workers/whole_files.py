"""Files to texts by one tool as its users would call it: python whole_files.py TOOL MODEL_FOLDER THREADS FILE...

Greedy, English, batches of 8, everything else as the tool has it. Prints one line of JSON: texts, seconds without
imports and loading, seconds of these, and bytes at the most.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

BATCH = 8


def by_whisperkv(folder, threads, **settings):
    import torch

    import whisperkv
    from whisperkv.transcription.transcribing import prepared

    torch.set_num_threads(threads)
    model, processor = prepared(folder, **settings)
    language = {"language": "en"} if model.generation_config.is_multilingual else {}

    def transcribe(files):
        found = whisperkv.transcribe(files, model=model, processor=processor, batch_size=BATCH, **language)
        return [each.text for each in found]

    return transcribe


def lossless(folder, threads):
    return by_whisperkv(folder, threads, lossless=True)


def by_faster_whisper(folder, threads, batched=False):
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=threads)
    options = {"language": "en", "beam_size": 1}
    if batched:
        model, options = BatchedInferencePipeline(model), {**options, "batch_size": BATCH}
    return lambda files: ["".join(one.text for one in model.transcribe(file, **options)[0]) for file in files]


def batched_faster_whisper(folder, threads):
    return by_faster_whisper(folder, threads, batched=True)


def by_transformers(folder, threads):
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    pipe = transformers.pipeline(
        "automatic-speech-recognition", folder, device="cpu", chunk_length_s=30, batch_size=BATCH, dtype=torch.float32
    )
    options = {"num_beams": 1}
    if pipe.model.generation_config.is_multilingual:
        options |= {"language": "en", "task": "transcribe"}

    def samples(file):
        import soundfile  # the pipeline itself would ask for ffmpeg

        return soundfile.read(file, dtype="float32")[0]

    return lambda files: [each["text"] for each in pipe([samples(one) for one in files], generate_kwargs=options)]


TOOLS = {
    "whisperkv": by_whisperkv,
    "whisperkv, lossless": lossless,
    "faster-whisper int8": by_faster_whisper,
    "faster-whisper int8, batched": batched_faster_whisper,
    "transformers' pipeline": by_transformers,
}


def main(tool, folder, threads, *files):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    begin = time.perf_counter()
    transcribe = TOOLS[tool](folder, int(threads))
    loaded = time.perf_counter()
    texts = transcribe(list(files))
    done = time.perf_counter()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # getrusage: a parent's
    print(json.dumps({"texts": texts, "seconds": done - loaded, "loading": loaded - begin, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
