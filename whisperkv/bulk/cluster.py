"""Ray: started here or joined, and how many workers it has room for."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STORE = 100 * 2**20  # bytes; what goes through it is small
LOCAL = "local"
MOST_THREADS = 4


@dataclass(frozen=True)
class Shape:
    """The workers."""

    workers: int
    threads: int  # of each
    gpus: int  # of each


def need_ray() -> Any:
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install whisperkv[ray]") from error
    return ray


@contextmanager
def cluster(address: str | None, workers: int | None, threads: int | None, device: str | None) -> Iterator[Shape]:
    """Ray is there, and what was started here ends."""
    ray = need_ray()
    if ray.is_initialized():
        if address is not None:
            raise ValueError(f"ray={address!r}: this process uses a cluster already; leave out ray=, or ray.shutdown()")
        yield _shape(ray, workers, threads, device)
        return
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if address in (None, LOCAL):
        cores = len(os.sched_getaffinity(0))
        threads = threads or _threads(cores, cores, workers)
        count = (workers or max(1, cores // threads)) * threads
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else an error stands at the beginning of every run
        ray.init(LOCAL, num_cpus=count, object_store_memory=STORE, **quiet)
    else:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield _shape(ray, workers, threads, device)
    finally:
        ray.shutdown()


def _shape(ray, workers, threads, device):
    """By what the cluster has."""
    total = ray.cluster_resources()
    cores, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    on_gpu = gpus > 0 if device is None else device.startswith("cuda")
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    threads = threads or _threads(cores, largest, workers)
    if threads > largest:
        raise ValueError(f"threads={threads}: no machine of the cluster has more than {largest} cores")
    room = gpus if on_gpu else cores // threads
    if room == 0 or (workers or 0) > room:
        have = f"{gpus} GPUs" if on_gpu else f"{cores} cores"
        raise ValueError(f"workers={workers or 1} of {threads} threads: the cluster has {have}, room for {room}")
    return Shape(workers or room, threads, int(on_gpu))


def _threads(cores, largest, workers):
    """Of a worker, where none are given. largest: the cores of the largest machine."""
    return max(1, min(largest, MOST_THREADS, cores // (workers or 1)))
