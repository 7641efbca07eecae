"""Speech LLMs of each family, tiny and with random weights, and prompts for them."""

import torch
import transformers as T

VOCABULARY, AUDIO = 200, 7
LAYERS, HEADS, KV_HEADS = 3, 4, 2
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
MELS, FRAMES = 16, 200


def prompt(audio_tokens, texts=(3, 5, 7), seed=1):
    """Rows of one audio each, of so many tokens, with text around it: left padded, as generate() takes them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for count, text in zip(audio_tokens, texts, strict=False):
        words = torch.randint(20, VOCABULARY, (text,), generator=generator)
        rows.append(torch.cat([torch.tensor([1, 9]), torch.full((count,), AUDIO), words]))
    most = max(map(len, rows))
    pad = [most - len(row) for row in rows]
    return {
        "input_ids": torch.stack([torch.cat([torch.zeros(n, dtype=torch.long), row]) for n, row in zip(pad, rows, strict=True)]),
        "attention_mask": torch.stack([(torch.arange(most) >= n).long() for n in pad]),
    }


def mels(rows, seed=2):
    return torch.randn(rows, MELS, FRAMES, generator=torch.Generator().manual_seed(seed))


def lengths(*frames):
    return (torch.arange(FRAMES) < torch.tensor(frames)[:, None]).long()


def qwen2_audio():
    audio = dict(model_type="qwen2_audio_encoder", d_model=32, encoder_layers=1, encoder_attention_heads=2,
                 encoder_ffn_dim=64, num_mel_bins=MELS, max_source_positions=100)  # fmt: skip
    text = dict(model_type="qwen2", **TEXT)
    config = T.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    given = {"input_features": mels(3), "feature_attention_mask": lengths(200, 120, 80)}
    return T.Qwen2AudioForConditionalGeneration(config), {**prompt([50, 30, 20]), **given}


def voxtral():
    audio = dict(model_type="voxtral_encoder", hidden_size=32, intermediate_size=128, num_hidden_layers=1,
                 num_attention_heads=2, num_mel_bins=MELS, max_source_positions=100)  # fmt: skip
    config = T.VoxtralConfig(audio_config=audio, text_config=dict(model_type="llama", head_dim=16, **TEXT),
                             audio_token_id=AUDIO)  # fmt: skip
    return T.VoxtralForConditionalGeneration(config), {**prompt([25, 25, 25]), "input_features": mels(3)}


def qwen2_5_omni():
    audio = dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=MELS,
                 max_source_positions=100, n_window=100, output_dim=64)  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    config = T.Qwen2_5OmniThinkerConfig(
        audio_config=audio, vision_config=vision, text_config=dict(**TEXT, rope_parameters=rope), audio_token_index=AUDIO,
        image_token_index=11, video_token_index=12, audio_start_token_id=9, audio_end_token_id=13, vision_start_token_id=14,
    )  # fmt: skip
    given = {"input_features": mels(2), "feature_attention_mask": lengths(200, 120)}
    return T.Qwen2_5OmniThinkerForConditionalGeneration(config), {**prompt([50, 30]), **given}


def glmasr():
    audio = dict(model_type="glmasr_encoder", hidden_size=32, intermediate_size=128, num_hidden_layers=1,
                 num_attention_heads=2, num_mel_bins=MELS, max_position_embeddings=200)  # fmt: skip
    config = T.GlmAsrConfig(audio_config=audio, text_config=dict(model_type="llama", head_dim=16, **TEXT),
                            audio_token_id=AUDIO)  # fmt: skip
    given = {"input_features": mels(2), "input_features_mask": lengths(200, 120)}
    return T.GlmAsrForConditionalGeneration(config), {**prompt([25, 15]), **given}


def audioflamingo3():
    audio = dict(model_type="audioflamingo3_encoder", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                 num_attention_heads=2, num_mel_bins=MELS, max_source_positions=100)  # fmt: skip
    config = T.AudioFlamingo3Config(audio_config=audio, text_config=dict(model_type="qwen2", **TEXT), audio_token_id=AUDIO)
    given = {"input_features": mels(2), "input_features_mask": lengths(200, 120)}
    return T.AudioFlamingo3ForConditionalGeneration(config), {**prompt([50, 30]), **given}


# Of each family by name: a function that makes a model and what its generate() is given.
MODELS = {
    "qwen2_audio": qwen2_audio,
    "voxtral": voxtral,
    "qwen2_5_omni": qwen2_5_omni,
    "glmasr": glmasr,
    "audioflamingo3": audioflamingo3,
}


def make(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs
