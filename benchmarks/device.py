"""Time and memory of a GPU; and of a CPU, so that what measures a GPU can be tried without one."""

import gc
import subprocess
from statistics import median
from time import perf_counter

import torch

OTHER = 512 << 20  # bytes read before each call: several times any GPU's cache


def mark(device):
    """A point in time, on the device's own clock."""
    if device.type == "cpu":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end):
    """Milliseconds; waits for the end."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def by_turns(calls, rounds, device):
    """Median milliseconds of each call: one after the other, and the other way round the next time. Other memory is
    read before each, which empties the caches and keeps the GPU busy while Python prepares the call."""
    other = torch.zeros(OTHER // 4 >> (0 if device.type == "cuda" else 5), device=device)
    marks = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key in list(calls)[:: 1 if turn % 2 else -1]:
            other.sum()
            start = mark(device)
            calls[key]()
            if turn:  # the first warms up
                marks[key].append((start, mark(device)))
    return {key: median(between(*pair) for pair in pairs) for key, pairs in marks.items()}


class Memory:
    """GB that a GPU has taken since this was made. Of a CPU nothing is known."""

    def __init__(self, device):
        self.is_known = device.type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.is_known else 0
        self.begin_peak()

    def begin_peak(self):
        if self.is_known:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self):
        return (torch.cuda.max_memory_allocated() - self.before) / 1e9 if self.is_known else None


def driver():
    """The version of NVIDIA's driver, or None."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def forget():
    """Leave no memory of one measurement to the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(function, *args):
    """What it returns and "", or None and why not."""
    try:
        return function(*args), ""
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        return None, "out of memory" if "out of memory" in text else f"{type(error).__name__}: {text[:200]}"
