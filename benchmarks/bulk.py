"""Many recordings by Ray: a worker is killed, then the driver, and what comes out is held against one process.

200 recordings (100 utterances of LibriSpeech and 100 spoken digits) by two workers of a local cluster. One of them is
killed when a fifth is done, and the driver when half is; the same command then does the rest. Nothing may be lost,
nothing doubled, and with windows decoded one by one the texts must be those of one process. With larger batches a word
on the edge falls as its neighbours in the batch have it, in one process too: there the same recordings in reverse order
are held against it beside.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import whisperkv
from whisperkv.transcription.transcribing import prepared


def rows_of(folder):
    lines = (line for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines())
    return [json.loads(line) for line in lines]


def workers_of(driver):
    """The processes of its workers: their parent's parent is the driver."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:
            pass  # it has ended
    return [one for one in parents if parents.get(parents[one]) == driver and names[one].startswith(b"ray::MapWorker(")]


def wait_for(out, count, driver):
    while len(rows_of(out)) < count:
        if driver.poll() is not None:
            sys.exit(f"the run was over ({driver.returncode}) with {len(rows_of(out))} results, {count} were awaited")
        time.sleep(0.05)
    return len(rows_of(out))


def one_process(paths, model, threads, batch_size):
    """({name: text}, seconds that it took, seconds of audio)"""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    whisper, processor = prepared(model)
    found = whisperkv.transcribe(paths, model=whisper, processor=processor, batch_size=batch_size)
    texts = {Path(each.name).name: each.text for each in found}
    return texts, time.perf_counter() - start, sum(each.duration for each in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of .flac and .wav (default: ../shared/data)")
    parser.add_argument("--count", type=int, default=200, help="recordings (200)")
    parser.add_argument("--model", default="tiny.en")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=1, help="windows decoded together (1)")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (1)")
    given = parser.parse_args()
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    folders = given.folders or [data / "librispeech" / "test-other", data / "fsdd"]
    share = given.count // len(folders)
    paths = [path for one in folders for path in sorted([*one.glob("*.flac"), *one.glob("*.wav")])[:share]]

    with tempfile.TemporaryDirectory() as room:
        source, out, log = Path(room, "in"), Path(room, "out"), Path(room, "log")
        source.mkdir()
        for path in paths:
            (source / path.name).symlink_to(path)
        command = [
            *(sys.executable, "-m", "whisperkv", "transcribe", source, "--ray", "local", "--model", given.model),
            *("--workers", given.workers, "--threads", given.threads, "-o", out, "-f", "jsonl"),
            *("--batch_size", given.batch_size),
        ]
        command = list(map(str, command))

        start = time.perf_counter()
        with open(log, "w") as said:
            driver = subprocess.Popen(command, stderr=said)
            done = wait_for(out, len(paths) // 5, driver)
            victim = workers_of(driver.pid)[0]
            os.kill(victim, signal.SIGKILL)
            print(f"{time.perf_counter() - start:6.1f} s: {done} done, worker {victim} killed", flush=True)
            done = wait_for(out, len(paths) // 2, driver)
            driver.kill()
            driver.wait()
        before = rows_of(out)
        print(f"{time.perf_counter() - start:6.1f} s: {len(before)} done, the driver killed", flush=True)
        again = time.perf_counter()
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        print(f"{time.perf_counter() - start:6.1f} s: {run.stderr.strip().splitlines()[-1]}", flush=True)
        print(f"the second run took {time.perf_counter() - again:.1f} s, with the start of Ray and of its workers")
        rows = rows_of(out)

    alone = given.model, given.threads, given.batch_size
    texts, seconds, audio = one_process(paths, *alone)
    print(f"one process, {given.threads} threads: {audio:.0f} s of audio in {seconds:.1f} s")
    keys = [row["key"] for row in rows]
    lost, doubled = set(texts) - set(keys), {key for key in keys if keys.count(key) > 1}
    other = {row["key"]: row["text"] for row in rows if row["text"] != texts[row["key"]]}
    print(f"{len(keys)} results of {len(paths)}; lost: {sorted(lost)}; doubled: {sorted(doubled)}")
    print(f"texts that differ from those of one process: {len(other)}")
    for key, text in other.items():
        print(f"  {key}\n    {texts[key]}\n    {text}")
    if given.batch_size > 1:
        reverse, *_ = one_process(paths[::-1], *alone)
        print(f"texts that differ in one process in reverse order: {sum(texts[key] != reverse[key] for key in texts)}")
    assert run.returncode == 0 and not lost and not doubled and len(keys) == len(paths)
    assert rows[: len(before)] == before, "what was done before the driver was killed has changed"
    assert given.batch_size > 1 or not other, "a text differs from that of one process"


if __name__ == "__main__":
    main()
