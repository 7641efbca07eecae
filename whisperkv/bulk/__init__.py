"""Thousands of recordings, by Ray Data, each transcribed exactly once.

items      what is to be done, each recording under its key, in groups of like length
worker     what runs on the cluster: a patched model an actor
ledger     what is known of recordings that ended a worker
outputs    the folder of results, which has one writer and knows what is done
cluster    Ray, started or joined
running    transcribe_dataset(), which puts these together
"""

from typing import TYPE_CHECKING

__all__ = ["Summary", "transcribe_dataset"]

if TYPE_CHECKING:
    from .running import Summary as Summary
    from .running import transcribe_dataset as transcribe_dataset
else:

    def __getattr__(name):  # a process of the cluster imports what it needs of this room, and no more
        if name not in __all__:
            raise AttributeError(f"module 'whisperkv.bulk' has no attribute '{name}'")
        from . import running

        return getattr(running, name)
