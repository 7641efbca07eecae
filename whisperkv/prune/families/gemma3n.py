import math

import torch

from .family import Family


class Gemma3n(Family):
    """Of its layers some look through a window, and the last read what earlier ones have cached. Every clip has as many
    tokens as the longest may have, of 16 columns each."""

    def columns(self, features, config):
        columns = features.mT / (2 * math.log(10))  # of magnitude, which is half of power's
        return torch.nn.functional.pad(columns, (0, 16 * config.audio_soft_tokens_per_image - columns.shape[-1]))

    def prunes(self, language_model, layer):
        return layer < _own(language_model.config) and super().prunes(language_model, layer)

    def reads(self, module):
        number = super().reads(module)
        if number is None or number < _own(module.config):
            return number
        types = module.config.layer_types
        return max(layer for layer in range(_own(module.config)) if types[layer] == types[number])


def _own(config):
    """How many layers have keys of their own."""
    return config.num_hidden_layers - config.num_kv_shared_layers


GEMMA3N = Gemma3n(names=("gemma3n",), rate=6.25)
