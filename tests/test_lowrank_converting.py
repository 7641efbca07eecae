"""convert_to_mla() of a Whisper."""

import copy

import pytest
import torch
from safetensors.torch import load as tensors_of
from small_speech import noise

from whisperkv import CrossConfig, EvictionConfig, lowrank, patch, stats, unpatch
from whisperkv.calibration import Calibration
from whisperkv.lowrank import calibrate, convert_to_mla, load_mla_model, measure_cache_memory, restore, save_mla_model

MADE = []


@pytest.fixture
def file(small, tmp_path):
    """A calibration of the small Whisper, which is the same one each time."""
    made = tmp_path / "small.safetensors"
    if not MADE:
        MADE.append(calibrate(small, [noise(n) for n in range(3)], made, verbose=False).read_bytes())
    made.write_bytes(MADE[0])
    return made


def generate(model, **options):
    features = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.generate(features, **{"do_sample": False, "max_new_tokens": 20, **options})


def test_it_is_a_calibration_and_a_patch(small, tmp_path):
    """The recordings are what calibrate() hears, and the settings those that patch() takes."""
    recordings = [noise(n) for n in range(3)]
    file = calibrate(small, recordings, tmp_path / "file.safetensors", keep=0.25, verbose=False)
    patch(small, EvictionConfig("all", keep=0.25, calibration=file), CrossConfig("latent_int2", calibration=file))
    want, held = generate(small), stats(small)
    model, processor = convert_to_mla(unpatch(small), calibration=recordings, cache_bits=2, verbose=False)
    assert model is small and processor is None and repr(model.lowrank).startswith("WhisperLowRank(ratio=4.0, bits=2")
    assert torch.equal(generate(model), want)
    assert (stats(model).self_bytes, stats(model).cross_bytes) == (held.self_bytes, held.cross_bytes)
    fewer, _ = convert_to_mla(restore(model), calibration=iter(recordings), num_calibration_samples=1, verbose=False)
    assert (tensors_of(fewer.lowrank.calibration)["cross.mean"] != tensors_of(file.read_bytes())["cross.mean"]).any()


@pytest.mark.parametrize(
    "settings, rank",
    [
        (dict(compression_ratio=1), None),
        (dict(compression_ratio=8, cache_bits=4), 16),
        (dict(d_latent=48, compression_method="joint"), 48),
    ],
    ids=str,
)
def test_memory(small, file, settings, rank):
    """What is computed is what the tensors take."""
    model, _ = convert_to_mla(small, calibration=file, verbose=False, **settings)
    assert model.lowrank.rank == rank
    for tokens, audios in ((1, 1), (17, 3), (None, 2)):
        memory = measure_cache_memory(model, tokens, audios)
        assert memory.measured == memory.latent and memory.full == audios * 2 * 2 * 64 * 4 * ((tokens or 64) + 50)
    channels = Calibration(file, model.get_decoder(), "").codes(model.lowrank.bits).channels
    heard = 4 * 64 * 2 * model.lowrank.bits + 2 * channels * 4
    assert measure_cache_memory(model, 64).latent == 2 * 64 * (rank or 128) * 4 + heard
    with pytest.raises(ValueError, match="sequence_length must be at most 64, .* got 65"):
        measure_cache_memory(model, 65)
    patch(model)
    with pytest.raises(ValueError, match=r"patched otherwise.*restore\(model\)"):
        measure_cache_memory(model)


def test_restore(small, file):
    want, names = generate(small), list(small.state_dict())
    model, _ = convert_to_mla(small, calibration=file, verbose=False)
    assert not torch.equal(generate(model), want)
    assert restore(model) is small and not hasattr(model, "lowrank") and list(model.state_dict()) == names
    assert torch.equal(generate(model), want) and restore(model) is model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files(small, file, tmp_path, dtype):
    model, _ = convert_to_mla(small, calibration=file, dtype=dtype, verbose=False)
    save_mla_model(model, None, tmp_path / "saved")
    loaded, processor = load_mla_model(tmp_path / "saved")
    assert processor is None and loaded.lowrank == model.lowrank and loaded.dtype == dtype and not loaded.training
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    if dtype == torch.float32:
        assert torch.equal(generate(loaded, num_beams=2), generate(model, num_beams=2))
    copied = copy.deepcopy(loaded)
    assert torch.equal(restore(copied).model.encoder.conv1.weight, model.model.encoder.conv1.weight)


def cut(name, to):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])


BAD = {
    "weights cut short": (cut("model.safetensors", 5000), "model.safetensors is truncated or damaged"),
    "calibration cut short": (cut("calibration.safetensors", 5000), "cannot be read"),
    "no calibration": (
        lambda folder: (folder / "calibration.safetensors").unlink(),
        "calibration.safetensors is missing. Save",
    ),
    "another record": (lambda folder: (folder / "lowrank.json").write_text("{}"), "there are .*qwen3, whisper"),
}


@pytest.mark.parametrize("spoil, error", BAD.values(), ids=BAD)
def test_folders_that_are_refused(small, file, tmp_path, spoil, error):
    save_mla_model(convert_to_mla(small, calibration=file, verbose=False)[0], None, tmp_path / "saved")
    spoil(tmp_path / "saved")
    with pytest.raises(ValueError, match=error):
        load_mla_model(tmp_path / "saved")


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(calibration=None), "calibration must hold recordings for a Whisper.*ten minutes.*got None"),
        (dict(calibration=[]), "audio must hold a recording or more"),
        (dict(compression_ratio=1.5), "compression_ratio must be 1, or 2 and more, for a Whisper.*got 1.5"),
        (dict(compression_method="xkv"), "compression_method must be 'auto' or 'joint' for a Whisper.*got 'xkv'"),
        (dict(cache_bits=8), r"cache_bits must be 4, 3 or 2 for a Whisper; got 8.*CrossConfig\('latent_int8'\)"),
        (dict(d_latent=40), "d_latent must be a multiple of 16 up to 64.*got 40"),
        (dict(d_latent=128), "d_latent must be a multiple of 16 up to 64.*got 128"),
        (dict(cross_layer_group_size=2), "cross_layer_group_size is for language models: leave it out.*got 2"),
        (dict(max_calibration_length=99), "max_calibration_length is for language models: leave it out"),
        (dict(xkv_share="bases"), "xkv_share is for language models: leave it out"),
        (dict(use_calibration=False, calibration=None), "use_calibration=False leaves a Whisper nothing to go by"),
    ],
    ids=str,
)
def test_what_is_refused(small, settings, error):
    with pytest.raises(ValueError, match=error):
        convert_to_mla(small, **{"calibration": [noise(0)], "verbose": False, **settings})
    assert not hasattr(small, "lowrank") and type(small.get_decoder()).__module__.startswith("transformers")


def test_models_that_are_refused(small, file):
    with pytest.raises(TypeError, match="must be a WhisperForConditionalGeneration, got WhisperModel"):
        convert_to_mla(small.model, calibration=file)
    with pytest.raises(ValueError, match=r"this is for language models, or a Whisper that was converted"):
        measure_cache_memory(small)
    with pytest.raises(ValueError, match=r"whisperkv.unpatch\(model\) first"):
        convert_to_mla(patch(small), calibration=file)
    model, _ = convert_to_mla(unpatch(small), calibration=file, verbose=False)
    with pytest.raises(ValueError, match=r"converted already: WhisperLowRank.*restore\(\) it first"):
        convert_to_mla(model, calibration=file)
    with pytest.raises(ValueError, match=r"for language models. A Whisper's latents take other settings by restore"):
        lowrank.quantize_latents(model, 4)
    with pytest.raises(ValueError, match=r"compute_perplexity is for language models.*whisperkv.evaluation.compare"):
        lowrank.compute_perplexity(model, None, ["a"])
