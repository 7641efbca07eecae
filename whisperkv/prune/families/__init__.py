"""The speech LLMs that can be pruned."""

from .audioflamingo3 import AUDIO_FLAMINGO_3
from .family import Family
from .gemma3n import GEMMA3N
from .glmasr import GLM_ASR
from .granite_speech import GRANITE_SPEECH
from .omni import QWEN2_5_OMNI, QWEN3_OMNI
from .phi4_multimodal import PHI4_MULTIMODAL
from .qwen2_audio import QWEN2_AUDIO
from .qwen3_asr import QWEN3_ASR
from .voxtral import VOXTRAL
from .whisper_llm import SALMONN, WHISPER_LLM

FAMILIES = [
    QWEN2_AUDIO, QWEN2_5_OMNI, QWEN3_OMNI, VOXTRAL, GRANITE_SPEECH, AUDIO_FLAMINGO_3, GLM_ASR, QWEN3_ASR,
    PHI4_MULTIMODAL, GEMMA3N, SALMONN, WHISPER_LLM,
]  # fmt: skip


def family_of(model):
    """The family of a model. TypeError if it is none that we know."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if kind in family.names:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.names)
    raise TypeError(f"whisperkv.prune knows no speech LLM of type {kind or type(model).__name__!r}; it knows {known}")


__all__ = ["FAMILIES", "Family", "family_of"]
