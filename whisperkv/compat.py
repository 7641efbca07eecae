"""Where the transformers versions that we support differ, and how we come into a model."""

import inspect
import sys

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperAttention

VERSION = Version(transformers.__version__).release

# The name by which a model is given its cache, and returns it. Callers may go on using the old one.
OLD_CACHE = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(WhisperAttention.forward).parameters else OLD_CACHE


def with_new_names(given):
    """What a forward is given, the cache by the name that this transformers has for it."""
    if OLD_CACHE == CACHE or OLD_CACHE not in given:
        return given
    return {CACHE: given[OLD_CACHE], **{name: value for name, value in given.items() if name != OLD_CACHE}}


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


def become(module, kind):
    """Let a module be of another class, and what accelerate's hooks have noted of its forward follow."""
    old, module.__class__ = type(module), kind
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is old.forward:
            setattr(module, name, kind.forward.__get__(module))


def who_traces(cache):
    """Why a decode over this fresh cache will be traced, and so be left as a tracer knows it; "" if it will not.

    With a static cache, generate() settles before the first pass whether it compiles the later ones; transformers'
    exporters decode once to see what a cache looks like. Both are seen in the frames that called us.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the model is being compiled or exported (whisperkv decodes without; unpatch() before an export)"
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    is_static = cache is not None and cache.is_compileable and type(cache).__name__ == "StaticCache"
    frame = sys._getframe(1)
    while frame is not None:
        if (frame.f_globals.get("__name__") or "").startswith("transformers.exporters"):
            return "transformers' exporters decode it to see its cache (unpatch() before an export)"
        if is_static and frame.f_code.co_name in ("_sample", "_prefill"):
            forward = frame.f_locals.get("model_forward")
            if forward is not None and forward != frame.f_locals["self"].__call__:
                return "generate() compiles the steps over a static cache (leave out cache_implementation)"
        frame = frame.f_back
    return ""


BEAM_HELPERS = {  # of a beam search, by name: what they are given
    "_get_running_beams_for_next_iteration": (
        "topk_log_probs", "topk_running_sequences", "topk_running_beam_indices", "next_token_hits_stopping_criteria",
        "num_beams",
    ),
    "_update_finished_beams": (
        "sequences", "topk_running_sequences", "beam_scores", "topk_log_probs", "beam_indices",
        "topk_running_beam_indices", "is_early_stop_heuristic_unsatisfied", "is_sent_finished",
        "next_token_hits_stopping_criteria", "top_num_beam_mask", "num_beams", "cur_len", "decoder_prompt_len",
        "length_penalty", "early_stopping",
    ),
    "_check_early_stop_heuristic": (
        "is_early_stop_heuristic_unsatisfied", "running_beam_scores", "beam_scores", "is_sent_finished", "cur_len",
        "max_length", "decoder_prompt_len", "early_stopping", "length_penalty",
    ),
    "_beam_search_has_unfinished_sequences": (
        "is_early_stop_heuristic_unsatisfied", "is_sent_finished", "next_token_hits_stopping_criteria",
        "early_stopping",
    ),
}  # fmt: skip


def _is_known(name, arguments):
    method = getattr(GenerationMixin, name, None)
    return method is not None and set(inspect.signature(method).parameters) - {"self"} == set(arguments)


# Whether the parts of a beam search that we borrow of transformers are those of 5.10 to 5.24.
KNOWS_BEAM_SEARCH = all(_is_known(*helper) for helper in BEAM_HELPERS.items())

SORTS_DRAWN_BEAMS = VERSION >= (5, 24)  # a beam search that samples: the candidates of an audio, the likeliest first
