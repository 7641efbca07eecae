"""MLATrainer of a Whisper: what its caches lost, learned back."""

import copy
import multiprocessing
import signal
import time

import pytest
import torch
from safetensors.torch import load as tensors_of
from transformers import WhisperFeatureExtractor

from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.lowrank import MLATrainer, calibrate, convert_to_mla, load_mla_model, save_mla_model

RATE, MADE = 16_000, []
LOSSES = {
    "distillation": {},
    "reconstruction": {"use_distillation": False, "use_reconstruction_loss": True},
    "likelihood": {"use_distillation": False},
}


def noise(seed, seconds=1.0):
    return torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed)).numpy()


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


def features_of(*seeds):
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return extractor([noise(seed) for seed in seeds], sampling_rate=RATE, return_tensors="pt").input_features


def logits_of(model, features, tokens):
    """Of tokens that are fed one by one, through the caches."""
    with torch.no_grad():
        states, cache, logits = model.get_encoder()(features), None, []
        for place in range(tokens.shape[1]):
            step = tokens[:, place : place + 1]
            output = model(encoder_outputs=states, decoder_input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def distance(model, plain):
    """From what another model says, on noise that was not learned from."""
    features = features_of(21, 22, 23)
    tokens = torch.arange(3, 15).repeat(3, 1)
    ours, theirs = (logits_of(each, features, tokens).log_softmax(-1) for each in (model, plain))
    return float(torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True))


def train(model, epochs=8, **settings):
    options = {"batch_size": 2, "max_length": 12, "progress": False}
    options |= {name: settings.pop(name) for name in list(settings) if name.startswith("checkpoint")}
    return MLATrainer(model, None, 3e-3, 3e-3, **settings).train(RECORDINGS, epochs, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "riemannian"])
@pytest.mark.parametrize("loss", LOSSES)
def test_learns(small, converted, loss, optimizer):
    if optimizer == "riemannian":
        pytest.importorskip("geoopt")
    before, weights = distance(converted, small), copy.deepcopy(converted.state_dict())
    first = tensors_of(converted.lowrank.calibration)
    losses = train(converted, optimizer=optimizer, **LOSSES[loss])
    assert sum(losses[-4:]) < sum(losses[:4])
    if loss != "likelihood":  # of its own words, which it then repeats
        assert distance(converted, small) < before
    assert all(torch.equal(weights[name], each) for name, each in converted.state_dict().items())
    assert all(each.requires_grad for each in converted.parameters())
    learned = tensors_of(converted.lowrank.calibration)
    assert {name for name in learned if name not in first or learned[name].shape != first[name].shape or (
        learned[name] != first[name]).any()} == {"self.basis", "self.back", "cross.there", "cross.back"}  # fmt: skip
    for up in learned["self.back"]:
        assert torch.allclose(up.T @ up, torch.eye(up.shape[1]), atol=1e-5)


def test_what_learns_is_what_decodes(small, converted):
    """The loss before the first step is that of the caches."""
    trainer = MLATrainer(converted, None)
    window = noise(31)
    loss = float(trainer.loss([window]))
    features = features_of(31)
    with torch.no_grad():
        heard = small.generate(features, do_sample=False)[0].tolist()
    ends = small.generation_config.eos_token_id
    heard = heard[: heard.index(ends) + 1] if ends in heard else heard
    tokens = torch.tensor([[small.generation_config.decoder_start_token_id, *heard[:-1]]])
    ours, theirs = (logits_of(each, features, tokens)[0].log_softmax(-1) for each in (converted, small))
    want = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    assert loss == pytest.approx(float(want), rel=0.1) and loss > 1e-3
