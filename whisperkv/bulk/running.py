"""transcribe_dataset(): many recordings on a cluster, each exactly once."""

import os
import pickle
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..config import CrossConfig, EvictionConfig
from ..transcription.engine import AHEAD, News
from ..transcription.settings import Settings
from ..transcription.writers import Layout
from .cluster import Shape, cluster, need_ray
from .items import Item, groups, items, measured
from .ledger import Ledger
from .outputs import check_format, folder_of, output_of
from .worker import Worker


@dataclass
class Summary:
    """How a run went."""

    done: int = 0  # recordings that were transcribed
    failed: list[str] = field(default_factory=list)  # the keys of those that were not, now or in a run before
    skipped: int = 0  # done before
    audio_seconds: float = 0.0  # of what was transcribed now
    seconds: float = 0.0  # that it took, the loading of the models with it

    @property
    def rtfx(self) -> float:
        """Times real time."""
        return self.audio_seconds / self.seconds if self.seconds else 0.0


class Bulk:
    """A run: what is left to do is in `left`, and news() does it. As a context it holds the folder and the cluster."""

    def __init__(
        self,
        source: Any,
        output: str | PathLike[str],
        settings: Settings,
        *,
        patching: dict[str, Any],
        output_format: str = "parquet",
        layout: Layout = Layout(),
        ray: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
        retry_failed: bool = False,
    ) -> None:
        need_ray()
        check_format(output_format)
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}")
        model = patching.get("model")
        if not isinstance(model, (str, PathLike)):
            raise TypeError(
                f"model must be a name, a folder or a hub id, as each worker loads its own; got {type(model).__name__}"
            )
        if layout.needs_words and not settings.word_timestamps:
            raise ValueError("a layout cuts subtitles between words: add word_timestamps=True")
        self._settings, self._retry = settings, retry_failed
        self._patching = {**patching, "model": os.path.abspath(model) if Path(model).exists() else str(model)}
        self._cluster = ray, workers, threads, patching.get("device")
        self._folder, self._format, self._layout = Path(output), output_format, layout
        self._found = items(source)
        self.left: list[Item] = []
        self.skipped = 0
        self.failed_before: list[str] = []

    def __enter__(self) -> "Bulk":
        with ExitStack() as stack:
            folder = stack.enter_context(folder_of(self._folder, self._run()))
            self._output = output_of(folder, self._found, self._format, self._layout)
            written, failed = self._output.done()
            if self._retry and failed:
                self._output.forget(failed)
                failed = set()
            self.left = measured([item for item in self._found if item.key not in written | failed])
            self.failed_before = [item.key for item in self._found if item.key in failed]
            self.skipped = len(self._found) - len(self.left) - len(self.failed_before)
            if self.left:
                self._shape = stack.enter_context(cluster(*self._cluster))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def news(self) -> Iterator[News]:
        """Of each recording, once its result is written; `number` is its place in `left`."""
        numbers = {item.key: number for number, item in enumerate(self.left)}
        for done in _answers(self.left, self._patching, self._settings, self._shape):
            new = [(self.left[numbers[key]], transcript) for key, transcript in done.items() if key in numbers]
            self._output.add(new)
            for item, transcript in new:
                yield News(numbers.pop(item.key), item.audio, [], transcript.duration, transcript)

    def _run(self):
        """What the texts depend on."""
        given = {name: value for name, value in self._patching.items() if name != "device"}
        about = self._settings.__dict__.items()
        given |= {name: value for name, value in about if name not in ("batch_size", "seed")}
        return {name: re.sub(" at 0x[0-9a-f]+", "", repr(value)) for name, value in given.items()}  # of a function


def _answers(left, patching, settings, shape: Shape):
    """{key: Transcript} of a group, as soon as it is done.

    A group is one block of Ray Data, and its transcripts are another: so a worker's death costs one group, which Ray
    gives to the next worker whole, and what comes of it comes once. Ray would do so for ever: Worker and Ledger see to
    it that a recording that ends its worker is given up.
    """
    import pyarrow
    import ray

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        ledger = ray.remote(num_cpus=0)(Ledger).remote()
        blocks = [
            pyarrow.table({"group": [pickle.dumps(group)]})
            for group in groups(left, shape.workers, settings.batch_size, AHEAD)
        ]
        answers = ray.data.from_arrow(blocks).map_batches(
            Worker,
            fn_constructor_args=(ledger, patching, settings, shape.threads),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(shape.workers, len(blocks)), max_tasks_in_flight_per_actor=1),
            num_cpus=shape.threads,
            num_gpus=shape.gpus or None,
        )
        tables: Any = answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for table in tables:
            for answer in table.column("answer").to_pylist():
                found = pickle.loads(answer)
                if isinstance(found, Exception):
                    raise found
                yield found
    finally:
        context.enable_progress_bars = before


def transcribe_dataset(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    output_format: str = "parquet",
    layout: Layout = Layout(),
    ray: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    model: str | PathLike[str] = "tiny.en",
    device: str | None = None,
    eviction: EvictionConfig | None = None,
    cross: CrossConfig | None = None,
    weights: str | None = None,
    lossless: bool = False,
    **decoding: Any,
) -> Summary:
    """Transcribe many recordings on many cores or machines, by Ray Data. Each gets exactly one result, whatever dies.

    What is done is in `output` at once, and stays: called again, after a crash or with more recordings, it does the
    rest. A recording that cannot be read, or that ends the process of its worker three times, is in the output with its
    error, and is not tried again.

    source         a folder of recordings; a manifest (.tsv, .csv or .jsonl with "audio", a path, and perhaps "id",
                   "begin" and "end"); Parquet, a file or a folder (with "audio", a path or the bytes of a file, and
                   perhaps "id"); or a list of paths. All machines must see them. The key of a recording is its id, or
                   its place in the folder, or its path.
    output         a folder
    output_format  "parquet" or "jsonl": a row a recording, with key, audio, text, language, duration, segments and
                   error. "txt", "vtt", "srt", "tsv", "json" or "all": files a recording, as the command writes them,
                   and errors in _failed.jsonl.
    layout         how subtitles are cut: whisperkv.transcription.writers.Layout
    ray            "local" starts Ray on this machine; an address ("auto", "HOST:6379") joins a cluster; None takes the
                   one that this process uses, or else is "local"
    workers        models that run at once; None is as many as there is room for
    threads        cores of a worker; None is up to 4
    retry_failed   try those again that failed in a run before
    progress       a bar on stderr, where that is a terminal

    model, device, eviction, cross, weights, lossless, and as `decoding` all other keywords of whisperkv.transcribe()
    but processor, stream, audio and errors: as there. model is a name, a folder that all machines see, or a hub id.
    """
    from tqdm import tqdm

    known = Settings.__dataclass_fields__
    for name in decoding:
        if name not in known:
            raise TypeError(f"transcribe_dataset() has no {name!r}; of decoding it takes {', '.join(known)}")
    patching = {
        "model": model, "device": device, "eviction": eviction, "cross": cross, "weights": weights,
        "lossless": lossless,
    }  # fmt: skip
    bulk = Bulk(
        source, output, Settings(**decoding), patching=patching, output_format=output_format, layout=layout,
        ray=ray, workers=workers, threads=threads, retry_failed=retry_failed,
    )  # fmt: skip
    start, found = time.perf_counter(), Summary()
    with bulk:
        found.skipped, found.failed = bulk.skipped, list(bulk.failed_before)
        hidden = not progress or not sys.stderr.isatty()
        with tqdm(total=len(bulk.left), unit="recording", disable=hidden, file=sys.stderr) as bar:
            for news in bulk.news() if bulk.left else ():
                transcript = news.transcript
                assert transcript is not None
                if transcript.error is None:
                    found.done += 1
                    found.audio_seconds += transcript.duration
                else:
                    found.failed.append(bulk.left[news.number].key)
                found.seconds = time.perf_counter() - start
                bar.set_postfix_str(f"{found.rtfx:.0f}x real time, {len(found.failed)} failed")
                bar.update()
    found.seconds = time.perf_counter() - start
    return found
