"""Encoder, something that makes tokens of its frames, and a LLaMA: SALMONN's shape, and what people build themselves."""

from .family import Family

# A model of this shape names the token of its audio in config.audio_token_id and its LLaMA model.language_model.
WHISPER_LLM = Family(names=("whisper_llm", "salmonn"))
