"""Speech LLMs of each family, tiny and with random weights, and prompts for them."""

import pytest
import torch
import transformers as T
from transformers.models.whisper.modeling_whisper import WhisperEncoder

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
    padded = [torch.cat([torch.zeros(n, dtype=torch.long), row]) for n, row in zip(pad, rows, strict=True)]
    return {
        "input_ids": torch.stack(padded),
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
        audio_config=audio, vision_config=vision, text_config=dict(**TEXT, rope_parameters=rope),
        audio_token_index=AUDIO, image_token_index=11, video_token_index=12, audio_start_token_id=9,
        audio_end_token_id=13, vision_start_token_id=14,
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
    text = dict(model_type="qwen2", **TEXT)
    config = T.AudioFlamingo3Config(audio_config=audio, text_config=text, audio_token_id=AUDIO)
    given = {"input_features": mels(2), "input_features_mask": lengths(200, 120)}
    return T.AudioFlamingo3ForConditionalGeneration(config), {**prompt([50, 30]), **given}


def qwen3_omni():
    audio = dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=MELS,
                 max_source_positions=100, downsample_hidden_size=8, output_dim=64)  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64,
                  num_position_embeddings=16, deepstack_visual_indexes=[0])  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    experts = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    config = T.Qwen3OmniMoeThinkerConfig(
        audio_config=audio, vision_config=vision, text_config=dict(**TEXT, **experts, rope_parameters=rope),
        audio_token_id=AUDIO, image_token_id=11, video_token_id=12, audio_start_token_id=9, vision_start_token_id=14,
    )  # fmt: skip
    given = {"input_features": mels(2), "feature_attention_mask": lengths(200, 120)}
    return T.Qwen3OmniMoeThinkerForConditionalGeneration(config), {**prompt([26, 16]), **given}


def qwen3_asr():
    audio = dict(model_type="qwen3_asr_encoder", d_model=32, encoder_layers=1, encoder_attention_heads=2,
                 encoder_ffn_dim=64, num_mel_bins=MELS, downsample_hidden_size=8, output_dim=64)  # fmt: skip
    config = T.Qwen3ASRConfig(
        audio_config=audio, text_config=dict(model_type="qwen3", head_dim=16, **TEXT), audio_token_id=AUDIO,
        pad_token_id=0, eos_token_id=2, tie_word_embeddings=False)  # fmt: skip
    given = {"input_features": mels(2), "input_features_mask": lengths(200, 120)}
    return T.Qwen3ASRForConditionalGeneration(config), {**prompt([26, 16]), **given}


def granite_speech():
    encoder = dict(model_type="granite_speech_encoder", input_dim=MELS, num_layers=2, hidden_dim=32, num_heads=2,
                   output_dim=8, context_size=50, max_pos_emb=64)  # fmt: skip
    projector = dict(model_type="blip_2_qformer", hidden_size=32, encoder_hidden_size=32, intermediate_size=64,
                     num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    text = dict(model_type="granite", attention_multiplier=0.25, **TEXT)
    config = T.GraniteSpeechConfig(encoder_config=encoder, projector_config=projector, text_config=text,
                                   audio_token_index=AUDIO, has_lora_adapter=False)  # fmt: skip
    heard = torch.arange(42) < torch.tensor([42, 24])[:, None]  # 3 tokens for 15 frames, of 200 and 120
    given = {"input_features": mels(2).mT, "input_features_mask": heard}
    return T.GraniteSpeechForConditionalGeneration(config), {**prompt([42, 24]), **given}


def phi4_multimodal():
    audio = dict(hidden_size=32, intermediate_size=64, num_blocks=1, num_attention_heads=2, input_size=MELS,
                 ext_pw_out_channel=32, depthwise_separable_out_channel=32, nemo_conv_channels=8,
                 audio_token_id=AUDIO)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56,
                  crop_size=56, image_token_id=11)  # fmt: skip
    config = T.Phi4MultimodalConfig(audio_config=audio, vision_config=vision, sliding_window=4096, **TEXT)
    given = {"audio_input_features": mels(2).mT, "audio_attention_mask": lengths(200, 120).bool(),
             "audio_embed_sizes": torch.tensor([25, 15])}  # fmt: skip
    model = T.Phi4MultimodalForCausalLM(config)
    model.generation_config.suppress_tokens = [AUDIO]  # it would stumble over its own
    return model, {**prompt([25, 15]), **given}


def _blind(kind):
    """A config of an eye that is none: the real one wants timm."""

    class BlindConfig(kind):
        model_type = "blind"

    class Blind(T.PreTrainedModel):
        config_class = config = BlindConfig

        def __init__(self, config):
            super().__init__(config)
            self.post_init()

    T.AutoModel.register(BlindConfig, Blind)
    return BlindConfig


def gemma3n():
    audio = dict(hidden_size=32, input_feat_size=MELS, conf_num_attention_heads=2, conf_num_hidden_layers=1,
                 vocab_size=10, vocab_offset=190, sscp_conv_channel_size=[8, 4])  # fmt: skip
    vision = _blind(T.Gemma3nVisionConfig)(hidden_size=32, vocab_size=10, vocab_offset=180)
    types = ["sliding_attention", "full_attention"] * 3
    text = {**TEXT, "num_hidden_layers": len(types), "layer_types": types, "num_kv_shared_layers": 2}
    text |= dict(sliding_window=8, head_dim=16, laurel_rank=8)
    text |= dict(vocab_size_per_layer_input=180, hidden_size_per_layer_input=16)
    config = T.Gemma3nConfig(audio_config=audio, vision_config=vision, text_config=text, audio_token_id=AUDIO,
                             image_token_id=11, audio_soft_tokens_per_image=13, tie_word_embeddings=False)  # fmt: skip
    given = {"input_features": mels(2).mT, "input_features_mask": lengths(200, 120).bool()}
    return T.Gemma3nForConditionalGeneration(config), {**prompt([13, 13]), **given}


class Listening(T.PreTrainedConfig):
    """Of a model that people wire up themselves: a Whisper encoder, a LLaMA, and something between."""

    model_type = "whisper_llm"

    def __init__(self, **given):
        self.audio_token_id = AUDIO
        self.audio = T.WhisperConfig(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
                                     num_mel_bins=MELS, max_source_positions=FRAMES // 2)  # fmt: skip
        self.text = T.LlamaConfig(**TEXT)
        super().__init__(**given)

    def get_text_config(self, *args, **kwargs):
        return self.text


class ListeningLlama(T.PreTrainedModel, T.GenerationMixin):
    config_class = Listening

    def __init__(self, config):
        super().__init__(config)
        self.audio_tower = WhisperEncoder(config.audio)
        self.language_model = T.AutoModelForCausalLM.from_config(config.text)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(self, input_ids, input_features=None, **others):
        embeddings = self.get_input_embeddings()(input_ids)
        if input_features is not None:
            heard = self.tokens(self.audio_tower(input_features).last_hidden_state)
            embeddings = embeddings.masked_scatter((input_ids == self.config.audio_token_id)[..., None], heard)
        return self.language_model(inputs_embeds=embeddings, **others)


class Stacking(ListeningLlama):
    """Tokens are four frames each."""

    def __init__(self, config):
        super().__init__(config)
        self.projector = torch.nn.Linear(4 * 32, 64)
        self.post_init()

    def tokens(self, frames):
        return self.projector(frames.unflatten(1, (-1, 4)).flatten(2))


class Salmonn(ListeningLlama):
    """Of each window of frames a Q-Former makes one token."""

    def __init__(self, config):
        super().__init__(config)
        self.queries = torch.nn.Parameter(torch.randn(1, 1, 32))
        self.qformer = T.Blip2QFormerModel(T.Blip2QFormerConfig(
            hidden_size=32, encoder_hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2))  # fmt: skip
        self.projector = torch.nn.Linear(32, 64)
        self.post_init()

    def tokens(self, frames):
        windows = frames[:, : frames.shape[1] // 5 * 5].unflatten(1, (-1, 5))  # [rows, windows, 5, 32]
        heard = self.qformer(query_embeds=self.queries, encoder_hidden_states=windows.flatten(0, 1)).last_hidden_state
        return self.projector(heard).view(*windows.shape[:2], -1)


def whisper_llm():
    return Stacking(Listening()), {**prompt([25, 25]), "input_features": mels(2)}


def salmonn():
    config = Listening()
    config.model_type = "salmonn"
    return Salmonn(config), {**prompt([20, 20]), "input_features": mels(2)}


# Of each family by name, what transformers must have for it. A function of that name makes a model and what its
# generate() is given.
MODELS = {
    "qwen2_audio": "Qwen2AudioConfig",
    "voxtral": "VoxtralConfig",
    "qwen2_5_omni": "Qwen2_5OmniThinkerConfig",
    "qwen3_omni": "Qwen3OmniMoeThinkerConfig",
    "glmasr": "GlmAsrConfig",
    "audioflamingo3": "AudioFlamingo3Config",
    "granite_speech": "GraniteSpeechConfig",
    "qwen3_asr": "Qwen3ASRConfig",
    "phi4_multimodal": "Phi4MultimodalConfig",
    "gemma3n": "Gemma3nConfig",
    "whisper_llm": "WhisperConfig",
    "salmonn": "Blip2QFormerConfig",
}


def make(name):
    if not hasattr(T, MODELS[name]):
        pytest.skip(f"transformers {T.__version__} has no {MODELS[name]}")
    torch.manual_seed(0)
    model, inputs = globals()[name]()
    return model.eval(), inputs


def language_model(model):
    return next(module for module in model.modules() if hasattr(module, "embed_tokens"))


def layers_read(model):
    """Of each layer of the language model: the one whose keys it reads, if that one sees all tokens, or None."""
    config = language_model(model).config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    return [
        (layer if layer < own else own - 1 - types[:own][::-1].index(kind)) if kind == "full_attention" else None
        for layer, kind in enumerate(types)
    ]
