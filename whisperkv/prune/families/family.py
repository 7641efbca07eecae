"""What we must know of a family of speech LLMs. One that does it differently overrides a method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """
    names  the model types, as config.model_type has them
    rate   audio tokens a second
    """

    names: tuple[str, ...]
    rate: float = 0.0

    def whole(self, model):
        """The model whose forward takes the prompt, out of a PEFT model around it."""
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def embedder(self, language_model):
        """The module that embeds a prompt, audio included; None if the language model is given the embeddings."""
        return None

    def language_model(self, model):
        return model.get_decoder()

    def audio_token(self, model):
        """The token that stands in a prompt for a piece of audio."""
        return model.config.audio_token_id

    def columns(self, features, config):
        """The features as Whisper's are: [clips, mels, columns of 10 ms], a quarter of the decimal logarithm of power.
        What is added to all of them does not matter."""
        return features

    def prunes(self, language_model, layer):
        """Whether that layer may be pruned: it looks at all tokens. Others (windows, states) stay as they are."""
        config = language_model.config
        types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if types is None:
            slides = window is not None and getattr(config, "use_sliding_window", True)
        elif types[layer] in ("full_attention", "sliding_attention"):
            slides = types[layer] == "sliding_attention"
        else:
            return False
        return not slides or window >= config.max_position_embeddings  # as Phi-4's: none, for any text that it can read

    def reads(self, module):
        """The number of the layer whose keys a module of attention reads; None if it is none of a language model's."""
        return getattr(module, "layer_idx", None)

    def check(self, prompt, tokens):
        """Raise if the language model is given another number of tokens than the prompt has."""
        if prompt != tokens:
            raise ValueError(
                f"the prompt has {prompt} tokens and the language model was given {tokens}: its audio stands as one "
                "token for each clip, from a processor before transformers 4.48. Let the processor of this version "
                "write the prompt"
            )
