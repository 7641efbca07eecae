"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: what listens and writes. What speaks is left alone."""

from .family import Family


class Omni(Family):
    def whole(self, model):
        model = super().whole(model)
        return getattr(model, "thinker", model)

    def language_model(self, model):
        return getattr(model.model, "language_model", model.model)  # older transformers: the model itself


QWEN2_5_OMNI = Omni(names=("qwen2_5_omni", "qwen2_5_omni_thinker"), rate=25)
# Its encoder, as that of Qwen3-ASR, makes 13 tokens of each second, which ends in a padded frame.
QWEN3_OMNI = Omni(names=("qwen3_omni_moe", "qwen3_omni_moe_thinker"), rate=13)
