"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: what listens and writes. What speaks is left alone."""

from .family import Family


class Omni(Family):
    def whole(self, model):
        return getattr(model, "thinker", model)


QWEN2_5_OMNI = Omni(names=("qwen2_5_omni", "qwen2_5_omni_thinker"), rate=25)
QWEN3_OMNI = Omni(names=("qwen3_omni_moe", "qwen3_omni_moe_thinker"), rate=12.5)
