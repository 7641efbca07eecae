"""A decode step as one captured graph, replayed.

A step launches hundreds of small kernels, and the host takes longer to launch them than the device to run them. All
that they read and write is at fixed addresses here: the weights (snapshot.py); the caches' buffers, in memory that
later caches of the same shape find again (graph_memory.py); and the tokens and their positions, which are copied in
before each replay. So one graph serves the steps of all chunks and calls of one shape. Whatever is not a plain step of
one token runs as ever.
"""

import threading
import warnings
from collections import OrderedDict
from typing import NamedTuple

import torch

from .compat import CACHE
from .cross_cache import CrossHome, CrossLayout
from .graph_memory import Pool, SelfHome, SelfLayout
from .plain import are_filled, is_ordinary, is_plain_step, layers_of
from .slots import advance
from .snapshot import Snapshot, hooks_so_far

MOST = 64  # graphs kept, the last ones used
ATTEMPTS = 3  # at a capture that memory is too short for; after so many there are no more


class CudaGraph:
    """The kernels that a call launches, launched again as one."""

    _capturing = threading.Lock()  # torch captures one graph at a time in a process

    @staticmethod
    def stream(device):
        """What replays one after another; None while someone else captures what it does."""
        with torch.cuda.device(device):
            return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream

    @staticmethod
    def workspace(device):
        """For all graphs of a stream: memory for what lies between, a stream to try a call on and one to capture it on.
        They differ, as cuBLAS has memory of its own on each: what it has where nothing runs before a capture lies in
        the graphs' memory, and nobody else can make it go away."""
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), torch.cuda.Stream(device)

    def __init__(self, call, undo, device, workspace):
        """undo() takes back what call() did."""
        memory, aside, side = workspace
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device), self._capturing:
            stream = torch.cuda.current_stream()
            aside.wait_stream(stream)
            try:
                with torch.cuda.stream(aside):
                    call()  # kernels are loaded and libraries started by the first call, which no graph can do
            finally:
                stream.wait_stream(aside)
            undo()
            with torch.cuda.stream(stream):  # which a capture that fails at its end does not come back to by itself
                with torch.cuda.graph(self._graph, pool=memory, stream=side, capture_error_mode="thread_local"):
                    call()

    def replay(self):
        with torch.cuda.device(self._device):
            self._graph.replay()


GRAPHS = {"cuda": CudaGraph}  # by type of device


class Graphs:
    """The captured steps of one patched model."""

    def __init__(self):
        self._decoder = None  # a Snapshot
        self._graphs = OrderedDict()
        self._pools, self._workspaces = {}, {}  # by device and stream
        self._lock = threading.Lock()
        self._failed = False  # for good
        self._waits, self._shortages = False, 0  # until the next decode, for memory; how often so far

    def __reduce__(self):
        return Graphs, ()  # a copy of the model captures its own

    # At the first pass of a decode

    def begin(self, decoder):
        """Whether the steps to come may be captured."""
        device = decoder.embed_tokens.weight.device
        if self._failed or not _is_ordinary(device) or GRAPHS[device.type].stream(device) is None:
            return False
        self._waits = False
        self._look_at(decoder)
        return self._decoder.is_plain

    def home_of(self, audios, config):
        """A home for audios that are about to be held; None if there is no memory for it."""
        layout = CrossLayout.of(audios, self._decoder.heads, config)
        return self._tried(lambda: self._lease(CrossHome, layout, audios.states.device))

    # At each pass

    def step(self, decoder, given, forward):
        """The last hidden states [rows, 1, width] of one new token a row; None if that is not for a graph."""
        ids = given.get("input_ids")
        if self._failed or ids is None or ids.device.type not in GRAPHS or not is_plain_step(decoder, given):
            return None
        states, past = given.get("encoder_hidden_states"), given.get(CACHE)
        layers, audio_layers = layers_of(decoder, past, states is not None)
        stream = GRAPHS[ids.device.type].stream(ids.device)
        if layers is None or stream is None:
            return None
        if not self._goes_on(decoder, layers, audio_layers, stream):
            if not self._prepared(decoder, layers, audio_layers, len(ids)):
                return None
        home = layers[0].home
        if len(ids) != len(home.ids):
            return None

        home.ids.copy_(ids)
        if given.get("position_ids") is None:
            home.places.fill_(layers[0].seen)
        else:
            home.places.copy_(given["position_ids"])
        if home.replay is None:
            home.replay = self._replay(home, stream, layers, audio_layers, forward, states, past)
        if home.replay is None:
            return None
        home.replay.graph.replay()
        layers[0].count(1)
        for layer in layers[1:]:
            layer.seen, layer.live = layers[0].seen, layers[0].live
        return home.hidden.clone()

    # How it works

    def _goes_on(self, decoder, layers, audio_layers, stream):
        """Whether the step before was replayed, and all that its graph takes for granted is still so."""
        first, replay = layers[0], layers[0].home and layers[0].home.replay
        if replay is None:
            return False
        first.make_room(1)  # where this does something, for one layer as for all, its buffers are no longer at home
        return (
            replay.hooks == hooks_so_far()
            and replay.stream == stream
            and replay.decoder is self._decoder
            and replay.decoder.embeddings == decoder.embed_tokens.weight.data_ptr()
            and first.seen < decoder.max_target_positions
            and (audio_layers[0].audios.home if audio_layers else None) is replay.audios
            and _are_home(layers, audio_layers)
        )

    def _prepared(self, decoder, layers, audio_layers, rows):
        """Whether a graph can have to do with this cache, whose buffers are then at a home."""
        if self._waits or not self._is_unchanged(decoder) or not _are_ours(decoder, layers, audio_layers, rows):
            return False
        for layer in layers:
            layer.make_room(1)
        if not _are_home(layers, audio_layers):
            if not self._moved(layers, audio_layers) or not _are_home(layers, audio_layers):
                return False
        layers[0].home.replay = None
        return True

    def _moved(self, layers, audio_layers):
        """Whether all buffers now are where a graph would find them."""
        layouts = {
            SelfLayout(
                len(layers), *layer.key_slots.shape, layer.key_slots.dtype, layer.eviction, layer.padding is not None,
                layer.sources.numel() > 0,
            )
            for layer in layers
        }

        def move():
            for layer in (*layers, *audio_layers):
                layer.leave()  # the memory may be the same again, laid out for more slots, say
            partner = audio_layers[0].audios.home.key if audio_layers else None
            home = self._lease(SelfHome, *layouts, layers[0].device, partner)
            for layer in (*layers, *audio_layers):
                layer.move_to(home)
            return True

        return len(layouts) == 1 and self._tried(move)

    def _lease(self, kind, layout, device, partner=None):
        with self._lock:
            pool = self._pools.setdefault((kind, device, GRAPHS[device.type].stream(device)), Pool(device))
        with torch.inference_mode(False):  # what is made in inference mode could not be written to outside it
            return kind(pool.lease(layout, partner))

    def _replay(self, home, stream, layers, audio_layers, forward, states, past):
        """The graph of a step of this cache; None if it cannot be captured."""
        hooks, first, joined = hooks_so_far(), layers[0], None
        if len(home.ids) == 1:
            joined = self._tried(self._decoder.joined)
            if joined is None:
                return None

        def call():
            home.captures, home.joined = True, joined
            try:
                output = forward(
                    input_ids=home.ids,
                    attention_mask=home.ids[:, None, None],  # of four dimensions, so that transformers makes none
                    encoder_hidden_states=states,
                    position_ids=home.places,
                    use_cache=True,
                    **{CACHE: past},
                ).last_hidden_state
            finally:
                home.captures, home.joined = False, None
            if first.eviction is None:
                advance(home.cursors, 1, first.padding is not None)
            assert output.dtype == home.hidden.dtype
            home.hidden.copy_(output)

        audios = audio_layers[0].audios.home if audio_layers else None
        key = stream, home.key, audios and audios.key, self._decoder
        with self._lock:
            graph = self._graphs.pop(key, None)
        graph = graph or self._captured(call, home, layers, stream)
        if graph is None:
            return None
        with self._lock:
            self._graphs[key] = graph  # the last one used is the last one to go
            if len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
        return Replay(graph, self._decoder, hooks, stream, audios)

    def _captured(self, call, home, layers, stream):
        """The graph of a call, of which nothing else is left; None if it cannot be captured."""
        before = [tensor.clone() for tensor in home.state]
        counts = [(layer.seen, layer.live) for layer in layers]

        def undo():
            for tensor, saved in zip(home.state, before):
                tensor.copy_(saved)
            for layer, count in zip(layers, counts):
                layer.seen, layer.live = count

        device = home.ids.device
        kind = GRAPHS[device.type]
        with self._lock:
            if (device, stream) not in self._workspaces:
                self._workspaces[device, stream] = kind.workspace(device)
        try:
            return self._tried(lambda: kind(call, undo, device, self._workspaces[device, stream]))
        finally:
            undo()

    def _tried(self, make):
        """make(), or None with a warning. Where memory was too short, the next decode tries again."""
        try:
            return make()
        except Exception as error:
            self._shortages += _is_short_of_memory(error)
            self._waits = _is_short_of_memory(error) and self._shortages < ATTEMPTS
            self._failed = not self._waits
            when = f" until the next one begins (attempt {self._shortages} of {ATTEMPTS})" if self._waits else ""
            warnings.warn(
                f"whisperkv decodes without graphs{when}, as a step could not be captured: {error}", stacklevel=2
            )
            return None

    def _look_at(self, decoder):
        snapshot = Snapshot(decoder)
        if self._decoder is None or snapshot.facts != self._decoder.facts:
            with self._lock:
                self._decoder = snapshot
                self._graphs.clear()  # they are over weights that are elsewhere now

    def _is_unchanged(self, decoder):
        """Whether no module below the decoder has a hook or is of a kind that we do not know. Each decode looks at all
        weights when it begins; a step does at those that must have moved if the model has."""
        if self._decoder is None or self._decoder.embeddings != decoder.embed_tokens.weight.data_ptr():
            self._look_at(decoder)
        return self._decoder.is_plain and not self._decoder.is_hooked


class Replay(NamedTuple):
    """A graph that may be replayed for the next step of a cache as well, if the rest is still so."""

    graph: object
    decoder: Snapshot
    hooks: int  # registered so far
    stream: int
    audios: CrossHome | None


def _is_ordinary(device):
    """Whether nothing is on that a replay would not see."""
    return device.type in GRAPHS and is_ordinary(device)


def _are_ours(decoder, layers, audio_layers, rows):
    """Latents of tokens have no home."""
    is_filled = layers[0].low_rank is None and are_filled(decoder, layers, audio_layers, rows)
    return is_filled and all(layer.is_home for layer in audio_layers)


def _are_home(layers, audio_layers):
    """Whether all layers have their buffers in one home, and the same number of tokens. This is looked at before each
    step, so it is a loop without calls."""
    home, audios = layers[0].home, audio_layers[0].audios if audio_layers else None
    if home is None or (audios is not None and audios.home is None):
        return False
    seen, live = layers[0].seen, layers[0].live
    return all(
        layer.key_slots is keys
        and layer.value_slots is values
        and layer.cursor is cursor
        and layer.positions is positions
        and layer.scores is scores
        and (home.sources is None or layer.sources is home.sources)
        and layer.seen == seen
        and layer.live == live
        for layer, (keys, values, cursor, positions, scores) in zip(layers, home.of_layer)
    ) and all(
        layer.owner is home.owner
        and layer.audios is audios
        and layer.keys_of_audios is keys
        and layer.values_of_audios is values
        for layer, (keys, values) in zip(audio_layers, () if audios is None else audios.home.of_layer)
    )


def _is_short_of_memory(error):
    """What is raised when a capture ends may hide what went wrong in it."""
    while error is not None and "out of memory" not in str(error):
        error = error.__context__
    return error is not None
