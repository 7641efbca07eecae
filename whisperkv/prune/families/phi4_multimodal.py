import math

from .family import Family


class Phi4Multimodal(Family):
    """The language model itself puts the audio in place of its tokens."""

    def language_model(self, model):
        return model.model

    def embedder(self, language_model):
        return language_model.embed_tokens_extend

    def columns(self, features, config):
        return features.mT / (4 * math.log(10))

    def audio_token(self, model):
        return model.config.audio_config.audio_token_id


PHI4_MULTIMODAL = Phi4Multimodal(names=("phi4_multimodal",), rate=12.5)
