"""Decode steps as graphs. Without a GPU, a graph that does on the CPU what a CUDA graph does stands in for it."""

import copy
import pickle
import threading

import pytest
import recorder
import torch
from conftest import DEVICE, alike
from test_patch import generate
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from whisperkv import CrossConfig, EvictionConfig, graphs, patch, stats, unpatch
from whisperkv.config import FORMATS
from whisperkv.decoder import FastDecoder

POLICIES = [EvictionConfig(policy, recent=8, heavy=6) for policy in ("heavy_hitter", "magnitude", "window")]
EVICTIONS = [None, *POLICIES]
CONFIGS = [CrossConfig(name) for name in FORMATS] + [CrossConfig("latent_int4", "padding", group=16)]


@pytest.fixture
def graph(monkeypatch):
    return recorder.listed(monkeypatch)


@pytest.fixture
def small(small):
    return small.to(DEVICE)


@pytest.fixture(scope="module")
def tiny_en(tiny_en):
    yield tiny_en[0].to(DEVICE), tiny_en[1]
    tiny_en[0].to("cpu")


@pytest.fixture
def audio():
    return torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.fixture
def short_audio(audio):
    """Of three lengths; the rest is padding."""
    audio[0, :, 10:] = audio[1, :, 31:] = -1.0
    return audio


@pytest.fixture
def long(small):
    """The small model with room for 200 tokens."""
    config = copy.deepcopy(small.config)
    config.max_target_positions = 200
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval().to(DEVICE)
    model.generation_config = small.generation_config
    return model


@pytest.fixture
def states(small, audio):
    with torch.no_grad():
        return small.model.encoder(audio).last_hidden_state


def ids(rows, tokens, seed=0):
    return torch.randint(4, 200, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.no_grad()
def feed(model, states, tokens, past=None, **options):
    """The logits of one token after the other, and the cache."""
    logits = []
    for token in tokens.split(1, 1):
        output = model(encoder_outputs=(states,), decoder_input_ids=token, past_key_values=past, **options)
        past = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), past


def both(model, run, *settings):
    """run(model) without graphs and with them."""
    return [run(patch(model, *settings, graphs=on)) for on in (False, True)]


# Same results


MODES = {
    "greedy": {},
    "beams": dict(num_beams=4),
    "sampling": dict(do_sample=True, temperature=0.8),
    "samples": dict(do_sample=True, num_return_sequences=2),
    "returned beams": dict(num_beams=3, num_return_sequences=3),
    "static cache": dict(cache_implementation="static"),
    "padded prompt": dict(
        decoder_input_ids=ids(3, 6),
        decoder_attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]], device=DEVICE),
    ),
    "prompt": dict(decoder_input_ids=ids(3, 13)),
    "prompt beyond the budget": dict(decoder_input_ids=ids(3, 20)),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_generate(small, audio, graph, mode, eviction):
    if eviction is not None and "beyond" in mode:
        eviction = EvictionConfig(eviction.policy, recent=8, heavy=6, pin_prompt=False)
    audio = audio[:1] if mode == "prompt lookup" else audio

    def run(model):
        torch.manual_seed(0)
        return generate(model, audio, max_new_tokens=30, **MODES[mode])

    eager, graphed = both(small, run, eviction)
    assert torch.equal(eager, graphed)
    assert graph.replays or mode == "prompt lookup"
    assert eviction is None or stats(small).evicted > 0


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("eviction", [None, POLICIES[0]], ids=str)
def test_formats(small, short_audio, graph, config, beams, eviction):
    def run(model):
        tokens = [generate(model, short_audio, num_beams=beams, max_new_tokens=20) for _ in range(2)]
        return torch.stack(tokens)

    eager, graphed = both(small, run, eviction, config)
    assert torch.equal(eager, graphed) and len(graph.made) == 1
    assert len(graph.replays) == 2 * 19


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["model", "latent_int8"])
def test_half_precision(small, audio, graph, dtype, format):
    small.to(dtype)
    runs = both(small, lambda model: generate(model, audio.to(dtype), num_beams=2), POLICIES[0], CrossConfig(format))
    assert torch.equal(*runs) and graph.replays


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_outputs_that_are_kept(small, states, graph, eviction):
    """The output of a step is not that of the next."""
    tokens = ids(3, 30)

    def run(model):
        past, outputs = None, []
        with torch.no_grad():
            for token in tokens.split(1, 1):
                output = model.model(encoder_outputs=(states,), decoder_input_ids=token, past_key_values=past)
                past = output.past_key_values
                outputs.append(output.last_hidden_state)
        assert past.get_seq_length() == 30
        return torch.cat(outputs, 1)

    eager, graphed = both(small, run, eviction)
    assert torch.equal(eager, graphed) and len(graph.replays) == 29


def test_slots_that_grow(long, audio, graph):
    runs = both(long, lambda model: generate(model, audio, max_new_tokens=150))
    assert torch.equal(*runs)
    assert len(graph.made) == 3  # of 64, 128 and 192 slots
    for _ in range(2):
        assert torch.equal(generate(long, audio, max_new_tokens=150), runs[0])
        assert len(graph.made) == 5  # the largest memory now serves all three


@pytest.mark.parametrize("eviction", [None, POLICIES[0]], ids=str)
@pytest.mark.parametrize(
    "move",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.self_attention_cache.reorder_cache(torch.tensor([1, 0, 2])),
    ],
    ids=["reorder", "select", "select fewer", "repeat", "reorder one half"],
)
def test_rows_that_move(small, states, graph, move, eviction):
    def run(model):
        logits, past = feed(model, states, ids(3, 20))
        for _ in range(2):
            move(past)
            rows = past.self_attention_cache.layers[0].batch_size
            more, past = feed(model, states[:1].expand(rows, -1, -1), ids(rows, 5, seed=1), past)
            logits = torch.cat([logits.flatten(), more.flatten()])
            if rows != 3:
                break
        return logits

    assert torch.equal(*both(small, run, eviction))


def test_the_same_rows_again(small, states, graph):
    """A loop may write its next order into the tensor that held the last."""

    def run(model):
        order, logits, past = torch.empty(3, dtype=torch.long), [], None
        for step in range(8):
            output, past = feed(model, states, ids(3, 2, seed=step), past)
            past.reorder_cache(order.copy_(torch.tensor([[1, 2, 0], [2, 2, 1]][step % 2])))
            logits.append(output)
        return torch.cat(logits)

    assert torch.equal(*both(small, run))


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_crop(small, states, graph, eviction):
    from test_cache import _CROP_TAKES_LENGTH

    def run(model):
        first, past = feed(model, states, ids(3, 25))
        past.crop(past.get_seq_length() - 4 if _CROP_TAKES_LENGTH else -4)
        with torch.no_grad():
            several = model(encoder_outputs=(states,), decoder_input_ids=ids(3, 4, seed=1), past_key_values=past).logits
        last, _ = feed(model, states, ids(3, 15, seed=2), past)
        return torch.cat([first, several, last], 1)

    eager, graphed = both(small, run, eviction)
    assert torch.equal(eager, graphed) and len(graph.replays) == 24 + 15


def test_positions_that_are_given(small, states, graph):
    def run(model):
        with torch.no_grad():
            past = model(encoder_outputs=(states,), decoder_input_ids=ids(3, 4)).past_key_values
            steps = [
                model(
                    encoder_outputs=(states,), decoder_input_ids=ids(3, 1), past_key_values=past,
                    decoder_position_ids=torch.tensor(places, device=DEVICE),
                ).logits
                for places in ([[9]], [[3], [7], [20]])
            ]  # fmt: skip
        return torch.cat(steps, 1)

    eager, graphed = both(small, run)
    assert torch.equal(eager, graphed) and len(graph.replays) == 2


def test_without_an_audio(small, graph):
    from transformers import WhisperForCausalLM

    causal = WhisperForCausalLM(copy.deepcopy(small.config)).eval().to(DEVICE)

    def run(model):
        past, logits = None, []
        with torch.no_grad():
            for token in ids(2, 12).split(1, 1):
                output = model(token, past_key_values=past, use_cache=True)
                past = output.past_key_values
                logits.append(output.logits)
        return torch.cat(logits, 1)

    eager, graphed = both(causal, run)
    assert torch.equal(eager, graphed) and len(graph.replays) == 11


# Real weights


@pytest.fixture(scope="module")
def features(tiny_en, speech):
    """Three pieces of different length: rows that finish at different times."""
    samples, _ = speech
    pieces = [samples[: 16000 * 6], samples, samples[16000 * 9 : 16000 * 20]]
    return tiny_en[1](pieces, sampling_rate=16000, return_tensors="pt").input_features.to(DEVICE)


@pytest.fixture(scope="module")
def encoded(tiny_en, features):
    with torch.no_grad():
        return tiny_en[0].model.encoder(features).last_hidden_state


REAL = {
    "greedy": dict(max_new_tokens=80),
    "beams": dict(num_beams=5, max_new_tokens=25),
    "sampling": dict(do_sample=True, temperature=0.8, max_new_tokens=40),
}


@pytest.mark.parametrize("mode", REAL)
def test_real_weights(tiny_en, encoded, graph, mode):
    model, tokens = tiny_en[0], []
    for prepare in (unpatch, patch):
        prepare(model)
        torch.manual_seed(0)
        tokens.append(model.generate(encoder_outputs=BaseModelOutput(encoded), **REAL[mode]))
    unpatch(model)
    assert torch.equal(*tokens)
    assert 0 < len(graph.made) < len(graph.replays) / 5


def test_fallback(tiny_en, features, graph):
    """Attempts at a temperature, for fewer and fewer rows."""
    model, tokens = tiny_en[0], []
    options = dict(temperature=(0.0, 0.8), logprob_threshold=-0.2, compression_ratio_threshold=1.6, max_new_tokens=40)
    for prepare in (unpatch, patch):
        prepare(model)
        torch.manual_seed(0)
        tokens.append(model.generate(features, **options))
    attempts = stats(model).decodes
    unpatch(model)
    assert torch.equal(*tokens) and attempts > 1
    assert 0 < len(graph.made) < len(graph.replays) / 5


def test_long_audio(tiny_en, speech, graph):
    """Chunks of a batch that becomes smaller, with the text so far as the prompt and attempts at a temperature."""
    model, processor = tiny_en
    samples, _ = speech
    pieces = [samples[: 16000 * 7], [*samples, *samples[: 16000 * 12]]]
    inputs = processor(
        pieces, sampling_rate=16000, return_tensors="pt", truncation=False, padding="longest",
        return_attention_mask=True,
    ).to(DEVICE)  # fmt: skip
    outputs = []
    for prepare in (unpatch, patch):
        prepare(model)
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                **inputs, return_timestamps=True, condition_on_prev_tokens=True, temperature=(0.0, 0.4),
                logprob_threshold=-0.3, compression_ratio_threshold=1.6,
            )
        )  # fmt: skip
    unpatch(model)
    assert torch.equal(*outputs) and len(graph.made) < len(graph.replays) / 5


# Captured once


def test_one_graph_serves_all_calls(small, audio, graph):
    patch(small)
    for seed in range(3):
        torch.manual_seed(seed)
        generate(small, torch.randn(3, 8, 100).to(DEVICE), max_new_tokens=20)
    assert len(graph.made) == 1 and len(graph.replays) == 3 * 19
    generate(small, audio[:2], max_new_tokens=20)
    generate(small, audio[:2], num_beams=3, max_new_tokens=20)
    assert len(graph.made) == 3
    for _ in range(2):
        for rows in (3, 2):
            generate(small, audio[:rows], max_new_tokens=20)
        assert len(graph.made) == 5  # the six beams needed more memory, which now serves all


def test_trimmed_audios_of_other_lengths(small, audio, graph):
    patch(small, cross=CrossConfig(trim="padding"))
    kept = set()
    for columns in (10, 31, 50):
        each = audio.clone()
        each[:, :, columns:] = -1.0
        generate(small, each, max_new_tokens=10)
        kept.add(stats(small).frames_kept)
    assert len(kept) == 3 and len(graph.made) == 1


def test_padding_makes_another_graph(small, states, graph):
    tokens = ids(3, 20)
    mask = torch.ones(3, 6, device=DEVICE)
    mask[1, :3] = 0
    prompts = [{}, dict(decoder_attention_mask=mask)]

    def run(model):
        logits = []
        for prompt in (*prompts, *prompts):
            with torch.no_grad():
                past = model(encoder_outputs=(states,), decoder_input_ids=tokens[:, :6], **prompt).past_key_values
            logits.append(feed(model, states, tokens[:, 6:], past)[0])
            del past  # or the next cache has other memory
        return torch.stack(logits)

    eager, graphed = both(small, run)
    assert torch.equal(eager, graphed) and not torch.equal(eager[0], eager[1])
    assert len(graph.made) == 2


@pytest.mark.filterwarnings("ignore:CrossConfig:UserWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_what_a_trimmed_audio_shows(small, short_audio, graph, format):
    """Its memory has room for more frames than it has."""
    small.set_attn_implementation("eager")

    def run(model):
        options = dict(max_new_tokens=4, return_dict_in_generate=True)
        generate(model, short_audio.flip(0), **options)
        cache = generate(model, short_audio[:2], **options).past_key_values
        with torch.no_grad():
            states = model.model.encoder(short_audio[:2]).last_hidden_state
            output = model(
                encoder_outputs=(states,), decoder_input_ids=ids(2, 1), past_key_values=cache, output_attentions=True
            )
        layer = cache.cross_attention_cache.layers[1]
        return [layer.keys[:], layer.values[1], *output.cross_attentions, *output.decoder_attentions]

    for config in (CrossConfig(format, "padding", group=16), CrossConfig(format, group=16, merge=0.5)):
        eager, graphed = both(small, run, None, config)
        assert eager[0].shape[2] < 50 and graph.replays
        torch.testing.assert_close(graphed, eager)
        del graph.replays[:]


def test_no_more_graphs_than_needed_are_kept(small, audio, graph, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    patch(small)
    (hook,) = small.model.decoder._forward_pre_hooks.values()
    want = [generate(small, audio[:rows], max_new_tokens=5) for rows in (1, 2, 3)]
    assert len(hook.graphs._graphs) == 2
    assert torch.equal(generate(small, audio[:1], max_new_tokens=5), want[0])
    assert len(graph.made) == 4


def test_two_caches_in_turn(small, states, graph):
    patch(small)
    tokens = [ids(3, 20, seed) for seed in (1, 2)]
    alone = [feed(small, states, each)[0] for each in tokens]
    assert len(graph.made) == 1
    pasts, together = [None, None], [[], []]
    for step in range(20):
        for i in range(2):
            logits, pasts[i] = feed(small, states, tokens[i][:, step : step + 1], pasts[i])
            together[i].append(logits)
    assert len(graph.made) == 2
    for one, other in zip(alone, together):
        assert torch.equal(one, torch.cat(other, 1))


def test_threads(small, audio, graph):
    want = [generate(small, audio[i : i + 1]) for i in range(3)]
    got = [None] * 3
    patch(small)

    def work(i):
        for _ in range(3):
            got[i] = generate(small, audio[i : i + 1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(want, got)) and len(graph.made) <= 9


# Memory that is lent


@pytest.mark.parametrize("eviction", [None, POLICIES[0]], ids=str)
def test_a_cache_that_is_kept_is_not_written_over(small, audio, states, graph, eviction):
    patch(small, eviction)
    output = generate(small, audio, max_new_tokens=20, return_dict_in_generate=True)
    cache = output.past_key_values
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    before = [layer.keys.clone() for layer in cache.self_attention_cache.layers]
    for _ in range(2):
        generate(small, audio.flip(0), max_new_tokens=20)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.self_attention_cache.layers))
    step = ids(3, 6)
    want = feed(patch(small, eviction, graphs=False), states, step, copy.deepcopy(cache))[0]
    patch(small, eviction)
    for each in (cache, *copies):
        assert torch.equal(feed(small, states, step, each)[0], want)


def test_what_was_taken_from_a_cache_stays(small, audio, graph):
    """generate() itself takes views of the rows."""
    patch(small)
    for part, other in (("self", "keys"), ("self", "values"), ("cross", "keys"), ("cross", "values")):
        cache = generate(small, audio, max_new_tokens=20, return_dict_in_generate=True).past_key_values
        layer = getattr(cache, f"{part}_attention_cache").layers[1]
        whole, row = getattr(layer, other), getattr(layer, other)[1][None]
        before = whole[:].clone()
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert torch.equal(whole[:], before)
        del cache, layer, whole
        generate(small, audio.flip(0), max_new_tokens=20)
        assert torch.equal(row[0], before[1])
    assert len(graph.made) == 2  # the memory of a cache that somebody looks at is not another's


def test_a_pickle_takes_no_more_than_the_cache(small, audio, graph):
    sizes = []
    for on in (False, True):
        patch(small, graphs=on)
        cache = generate(small, audio, max_new_tokens=60, return_dict_in_generate=True).past_key_values  # 64 slots
        sizes.append(len(pickle.dumps(cache)))
    assert sizes[1] < 1.1 * sizes[0]


def test_memory_is_given_back_and_let_go(small, audio, graph):
    patch(small)
    (hook,) = small.model.decoder._forward_pre_hooks.values()
    caches = [generate(small, audio, max_new_tokens=4, return_dict_in_generate=True) for _ in range(7)]
    assert len(graph.made) == 7
    pools = list(hook.graphs._pools.values())
    caches.clear()
    generate(small, audio, max_new_tokens=4)
    assert len(pools) == 2 and all(len(pool._free) < 4 for pool in pools) and len(graph.made) == 7


def test_inference_mode_and_back(small, states, graph):
    patch(small)
    tokens = ids(3, 12)
    want = feed(small, states, tokens)[0]
    with torch.inference_mode():
        assert torch.equal(feed(small, states, tokens)[0], want)
        patch(small)
        assert torch.equal(feed(small, states, tokens)[0], want)
    assert torch.equal(feed(small, states, tokens)[0], want)
    assert len(graph.made) == 2


# What a graph takes for granted


def test_weights_that_change_in_place(small, states, graph):
    tokens = ids(3, 10)
    patch(small)
    first = feed(small, states, tokens)[0]
    small.load_state_dict({name: weight * 1.1 for name, weight in small.state_dict().items()})
    second = feed(small, states, tokens)[0]
    assert len(graph.made) == 1 and not torch.equal(first, second)
    assert torch.equal(second, feed(patch(small, graphs=False), states, tokens)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.model.decoder.layers[1], "fc1", torch.nn.Linear(64, 64).to(DEVICE)),
        lambda model: setattr(model.model.decoder.layers[1], "activation_fn", torch.nn.ReLU()),
    ],
    ids=["other tensors", "other dtype", "other module", "other activation"],
)
def test_weights_that_move(small, states, graph, change):
    tokens = ids(3, 10)
    patch(small)
    feed(small, states, tokens)
    change(small.eval())
    small.eval()
    states = states.to(small.dtype)
    got = feed(small, states, tokens)[0]
    assert len(graph.made) == 2
    assert alike(got, feed(patch(small, graphs=False), states, tokens)[0])


def test_a_model_that_moves_in_the_middle(small, states, graph):
    """As to another device and back: every weight is somewhere else."""
    tokens = ids(3, 10)
    want = feed(patch(small, graphs=False), states, tokens)[0]
    patch(small)
    first, past = feed(small, states, tokens[:, :5])
    for parameter in small.parameters():
        parameter.data = parameter.data.clone()
    rest = feed(small, states, tokens[:, 5:], past)[0]
    assert torch.equal(torch.cat([first, rest], 1), want) and len(graph.made) == 2


def test_settings_of_before(small, states, graph):
    """A cache goes on under the settings that it was begun with."""
    tokens = ids(3, 30)
    want = feed(patch(small, POLICIES[0], graphs=False), states, tokens)[0]
    first, past = feed(patch(small, POLICIES[0]), states, tokens[:, :20])
    patch(small, POLICIES[2])
    feed(small, states, tokens)
    rest = feed(small, states, tokens[:, 20:], past)[0]
    assert torch.equal(torch.cat([first, rest], 1), want) and len(graph.made) == 3


# What runs as it is


def test_hooks(small, audio, graph):
    seen = []
    want = generate(patch(small, graphs=False), audio, max_new_tokens=10)
    patch(small)
    for module, hook in (
        (small.model.decoder.layers[1].fc1, "register_forward_hook"),
        (small.model.decoder.layers[0].self_attn, "register_forward_pre_hook"),
    ):
        handle = getattr(module, hook)(lambda *args: seen.append(args[0]))
        assert torch.equal(generate(small, audio, max_new_tokens=10), want)
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert torch.equal(generate(small, audio, max_new_tokens=10), want)
    handle.remove()
    assert len(seen) == 20 and not graph.made
    generate(small, audio, max_new_tokens=10)
    assert len(graph.replays) == 9


def test_hooks_of_the_decoder_itself(small, audio, graph):
    seen = []
    patch(small)
    small.model.decoder.register_forward_hook(lambda *args: seen.append(1))
    generate(small, audio, max_new_tokens=10)
    assert len(seen) == 10 and len(graph.replays) == 9


@pytest.mark.parametrize("by", ["argument", "config"])
def test_attentions_and_hidden_states(small, audio, graph, by):
    small.set_attn_implementation("eager")
    wanted = dict(output_attentions=True, output_hidden_states=True)

    def run(model):
        return generate(model, audio, max_new_tokens=8, return_dict_in_generate=True, **wanted)

    if by == "config":
        small.config.update(wanted)
    eager, graphed = both(small, run)
    assert not graph.made and torch.equal(eager.sequences, graphed.sequences)
    for name in ("decoder_attentions", "cross_attentions", "decoder_hidden_states"):
        ours, theirs = getattr(graphed, name), getattr(eager, name)
        assert len(ours) == 8 and all(len(step) >= 2 for step in ours)
        torch.testing.assert_close(ours, theirs)
    small.config.update(dict(output_attentions=False, output_hidden_states=False))
    patch(small)
    assert torch.equal(generate(small, audio, max_new_tokens=8), eager.sequences)
    assert len(graph.replays) == 7  # the hooks that transformers leaves behind do nothing


def test_what_else_is_left_alone(small, states, graph):
    tokens = ids(3, 6)
    decoder = small.model.decoder

    def eager_only(run):
        before = len(graph.replays)
        run()
        assert len(graph.replays) == before

    patch(small)
    first = dict(encoder_outputs=(states,), decoder_input_ids=tokens[:, :2])
    with torch.no_grad():
        past = small(**first).past_key_values
    step = dict(encoder_outputs=(states,), past_key_values=past)
    with torch.no_grad():
        with torch.autocast(DEVICE, torch.bfloat16):
            eager_only(lambda: small(**first))
        eager_only(lambda: small(**step, decoder_input_ids=tokens[:, :3]))
        eager_only(lambda: small(**step, decoder_inputs_embeds=torch.randn(3, 1, 64, device=DEVICE)))
    small.requires_grad_(False)
    eager_only(lambda: small(**step, decoder_input_ids=tokens[:, :1]))
    decoder.layers[0].fc1.forward = decoder.layers[0].fc1.forward
    patch(small)
    eager_only(lambda: feed(small, states, tokens))


def test_a_policy_that_is_a_function(small, audio, graph):
    eviction = EvictionConfig(lambda scores, positions, keys, values: scores, recent=8, heavy=4)
    assert torch.equal(*both(small, lambda model: generate(model, audio), eviction)) and not graph.made


def test_an_adapter(small, audio, graph):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small, config).eval()
    want = generate(small, audio)
    patch(model)
    assert torch.equal(generate(small, audio), want)
    with model.disable_adapter():
        assert not torch.equal(generate(small, audio), want)
    assert not graph.made
    merged = model.merge_and_unload()
    assert torch.equal(generate(patch(merged), audio), want) and graph.made


def test_torch_compile(small, audio, graph):
    want = generate(patch(small), audio)
    made = len(graph.made)
    small.forward = torch.compile(small.forward, backend="eager")
    assert torch.equal(generate(small, audio), want) and len(graph.made) == made


def test_a_decoder_of_another_class(small, audio, graph):
    class Other(WhisperDecoder):
        pass

    small.model.decoder.__class__ = Other
    want = generate(small, audio)
    assert torch.equal(generate(patch(small), audio), want) and not graph.made
    assert type(unpatch(small).model.decoder) is Other


# patch() and unpatch()


def test_it_can_be_switched_off(small, audio, graph):
    patch(small, graphs=False)
    want = generate(small, audio)
    assert not graph.made
    patch(small)
    assert type(small.model.decoder) is FastDecoder
    assert torch.equal(generate(small, audio), want) and graph.made
    patch(small, graphs=False)
    made = len(graph.replays)
    assert torch.equal(generate(small, audio), want) and len(graph.replays) == made
    patch(small)
    unpatch(small)
    assert type(small.model.decoder) is WhisperDecoder


@pytest.mark.parametrize("bad", [None, 1, "yes"])
def test_a_bad_switch(small, bad):
    with pytest.raises(ValueError, match=f"graphs must be True or False; got {bad!r}"):
        patch(small, graphs=bad)
    assert type(small.model.decoder) is WhisperDecoder


def test_a_cache_outlives_unpatch(small, states, graph):
    tokens = ids(3, 12)
    want = feed(unpatch(small), states, tokens)[0]
    first, past = feed(patch(small), states, tokens[:, :6])
    rest = feed(unpatch(small), states, tokens[:, 6:], past)[0]
    torch.testing.assert_close(torch.cat([first, rest], 1), want, rtol=1e-3, atol=1e-3)
    first, past = feed(patch(small), states, tokens[:, :6])
    unpatch(small)
    rest = feed(patch(small), states, tokens[:, 6:], past)[0]
    torch.testing.assert_close(torch.cat([first, rest], 1), want, rtol=1e-3, atol=1e-3)


def test_copies_and_pickles_capture_their_own(small, audio, graph):
    want = generate(patch(small), audio)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        made = len(graph.made)
        assert torch.equal(generate(other, audio), want) and len(graph.made) == made + 1
        assert type(unpatch(other).model.decoder) is WhisperDecoder
    made = len(graph.made)
    assert torch.equal(generate(small, audio), want) and len(graph.made) == made


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU")
def test_on_the_cpu_nothing_is_captured(small, audio):
    patch(small)
    (hook,) = small.model.decoder._forward_pre_hooks.values()
    cache = generate(small, audio, return_dict_in_generate=True).past_key_values
    assert cache.self_attention_cache.layers[0].home is None
    assert not hook.graphs._pools and not hook.graphs._graphs
