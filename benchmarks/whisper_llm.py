"""A small speech LLM of transformers' parts: Whisper's encoder, a projector and a LLaMA, for what prunes its cache.

`stack` encoder frames of 20 ms side by side make one audio token. A prompt holds a placeholder for each of them, as
those of Qwen2-Audio and Voxtral do; a row's audio is as long as its placeholders say, and need not fill 30 seconds.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel, WhisperConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import can_return_tuple

from whisperkv.compat import CACHE, with_new_names

COLUMNS = 2  # of the log-mel spectrogram in one frame of the encoder


class WhisperLLMConfig(PreTrainedConfig):
    """audio_token_id is the placeholder; stack is how many frames make an audio token."""

    model_type = "whisper_llm"
    sub_configs = {"audio_config": WhisperConfig, "text_config": LlamaConfig}

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 3
    stack: int = 4

    def __post_init__(self, **kwargs):
        for name, kind in type(self).sub_configs.items():
            if not isinstance(getattr(self, name), kind):
                setattr(self, name, kind(**(getattr(self, name) or {})))
        super().__post_init__(**kwargs)


@dataclass
class WhisperLLMOutput(CausalLMOutputWithPast):
    """ctc_logits: of the audio tokens of all rows, one row after the other, float [audio tokens, vocabulary]; the pad
    token is the blank. On the pass that holds audio tokens only."""

    ctc_logits: torch.Tensor | None = None


class WhisperLLM(PreTrainedModel, GenerationMixin):
    config_class = WhisperLLMConfig
    input_modalities = ("audio", "text")
    _no_split_modules = ["WhisperEncoderLayer", "LlamaDecoderLayer"]
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        heard, width = config.stack * config.audio_config.d_model, config.text_config.hidden_size
        self.audio_encoder = WhisperEncoder(config.audio_config).requires_grad_(False)
        self.projector = nn.Sequential(
            nn.LayerNorm(heard), nn.Linear(heard, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.language_model = LlamaModel(config.text_config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.ctc_head = nn.Linear(width, config.text_config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def encode(self, input_features):
        """The encoder's states of audios of one length, [audios, frames, channels]."""
        encoder = self.audio_encoder
        x = nn.functional.gelu(encoder.conv1(input_features.to(encoder.conv1.weight)))
        x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
        if x.shape[1] > encoder.max_source_positions:
            raise ValueError(f"an audio has {x.shape[1]} frames, and the encoder {encoder.max_source_positions}")
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for layer in encoder.layers:
            x = layer(x, None)
        return encoder.layer_norm(x)

    def project(self, states):
        """[..., frames, channels] as audio tokens, [..., frames / stack, width]"""
        return self.projector(states.unflatten(-2, (-1, self.config.stack)).flatten(-2))

    def get_audio_features(self, input_features, lengths):
        """The audio tokens of all rows, one row after the other, [audio tokens, width].

        input_features  float [rows, mels, columns]
        lengths         how many audio tokens there are of each row; columns beyond them are not heard
        """
        if len(input_features) != len(lengths):
            raise ValueError(f"input_features has {len(input_features)} rows, and input_ids {len(lengths)}")
        found = [None] * len(lengths)
        for length in set(lengths):
            rows = [row for row, other in enumerate(lengths) if other == length]
            columns = length * self.config.stack * COLUMNS
            if columns > input_features.shape[-1]:
                raise ValueError(f"{length} audio tokens are {columns} columns; got {input_features.shape[-1]}")
            features = input_features[rows, :, :columns]
            if length == 0:
                continue
            # Beams follow one another and are heard once.
            features, audio_of = features.unique_consecutive(dim=0, return_inverse=True)
            tokens = self.project(self.encode(features))
            for row, audio in zip(rows, audio_of.tolist()):
                found[row] = tokens[audio]
        return torch.cat([tokens for tokens in found if tokens is not None])

    def embed(self, input_ids, audio):
        """input_ids [rows, tokens], audio [audio tokens, width] in the placeholders' stead"""
        is_audio = input_ids == self.config.audio_token_id
        return self.get_input_embeddings()(input_ids).masked_scatter(is_audio[..., None], audio.to(self.dtype))

    @can_return_tuple
    def forward(
        self, input_ids=None, input_features=None, attention_mask=None, position_ids=None, inputs_embeds=None,
        labels=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        """The cache is among the kwargs, by the name that this transformers has for it."""
        ctc_logits = None
        if inputs_embeds is None and input_features is not None:
            lengths = (input_ids == self.config.audio_token_id).sum(1).tolist()
            if any(lengths):
                audio = self.get_audio_features(input_features, lengths)
                ctc_logits = self.ctc_head(audio)
                inputs_embeds = self.embed(input_ids, audio)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **with_new_names(kwargs),
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: all
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return WhisperLLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ctc_logits=ctc_logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )
