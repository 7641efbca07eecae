"""What this process holds: all of it where the model is on the CPU, what torch has of a GPU where it is there."""

import contextlib

import torch


def held(device: torch.device) -> int:
    """Bytes now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _read("VmRSS")


def most(device: torch.device) -> int:
    """Bytes at most since forget()."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _read("VmHWM")


def forget(device: torch.device) -> None:
    """Begin anew to note the most. Where that is not allowed, it stays that of all that ran before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _read(field):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return 1024 * int(line.split()[1])
