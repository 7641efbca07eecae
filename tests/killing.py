"""A training that is killed."""

import multiprocessing
import signal
import time

import torch


def losses_when_killed(checkpoint, run, *arguments):
    """Of run(*arguments) in a process that is killed as soon as there is a checkpoint: the losses in that."""
    training = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    training.start()
    until = time.monotonic() + 60
    while not checkpoint.exists() and training.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    training.kill()
    training.join()
    assert training.exitcode == -signal.SIGKILL
    return torch.load(checkpoint)["losses"]
