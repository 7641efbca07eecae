"""MLATrainer of a Whisper: what its caches lost, learned back."""

import copy

import pytest
import torch
from killing import losses_when_killed
from safetensors.torch import load as tensors_of
from small_speech import features_of, forced, noise

from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.lowrank import MLATrainer, calibrate, convert_to_mla, load_mla_model, save_mla_model

MADE = []
LOSSES = {
    "distillation": {},
    "reconstruction": {"use_distillation": False, "use_reconstruction_loss": True},
    "likelihood": {"use_distillation": False},
}


RECORDINGS = [noise(n, 0.3 + 0.1 * (n % 4)) for n in range(12)]


@pytest.fixture
def converted(small, tmp_path):
    """The small Whisper with an eighth of its tokens' numbers and 2 bits for the audio's."""
    if not MADE:
        file = calibrate(small, [noise(n) for n in range(4)], tmp_path / "first.safetensors", verbose=False)
        MADE.append(file.read_bytes())
    return converted_as(copy.deepcopy(small), tmp_path)


def converted_as(model, folder, ratio=8, bits=2):
    file = folder / "calibration.safetensors"
    file.write_bytes(MADE[0])
    return convert_to_mla(model, ratio, calibration=str(file), cache_bits=bits, verbose=False)[0]


def missed(model, windows=RECORDINGS[:6]):
    """How far the model is from what it was before."""
    return float(MLATrainer(model, None).loss(windows).detach())


def train(model, epochs=10, **settings):
    options = {"batch_size": 3, "max_length": 12, "progress": False}
    options |= {name: settings.pop(name) for name in list(settings) if name.startswith("checkpoint")}
    return MLATrainer(model, None, **settings).train(RECORDINGS, epochs, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_learns(converted, loss):
    before, weights = missed(converted), copy.deepcopy(converted.state_dict())
    first, learns = tensors_of(converted.lowrank.calibration), [each.requires_grad for each in converted.parameters()]
    losses = train(converted, **LOSSES[loss])
    assert len(losses) == 30 and sum(losses[-6:]) < sum(losses[:6])
    assert missed(converted) < 0.7 * before
    assert stats(converted).note == ""  # it is patched again
    changed = [name for name, each in converted.state_dict().items() if not torch.equal(weights[name], each)]
    assert not changed
    assert learns == [each.requires_grad for each in converted.parameters()]
    learned = tensors_of(converted.lowrank.calibration)
    changed = {name for name in learned if name not in first or not torch.equal(learned[name], first[name])}
    assert changed == {"self.basis", "self.back", "cross.there", "cross.back"}
    for up in learned["self.back"]:
        assert torch.allclose(up.T @ up, torch.eye(up.shape[1]), atol=1e-5)


def test_nothing_learned(converted):
    """A rate of 0 leaves the caches as they were."""
    before = forced(converted, features_of(21, 22), torch.arange(3, 15).repeat(2, 1))
    train(converted, 1, euclidean_lr=0.0)
    after = forced(converted, features_of(21, 22), torch.arange(3, 15).repeat(2, 1))
    assert torch.allclose(before, after, atol=1e-3)


def test_what_learns_is_what_decodes(small, converted):
    """The loss before the first step is that of the caches."""
    loss = missed(converted, [noise(31)])
    features = features_of(31)
    with torch.no_grad():
        heard = small.generate(features, do_sample=False)[0].tolist()
    ends = small.generation_config.eos_token_id
    heard = heard[: heard.index(ends) + 1] if ends in heard else heard
    tokens = torch.tensor([[small.generation_config.decoder_start_token_id, *heard[:-1]]])
    ours, theirs = (forced(each, features, tokens)[0].log_softmax(-1) for each in (converted, small))
    want = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    assert loss == pytest.approx(float(want), rel=0.1) and loss > 1e-3


def test_only_one_cache(small, tmp_path):
    """Tokens as they are: what learns is the audio's codes alone."""
    calibrate(small, [noise(n) for n in range(4)], tmp_path / "made.safetensors", verbose=False)
    model, _ = convert_to_mla(small, 1, calibration=str(tmp_path / "made.safetensors"), cache_bits=2, verbose=False)
    before = missed(model)
    train(model)
    assert missed(model) < 0.8 * before
    assert "self.back" not in tensors_of(model.lowrank.calibration)


def test_a_teacher(small, converted):
    """Another model of the same tongue; here the very same."""
    taught = MLATrainer(converted, None, teacher_model=copy.deepcopy(small)).loss(RECORDINGS[:3])
    assert float(taught.detach()) == pytest.approx(missed(converted, RECORDINGS[:3]), rel=1e-4)


def test_files(converted, tmp_path):
    """What was learned is in the folder, and its calibration serves patch() as well."""
    train(converted, 2)
    save_mla_model(converted, None, tmp_path / "folder")
    loaded, _ = load_mla_model(tmp_path / "folder")
    features, tokens = features_of(21, 22), torch.arange(3, 15).repeat(2, 1)
    want = forced(converted, features, tokens)
    assert torch.equal(forced(loaded, features, tokens), want)
    file = tmp_path / "folder" / "calibration.safetensors"
    patch(
        unpatch(loaded),
        EvictionConfig("all", keep=1 / 8, calibration=file),
        CrossConfig("latent_int2", calibration=file),
    )
    assert torch.equal(forced(loaded, features, tokens), want)
    with pytest.raises(ValueError, match="was calibrated up to 16: use 0.125 or less"):
        patch(unpatch(loaded), EvictionConfig("all", keep=0.25, calibration=file))
        forced(loaded, features, tokens)


def run(folder, checkpoint):
    from conftest import small

    model = converted_as(small.__wrapped__(), folder)
    return model, train(model, checkpoint=checkpoint, checkpoint_every=3)


def test_killed_and_resumed(converted, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    assert 0 < len(losses_when_killed(checkpoint, run, tmp_path, checkpoint)) < 30
    (resumed, losses), (whole, expected) = run(tmp_path, checkpoint), run(tmp_path, tmp_path / "other")
    assert losses == expected and len(losses) == 30
    one, other = (tensors_of(model.lowrank.calibration) for model in (resumed, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted(converted, monkeypatch):
    """What was learned so far stays, and the model is patched as before."""
    from whisperkv.lowrank.whisper_lessons import WhisperLessons

    first, before, steps = converted.lowrank.calibration, WhisperLessons.loss, []

    def loss(self, windows):
        steps.append(len(windows))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return before(self, windows)

    monkeypatch.setattr(WhisperLessons, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        train(converted)
    assert converted.lowrank.calibration != first
    forced(converted, features_of(21), torch.arange(3, 9)[None])
    assert stats(converted).self_bytes < stats(converted).self_bytes_transformers / 2


def test_refusals(converted):
    with pytest.raises(ValueError, match="optimizer must be 'adamw' for a Whisper"):
        MLATrainer(converted, None, optimizer="riemannian")
    trainer = MLATrainer(converted, None)
    for dataset in ([], None, ["no such file.wav"], [torch.zeros(2, 9).numpy()]):
        with pytest.raises((ValueError, TypeError, OSError)):
            trainer.train(dataset, progress=False)
    unpatch(converted)
    with pytest.raises(ValueError, match="patched otherwise, or unpatched, since it was converted"):
        trainer.train(RECORDINGS, progress=False)


def test_real_speech(tiny_en, recordings, tmp_path):
    """A minute of it: an eighth of the tokens' numbers say more than before, of a speaker that was not heard too."""
    from whisperkv.transcription.audio import read_audio

    files = sorted((recordings / "librispeech" / "test-other").glob("*.flac"))
    heard = [read_audio(file) for file in files[:6]]
    model, _ = tiny_en
    try:
        convert_to_mla(model, 8, calibration=heard, cache_bits=4, verbose=False)
        other = [read_audio(file) for file in files[-2:]]
        before = missed(model, other)
        losses = MLATrainer(model, None).train(heard, 2, 1, progress=False)
        assert losses[-1] < losses[0] and missed(model, other) < before
    finally:
        unpatch(model)
        model.__dict__.pop("lowrank", None)
