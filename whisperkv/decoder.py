"""The decoder: a plain step of one token goes by as a whole, on CUDA as a captured graph, on the CPU as one call."""

import functools

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .compat import CACHE, record_outputs_as


class FastDecoder(WhisperDecoder):
    """A WhisperDecoder that patch() has turned into ours by its class alone."""

    @functools.wraps(WhisperDecoder.forward)  # generate() reads the signature
    def forward(self, *args, **kwargs):
        states = None
        if not args and not torch.compiler.is_compiling():
            hooks = self._forward_pre_hooks.values()
            for way in next((hook.steps for hook in hooks if hasattr(hook, "steps")), ()):
                states = way.step(self, kwargs, super().forward)
                if states is not None:
                    break
        if states is None:
            return super().forward(*args, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states, **{CACHE: kwargs.get(CACHE)})


record_outputs_as(FastDecoder, WhisperDecoder)
