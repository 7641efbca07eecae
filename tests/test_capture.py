"""How a decode step is captured and what a replayed one costs: what is in a graph, what Python does at each step, and
what happens when a capture fails."""

import sys
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import recorder
import torch
from conftest import DEVICE
from test_graphs import EVICTIONS, POLICIES, feed, ids
from test_patch import generate

from whisperkv import CrossConfig, patch
from whisperkv.beams import gathered, own_rows, reordered
from whisperkv.cross_cache import CrossCacheLayer
from whisperkv.graph_memory import Pool
from whisperkv.graphs import CudaGraph
from whisperkv.snapshot import Snapshot


@pytest.fixture
def graph(monkeypatch):
    return recorder.listed(monkeypatch)


@pytest.fixture
def small(small):
    return small.to(DEVICE)


@pytest.fixture
def audio():
    return torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.fixture
def states(small, audio):
    with torch.no_grad():
        return small.model.encoder(audio).last_hidden_state


# What is in a graph

recorded = pytest.mark.skipif(DEVICE != "cpu", reason="a CUDA graph does not say what is in it")


def names_of(graph):
    return [op.overloadpacket.__name__ for op, *_ in graph.calls]


@recorded
@pytest.mark.parametrize("padded", [False, True])
def test_one_op_moves_the_cursors_of_all_layers(small, states, graph, padded):
    mask = torch.ones(3, 4)
    mask[0, 0] = 0 if padded else 1
    with torch.no_grad():
        past = patch(small)(
            encoder_outputs=(states,), decoder_input_ids=ids(3, 4), decoder_attention_mask=mask
        ).past_key_values
    feed(small, states, ids(3, 3), past)
    (made,) = graph.made
    moved = [args[0] for op, args, *_ in made.calls if op == torch.ops.aten.add_.Tensor]
    assert [len(each) for each in moved if each.dtype == torch.int32] == [2]  # layers
    cursors = torch.stack([layer.cursor for layer in past.self_attention_cache.layers])
    assert cursors[:, 0].tolist() == cursors[:, 1].tolist() == cursors[:, 2].tolist() == [[7 - padded, 7, 7]] * 2


@recorded
@pytest.mark.parametrize("rows, products", [(1, 6), (3, 8)])
def test_one_product_projects_a_single_row(small, states, graph, rows, products):
    feed(patch(small), states[:rows], ids(rows, 3))
    names = names_of(graph.made[0])
    assert sum(names.count(name) for name in ("addmm", "mm", "linear")) == 2 * products  # a layer


@recorded
@pytest.mark.parametrize("format", ["model", "latent"])
def test_the_query_is_scaled_by_the_kernel(small, states, graph, format):
    feed(patch(small, None, CrossConfig(format)), states, ids(3, 3))
    assert "mul" not in names_of(graph.made[0])


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_a_single_row(small, states, graph, eviction):
    tokens = ids(1, 40)
    want = feed(patch(small, eviction, graphs=False), states[:1], tokens)[0]
    got = feed(patch(small, eviction), states[:1], tokens)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert len(graph.replays) == 39


def test_a_single_row_follows_weights_that_change_in_place(small, states, graph):
    tokens = ids(1, 10)
    patch(small)
    first = feed(small, states[:1], tokens)[0]
    small.load_state_dict({name: weight * 1.1 for name, weight in small.state_dict().items()})
    for parameter in small.parameters():
        parameter.data *= 1.01  # which leaves no trace
    second = feed(small, states[:1], tokens)[0]
    assert len(graph.made) == 1 and not torch.allclose(first, second)
    torch.testing.assert_close(second, feed(patch(small, graphs=False), states[:1], tokens)[0], rtol=1e-4, atol=1e-4)


def test_weights_that_move_take_their_graphs_along(small, states, graph):
    patch(small)
    (hook,) = small.model.decoder._forward_pre_hooks.values()
    for _ in range(3):
        feed(small, states, ids(3, 3))
        for parameter in small.parameters():
            parameter.data = parameter.data.clone()
    assert len(graph.made) == 3 and len(hook.graphs._graphs) == 1


# What Python does


def calls_of(run):
    """How many Python functions are called; steps of a loop are none."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_name not in ("<genexpr>", "<lambda>")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("eviction", [None, POLICIES[0]], ids=str)
def test_a_step_makes_as_many_calls_for_many_layers_as_for_few(small, graph, eviction, monkeypatch):
    monkeypatch.setattr(graph, "replay", lambda self: None)
    counts = []
    for layers in (2, 9):
        config = type(small.config)(**{**small.config.to_dict(), "decoder_layers": layers})
        model = patch(type(small)(config).eval().to(DEVICE), eviction)
        states = torch.randn(2, 50, 64, device=DEVICE)
        past = feed(model, states, ids(2, 5))[1]
        given = dict(input_ids=ids(2, 1), encoder_hidden_states=states, past_key_values=past, use_cache=True)
        with torch.no_grad():
            counts.append(calls_of(lambda model=model, given=given: model.model.decoder(**given)))
        assert past.get_seq_length() == 6
    assert counts[0] == counts[1] < 100


def move_a_buffer(cache):
    layer = cache.self_attention_cache.layers[1]
    layer.value_slots = layer.value_slots.clone()


CHANGES = {
    "one layer's buffer": move_a_buffer,
    "one layer's rows": lambda cache: cache.self_attention_cache.layers[1].batch_select_indices(torch.arange(3)),
    "one layer in the place of another": lambda cache: cache.cross_attention_cache.layers.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_steps(small, states, graph, change):
    def run(on):
        first, past = feed(patch(small, graphs=on), states, ids(3, 8))
        CHANGES[change](past)
        return torch.cat([first, feed(small, states, ids(3, 8, seed=1), past)[0]], 1)

    want = run(False)
    assert torch.equal(run(True), want)


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)])
def test_an_audio_that_comes_and_goes(small, states, graph, order):
    def run(on):
        decoder, outputs = patch(small, graphs=on).model.decoder, []
        with torch.no_grad():
            past = decoder(input_ids=ids(3, 4), encoder_hidden_states=states, use_cache=True).past_key_values
            for hears in order:
                for token in ids(3, 3).split(1, 1):
                    given = {"encoder_hidden_states": states} if hears else {}
                    output = decoder(input_ids=token, past_key_values=past, use_cache=True, **given)
                    outputs.append(output.last_hidden_state)
        return torch.cat(outputs, 1)

    assert torch.equal(run(True), run(False)) and len(graph.made) == 2


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_that_comes_between_two_steps(small, states, graph, everywhere):
    seen = []
    first, past = feed(patch(small), states, ids(3, 8))
    register = small.model.decoder.layers[1].fc1.register_forward_hook
    if everywhere:
        register = torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda *args: seen.append(1))
    feed(small, states, ids(3, 4), past)
    handle.remove()
    assert len(seen) >= 4 and len(graph.replays) == 7
    feed(small, states, ids(3, 4), past)
    assert len(graph.replays) == 11


# Beams


def test_a_table_of_sources():
    slots, sources = torch.randn(4, 2, 6, 3), own_rows(4, 6, "cpu")
    moved = slots.clone()
    for live, rows in ((2, [1, 1, 3, 0]), (3, [2, 0, 0, 1]), (5, [3, 2, 1, 0])):
        rows = torch.tensor(rows)
        sources = reordered(sources, rows, live)
        moved[:, :, :live] = moved[rows, :, :live]
        assert torch.equal(gathered(slots, sources), moved)
        assert torch.equal(sources[:, live:], own_rows(4, 6 - live, "cpu"))


def test_beams_trade_places_by_a_table(small, states, graph):
    """Layers that have one keep it at home, where it is reordered in the place of the slots."""
    orders = [torch.tensor(order, device=DEVICE) for order in ([2, 2, 0], [1, 0, 0], [2, 1, 1], [0, 0, 1])]

    def run(on, has_table):
        logits, past = feed(patch(small, graphs=on), states, ids(3, 4))
        layers = past.self_attention_cache.layers
        if has_table:
            table = own_rows(3, layers[0].slots, DEVICE)
            for layer in layers:
                layer.leave()
                layer.sources = table
        outputs, slots = [logits], None
        for seed, order in enumerate(orders):
            more, past = feed(small, states, ids(3, 3, seed=seed), past)
            outputs.append(more)
            slots = layers[1].key_slots.clone()
            past.reorder_cache(order)
        assert torch.equal(slots, layers[1].key_slots) == (has_table or not on)  # a home without a table moves slots
        return torch.cat([*outputs, feed(small, states, ids(3, 3, seed=9), past)[0]], 1)

    want = run(False, False)
    assert torch.equal(run(True, True), want) and torch.equal(run(True, False), want)
    assert len(graph.made) == 3


# Failures


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_a_capture_that_fails(small, audio, graph, eviction, monkeypatch):
    want = generate(patch(small, eviction, graphs=False), audio)
    attempts = []

    def fail(self, call, undo, device, workspace):
        attempts.append(1)
        call()
        raise RuntimeError("operation not permitted when stream is capturing")

    patch(small, eviction)
    monkeypatch.setattr(graph, "__init__", fail)
    with pytest.warns(UserWarning, match="without graphs.*not permitted when stream"):
        assert torch.equal(generate(small, audio), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(small, audio), want)
    assert len(attempts) == 1


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def hidden_by_the_end_of_the_capture():
    try:
        out_of_memory()
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [out_of_memory, hidden_by_the_end_of_the_capture])
def test_memory_that_is_short_for_a_while(small, audio, graph, error, monkeypatch):
    want = generate(patch(small, graphs=False), audio)
    patch(small)
    begin = graph.__init__

    def fail(self, call, *options):
        call()
        error()

    monkeypatch.setattr(graph, "__init__", fail)
    for attempt in (1, 2):
        with pytest.warns(UserWarning, match=rf"without graphs until the next one begins \(attempt {attempt} of 3\)"):
            assert torch.equal(generate(small, audio), want)
    monkeypatch.setattr(graph, "__init__", begin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(small, audio), want)
    assert len(graph.made) == 1 and graph.replays


def test_memory_that_stays_short(small, audio, graph, monkeypatch):
    want = generate(patch(small, graphs=False), audio)
    patch(small)
    monkeypatch.setattr(graph, "__init__", lambda *args: out_of_memory())
    with pytest.warns(UserWarning, match="without graphs") as caught:
        for _ in range(5):
            assert torch.equal(generate(small, audio), want)
    assert len(caught) == 3
    assert "attempt 2 of 3" in str(caught[1].message) and "attempt" not in str(caught[2].message)


@pytest.mark.parametrize("rows, what", [(3, (Pool, "lease")), (1, (Snapshot, "joined"))])
def test_no_memory_for_what_is_beside_a_graph(small, audio, graph, rows, what, monkeypatch):
    want = generate(patch(small, graphs=False), audio[:rows])
    patch(small)
    with monkeypatch.context() as short, pytest.warns(UserWarning, match="attempt 1 of 3"):
        short.setattr(*what, lambda *args: out_of_memory())
        assert torch.equal(generate(small, audio[:rows]), want)
    assert not graph.made
    assert torch.equal(generate(small, audio[:rows]), want) and len(graph.made) == 1


class FakeCuda:
    """What CudaGraph asks of torch.cuda, written down with the stream that was current then."""

    def __init__(self, monkeypatch, fails):
        self.events, self.main, self.fails = [], self.stream_of("main"), fails
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        graph = SimpleNamespace(replay=lambda: self.note("replay"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    def note(self, event):
        self.events.append(f"{event} on {self.current.name}")
        if event == self.fails:
            raise RuntimeError("no")

    def stream_of(self, name):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.events.append(f"{name} waits for {other.name}"), cuda_stream=0
        )

    @contextmanager
    def on_stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, stream, pool, capture_error_mode):
        """As torch.cuda.graph: where the end of the capture raises, the stream stays."""
        before, self.current = self.current, stream
        self.note("begin")
        try:
            yield
        finally:
            self.note("end")
            self.current = before


@pytest.mark.skipif(DEVICE != "cpu", reason="the real one is tested")
@pytest.mark.parametrize("fails", ["", "call", "end"])
def test_how_a_cuda_graph_is_captured(monkeypatch, fails):
    """No proof of what a GPU does: the calls and their order."""
    fake = FakeCuda(monkeypatch, fails)
    workspace = "memory", fake.stream_of("aside"), fake.stream_of("side")
    with pytest.raises(RuntimeError) if fails else nullcontext():
        CudaGraph(lambda: fake.note("call"), lambda: fake.note("undo"), torch.device("cuda", 1), workspace).replay()
    events = ["aside waits for main", "call on aside", "main waits for aside"]
    if fails != "call":
        events += ["undo on main", "begin on side", "call on side", "end on side"]
    assert fake.events == events + ([] if fails else ["replay on main"])
    assert fake.current is fake.main
    assert CudaGraph.stream(torch.device("cuda", 1)) == 0


def test_the_double_refuses_what_a_capture_refuses(small, audio, graph, monkeypatch):
    want = generate(patch(small, graphs=False), audio)
    run = CrossCacheLayer._run
    for wait in (lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.tolist()):

        def waits(self, query, *options, wait=wait):
            wait(query)
            return run(self, query, *options)

        monkeypatch.setattr(CrossCacheLayer, "_run", waits)
        patch(small)
        with pytest.warns(UserWarning, match="without graphs"):
            assert torch.equal(generate(small, audio), want)
    assert not graph.made
