"""Low-rank caches of Whisper, from the calibration to the text."""

import copy
import pickle

import pages
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_speech import RATE, features_of, forced, noise

from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.calibration import Calibration, bits_of_blocks, fingerprint
from whisperkv.lowrank import (
    calibrate,
    convert_to_mla,
    generate_samples,
    load_mla_model,
    measure_cache_memory,
    save_mla_model,
)
from whisperkv.lowrank.whisper_listening import Listening

MADE = []


@pytest.fixture
def calibrated(small, tmp_path):
    """(model, file) of the small random Whisper, which is the same one each time."""
    if not MADE:
        made = calibrate(small, [noise(n) for n in range(4)], tmp_path / "first", verbose=False)
        MADE.append(made.read_bytes())
        made.unlink()
    file = tmp_path / "small.safetensors"
    file.write_bytes(MADE[0])
    return small, file


@pytest.fixture(scope="module")
def audio():
    """Features of noise that no calibration has heard."""
    return features_of(7, 8, 9)


def generate(model, audio, **options):
    with torch.no_grad():
        return model.generate(audio, **{"do_sample": False, "max_new_tokens": 20, **options})


def own(file, keep=0.5, policy="all", **options):
    return EvictionConfig(policy, keep=keep, calibration=file, **options)


def tokens_of(model, audio):
    return torch.cat([torch.full((len(audio), 1), 3), generate(model, audio)], 1)[:, :16]


# The calibration


def test_the_model_stays_as_it_was(small, tmp_path):
    before = copy.deepcopy(small.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in small.modules()]
    calibrate(small.train(), [noise(0)], tmp_path / "file", verbose=False)
    assert small.training and hooks == [len(module._forward_pre_hooks) for module in small.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_every_token_is_heard(small, audio):
    """Those of the prompt and of the transcript but its end, which asks nothing."""
    listening, heard = Listening(small), []
    listening.hear(small, audio[0], lambda frames: None, lambda index, states: heard.append(states))
    tokens = small.generate(audio[:1], do_sample=False)[0].tolist()
    tokens = [3, *(tokens[: tokens.index(2)] if 2 in tokens else tokens)]
    asked = []
    handle = (
        small.get_decoder()
        .layers[1]
        .self_attn.register_forward_pre_hook(
            lambda _, args, given: asked.append((args[0] if args else given["hidden_states"])[0]), with_kwargs=True
        )
    )
    with torch.no_grad():
        small(audio[:1], decoder_input_ids=torch.tensor([tokens]), use_cache=False)
    handle.remove()
    assert len(heard) == 2 and len(tokens) > 5
    length = min(len(tokens), len(heard[1]))
    assert len(tokens) - length <= 1  # the last one of a transcript that has no end is not asked
    torch.testing.assert_close(heard[1], asked[0][:length], rtol=1e-4, atol=1e-4)
    assert {reading.queries for reading in (*listening.own, *listening.cross)} == {length}


def test_what_is_in_the_file(calibrated):
    model, file = calibrated
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["kind"] == "whisperkv.lowrank" and '"d_model": 64' in opened.metadata()["shape"]
    tensors = load_file(file)
    there, back = tensors["cross.there"].double(), tensors["cross.back"].double()
    torch.testing.assert_close(there @ back, torch.eye(64).double(), rtol=0, atol=1e-4)
    errors = tensors["cross.errors"]
    assert (errors[1:] < errors[:1]).all() and errors[8].sum() < errors[4].sum() / 20 < errors[1].sum() / 100
    assert errors[0].argsort(descending=True).eq(torch.arange(64)).float().mean() > 0.5  # the most telling ones first
    assert list(file.parent.iterdir()) == [file]


def test_the_same_file_from_the_same_audio(calibrated, tmp_path):
    model, file = calibrated
    again = calibrate(model, [noise(n) for n in range(4)], tmp_path / "again", verbose=False)
    one, other = load_file(file), load_file(again)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "given, error",
    [
        (dict(audio=[]), "audio must hold a recording or more"),
        (dict(audio=[torch.zeros(2, 9).numpy()]), "audio 0 must be mono samples"),
        (dict(audio=[torch.full((9,), torch.nan).numpy()]), "audio 0 must be mono samples"),
        (dict(keep=0.6), "keep must be above 0 and up to 0.5, got 0.6"),
        (dict(keep=True), "keep must be above 0"),
        (dict(path="/nowhere/file"), "path='/nowhere/file': there is no folder /nowhere"),
    ],
)
def test_what_calibrate_refuses(small, tmp_path, given, error):
    arguments = dict(audio=[noise(0)], path=tmp_path / "file") | given
    with pytest.raises(ValueError, match=error):
        calibrate(small, arguments.pop("audio"), arguments.pop("path"), **arguments)


def test_models_that_cannot_be_calibrated(small, tmp_path):
    with pytest.raises(TypeError, match="must be a WhisperForConditionalGeneration, got WhisperModel"):
        calibrate(small.model, [noise(0)], tmp_path / "file")
    with pytest.raises(ValueError, match=r"patched: whisperkv.unpatch\(model\) first"):
        calibrate(patch(small), [noise(0)], tmp_path / "file")


def test_bits_go_where_they_save_most():
    errors = torch.tensor([[16.0, 1.0, 0.01]]) * 0.25 ** torch.arange(9.0)[:, None]
    assert bits_of_blocks(errors, 0) == [0, 0, 0] and bits_of_blocks(errors, 1) == [1, 0, 0]
    assert bits_of_blocks(errors, 9) == [5, 4, 0] and bits_of_blocks(errors, 24) == [8, 8, 8]
    late = torch.tensor([1.0, 0.99, 0.1] + [0.09] * 6)[:, None]  # a bit alone brings nothing, two do
    assert bits_of_blocks(late, 2) == [2]


# The files that are refused


def test_a_file_is_needed():
    for name in ("latent_int3", "latent_int2"):
        with pytest.raises(
            ValueError, match=r"calibration must be the path of a file that whisperkv.lowrank.calibrate"
        ):
            CrossConfig(name)
    with pytest.raises(ValueError, match=r"calibration must be the path .*, as keep=0.25 reads one"):
        EvictionConfig(keep=0.25)
    with pytest.raises(ValueError, match="calibration must be None for 'int8'"):
        CrossConfig("int8", calibration="file")
    with pytest.raises(ValueError, match="calibration must be None where keep is 1"):
        EvictionConfig(calibration="file")
    with pytest.raises(ValueError, match="calibration must be the path of a file, or None; got 3"):
        CrossConfig("latent_int4", calibration=3)


@pytest.mark.parametrize("keep", [0, 0.6, 0.99, 2, True, "all"])
def test_shares_that_make_no_sense(keep):
    with pytest.raises(ValueError, match=r"keep must be above 0 and up to 0.5"):
        EvictionConfig(keep=keep, calibration="file")


def test_a_policy_that_looks_at_keys():
    with pytest.raises(ValueError, match='policy must be another one with keep below 1: "magnitude"'):
        EvictionConfig("magnitude", keep=0.25, calibration="file")


def truncated(file):
    file.write_bytes(file.read_bytes()[:5000])


def with_metadata(**about):
    def change(file):
        with safe_open(file, "pt") as opened:
            kept = opened.metadata()
        save_file(load_file(file), file, kept | about)

    return change


BAD = {
    "gone": (lambda file: file.unlink(), FileNotFoundError, "no such file; whisperkv.lowrank.calibrate"),
    "cut short": (truncated, ValueError, "cannot be read"),
    "no such thing": (lambda file: file.write_text("hello"), ValueError, "cannot be read"),
    "another kind": (with_metadata(kind="x"), ValueError, "is no whisperkv.lowrank 1 file, but x 1"),
    "of a later time": (with_metadata(version="2"), ValueError, "is no whisperkv.lowrank 1 file"),
    "of another size": (with_metadata(shape='{"d_model": 384}'), ValueError, "was calibrated on a model of .*384"),
}


@pytest.mark.parametrize("spoil, kind, error", BAD.values(), ids=BAD)
def test_files_that_are_refused(calibrated, audio, spoil, kind, error):
    model, file = calibrated
    want = generate(patch(model), audio)
    spoil(file)
    for settings in (dict(cross=CrossConfig("latent_int3", calibration=file)), dict(eviction=own(file))):
        with pytest.raises(kind, match=error):
            patch(model, **settings)
    assert torch.equal(generate(model, audio), want) and stats(model).decodes > 1  # nothing has changed


def test_a_file_of_other_weights(calibrated):
    model, file = calibrated
    patch(copy.deepcopy(model).to(torch.bfloat16), cross=CrossConfig("latent_int3", calibration=file))
    with torch.no_grad():
        model.model.decoder.layers[1].encoder_attn.v_proj.weight.mul_(1.05)
    with pytest.raises(ValueError, match=r"was calibrated on other weights; whisperkv.lowrank.calibrate\(model, audio"):
        patch(model, cross=CrossConfig("latent_int3", calibration=file))


def test_more_than_the_file_has(small, tmp_path):
    file = calibrate(small, [noise(0)], tmp_path / "file", keep=0.25, verbose=False)
    patch(small, own(file, 0.25))
    with pytest.raises(ValueError, match=r"keep=0.5 is rank 64, and file was calibrated up to 32: use 0.25 or less"):
        patch(small, own(file, 0.5))


def test_a_fingerprint_is_of_all_layers(small):
    before = fingerprint(small.get_decoder())
    for layer in small.get_decoder().layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            for project in (attention.k_proj, attention.v_proj):
                with torch.no_grad():
                    project.weight.add_(1)
                after = fingerprint(small.get_decoder())
                assert (before != after).any()
                before = after


# The self-attention's cache


def test_full_rank_is_exact(calibrated, audio):
    """A token's keys and values are made of one state, which has half as many numbers."""
    model, file = calibrated
    tokens = tokens_of(model, audio)
    want = forced(model, audio, tokens)
    patch(model, own(file))
    torch.testing.assert_close(forced(model, audio, tokens), want, rtol=1e-3, atol=1e-3)
    assert torch.equal(generate(model, audio), generate(unpatch(model), audio))


def test_less_rank_loses_more(calibrated, audio):
    model, file = calibrated
    tokens = tokens_of(model, audio)
    want, apart = forced(model, audio, tokens), []
    for keep in (0.5, 0.375, 0.25, 0.125):
        patch(model, own(file, keep))
        apart.append(float((forced(model, audio, tokens) - want).abs().mean()))
    assert apart == sorted(apart) and apart[-1] > 10 * apart[0]


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)], ids=str)
def test_full_rank_with_beams(calibrated, audio, options):
    model, file = calibrated
    want = generate(model, audio, **options)
    assert torch.equal(generate(patch(model, own(file)), audio, **options), want)


def test_full_rank_with_left_padding(calibrated, audio):
    model, file = calibrated
    ids = torch.tensor([[0, 0, 3, 7], [3, 9, 8, 7], [0, 3, 9, 4]])
    given = dict(decoder_input_ids=ids, decoder_attention_mask=ids.ne(0).long())
    want = generate(patch(model), audio, **given)
    assert torch.equal(generate(patch(model, own(file)), audio, **given), want)


def test_with_eviction(calibrated, audio):
    """At full rank the same tokens are evicted, and the same ones said."""
    model, file = calibrated
    for policy in ("heavy_hitter", "window"):
        budget = dict(recent=6, heavy=2)
        want = generate(patch(model, EvictionConfig(policy, **budget)), audio)
        assert torch.equal(generate(patch(model, own(file, 0.5, policy, **budget)), audio), want)
        assert stats(model).evicted > 0


def test_a_policy_of_ones_own_sees_keys_and_values(calibrated, audio):
    model, file = calibrated
    seen = []

    def oldest(scores, positions, keys, values):
        seen.append((keys.clone(), values.clone()))
        return positions

    generate(patch(model, EvictionConfig(oldest, 6, 2)), audio)
    want, seen[:] = list(seen), []
    generate(patch(model, own(file, 0.5, oldest, recent=6, heavy=2)), audio)
    assert len(seen) == len(want)
    for ours, theirs in zip(seen[0], want[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_keys_and_values_on_demand(calibrated, audio):
    model, file = calibrated

    def caches():
        with torch.no_grad():
            output = model(audio, decoder_input_ids=torch.tensor([[3, 5, 6]] * 3), use_cache=True)
        layers = output.past_key_values.self_attention_cache.layers
        return [(layer.keys + 0, layer.values + 0) for layer in layers]

    want = caches()
    patch(model, own(file))
    for ours, theirs in zip(caches(), want):
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_attentions(calibrated, audio):
    model, file = calibrated
    model.set_attn_implementation("eager")
    options = dict(return_dict_in_generate=True, output_attentions=True)
    want = generate(model, audio, **options).decoder_attentions
    got = generate(patch(model, own(file)), audio, **options).decoder_attentions
    for ours, theirs in zip(want, got):
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_what_it_takes(calibrated, audio):
    model, file = calibrated
    generate(patch(model, own(file, 0.25)), audio)
    ours = stats(model)
    generate(patch(model), audio)
    whole = stats(model)
    state = 2 * 3 * 4 * 4  # cursors
    assert (ours.self_bytes - state) * 4 == whole.self_bytes - state
    assert ours.self_bytes_transformers == whole.self_bytes_transformers
    copies = 2 * (32 * 64 * 3 + 32 + 2 * 64) * 4  # down, up twice, and what is added
    copies += 2 * (128 * 32 + 64 + 2 * 2 * 4 * 16 * 16) * 4  # what they are made of
    assert ours.weight_bytes - whole.weight_bytes == copies + 2 * 32 * 64 * 4  # and each head's, as a step reads them


def test_weights_that_change_are_followed(calibrated, audio):
    model, file = calibrated
    patch(model, own(file), CrossConfig("latent_int4", calibration=file))
    generate(model, audio)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for attention in (layer.self_attn, layer.encoder_attn):
                attention.v_proj.weight.mul_(0.5)
                attention.v_proj.bias.mul_(0.5)
    tokens = tokens_of(model, audio)
    ours, fresh = forced(model, audio, tokens), copy.deepcopy(model)
    assert torch.equal(ours, forced(fresh, audio, tokens))  # which has made nothing yet


# The cross-attention's cache


def test_more_bits_are_nearer(calibrated, audio):
    model, file = calibrated
    tokens = tokens_of(model, audio)
    want, apart = forced(model, audio, tokens), []
    for bits in (4, 3, 2):
        patch(model, cross=CrossConfig(f"latent_int{bits}", calibration=file))
        apart.append(float((forced(model, audio, tokens) - want).abs().mean() / want.std()))
        channels = Calibration(file, model.get_decoder(), "").codes(bits).channels  # that have a bit
        # 3 audios of 50 frames, which are 4 tiles and a group
        assert stats(model).cross_bytes == 3 * (4 * 64 * bits * 16 // 8 + 2 * channels * 4)
    assert apart == sorted(apart) and apart[0] < 0.1 and 1.1 * apart[0] < apart[2], apart


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=str)
def test_text_of_few_bits(calibrated, audio, options):
    """Rows of an audio share it, and what generate() does with a cache works."""
    model, file = calibrated
    patch(model, cross=CrossConfig("latent_int3", calibration=file))
    output = generate(model, audio, return_dict_in_generate=True, **options)
    keys = output.past_key_values.cross_attention_cache.layers[1].keys
    assert keys.shape[1:] == (4, 50, 16) and keys.isfinite().all()
    assert torch.equal(generate(model, audio, **options), output.sequences[:, 1:])


def test_with_trim_and_copies(calibrated, audio):
    model, file = calibrated
    patch(model, own(file, 0.25), CrossConfig("latent_int3", trim="padding", calibration=str(file)))
    want = generate(model, audio)
    assert torch.equal(generate(copy.deepcopy(model), audio), want)
    assert torch.equal(generate(pickle.loads(pickle.dumps(model)), audio), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(calibrated, audio, dtype):
    model, file = calibrated
    tokens = tokens_of(model, audio)
    settings = own(file, 0.25), CrossConfig("latent_int3", calibration=file)
    want = forced(patch(model, *settings), audio, tokens)
    half = patch(copy.deepcopy(unpatch(model)).to(dtype), *settings)
    got = forced(half, audio.to(dtype), tokens).float()
    assert (got - want).abs().mean() < 0.1 * want.std()


def test_an_adapter_is_refused(calibrated, audio):
    peft = pytest.importorskip("peft")
    model, file = calibrated
    config = peft.LoraConfig(r=2, target_modules=["v_proj"])
    adapted = peft.get_peft_model(model, config)
    for settings in (dict(cross=CrossConfig("latent_int3", calibration=file)), dict(eviction=own(file))):
        with pytest.raises(ValueError, match=r"merge the adapter \(merge_and_unload\(\)\)"):
            patch(adapted, **settings)


# A step in one call says what the layers say


@pytest.mark.parametrize("weights", ["model", "bfloat16", "int8"])
def test_steps_are_those_of_the_layers(calibrated, audio, weights, monkeypatch):
    from whisperkv.steps import Steps

    model, file = calibrated
    patch(model, own(file, 0.25), CrossConfig("latent_int3", calibration=file), weights=weights)
    tokens, taken = tokens_of(model, audio), []
    step = Steps.step
    monkeypatch.setattr(Steps, "step", lambda *given: taken.append(step(*given)) or taken[-1])
    got = forced(model, audio, tokens)
    # heads of 16 channels are too narrow for packed matrices
    assert sum(each is not None for each in taken) == (15 if weights == "model" else 0)
    monkeypatch.setattr(Steps, "step", lambda *given: None)
    want = forced(model, audio, tokens)
    assert (got - want).abs().mean() < (1e-3 if weights == "model" else 0.05) * want.std()


# The page about it


def test_its_page(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": small, "recordings": [noise(0), noise(1)], "more_recordings": [noise(2)]}
    for block in pages.blocks("docs/lowrank-whisper.md"):
        pages.run(block, names, "docs/lowrank-whisper.md")
    assert names["model"] is not small and names["model"].lowrank.ratio == 8 and not hasattr(small, "lowrank")


# Real weights


@pytest.fixture(scope="module")
def heard(tiny_en, recordings, tmp_path_factory):
    """(calibration of two speakers, samples of a third)"""
    soundfile, speakers = pytest.importorskip("soundfile"), {}
    for file in sorted((recordings / "librispeech" / "test-other").glob("*.flac")):
        speakers.setdefault(file.name.split("-")[0], []).append(file)
    first, second, third, *_ = speakers.values()
    path = tmp_path_factory.mktemp("heard") / "tiny.safetensors"
    calibrate(tiny_en[0], [*first[:3], *second[:3]], path, verbose=False)
    return path, [soundfile.read(file, dtype="float32")[0] for file in third[:2]]


def test_converted_by_its_name(tiny_en, heard, tmp_path):
    """To a folder and back."""
    file, third = heard
    model, processor = convert_to_mla("tiny.en", calibration=file, cache_bits=4, verbose=False)
    texts = generate_samples(model, processor, third)
    for text, want in zip(texts, generate_samples(*tiny_en, third)):
        same = sum(one == other for one, other in zip(text.split(), want.split()))
        assert len(want.split()) > 5 and same > 0.7 * len(want.split()), (text, want)
    memory = measure_cache_memory(model, 100)
    assert memory.measured == memory.latent and memory.ratio > 30  # of float32
    save_mla_model(model, processor, tmp_path)
    assert generate_samples(*load_mla_model(tmp_path), third[:1]) == texts[:1]


def test_real_speech(tiny_en, heard):
    """Calibrated on two speakers, tried on a third: nats a token of the full model's own transcript."""
    model, processor = tiny_en
    file, third = heard
    features = processor(third, sampling_rate=RATE, return_tensors="pt").input_features
    with torch.no_grad():
        states = model.get_encoder()(features)
        tokens = model.generate(encoder_outputs=copy.copy(states))
    start = torch.tensor(processor.tokenizer.prefix_tokens).expand(len(tokens), -1)
    whole = torch.cat([start, tokens], 1)

    def loss(*settings):
        patch(model, *settings) if settings else unpatch(model)
        with torch.no_grad():
            logits = model(encoder_outputs=states, decoder_input_ids=whole[:, :-1], use_cache=True).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), whole[:, 1:], reduction="none")
        said = tokens.eq(tokens[:, -1:].max()).int().cumsum(1) < 2
        return float(losses[:, len(start[0]) - 1 :][said].mean())

    try:
        full = loss()
        many, few = (loss(None, CrossConfig(f"latent_int{bits}", calibration=file)) for bits in (4, 3))
        fp16 = 2 * 4 * 1500 * 384 * 2 * len(features)
        assert fp16 / stats(model).cross_bytes == pytest.approx(39.7, abs=0.3)
        quarter, sixteenth = (loss(own(file, keep)) for keep in (0.25, 0.0625))
        assert stats(model).self_bytes < stats(model).self_bytes_transformers / 10
    finally:
        unpatch(model)
    assert many < full + 0.04 and few < full + 0.1 and quarter < full + 0.1 < sixteenth
