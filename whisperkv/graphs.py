"""A decode step as one captured graph, replayed.

A step launches hundreds of small kernels, and the host takes longer to launch them than the device to run them. All
that they read and write is at fixed addresses here: the weights; the caches' buffers, in memory that later caches of
the same shape find again (homes.py); and the tokens and their positions, which are copied in before each replay. So
one graph serves the steps of all chunks and calls of one shape. Whatever is not a plain step of one token runs as ever.
"""

import functools
import threading
import warnings
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.whisper.modeling_whisper import (
    WhisperDecoder,
    WhisperDecoderLayer,
    WhisperPositionalEmbedding,
)

from .attention import CrossAttention, SelfAttention
from .cache import SelfCacheLayer
from .compat import CAPTURING, record_outputs_as
from .cross_cache import CrossCacheLayer, CrossHome, CrossLayout
from .homes import Pool, SelfHome, SelfLayout

MOST = 64  # graphs kept, the last ones used

# What a decoder may be made of, and what its forward may be given; all else runs without graphs.
_MODULES = (
    nn.ModuleList, nn.Linear, nn.LayerNorm, nn.Embedding, WhisperPositionalEmbedding, WhisperDecoderLayer,
    SelfAttention, CrossAttention,
)  # fmt: skip
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_ARGUMENTS = {
    "input_ids", "attention_mask", "encoder_hidden_states", "past_key_values", "position_ids", "use_cache",
    "return_dict",
}  # fmt: skip


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
        """For all graphs of a stream: memory for what lies between, and a stream to capture on."""
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __init__(self, call, undo, device, workspace):
        """undo() takes back what call() did."""
        memory, side = workspace
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device), self._capturing:
            stream = torch.cuda.current_stream()
            side.wait_stream(stream)
            try:
                with torch.cuda.stream(side):
                    call()  # kernels are loaded and libraries started by the first call, which no graph can do
            finally:
                stream.wait_stream(side)
            undo()
            with torch.cuda.graph(self._graph, pool=memory, stream=side, capture_error_mode="thread_local"):
                call()

    def replay(self):
        with torch.cuda.device(self._device):
            self._graph.replay()


GRAPHS = {"cuda": CudaGraph}  # by type of device


class GraphDecoder(WhisperDecoder):
    """A WhisperDecoder that patch() has turned into ours by its class alone."""

    @functools.wraps(WhisperDecoder.forward)  # generate() reads the signature
    def forward(self, *args, **kwargs):
        output = None
        if not args and not torch.compiler.is_compiling():
            hooks = self._forward_pre_hooks.values()
            graphs = next((hook.graphs for hook in hooks if isinstance(getattr(hook, "graphs", None), Graphs)), None)
            if graphs is not None:
                output = graphs.step(self, kwargs, super().forward)
        return super().forward(*args, **kwargs) if output is None else output


record_outputs_as(GraphDecoder, WhisperDecoder)


class Graphs:
    """The captured steps of one patched model."""

    def __init__(self):
        self._decoder = None  # a _Snapshot
        self._graphs = OrderedDict()
        self._pools, self._workspaces = {}, {}  # by device and stream
        self._lock = threading.Lock()
        self._failed = False

    def __reduce__(self):
        return Graphs, ()  # a copy of the model captures its own

    # At the first pass of a decode

    def begin(self, decoder):
        """Whether the steps to come may be captured."""
        device = decoder.embed_tokens.weight.device
        if self._failed or not _is_ordinary(device) or GRAPHS[device.type].stream(device) is None:
            return False
        self._look_at(decoder)
        return self._decoder.is_plain

    def home_of(self, audios, config):
        """A home for audios that are about to be held."""
        return self._lease(CrossHome, CrossLayout.of(audios, self._decoder.heads, config), audios.states.device)

    # At each pass

    def step(self, decoder, given, forward):
        """What the decoder makes of one new token a row; None if that is not for a graph."""
        if self._failed or not _is_plain_step(decoder, given):
            return None
        ids, states, past = (given.get(name) for name in ("input_ids", "encoder_hidden_states", "past_key_values"))
        layers, audio_layers = _layers(decoder, past, states is not None, len(ids))
        stream = GRAPHS[ids.device.type].stream(ids.device)
        if layers is None or stream is None or not self._is_unchanged(decoder):
            return None
        for layer in layers:
            layer.make_room(1)
        home = self._home(layers, audio_layers)
        if home is None:
            return None

        def call():
            output = forward(
                input_ids=home.ids,
                attention_mask=home.ids[:, None, None],  # of four dimensions, so that transformers makes none
                encoder_hidden_states=states,
                past_key_values=past,
                position_ids=home.places,
                use_cache=True,
            ).last_hidden_state
            assert output.dtype == home.hidden.dtype
            home.hidden.copy_(output)

        home.ids.copy_(ids)
        if given.get("position_ids") is None:
            home.places.fill_(layers[0].seen)
        else:
            home.places.copy_(given["position_ids"])
        key = stream, home.key, audio_layers[0].audios.home.key if audio_layers else None, self._decoder
        graph = self._graph(key, lambda: self._captured(call, home, layers, ids.device, stream))
        if graph is None:
            return None
        graph.replay()
        for layer in layers:
            layer.count(1)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=home.hidden.clone(), past_key_values=past)

    # How it works

    def _home(self, layers, audio_layers):
        """Where the buffers are that a graph has to do with. Those that are elsewhere move there."""
        if _are_home(layers, audio_layers):
            return layers[0].home
        layouts = {
            SelfLayout(
                len(layers), *layer.key_slots.shape, layer.key_slots.dtype, layer.eviction, layer.padding is not None
            )
            for layer in layers
        }
        if len(layouts) > 1:
            return None
        for layer in (*layers, *audio_layers):
            layer.leave()  # the memory may be the same again, laid out for more slots, say
        partner = audio_layers[0].audios.home.key if audio_layers else None
        home = self._lease(SelfHome, *layouts, layers[0].device, partner)
        for layer in (*layers, *audio_layers):
            layer.move_to(home)
        return home

    def _lease(self, kind, layout, device, partner=None):
        with self._lock:
            pool = self._pools.setdefault((kind, device, GRAPHS[device.type].stream(device)), Pool(device))
        with torch.inference_mode(False):  # what is made in inference mode could not be written to outside it
            return kind(pool.lease(layout, partner))

    def _graph(self, key, capture):
        with self._lock:
            graph = self._graphs.pop(key, None)
        graph = graph or capture()
        if graph is not None:
            with self._lock:
                self._graphs[key] = graph  # the last one used is the last one to go
                if len(self._graphs) > MOST:
                    self._graphs.popitem(last=False)
        return graph

    def _captured(self, call, home, layers, device, stream):
        """The graph of a call, of which nothing else is left; None if it cannot be captured."""
        before = [tensor.clone() for tensor in home.state]
        counts = [(layer.seen, layer.live) for layer in layers]

        def undo():
            for tensor, saved in zip(home.state, before):
                tensor.copy_(saved)
            for layer, count in zip(layers, counts):
                layer.seen, layer.live = count

        kind = GRAPHS[device.type]
        with self._lock:
            if (device, stream) not in self._workspaces:
                self._workspaces[device, stream] = kind.workspace(device)
        try:
            return kind(call, undo, device, self._workspaces[device, stream])
        except Exception as error:
            self._failed = True
            warnings.warn(f"whisperkv decodes without graphs, as a step could not be captured: {error}", stacklevel=2)
            return None
        finally:
            undo()

    def _look_at(self, decoder):
        snapshot = _Snapshot(decoder)
        if self._decoder is None or snapshot.facts != self._decoder.facts:
            self._decoder = snapshot

    def _is_unchanged(self, decoder):
        """Whether no module below the decoder has a hook or is of a kind that we do not know. Each decode looks at all
        weights when it begins; a step does at those that must have moved if the model has."""
        if self._decoder is None or self._decoder.embeddings != decoder.embed_tokens.weight.data_ptr():
            self._look_at(decoder)
        return self._decoder.is_plain and not self._decoder.is_hooked and not _has_any_global_hook()


class _Snapshot:
    """What graphs take for granted of a decoder: which modules it has, and where their weights are."""

    def __init__(self, decoder):
        modules = list(decoder.modules())[1:]
        held = [each for module in modules for each in (*module._parameters.values(), *module._buffers.values())]
        tensors = [tensor for tensor in held if tensor is not None]
        self.is_plain = all(
            (type(module) in _MODULES or type(module).__module__ in _ACTIVATIONS)
            and "forward" not in vars(module)
            and module._compiled_call_impl is None
            and not module.training
            for module in modules
        ) and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        self.facts = self.is_plain and (
            [id(module) for module in modules],
            [(tensor.data_ptr(), tensor.dtype) for tensor in tensors],
        )
        self.embeddings = decoder.embed_tokens.weight.data_ptr()
        self.heads = decoder.config.decoder_attention_heads
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    @property
    def is_hooked(self):
        """By others than transformers, which leaves hooks behind that do nothing unless outputs are asked for."""
        return any(
            getattr(hook, "__module__", "") != CAPTURING for hooks in self._hooks if hooks for hook in hooks.values()
        )


def _is_ordinary(device):
    """Whether nothing is on that a replay would not see."""
    return (
        device.type in GRAPHS
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled(device.type)
    )


def _is_plain_step(decoder, given):
    """One new token a row, no gradients, nothing but the last hidden state wanted."""
    config, ids, places = decoder.config, given.get("input_ids"), given.get("position_ids")
    use_cache, as_dict = given.get("use_cache"), given.get("return_dict", getattr(config, "return_dict", True))
    return (
        ids is not None
        and _is_ordinary(ids.device)
        and ids.dim() == 2
        and ids.shape[1] == 1
        and (places is None or places.shape in (ids.shape, (1, 1)))
        and not (torch.is_grad_enabled() or decoder.training)
        and (config.use_cache if use_cache is None else use_cache)
        and as_dict is not False
        and not (config.output_attentions or config.output_hidden_states)
        and all(value is None or value is False for name, value in given.items() if name not in _ARGUMENTS)
        and ids.device == decoder.embed_tokens.weight.device
    )


def _layers(decoder, past, hears, rows):
    """The layers of the self- and the cross-attention cache if they are ours, filled and of so many rows; else None."""
    count = len(decoder.layers)
    layers = getattr(getattr(past, "self_attention_cache", past), "layers", ())
    audio_layers = getattr(getattr(past, "cross_attention_cache", None), "layers", ()) if hears else ()
    if len(layers) != count or len(audio_layers) != (count if hears else 0) or type(layers[0]) is not SelfCacheLayer:
        return None, None
    first = layers[0]
    ours = (
        0 < first.seen < decoder.max_target_positions
        and first.batch_size == rows
        and first.device == decoder.embed_tokens.weight.device
        and not first.is_ranked
        and all(type(layer) is SelfCacheLayer and layer.seen == first.seen for layer in layers)
        and all(
            type(layer) is CrossCacheLayer
            and layer.is_home
            and layer.audios is audio_layers[0].audios
            and layer.owner.shape[0] == rows
            for layer in audio_layers
        )
    )
    return (layers, audio_layers) if ours else (None, None)


def _are_home(layers, audio_layers):
    home = layers[0].home
    return all(layer.home is home and layer.is_home for layer in layers) and all(
        layer.owner is home.owner for layer in audio_layers
    )
