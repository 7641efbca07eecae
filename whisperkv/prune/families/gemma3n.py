from .family import Family


class Gemma3n(Family):
    """Of its layers some look through a window, and the last read what earlier ones have cached."""

    def prunes(self, language_model, layer):
        config = language_model.config
        return layer < config.num_hidden_layers - config.num_kv_shared_layers and super().prunes(language_model, layer)


GEMMA3N = Gemma3n(names=("gemma3n",), rate=6.25)
