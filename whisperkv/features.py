"""log_mel(): what WhisperFeatureExtractor makes of audio, without the work of the padding that fills up 30 seconds."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy
import torch
import transformers
from numpy.typing import NDArray

from . import voice

# Fewer columns than 12 take torch's matrix product another way, which rounds differently.
LEAST = 64


Audios = Sequence[NDArray[numpy.floating]]


@overload
def log_mel(audios: Audios, extractor: Any, return_columns: Literal[False] = False) -> torch.Tensor: ...
@overload
def log_mel(audios: Audios, extractor: Any, return_columns: Literal[True]) -> tuple[torch.Tensor, torch.Tensor]: ...
def log_mel(
    audios: Audios, extractor: Any, return_columns: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The `input_features` of WhisperFeatureExtractor, float32 [audios, mels, 3000], to the last bit.

    audios          a list of float arrays, one audio each: mono, at the extractor's rate, of up to 30 seconds
    extractor       a WhisperFeatureExtractor or WhisperProcessor: how many mels, their filters, window and padding
    return_columns  also return how many columns of each are audio, int64 [audios]: what its attention_mask sums up to

    Columns are computed for the audio's own seconds, by the same operations; those of the padding are all alike. The
    bits are the extractor's wherever torch's matrix product rounds a column alike whatever their number, as MKL's does.
    """
    extractor = _extractor(extractor)
    audios = _checked(audios, extractor)
    features = _features(audios, extractor)
    if not return_columns:
        return features
    return features, torch.tensor([-(-len(audio) // extractor.hop_length) for audio in audios])


def _features(audios, extractor):
    if isinstance(extractor, voice.WhisperFeatureExtractor):  # it listens to what it is given
        return extractor(audios, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
    filters = torch.from_numpy(extractor.mel_filters).float().T  # [mels, frequencies]
    window = torch.hann_window(extractor.n_fft)
    features = torch.empty(len(audios), len(filters), extractor.nb_max_frames)
    for audio, row in zip(audios, features):
        _fill(row, audio, filters, window, extractor)
    return features


def _fill(row, audio, filters, window, extractor):
    """row [mels, columns]"""
    hop, reach = extractor.hop_length, extractor.n_fft // 2
    touched = -(-(len(audio) + reach) // hop)  # columns with a sample of the audio in their window
    columns = min(max(touched + 1, LEAST), extractor.nb_max_frames)  # and one of padding alone
    samples = torch.full((min(columns * hop + reach, extractor.n_samples),), extractor.padding_value)
    samples[: len(audio)] = torch.from_numpy(audio)
    spectrum = torch.stft(samples, extractor.n_fft, hop, window=window, return_complex=True)[:, :columns]
    power = spectrum.T.abs().square()  # [columns, frequencies]
    values = (filters @ power.T).clamp(min=1e-10).log10()
    values = torch.maximum(values, values.max() - 8.0)
    row[:, :columns] = (values + 4.0) / 4.0
    row[:, columns:] = row[:, columns - 1 : columns]


def _extractor(given):
    extractor = getattr(given, "feature_extractor", given)
    if not isinstance(extractor, transformers.WhisperFeatureExtractor):
        raise TypeError(f"extractor must be a WhisperFeatureExtractor or WhisperProcessor; got {type(given).__name__}")
    if extractor.dither:
        raise ValueError(
            f"extractor.dither must be 0, as log_mel() adds no noise; got {extractor.dither}: call the extractor itself"
        )
    return extractor


def _checked(audios, extractor):
    """As float32 arrays."""
    if not isinstance(audios, (list, tuple)):
        raise TypeError(f"audios must be a list of arrays; got {type(audios).__name__}: pass [audio] for a single one")
    if not audios:
        raise ValueError("audios must hold at least one audio; got an empty list")
    return [_samples(f"audios[{index}]", audio, extractor) for index, audio in enumerate(audios)]


def _samples(name, audio, extractor):
    samples = numpy.asarray(audio)
    if samples.dtype.kind != "f":
        hint = ": divide it by 32768" if samples.dtype == numpy.int16 else ""
        raise TypeError(f"{name} must be an array of floats from -1 to 1; got {samples.dtype}{hint}")
    if samples.ndim != 1:
        raise ValueError(f"{name} must be mono, one dimension; got shape {samples.shape}: average its channels")
    if not len(samples):
        raise ValueError(f"{name} must hold at least one sample; it is empty: leave it out")
    if len(samples) > extractor.n_samples:
        raise ValueError(
            f"{name} must be of {extractor.chunk_length} seconds, {extractor.n_samples} samples, at most; got "
            f"{len(samples)}: cut it, or call the extractor with truncation=False for long-form generate()"
        )
    samples = samples.astype(numpy.float32, copy=False)
    if not numpy.isfinite(samples).all():
        raise ValueError(f"{name} must hold finite numbers only; got NaN or infinity: numpy.nan_to_num() mends it")
    return numpy.ascontiguousarray(samples)
