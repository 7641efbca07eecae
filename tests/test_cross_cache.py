"""The cross-attention cache: who shares it, what it holds in each format, and what is dropped of an audio."""

import copy
import pickle
import warnings

import pytest
import reference
import torch
from test_patch import generate
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import WhisperForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperAttention

from whisperkv import CrossConfig, EvictionConfig, patch, stats, unpatch
from whisperkv.compat import CACHE
from whisperkv.config import FORMATS
from whisperkv.cross_cache import Audios, CrossCacheLayer, owners_of
from whisperkv.listener import EncoderListener
from whisperkv.records import DecodeRecord
from whisperkv.trim import Kept, kept_frames

EXACT = ["model", "latent"]
PACKED = [name for name, bits in FORMATS.items() if bits]
CONFIGS = [CrossConfig(name) for name in FORMATS] + [CrossConfig("latent_int4", "padding", group=16)]
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture
def audio():
    return torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def short_audio(audio):
    """Of three lengths, the last of them all there is; the rest is padding."""
    audio[0, :, 10:] = audio[1, :, 31:] = -1.0
    return audio


@pytest.fixture
def states(small, audio):
    with torch.no_grad():
        return small.model.encoder(audio).last_hidden_state


def run(model, states, ids, past=None, **options):
    """One pass of the decoder."""
    with torch.no_grad():
        return model(encoder_outputs=(states,), decoder_input_ids=ids, **{CACHE: past}, **options)


def cross_layers(past):
    return past.cross_attention_cache.layers


def ids(rows=3, tokens=4):
    return torch.randint(4, 200, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))


def assert_close(ours, theirs):
    """Logits, which with these weights are some 5 in size; another audio's are off by as much."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# Who shares


@pytest.mark.parametrize(
    "rows, share, owners",
    [
        ([0], True, [0]),
        ([0, 1, 2], True, [0, 1, 2]),
        ([0, 0, 1, 1, 1], True, [0, 0, 1, 1, 1]),
        ([0, 1, 0, 0], True, [0, 1, 2, 2]),
        ([0, 0, 0], False, [0, 1, 2]),
    ],
)
def test_neighbours_of_equal_states_share(rows, share, owners):
    found = owners_of(torch.randn(3, 5, 4)[rows], share)
    assert found.dtype == torch.int32 and found.tolist() == owners


def test_almost_equal_states_do_not_share():
    states = torch.randn(1, 5, 4).repeat(3, 1, 1)
    states[1, 4, 3] += 1e-6
    assert owners_of(states, True).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "options, rows",
    [
        (dict(), 3),
        (dict(num_beams=4), 12),
        (dict(num_beams=4, num_return_sequences=3), 12),
        (dict(do_sample=True, num_return_sequences=2), 6),
    ],
)
@pytest.mark.parametrize("format", ["model", "latent_int8"])
def test_beams_and_returned_sequences_share(small, audio, options, rows, format):
    outputs, decodes = [], []
    for share in (True, False):
        patch(small, cross=CrossConfig(format, share_beams=share))
        torch.manual_seed(0)
        outputs.append(generate(small, audio, max_new_tokens=12, **options))
        decodes.append(stats(small))
    shared, alone = decodes
    assert (shared.audios, shared.rows, alone.audios, alone.rows) == (3, rows, rows, rows)
    assert shared.cross_bytes * rows == alone.cross_bytes * 3
    assert torch.equal(*outputs)


def test_equal_audios_beside_each_other_share(small, states):
    patch(small)
    run(small, states[[0, 0, 2]], ids())
    assert stats(small).audios == 2


MOVES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
}
ORDERS = {"reorder": [2, 2, 0], "select": [2, 1], "select by mask": [0, 2], "repeat": [0, 0, 0, 1, 1, 1, 2, 2, 2]}


@pytest.mark.parametrize("move", MOVES)
@every_format
def test_rows_keep_their_audio_wherever_they_go(small, states, format, move):
    """An unpatched cache that is moved about gives the same, and so does ours that was there from the start."""
    order = torch.tensor(ORDERS[move])
    step = ids(len(order), 1)
    results = []
    for prepare in (unpatch, lambda model: patch(model, cross=CrossConfig(format))):
        past = run(prepare(small), states, ids()).past_key_values
        MOVES[move](past)
        results.append(run(small, states[order], step, past).logits)
    assert [layer.owner.tolist() for layer in cross_layers(past)] == [ORDERS[move]] * 2
    assert cross_layers(past)[0].batch_size == len(order)
    there = run(small, states[order], ids()[order]).past_key_values
    assert_close(results[1], run(small, states[order], step, there).logits)
    if format in EXACT:
        assert_close(results[1], results[0])
    elif "int8" in format:  # fewer bits are too coarse for random weights
        assert (results[1] - results[0]).abs().mean() < 0.2 * results[0].std()


def test_moves_one_after_the_other(small, states):
    results = []
    for prepare in (unpatch, patch):
        past, order, logits = None, torch.arange(3), []
        prepare(small)
        for move in ("reorder", "repeat", "select", "repeat", "reorder"):
            output = run(small, states[order], ids(len(order), 2), past)
            past = output.past_key_values
            logits.append(output.logits)
            MOVES[move](past)
            order = order[torch.tensor(ORDERS[move])] if move != "repeat" else order.repeat_interleave(3)
        results.append(logits)
    for theirs, ours in zip(*results):
        assert_close(ours, theirs)


# What is held


def held(layers):
    """Bytes of the tensors in the layers, each counted once."""
    tensors = [x.audios.bias for x in layers]
    tensors += [t for x in layers for m in (x.keys_of_audios, x.values_of_audios) for t in (m.data, m.scales)]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stats_are_the_bytes_held(small, short_audio, config, beams):
    theirs = generate(small, short_audio, num_beams=beams, return_dict_in_generate=True).past_key_values
    theirs = sum(layer.keys.nbytes + layer.values.nbytes for layer in cross_layers(theirs))
    patch(small, cross=config)
    ours = generate(small, short_audio, num_beams=beams, return_dict_in_generate=True).past_key_values
    got = stats(small)
    assert got.cross_bytes == held(cross_layers(ours)) > 0
    assert got.cross_bytes_transformers == theirs
    if config.format == "model":
        assert got.cross_bytes * beams == theirs
    if config.format == "latent":
        assert got.cross_bytes * beams * 2 * 2 == theirs  # 2 layers, keys and values
    assert (got.audios, got.frames) == (3, 50) and (got.frames_kept == 150) == (config.trim == "off")
    assert got.note == "" and f"{got.frames_kept} of 150 frames kept" in str(got)


@every_format
def test_latent_formats_hold_one_copy_for_all_layers(small, states, format):
    patch(small, cross=CrossConfig(format))
    layers = cross_layers(run(small, states, ids()).past_key_values)
    matrices = {id(m) for layer in layers for m in (layer.keys_of_audios, layer.values_of_audios)}
    assert len(matrices) == (1 if format.startswith("latent") else 4)


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 1]], ids=["alone", "shared"])
@every_format
def test_the_encoders_output_is_let_go(small, states, format, rows):
    patch(small, cross=CrossConfig(format))
    given = states[rows]
    kept = StorageWeakRef(given.untyped_storage())
    past = run(small, given, ids()).past_key_values
    assert all(layer.audios.states is None for layer in cross_layers(past))
    del given
    assert kept.expired()


@every_format
def test_the_encoders_output_may_be_written_over(small, states, format):
    patch(small, cross=CrossConfig(format))
    want = run(small, states, ids(3, 1), run(small, states, ids()).past_key_values).logits
    past = run(small, states, ids()).past_key_values
    states.zero_()
    assert torch.equal(run(small, states, ids(3, 1), past).logits, want)


@pytest.mark.parametrize("format", ["model", "int8", "int4"])
def test_keys_and_values_on_demand(small, states, format):
    """Those of transformers: to rounding, or within half a step of a code."""
    rows = torch.tensor([0, 0, 1, 2])
    theirs = cross_layers(run(small, states[rows], ids(4)).past_key_values)
    patch(small, cross=CrossConfig(format, group=16))
    ours = cross_layers(run(small, states[rows], ids(4)).past_key_values)
    for our, their in zip(ours, theirs):
        for name in ("keys", "values"):
            got, want, matrix = getattr(our, name)[:], getattr(their, name), getattr(our, f"{name}_of_audios")
            assert all(torch.equal(getattr(our, name)[row], got[row]) for row in range(4))
            assert torch.equal(torch.cat([getattr(our, name), want], 0)[:4], got)
            assert getattr(our, name).shape == got.shape
            assert got.shape == want.shape == (4, 4, 50, 16) and got.dtype == want.dtype
            if format == "model":
                torch.testing.assert_close(got, want)
                continue
            step, _ = reference.of_frames(matrix.scales, 50, 16)
            assert ((got - want).abs() <= 0.5 * step[our.owner.long(), ..., :16] + 1e-5).all()
            unpacked = reference.unpack_frames(matrix.data, matrix.scales, 50, 16, 16)
            assert torch.equal(got, unpacked[our.owner.long()])


@pytest.mark.parametrize("format, worst", [("latent", 1e-5), ("latent_int8", 0.02), ("latent_int4", 0.2)])
def test_a_latent_cache_makes_keys_and_values(small, states, format, worst):
    rows = torch.tensor([0, 0, 1, 2])
    theirs = cross_layers(run(small, states[rows], ids(4)).past_key_values)
    past = run(patch(small, cross=CrossConfig(format)), states[rows], ids(4)).past_key_values
    for our, their in zip(cross_layers(past), theirs):
        for name in ("keys", "values"):
            got, want = getattr(our, name)[:], getattr(their, name)
            assert got.shape == want.shape and (got - want).abs().mean() < worst * want.std()
            torch.testing.assert_close(getattr(our, name)[2], got[2])
    with pytest.raises(RuntimeError, match=f'"{format}".* holds no keys and values'):
        cross_layers(copy.deepcopy(past))[0].keys[0].clone()  # a copy does not hold on to the model


@pytest.mark.parametrize("format", ["model", "int8", "latent"])
def test_a_cache_after_unpatch(small, states, format):
    """transformers goes on with it."""
    want = run(small, states, ids(3, 1), run(small, states, ids()).past_key_values).logits
    past = run(patch(small, cross=CrossConfig(format)), states, ids()).past_key_values
    unpatch(small)
    got = run(small, states, ids(3, 1), past).logits
    assert (got - want).abs().mean() < (0.1 if format == "int8" else 1e-4) * want.std()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_cache_can_be_kept_copied_reset_and_continued(small, short_audio, config):
    patch(small, cross=config)
    with torch.no_grad():
        states = small.model.encoder(short_audio).last_hidden_state
    past = run(small, states, ids()).past_key_values
    others = [copy.deepcopy(past), pickle.loads(pickle.dumps(past))]
    want = run(small, states, ids(3, 1), past).logits
    for other in others:
        assert torch.equal(run(small, states, ids(3, 1), other).logits, want)
        assert held(cross_layers(other)) == held(cross_layers(past))
    past.reset()
    assert cross_layers(past)[0].get_seq_length() == 0
    run(small, states, ids(), past)
    assert torch.equal(run(small, states, ids(3, 1), past).logits, want)


@every_format
@pytest.mark.parametrize("trimmed", [False, True])
def test_no_step_waits_for_the_device(small, states, format, trimmed):
    """Tensors without data: to look into one raises, and so does to mix it with one of the CPU."""
    attention = small.to("meta").model.decoder.layers[0].encoder_attn
    kept = None
    if trimmed:
        places, of_all = (torch.zeros(3, n, dtype=torch.long, device="meta") for n in (50, 70))
        kept = Kept(places, places, places[:, 0].int(), of_all)
    record = DecodeRecord(2, 64, 4, rows=6, padding=0, frames=50, eviction=None)
    lengths = torch.zeros(3, dtype=torch.int32, device="meta")
    audios = Audios(states.to("meta"), lengths, kept, 70 if trimmed else 50, 2, record)
    owner = torch.zeros(6, dtype=torch.int32, device="meta")
    layer = CrossCacheLayer(CrossConfig(format), audios, owner)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.fill(attention)
        for want_weights in (False, True):
            output, weights = layer.attend(torch.zeros(6, 1, 4, 16, device="meta"), attention, want_weights)
            layer.reorder_cache(torch.zeros(6, dtype=torch.long, device="meta"))
        assert output.shape == (6, 1, 4, 16) and weights.shape == (6, 4, 1, 70 if trimmed else 50)
        assert layer.keys[:].shape == layer.values[:].shape == (6, 4, 50, 16)


# What comes out


@pytest.mark.parametrize("format", EXACT)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_exact_formats_give_the_logits_of_transformers(small, states, format, tokens):
    results = []
    for prepare in (unpatch, lambda model: patch(model, cross=CrossConfig(format))):
        prepare(small)
        past, logits = None, []
        for step in ids(3, 18).split(tokens, 1):
            output = run(small, states, step, past)
            past = output.past_key_values
            logits.append(output.logits)
        results.append(torch.cat(logits, 1))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("format, worst", [("int8", 0.1), ("int4", 1.0), ("latent_int8", 0.2), ("latent_int4", 2.0)])
def test_packed_formats_come_near(small, states, format, worst):
    """The random weights make attention sharp, which real ones are not; a wrong projection is off by more."""
    want = run(small, states, ids()).logits
    got = run(patch(small, cross=CrossConfig(format, group=16)), states, ids()).logits
    assert (got - want).abs().mean() < worst * want.std()
    wrong = run(small, states.flip(1, 2), ids()).logits
    assert (got - want).abs().mean() < (wrong - want).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_format
def test_half_precision(small, audio, dtype, format):
    small.to(dtype)
    with torch.no_grad():
        states = small.model.encoder(audio.to(dtype)).last_hidden_state
    want = run(small, states, ids()).logits.float()
    output = run(patch(small, cross=CrossConfig(format, group=16)), states, ids())
    assert output.logits.dtype == dtype and output.logits.isfinite().all()
    if format in EXACT:
        assert (output.logits.float() - want).abs().mean() < 0.1 * want.std()
    assert generate(small, audio.to(dtype), num_beams=2, max_new_tokens=5).shape == (3, 6)


MODES = [dict(), dict(num_beams=3), dict(cache_implementation="static"), dict(prompt_lookup_num_tokens=3)]


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_format_generates_and_unpatch_restores(small, short_audio, config, options):
    short_audio = short_audio[:1] if "prompt_lookup_num_tokens" in options else short_audio
    options = dict(max_new_tokens=20, **options)
    before = generate(small, short_audio, **options)
    patch(small, cross=config)
    runs = [generate(small, short_audio, **options) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].shape == before.shape
    if config.format in EXACT:
        assert torch.equal(runs[0], before)
    patch(small, EvictionConfig(recent=8, heavy=4), config)
    generate(small, short_audio, **options)
    unpatch(small)
    assert torch.equal(generate(small, short_audio, **options), before)
    for module in small.modules():
        assert type(module).__module__ != "whisperkv.attention"
        assert not module._forward_hooks and not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs


def test_without_a_cache_it_is_left_to_transformers(small, audio):
    want = generate(small, audio, use_cache=False, max_new_tokens=6)
    patch(small, cross=CrossConfig("latent_int4"))
    assert torch.equal(generate(small, audio, use_cache=False, max_new_tokens=6), want)


def test_patching_again_takes_the_new_format(small, states):
    for format in ("latent", "int4", "model"):
        patch(small, cross=CrossConfig(format))
        assert cross_layers(run(small, states, ids()).past_key_values)[0].config.format == format
    for trim, hooks in (("padding", 1), ("silence", 1), ("off", 0)):
        patch(small, cross=CrossConfig(trim=trim))
        assert len(small.model.encoder._forward_hooks) == hooks


@every_format
def test_a_broken_audio_breaks_no_other(small, states, format):
    """states of NaN in the second audio, from the first pass on."""
    patch(small, cross=CrossConfig(format))
    broken = states.clone()
    broken[1, 7] = torch.nan
    results = []
    for each in (states, broken):
        output = run(small, each, ids())
        results.append([output.logits, run(small, each, ids(3, 1), output.past_key_values).logits])
    for sound, spoilt in zip(*results):
        assert torch.equal(sound[[0, 2]], spoilt[[0, 2]]) and spoilt[1].isnan().all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_copies_and_pickles_of_a_patched_model(small, short_audio, config):
    patch(small, cross=config)
    want, kept = generate(small, short_audio), stats(small).frames_kept
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(generate(other, short_audio), want)
        assert stats(other).frames_kept == kept
        unpatch(other)
        assert type(other.model.decoder.layers[0].encoder_attn) is WhisperAttention
        assert not other.model.encoder._forward_hooks
    assert torch.equal(generate(small, short_audio), want)


def test_two_models_at_once(small, short_audio):
    """Each with its own settings, step by step in turn."""
    configs = CrossConfig("latent", "padding"), CrossConfig("int8")
    models = [patch(copy.deepcopy(small), cross=config) for config in configs]
    alone, together = [], [None, None]
    for model in models:
        with torch.no_grad():
            states = model.model.encoder(short_audio).last_hidden_state
        output = run(model, states, ids())
        alone.append(run(model, states, ids(3, 1), output.past_key_values).logits)
    with torch.no_grad():
        states = [model.model.encoder(short_audio).last_hidden_state for model in models]
    for step in (ids(), ids(3, 1)):
        for i, model in enumerate(models):
            past = together[i] and together[i].past_key_values
            together[i] = run(model, states[i], step, past)
    for one, other in zip(alone, together):
        assert torch.equal(one, other.logits)
    assert stats(models[0]).frames_kept < 150 == stats(models[1]).frames_kept
    unpatch(models[0])
    assert stats(models[1]).cross_bytes > 0


# Attentions


def attentions(model, states, config=None):
    """Of a first pass and a step, [rows, heads, tokens, frames] of each layer."""
    model.set_attn_implementation("eager")
    patch(model, cross=config) if config else unpatch(model)
    first = run(model, states, ids(), output_attentions=True)
    second = run(model, states, ids(3, 1), first[CACHE], output_attentions=True)
    return [*first.cross_attentions, *second.cross_attentions]


@pytest.mark.parametrize("format", EXACT)
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 1]], ids=["alone", "shared"])
def test_exact_attentions(small, states, format, rows):
    theirs = attentions(small, states[rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = attentions(small, states[rows], CrossConfig(format))
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("format", PACKED)
def test_quantized_attentions_are_announced(small, states, format):
    with pytest.warns(UserWarning, match=rf'"{format}".* quantized cache, not exact; .*"model" or "latent"'):
        ours = attentions(small, states, CrossConfig(format, group=16))
    for weights in ours:
        assert weights.shape == (3, 4, weights.shape[2], 50)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


@every_format
def test_attentions_of_a_trimmed_audio_are_of_full_width(small, short_audio, format):
    """A frame that stands for several has its weight shared out among them."""
    patch(small, cross=CrossConfig(format, "padding"))
    with torch.no_grad():
        states = small.model.encoder(short_audio).last_hidden_state
    kept = kept_frames(short_audio, None, "padding")
    small.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = run(small, states, ids(), output_attentions=True).cross_attentions
    for layer in weights:
        assert layer.shape == (3, 4, 4, 50)
        torch.testing.assert_close(layer.sum(-1), torch.ones(3, 4, 4))
        for row in range(3):
            stands = kept[row].nonzero()[kept[row].cumsum(0) - 1, 0]
            assert torch.equal(layer[row], layer[row][..., stands]) and layer[row].any(-2).all()


# What is dropped


@pytest.mark.parametrize("format", EXACT)
def test_a_trimmed_audio_is_an_audio_of_the_frames_kept(small, short_audio, format):
    """As if the encoder had given those frames alone, over and over in the place of the others; each audio has its
    own."""
    kept = kept_frames(short_audio, None, "padding")
    assert kept.sum(-1).unique().numel() == 3 and kept[2].all()
    patch(small, cross=CrossConfig(format, "padding"))
    with torch.no_grad():
        states = small.model.encoder(short_audio).last_hidden_state
    for row, stands in enumerate(one.nonzero()[one.cumsum(0) - 1, 0] for one in kept):
        assert torch.equal(states[row], states[row, stands])
    unpatch(small)
    want = [run(small, states[row : row + 1], ids()[row : row + 1]) for row in range(3)]
    patch(small, cross=CrossConfig(format, "padding"))
    with torch.no_grad():
        assert torch.equal(small.model.encoder(short_audio).last_hidden_state, states)
    order = torch.tensor([2, 0, 0, 1])  # found again in whatever batch
    output = run(small, states[order], ids()[order])
    for row, audio in enumerate(order):
        assert_close(output.logits[row], want[audio].logits[0])
    got = stats(small)
    assert (got.audios, got.frames, got.frames_kept, got.note) == (3, 50, int(kept.sum()), "")
    assert cross_layers(output.past_key_values)[0].audios.lengths.tolist() == kept.sum(-1)[[2, 0, 1]].tolist()


def test_unknown_audio_is_kept_whole_and_said(small, short_audio):
    with torch.no_grad():
        states = small.model.encoder(short_audio).last_hidden_state
    want = run(small, states, ids()).logits
    patch(small, cross=CrossConfig("model", "padding"))
    assert_close(run(small, states, ids()).logits, want)
    got = stats(small)
    assert got.frames_kept == 150 and "not trimmed" in got.note and "not trimmed" in str(got)
    with torch.no_grad():
        states = small.model.encoder(short_audio).last_hidden_state
    run(small, states, ids())
    assert stats(small).frames_kept < 150 and stats(small).note == ""


def test_no_more_audios_are_remembered_than_needed(small, audio, monkeypatch):
    monkeypatch.setattr(EncoderListener, "MOST", 4)
    patch(small, cross=CrossConfig(trim="padding"))
    (listener,) = small.model.encoder._forward_hooks.values()
    with torch.no_grad():
        first = small.model.encoder(audio).last_hidden_state
        second = small.model.encoder(audio + 1).last_hidden_state
    assert len(listener._kept) == 4
    assert listener.kept(second).shape == (3, 50) and listener.kept(first) is None


def test_trimming_real_audio(tiny_en, speech):
    model, processor = tiny_en
    samples = speech[0][: 16000 * 10]
    inputs = processor(samples, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    texts, attended = [], []
    for config in (None, CrossConfig(trim="padding"), CrossConfig("latent", "padding"), CrossConfig(trim="silence")):
        patch(model, cross=config)
        try:
            tokens = model.generate(inputs.input_features, attention_mask=inputs.attention_mask)
            attended.append(stats(model))
        finally:
            unpatch(model)
        texts.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].rstrip("."))
    assert len(texts[0].split()) > 20 and texts == [texts[0]] * 4
    whole, padding, latent, silence = attended
    assert whole.frames_kept == 1500 and silence.frames_kept <= padding.frames_kept == latent.frames_kept < 900
    bias = 4 * padding.frames_kept
    assert (padding.cross_bytes - bias) * 1500 == whole.cross_bytes * padding.frames_kept
    assert (latent.cross_bytes - bias) * 2 * model.config.decoder_layers == padding.cross_bytes - bias


def test_token_timestamps_of_a_trimmed_audio(tiny_en, speech):
    """With silence between the words: the times are those of the full model, within the width of its filter."""
    model, processor = tiny_en
    samples = speech[0][: 16000 * 8].copy()
    samples[16000 * 4 : 16000 * 6] = 0
    features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
    times = []
    for config in (None, CrossConfig(trim="padding"), CrossConfig(trim="silence")):
        patch(model, cross=config)
        try:
            output = model.generate(features, return_token_timestamps=True, return_dict_in_generate=True)
        finally:
            unpatch(model)
            model.set_attn_implementation("sdpa")
        times.append(output["token_timestamps"][0])
    assert len(times[0]) > 10
    for each in times[1:]:
        assert len(each) == len(times[0]) and (each - times[0]).abs().mean() < 0.2


def test_packed_formats_of_real_audio(tiny_en, speech):
    """The words stay, in a small part of the memory."""
    model, processor = tiny_en
    inputs = processor(speech[0][: 16000 * 10], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        states = model.model.encoder(inputs.input_features)
    options = dict(num_beams=2, max_new_tokens=60)
    want = processor.batch_decode(model.generate(encoder_outputs=copy.copy(states), **options))[0].lower().split()
    for format, ratio in (("int8", 0.3), ("int4", 0.17), ("latent_int8", 0.04), ("latent_int4", 0.02)):
        patch(model, cross=CrossConfig(format))
        try:
            tokens = model.generate(encoder_outputs=copy.copy(states), **options)
            got = stats(model)
        finally:
            unpatch(model)
        words = processor.batch_decode(tokens)[0].lower().split()
        assert len(set(want) ^ set(words)) <= 0.2 * len(want), format
        assert got.cross_bytes * 2 < ratio * got.cross_bytes_transformers  # 2 beams share


# Refusals


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("format", "fp8", "'model', 'int8', 'int4', 'latent', 'latent_int8', 'latent_int4'"),
        ("format", None, "one of 'model'"),
        ("trim", "all", "'off', 'padding', 'silence'"),
        ("trim", True, "one of 'off'"),
        ("share_beams", 1, "True or False"),
        ("share_beams", None, "True or False"),
        *(("group", n, "16, 32, 64, 128 or a multiple of 256") for n in (0, 8, 48, 300, -256, 64.0, True, "64", None)),
    ],
)
def test_config_refuses(field, value, allowed):
    with pytest.raises(ValueError, match=f"CrossConfig.{field} must be .*{allowed}.*got {value!r}"):
        CrossConfig(**{field: value})


@pytest.mark.parametrize("field, value", [("format", ["int8"]), ("format", {}), ("trim", ["off"])])
def test_config_refuses_what_cannot_be_a_name(field, value):
    with pytest.raises(ValueError, match=f"CrossConfig.{field} must be "):
        CrossConfig(**{field: value})


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 512, 1536])
def test_config_takes(group):
    assert CrossConfig(group=group).group == group
    assert CrossConfig() == CrossConfig("model", "off", True, 256, 0.0)


@pytest.mark.parametrize("bad", ["latent", {"format": "latent"}, CrossConfig, EvictionConfig()], ids=str)
def test_bad_settings_leave_the_model_alone(small, audio, bad):
    want = generate(patch(small, cross=CrossConfig("latent")), audio)
    with pytest.raises(TypeError, match="cross must be a CrossConfig, as .*, or None; got"):
        patch(small, cross=bad)
    assert torch.equal(generate(small, audio), want)


@pytest.mark.parametrize(
    "change, given",
    [
        (lambda t: t[..., :32], r"\[3, 50, 32\]"),
        (lambda t: t[:2], r"\[2, 50, 64\]"),
        (lambda t: t.repeat(2, 1, 1), r"\[6, 50, 64\]"),
    ],
    ids=["width", "fewer rows", "more rows"],
)
@every_format
def test_encoder_output_of_another_size(small, states, format, change, given):
    patch(small, cross=CrossConfig(format))
    with pytest.raises(ValueError, match=rf"must be \[rows=3, frames, width=64\] .* got {given}"):
        run(small, change(states), ids())
    run(small, states, ids())


def test_rows_that_the_cache_is_not_of(small, states):
    patch(small)
    past = run(small, states, ids()).past_key_values
    past.cross_attention_cache.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="is of 2 rows over 3 audios, and 3 rows .* start from a fresh cache"):
        run(small, states, ids(3, 1), past)


@pytest.mark.parametrize("trim", ["padding", "silence"])
def test_trimming_needs_an_encoder(small, trim):
    decoder = WhisperForCausalLM(copy.deepcopy(small.config)).eval()
    with pytest.raises(ValueError, match=f"CrossConfig.trim='{trim}' needs the encoder, and WhisperForCausalLM"):
        patch(decoder, cross=CrossConfig(trim=trim))
    assert type(decoder.model.decoder.layers[0].encoder_attn) is WhisperAttention
    patch(decoder, cross=CrossConfig("latent"))


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_an_adapter_and_the_latent_formats(small, audio, name):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=[name], init_lora_weights=False)
    model = peft.get_peft_model(small, adapter).eval()
    want = generate(small, audio)
    for format in ("latent", "latent_int8", "latent_int4"):
        with pytest.raises(
            ValueError, match=rf"format='{format}' needs .* {name} of decoder layer 0 .*merge_and_unload"
        ):
            patch(model, cross=CrossConfig(format))
        assert type(small.model.decoder.layers[0].encoder_attn) is WhisperAttention
    assert torch.equal(generate(patch(model).base_model.model, audio), want)
    generate(patch(model, cross=CrossConfig("int8")).base_model.model, audio)
    assert stats(model).cross_bytes < stats(model).cross_bytes_transformers
    merged = unpatch(model).merge_and_unload()
    want = generate(merged, audio)
    assert torch.equal(generate(patch(merged, cross=CrossConfig("latent")), audio), want)


def test_an_adapter_that_comes_after_patch(small, audio):
    peft = pytest.importorskip("peft")
    patch(small, cross=CrossConfig("latent"))
    peft.get_peft_model(small, peft.LoraConfig(r=4, target_modules=["k_proj"])).eval()
    with pytest.raises(ValueError, match="merge_and_unload"):
        generate(small, audio)


def test_quantized_linears(small, audio):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(small, {torch.nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match="k_proj of decoder layer 0 is a .*quantized"):
        patch(quantized, cross=CrossConfig("latent"))
    assert generate(patch(quantized, cross=CrossConfig("int8")), audio).shape == (3, 41)


@every_format
def test_gradients_are_left_to_transformers(small, audio, format):
    labels = ids(3, 12)
    losses = []
    for prepare in (unpatch, lambda model: patch(model, cross=CrossConfig(format, "padding"))):
        prepare(small).zero_grad()
        loss = small(audio, labels=labels).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad.clone() for p in small.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
