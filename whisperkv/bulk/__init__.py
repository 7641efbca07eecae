"""Thousands of recordings, by Ray Data, each transcribed exactly once.

items      what is to be done, each recording under its key, in groups of like length
worker     what runs on the cluster: a patched model an actor, a ledger of recordings that ended one
outputs    the folder of results, which has one writer and knows what is done
cluster    Ray, started or joined
running    transcribe_dataset(), which puts these together
"""

from .running import Summary, transcribe_dataset

__all__ = ["Summary", "transcribe_dataset"]
