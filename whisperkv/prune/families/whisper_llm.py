"""An encoder, something that makes tokens of its frames, and a LLaMA: SALMONN, and what people build themselves."""

from .family import Family


class WhisperLLM(Family):
    """A model that names the token of its audio in config.audio_token_id, and its LLaMA model.language_model."""

    def language_model(self, model):
        found = super().language_model(model)
        if found is model or not hasattr(found, "config"):
            raise TypeError(
                f"which part of {type(model).__name__} is its language model? Name it language_model, or let "
                "get_decoder() return it"
            )
        return found

    def audio_token(self, model):
        token, kind = getattr(model.config, "audio_token_id", None), type(model).__name__
        if token is None:
            raise TypeError(f"which token stands for audio? The config of {kind} must have an audio_token_id")
        return token


WHISPER_LLM = WhisperLLM(names=("whisper_llm",))
# One token for a window of 17 frames of 20 ms, as SALMONN was trained.
SALMONN = WhisperLLM(names=("salmonn",), rate=50 / 17)
