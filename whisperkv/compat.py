"""Where the transformers versions that we support differ."""

import inspect

from transformers.cache_utils import DynamicLayer

# crop() took the length to keep (or, negative, the number to remove) and takes the negative number to remove since.
_CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def tokens_to_remove(argument, length):
    """How many of `length` tokens a call of crop(argument) removes in this transformers."""
    if argument > 0 and not _CROP_TAKES_LENGTH:
        raise ValueError(f"crop takes the number of tokens to remove as a negative number or 0; got {argument}")
    if argument < 0:
        return min(-argument, length)
    return max(length - argument, 0) if _CROP_TAKES_LENGTH else 0


CAPTURING = "transformers.utils.output_capturing"  # the module of the hooks that record a model's inside


def record_outputs_as(kind, original):
    """transformers looks up what it can record of a model (attentions, hidden states) by the name of its class: kind is
    to be taken for the original."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # a transformers that does without
        return
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(kind), original._can_record_outputs)
