"""What this process holds."""

import contextlib

import torch


def held() -> int:
    """Bytes now: of the process, or of torch on a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _read("VmRSS")


def most() -> int:
    """Bytes at most since forget()."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _read("VmHWM")


def forget() -> None:
    """Begin anew to note the most. Where that is not allowed, it stays that of all that ran before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _read(field):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return 1024 * int(line.split()[1])
