"""What runs on the cluster, with a model of its own."""

import pickle
from collections.abc import Iterator
from typing import Any

from ..transcription.engine import run
from ..transcription.results import Transcript
from ..transcription.settings import Settings
from ..transcription.transcribing import prepared
from .items import Item, audios

TRIES = 3  # of a recording whose worker ends with it
REMEDY = "with fewer workers each has more memory"


class Fatal(Exception):
    """What no other recording would fare better with: the model cannot be loaded, a package is missing."""

    def __init__(self, why: Exception) -> None:
        self.why = why


class Worker:
    """A patched model. Ray Data calls it with a group of recordings, and again on another process if it dies.

    A group is decoded together. If its worker died before, one at a time, those first that were begun and not ended
    most often; a recording with which the worker has ended TRIES times is not begun again.
    """

    def __init__(self, ledger: Any, patching: dict[str, Any], settings: Settings, threads: int) -> None:
        import ray
        import torch

        self._ledger, self._get, self._settings = ledger, ray.get, settings
        torch.set_num_threads(threads)
        self._error: Exception | None = None
        me = [f"worker {ray.get_runtime_context().get_actor_id()}"]
        if ray.get(ledger.tries.remote(me))[0] >= TRIES:
            what = f"model {patching['model']!r}: the process that loaded it ended, {TRIES} times"
            self._error = ChildProcessError(f"{what}; {REMEDY}")
            return
        ray.get(ledger.begin.remote(me))
        try:
            self._model, self._processor = prepared(**patching)
            run(self._model, self._processor, (), settings)  # it looks whether the model can do what is asked
        except Exception as error:  # raised here it would be tried again
            self._error = error
        ledger.end.remote(me)

    def __call__(self, table: Any) -> Any:
        import pyarrow

        groups = map(pickle.loads, table.column("group").to_pylist())
        return pyarrow.table({"answer": [pickle.dumps(self._answer(group)) for group in groups]})

    def _answer(self, group) -> dict[str, Transcript] | Exception:
        try:
            return dict(self._transcribed(group))
        except Fatal as error:
            return sendable(error.why)

    def _transcribed(self, group) -> Iterator[tuple[str, Transcript]]:
        if self._error:
            raise Fatal(self._error)
        tries = self._get(self._ledger.tries.remote([item.key for item in group]))
        ranked = sorted(zip(tries, group), key=lambda pair: -pair[0])
        for count, item in ranked:
            if count >= TRIES:
                error = ChildProcessError(f"{item.audio}: its worker's process ended, {count} times in a row; {REMEDY}")
                yield item.key, failed(item, error)
            elif count:
                yield from self._told([item])
        fresh = [item for count, item in ranked if not count]
        if not fresh:
            return
        try:
            yield from self._told(fresh)
        except Fatal:
            raise
        except Exception:  # of one of them, or memory is short
            for item in fresh:
                yield from self._told([item])

    def _told(self, group):
        """_together(), and the ledger knows of it."""
        keys = [item.key for item in group]
        self._get(self._ledger.begin.remote(keys))
        try:
            return self._together(group)
        except Fatal:
            raise
        except Exception as error:
            if len(group) > 1:
                raise
            return [(group[0].key, failed(group[0], error))]
        finally:
            self._ledger.end.remote(keys)

    def _together(self, group):
        found, opened = [], []
        try:
            for item, audio in zip(group, audios(group)):
                if isinstance(audio, Exception):
                    found.append((item.key, failed(item, audio)))
                else:
                    opened.append((item, audio))
            given = [audio for _, audio in opened]
            for news in run(self._model, self._processor, given, self._settings):
                if news.transcript:
                    item = opened[news.number][0]
                    news.transcript.name = item.audio
                    if news.transcript.error:
                        news.transcript.error = sendable(news.transcript.error)
                    found.append((item.key, news.transcript))
        except ImportError as error:
            raise Fatal(error) from error
        return found


def failed(item: Item, error: Exception) -> Transcript:
    return Transcript(item.audio, "", 0.0, 0.0, error=sendable(error))


def sendable(error: Exception) -> Exception:
    """The same, or one of its kind that can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        kinds = (ImportError, OSError, ValueError, TypeError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        return kind(f"{type(error).__name__}: {error}")
