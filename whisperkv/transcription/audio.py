"""Recordings from files, standard input and arrays: block by block, float32, mono, 16 kHz."""

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from os import PathLike

import numpy as np
from numpy.typing import NDArray

RATE = 16_000  # samples a second, of all Whispers and of the speech LLMs
BLOCK = 30  # seconds read at once
STDIN = "-"
ENDINGS = frozenset(
    ".aac .ac3 .aif .aiff .amr .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3 .mp4 .mpeg .mpga .oga .ogg .opus .w64 "
    ".wav .weba .webm .wma".split()
)  # of what is taken for a recording in a folder

Samples = NDArray[np.float32]


def read_audio(path: str | PathLike[str]) -> Samples:
    """A recording of any rate and number of channels, as float32 mono at 16 kHz.

    path  a file that soundfile reads, or the ffmpeg program where it is installed; "-" is standard input
    """
    return np.concatenate(list(read_blocks(path)))


def read_blocks(path: str | PathLike[str]) -> Iterator[Samples]:
    """The same piece by piece, so that hours take no more memory than a minute."""
    return _checked(str(path), _blocks(path))


def read_bytes(data: bytes, name: str) -> Samples:
    """A recording whose file is in memory."""
    return np.concatenate(list(_checked(name, _any(name, io.BytesIO(data), data))))


def blocks_of(samples: NDArray[np.floating]) -> Iterator[Samples]:
    """An array in memory as a recording."""
    given = np.asarray(samples)
    if given.ndim != 1 or given.dtype.kind != "f":
        raise ValueError(
            "audio must be an array of floats from -1 to 1 in one dimension, mono at 16 kHz; "
            f"got {given.dtype} of shape {given.shape}: average its channels, and divide int16 by 32768"
        )
    pieces = (given[start : start + BLOCK * RATE] for start in range(0, len(given), BLOCK * RATE))
    return _checked("the array", (np.ascontiguousarray(piece, dtype=np.float32) for piece in pieces))


def seconds_of(path: str | PathLike[str]) -> float | None:
    """How long a recording is by its header; None where only reading it would tell."""
    if str(path) == STDIN:
        return None
    try:
        about = _soundfile().info(str(path))
    except (OSError, RuntimeError):
        return None
    return about.frames / about.samplerate


def _checked(name, blocks):
    count = 0
    for block in blocks:
        if not np.isfinite(block).all():
            raise ValueError(f"{name}: not every sample is a number; write the file anew, as ffmpeg does")
        count += len(block)
        if len(block):
            yield block
    if not count:
        raise ValueError(f"{name}: there is no sound in it; record it again, or leave it out")


def _blocks(path):
    if str(path) == STDIN:
        data = sys.stdin.buffer.read()  # what is compressed stays so: soundfile must be able to go back in it
        if not data:
            raise ValueError("standard input: nothing came in; pipe a recording into it, or name a file")
        yield from _any("standard input", io.BytesIO(data), data)
    else:
        with open(path, "rb") as file:
            if not file.peek(1):
                raise ValueError(f"{path}: the file is empty; copy or record it again, or leave it out")
            yield from _any(path, file, None)


def _any(name, file, data):
    """By soundfile, else by ffmpeg. data: what ffmpeg is to read, or None for the file of that name."""
    soundfile = _soundfile()
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        if shutil.which("ffmpeg") is None:
            raise ValueError(
                f"{name}: {error.error_string} Pass WAV, FLAC, OGG or MP3, or install ffmpeg, which reads all else"
            ) from error
        yield from _by_ffmpeg(name, data)
        return
    with sound:
        try:
            yield from _resampled(sound)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{name}: it breaks off: {error.error_string} Copy it again, or save what is there: "
                "ffmpeg -i BROKEN WHOLE.wav"
            ) from error


def _resampled(sound):
    stream = None
    if sound.samplerate != RATE:
        import soxr

        stream = soxr.ResampleStream(sound.samplerate, RATE, 1, dtype="float32")
    while len(block := sound.read(BLOCK * sound.samplerate, dtype="float32", always_2d=True)):
        block = block.mean(axis=1)
        yield stream.resample_chunk(block) if stream else block
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _by_ffmpeg(name, data):
    source = f"file:{name}" if data is None else "pipe:0"
    command = ["ffmpeg", "-v", "error", "-nostdin" if data is None else "-y", "-i", source]
    command += ["-map", "0:a:0", "-f", "f32le", "-ac", "1", "-ar", str(RATE), "pipe:1"]
    with _spooled(data) as given, _spooled(b"") as said:
        process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=said)
        try:
            assert process.stdout is not None
            while block := process.stdout.read(4 * BLOCK * RATE):
                yield np.frombuffer(block[: len(block) // 4 * 4], np.float32)
            failed = process.wait() != 0
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if failed:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise ValueError(f"{name}: neither soundfile nor ffmpeg can read it ({lines[-1].strip()})")


def _spooled(data):
    """A file that a program can be given, with these bytes in it."""
    file = tempfile.TemporaryFile()
    file.write(data or b"")
    file.seek(0)
    return file


def _soundfile():
    try:
        import soundfile
        import soxr  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install whisperkv[demo]") from error
    return soundfile
