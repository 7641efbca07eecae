"""What the small random Whisper hears, and what it says of tokens that it is given."""

import torch
from transformers import WhisperFeatureExtractor

RATE = 16_000


def noise(seed, seconds=1.0):
    return torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed)).numpy()


def features_of(*seeds):
    """Of a second of noise each."""
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return extractor([noise(seed) for seed in seeds], sampling_rate=RATE, return_tensors="pt").input_features


def forced(model, audio, tokens):
    """Logits of tokens that are fed one by one."""
    with torch.no_grad():
        states, cache, logits = model.get_encoder()(audio), None, []
        for place in range(tokens.shape[1]):
            output = model(
                encoder_outputs=states, decoder_input_ids=tokens[:, place : place + 1], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)
