"""What the conversion asks of a model's architecture."""

from torch import nn
from transformers.pytorch_utils import Conv1D


class Architecture:
    """How a kind of model is built. A subclass in a file of its own is all that a new one needs.

    model_type  of its config
    attention   its attention over latents: LatentAttention before the model's own class
    """

    model_type: str
    attention: type

    def attentions(self, model):
        """The self-attention of each layer."""
        raise NotImplementedError

    def projections(self, attention):
        """((weight, bias) of keys, (weight, bias) of values), weights [kv_heads * head_dim, hidden], biases or None."""
        raise NotImplementedError

    def take_out(self, attention):
        """Remove what makes keys and values."""
        raise NotImplementedError

    def output(self, attention):
        """[hidden, heads * head_dim] of the output projection."""
        raise NotImplementedError

    def heads(self, attention):
        """(heads, kv_heads, head_dim)"""
        raise NotImplementedError

    def rotary(self, model):
        """The module that gives cosines and sines of positions, or None."""
        return None

    def key_norm(self, attention):
        """A norm that keys go through, head by head, or None."""
        return None

    def window(self, attention):
        """How many tokens a layer looks back, or None."""
        return None


def plain(module, name):
    """(weight [out, in], bias) of a projection that is nothing but a matrix."""
    if type(module) not in (nn.Linear, Conv1D) or not module.weight.is_floating_point():
        raise ValueError(
            f"{name} must be a plain projection to be converted; got {type(module).__name__}. Merge an adapter first "
            "(merge_and_unload), and load the model without quantization"
        )
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight, module.bias
