"""Neighbouring frames merged inside the encoder: as if both were their average from there on, for the encoder and for
all that decodes."""

import copy
import pickle
import warnings

import pytest
import torch
from test_cross_cache import cross_layers, held, ids, run
from test_patch import generate
from torch import nn
from transformers import WhisperConfig, WhisperForCausalLM, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.config import FORMATS
from whisperkv.merge import merged, merging_layer
from whisperkv.trim import Kept, kept_frames

HALF = CrossConfig(merge=0.5)


@pytest.fixture
def deep(small):
    """The small model with three layers of encoder, and 49 frames: the last one has no neighbour."""
    torch.manual_seed(0)
    changed = {"encoder_layers": 3, "max_source_positions": 49, "init_std": 0.3}
    model = WhisperForConditionalGeneration(WhisperConfig.from_dict({**small.config.to_dict(), **changed})).eval()
    model.generation_config = small.generation_config
    return model


@pytest.fixture
def audio():
    """Of three lengths, the last of them all there is."""
    audio = torch.randn(3, 8, 98, generator=torch.Generator().manual_seed(3))
    audio[0, :, 10:] = audio[1, :, 31:] = -1.0
    return audio


@torch.no_grad()
def encode(model, audio, **options):
    return model.model.encoder(audio, **options).last_hidden_state


# The slow and obvious way


def joined(states, keep, share):
    """The first frames of the pairs of one audio that are merged: states [frames, width], keep bool [frames]."""
    alone = [bool(keep[i] and keep[i + 1 : i + 2].all()) for i in range(len(keep))]
    pairs = [i for i in range(0, len(keep) - 1, 2) if alone[i] and alone[i + 1]]
    alike = {i: torch.cosine_similarity(states[i], states[i + 1], 0).item() for i in pairs}
    return sorted(pairs, key=lambda i: -alike[i])[: int(share * len(pairs))]


def standing_for(keep):
    """Of each frame the one that stands for it."""
    return keep.nonzero()[keep.cumsum(0) - 1, 0]


@torch.no_grad()
def slow_encoder(encoder, audio, trim, share):
    """(states, keep) of one audio [mels, columns], over all frames: one that is not kept is a copy of another, and two
    that are merged are twice their average."""
    keep = kept_frames(audio[None], None, trim)[0]
    x = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(audio[None])))).transpose(1, 2)
    x = (x + encoder.embed_positions.weight)[:, standing_for(keep)]
    for number, layer in enumerate(encoder.layers):
        if number == {1: 0, 3: 1}[len(encoder.layers)]:
            for i in joined(x[0], keep, share):
                x[0, i] = x[0, i + 1] = (x[0, i] + x[0, i + 1]) / 2
                keep[i + 1] = False
        x = layer(x, None)
    return encoder.layer_norm(x)[0], keep


# What is merged


@pytest.mark.parametrize("share", [0, 0.1, 0.29, 0.5, 1])
@pytest.mark.parametrize("frames", [1, 2, 3, 50, 101])
def test_the_pairs_most_alike(frames, share):
    draw = torch.Generator().manual_seed(frames)
    keep = torch.rand(5, frames, generator=draw) < torch.tensor([0, 0.3, 0.7, 0.95, 1])[:, None]
    keep[:, 0] = True
    kept, whole = Kept.of(keep), torch.randn(5, frames, 8, generator=draw)
    given = whole.gather(1, kept.places[..., None].expand(-1, -1, 8))
    states, fewer = merged(given, kept, share)
    for row in range(5):
        want, left = whole[row].clone(), keep[row].clone()
        for i in joined(whole[row], keep[row], share):
            want[i] = (whole[row, i] + whole[row, i + 1]) / 2
            left[i + 1] = False
        assert torch.equal(fewer.keep[row], left) and fewer.lengths[row] == left.sum()
        torch.testing.assert_close(states[row, : left.sum()], want[left])
    assert torch.equal(kept.keep, keep) and (fewer.counts >= 1).all()
    if frames == 101 and share == 0.5:
        assert fewer.lengths[4] == 76 and fewer.lengths[0] == 1


def test_of_equal_ones_the_first():
    kept = Kept.of(torch.ones(2, 10, dtype=torch.bool))
    states = torch.ones(2, 10, 4)
    states[1, 4:6] = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    _, fewer = merged(states, kept, 0.4)
    assert fewer.places[:, :8].tolist() == [[0, 2, 4, 5, 6, 7, 8, 9]] * 2
    _, fewer = merged(states, kept, 0.8)
    assert fewer.places[1].tolist() == [0, 2, 4, 5, 6, 8]


def test_that_share_and_no_more():
    kept = Kept.of(torch.ones(1, 200, dtype=torch.bool))
    states = torch.randn(1, 200, 4)
    for share in (0.01, 0.1, 0.3, 0.57, 0.7, 0.99):
        assert merged(states, kept, share)[1].lengths == 200 - int(100 * share)


def test_frames_of_no_size():
    kept = Kept.of(torch.ones(1, 8, dtype=torch.bool))
    states = torch.zeros(1, 8, 4)
    states[0, 4:6] = 1.0
    found, fewer = merged(states, kept, 0.5)
    assert fewer.places.tolist() == [[0, 2, 3, 4, 6, 7]] and found.sum() == 4


def test_as_many_threads_as_there_are():
    kept, states = Kept.of(torch.ones(2, 1500, dtype=torch.bool)), torch.randn(2, 1500, 384)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(merged(states, kept, 0.5))
    finally:
        torch.set_num_threads(threads)
    for other, fewer in found[1:]:
        assert torch.equal(other, found[0][0]) and torch.equal(fewer.places, found[0][1].places)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_kept_whole(wrong):
    kept = Kept.of(torch.ones(3, 20, dtype=torch.bool))
    states = torch.randn(3, 20, 4)
    states[1, 7, 2] = wrong
    _, fewer = merged(states, kept, 0.5)
    assert fewer.lengths.tolist() == [15, 20, 15]


# The encoder


def test_before_which_layer():
    assert [merging_layer(layers) for layers in (1, 2, 4, 6, 12, 24, 32)] == [0, 1, 2, 2, 5, 10, 13]


@pytest.mark.parametrize("by_layers", [False, True])
@pytest.mark.parametrize("trim", ["off", "padding"])
@pytest.mark.parametrize("share", [0.3, 1])
def test_the_encoder_hears_averages(deep, audio, trim, share, by_layers):
    encoder = deep.model.encoder
    want = [slow_encoder(encoder, each, trim, share) for each in audio]
    whole = encode(deep, audio)
    patch(deep, cross=CrossConfig(trim=trim, merge=share))
    seen = []
    if by_layers:
        encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    got = encode(deep, audio)
    (listener,) = (hook for hook in encoder._forward_hooks.values())
    assert bool(seen) == by_layers
    for row, (states, keep) in enumerate(want):
        torch.testing.assert_close(got[row], states, rtol=1e-3, atol=1e-3)
        assert torch.equal(got[row], got[row, standing_for(keep)])
        assert torch.equal(listener.kept(got)[row], keep)
    assert (got - whole).abs().max() > 0.01
    assert len({int(keep.sum()) for _, keep in want}) == (1 if trim == "off" else 3)


def test_an_encoder_of_one_layer(small):
    audio = torch.randn(2, 8, 100)
    want = [slow_encoder(small.model.encoder, each, "off", 0.5)[0] for each in audio]
    patch(small, cross=HALF)
    torch.testing.assert_close(encode(small, audio), torch.stack(want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", ["model", "int8"])
def test_an_audio_alone_and_in_a_batch(deep, audio, weights):
    """The same bits, whatever else is heard, how often and by how many threads."""
    patch(deep, cross=CrossConfig(trim="padding", merge=0.5), weights=weights)
    want = encode(deep, audio)
    for row in (2, 0, 1):
        assert torch.equal(encode(deep, audio[row : row + 1])[0], want[row])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(encode(deep, audio), want)
    finally:
        torch.set_num_threads(threads)


def test_nothing_merged_is_nothing_changed(deep, audio):
    for trim in ("off", "padding"):
        patch(deep, cross=CrossConfig(trim=trim))
        want, tokens = encode(deep, audio), generate(deep, audio)
        for merge in (0, 0.0):
            patch(deep, cross=CrossConfig(trim=trim, merge=merge))
            assert torch.equal(encode(deep, audio), want) and torch.equal(generate(deep, audio), tokens)
    patch(deep, cross=CrossConfig(merge=0))
    assert deep.model.encoder.listener is None and not deep.model.encoder._forward_hooks
    patch(deep, cross=CrossConfig(trim="padding", merge=0.01))  # of 24 pairs that is none
    assert torch.equal(encode(deep, audio), want)


@pytest.mark.parametrize("by_layers", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_audio_that_is_no_number(deep, audio, wrong, by_layers):
    """It is kept whole, and the others are what they were."""
    patch(deep, cross=HALF)
    encoder = deep.model.encoder
    if by_layers:
        encoder.layers[0].register_forward_hook(lambda *_: None)
    want = encode(deep, audio)
    broken = audio.clone()
    broken[0, 3, 40] = wrong
    got = encode(deep, broken)
    torch.testing.assert_close(got[1:], want[1:])
    (listener,) = encoder._forward_hooks.values()
    assert listener.kept(got).sum(-1).tolist() == [49, 37, 37]


def test_silence_and_a_click(deep):
    audio = torch.full((2, 8, 98), -1.0)
    audio[1, :, 0] = 1.0
    patch(deep, cross=CrossConfig(trim="padding", merge=1))
    tokens = generate(deep, audio)
    got = stats(deep)
    assert got.frames_kept < 2 * 49 / 2 and got.note == "" and torch.equal(generate(deep, audio), tokens)
    patch(deep, cross=CrossConfig(merge=1))
    generate(deep, audio)
    assert stats(deep).frames_kept == 2 * 25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(deep, audio, dtype):
    """By the layers, and near what the float32 model gives."""
    patch(deep, cross=HALF)
    want = encode(deep, audio)
    generate(deep.to(dtype), audio.to(dtype))
    assert stats(deep).frames_kept == 3 * 37 and stats(deep).note == ""
    got = encode(deep, audio.to(dtype)).float()
    assert (got - want).abs().mean() < 0.25 * want.std()


def test_what_a_model_learns_from_is_whole(deep, audio):
    losses = []
    for prepare in (unpatch, lambda model: patch(model, cross=HALF)):
        for train in (False, True):
            prepare(deep).train(train).zero_grad()
            loss = deep(audio, labels=ids(3, 12)).loss
            loss.backward()
            losses.append([loss.detach(), *(p.grad.clone() for p in deep.parameters() if p.grad is not None)])
    for one, other in zip(losses[:2], losses[2:]):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_hidden_states_that_are_asked_for_are_whole(deep, audio):
    want = encode(deep, audio, output_hidden_states=True)
    patch(deep, cross=HALF)
    got = encode(deep, audio, output_hidden_states=True)
    torch.testing.assert_close(got, want)
    run(deep, got, ids())
    assert stats(deep).frames_kept == 3 * 49


def test_features_of_another_length_are_refused_as_ever(deep, audio):
    patch(deep, cross=HALF)
    with pytest.raises(ValueError, match="length"):
        encode(deep, audio[:, :, :50])


def test_copies_and_pickles(deep, audio):
    patch(deep, cross=HALF)
    want, tokens = encode(deep, audio), generate(deep, audio)
    for other in (copy.deepcopy(deep), pickle.loads(pickle.dumps(deep))):
        assert torch.equal(encode(other, audio), want) and torch.equal(generate(other, audio), tokens)
        assert stats(other).frames_kept == 3 * 37
    patch(deep, cross=CrossConfig(merge=1))
    generate(deep, audio)
    assert stats(deep).frames_kept == 3 * 25
    unpatch(deep)
    assert type(deep.model.encoder) is WhisperEncoder and not deep.model.encoder._forward_hooks


# The cross-attention cache


@pytest.mark.parametrize("trim", ["off", "padding"])
@pytest.mark.parametrize("format", ["model", "latent"])
def test_a_merged_audio_is_decoded_as_its_average_over_and_over(deep, audio, format, trim):
    states, keep = zip(*(slow_encoder(deep.model.encoder, each, trim, 0.5) for each in audio))
    want = [run(deep, each[None], ids()[row : row + 1]).logits[0] for row, each in enumerate(states)]
    patch(deep, cross=CrossConfig(format, trim, merge=0.5))
    order = torch.tensor([2, 0, 0, 1])
    output = run(deep, encode(deep, audio)[order], ids()[order])
    for row, number in enumerate(order):
        torch.testing.assert_close(output.logits[row], want[number], rtol=1e-3, atol=1e-3)
    got, lengths = stats(deep), [int(each.sum()) for each in keep]
    assert (got.audios, got.frames, got.frames_kept, got.note) == (3, 49, sum(lengths), "")
    assert cross_layers(output.past_key_values)[0].audios.lengths.tolist() == [lengths[i] for i in (2, 0, 1)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("trim", ["off", "padding"])
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_frames_and_beams(deep, audio, format, trim, beams):
    outputs = []
    for share in (True, False):
        patch(deep, cross=CrossConfig(format, trim, share, 16, merge=0.5))
        output = generate(deep, audio, num_beams=beams, return_dict_in_generate=True)
        outputs.append(output.sequences)
        got = stats(deep)
        assert got.cross_bytes == held(cross_layers(output.past_key_values)) > 0
        assert got.audios == (3 if share else 3 * beams) and got.note == ""
        assert got.frames_kept == 37 * got.audios if trim == "off" else got.frames_kept < 37 * got.audios
    assert torch.equal(*outputs)
    patch(deep, cross=CrossConfig(format, trim, group=16))
    generate(deep, audio, num_beams=beams)
    assert stats(deep).cross_bytes > got.cross_bytes / beams


@pytest.mark.parametrize("format", FORMATS)
def test_attentions_are_of_full_width(deep, audio, format):
    """Two that were merged have the same, half of what their average has."""
    deep.set_attn_implementation("eager")
    want = [slow_encoder(deep.model.encoder, each, "padding", 0.5) for each in audio]
    theirs = run(deep, torch.stack([states for states, _ in want]), ids(), output_attentions=True).cross_attentions
    patch(deep, cross=CrossConfig(format, "padding", group=16, merge=0.5))
    states = encode(deep, audio)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = run(deep, states, ids(), output_attentions=True).cross_attentions
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.sum(-1), torch.ones(3, 4, 4))
        for row, (_, keep) in enumerate(want):
            assert torch.equal(our[row], our[row][..., standing_for(keep)])
        if format in ("model", "latent"):
            torch.testing.assert_close(our, their, rtol=1e-2, atol=1e-4)


def test_with_eviction_and_sampling(deep, audio):
    patch(deep, EvictionConfig(recent=8, heavy=4), CrossConfig("int8", "padding", merge=1))
    for options in (dict(), dict(num_beams=4), dict(do_sample=True, num_return_sequences=3)):
        torch.manual_seed(0)
        tokens = generate(deep, audio, **options)
        torch.manual_seed(0)
        assert torch.equal(generate(deep, audio, **options), tokens)
        assert stats(deep).audios == 3 and stats(deep).evicted > 0


def test_encoder_output_from_elsewhere_is_kept_whole(deep, audio):
    states = encode(deep, audio)
    patch(deep, cross=HALF)
    run(deep, states, ids())
    assert stats(deep).frames_kept == 3 * 49 and "not trimmed or merged" in stats(deep).note


# Real audio


def test_real_audio(tiny_en, speech):
    """The words and their times, with three quarters of the frames and with fewer."""
    model, processor = tiny_en
    features = processor(speech[0][: 16000 * 10], sampling_rate=16000, return_tensors="pt").input_features
    texts, times, frames = [], [], []
    for config in (None, HALF, CrossConfig(trim="padding", merge=0.5), CrossConfig("latent", "padding", merge=0.5)):
        patch(model, cross=config)
        try:
            with torch.no_grad():
                states = model.model.encoder(features)  # which generate() would ask for its own attentions too
            options = dict(return_token_timestamps=True, return_dict_in_generate=True)
            output = model.generate(encoder_outputs=states, **options)
            frames.append(stats(model).frames_kept)
        finally:
            unpatch(model)
            model.set_attn_implementation("sdpa")
        texts.append(processor.batch_decode(output["sequences"], skip_special_tokens=True)[0].rstrip("."))
        times.append(output["token_timestamps"][0])
    assert len(texts[0].split()) > 20 and texts == [texts[0]] * 4
    words = len(times[0]) - 2  # and a full stop that comes and goes, and the end
    for each in times[1:]:
        assert (each[:words] - times[0][:words]).abs().max() < 0.05  # two frames and a half
    assert frames[:2] == [1500, 1125] and frames[2] == frames[3] < 750


# Refusals


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf"), True, False, "0.5", None, [0.5], 1j])
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=r"CrossConfig.merge must be a number from 0 to 1; got "):
        CrossConfig(merge=wrong)


def test_config_takes():
    assert CrossConfig().merge == 0 and CrossConfig().keeps_all and CrossConfig("int4", merge=0).keeps_all
    for share in (0.25, 1):
        assert not CrossConfig(merge=share).keeps_all and CrossConfig(merge=share).merge == share


def test_merging_needs_a_whisper_encoder(deep, audio):
    decoder = WhisperForCausalLM(copy.deepcopy(deep.config)).eval()
    with pytest.raises(ValueError, match="CrossConfig.merge=0.5 needs the encoder, and WhisperForCausalLM .* merge=0"):
        patch(decoder, cross=HALF)

    class Other(WhisperEncoder):
        pass

    other = copy.deepcopy(deep)
    other.model.encoder.__class__ = Other
    with pytest.raises(ValueError, match="CrossConfig.merge=0.5 needs a WhisperEncoder, .* a Other: use merge=0"):
        patch(other, cross=HALF)
    assert not other.model.decoder._forward_pre_hooks
    generate(patch(other, cross=CrossConfig(trim="padding")), audio)
