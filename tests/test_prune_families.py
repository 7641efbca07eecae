"""Of each family of speech LLMs: what is its own."""

import types

import pytest
import torch
import transformers as T
from speech_models import (
    AUDIO,
    FRAMES,
    KV_HEADS,
    LAYERS,
    MELS,
    MODELS,
    TEXT,
    Listening,
    Stacking,
    language_model,
    layers_read,
    make,
    prompt,
)  # fmt: skip
from test_prune import GREEDY, Drawn, furthest, masked
from transformers import DynamicCache

from whisperkv import prune
from whisperkv.compat import CACHE
from whisperkv.prune import BasePruner
from whisperkv.prune.families import FAMILIES, family_of

HIGH = {"sequence_bias": [[[AUDIO], 500.0]]}


class Looking(BasePruner):
    """Keeps all, and notes what it was shown."""

    needs_attention = needs_silence = True
    every = 1

    def __init__(self):
        self.shown = []

    def score(self, k, v, attn_weights, meta):
        self.shown.append((attn_weights, meta))
        return attn_weights


class TestOfEveryFamily:
    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_what_a_pruner_is_shown(self, name):
        model, inputs = make(name)
        audio = inputs["input_ids"] == AUDIO
        pruner = Looking()
        with prune.apply(model, pruner), torch.no_grad():
            model(**inputs)
        assert len(pruner.shown) == len(set(layers_read(model)) - {None})
        for received, meta in pruner.shown:
            assert torch.equal(meta.tokens[meta.present], audio.nonzero()[:, 1])
            assert meta.embeddings.shape == (*meta.tokens.shape, 64)
            assert not torch.equal(meta.embeddings[0, 0], meta.embeddings[0, 1])
            assert received.shape == (len(audio), KV_HEADS, meta.tokens.shape[1])
            assert (received > 0)[meta.present[:, None].expand_as(received)].all()

    @pytest.mark.parametrize("name", sorted(set(MODELS) - {"whisper_llm", "salmonn"}))
    def test_rate(self, name):
        model, inputs = make(name)
        seconds = FRAMES / (50 if name == "granite_speech" else 100)  # it is given two frames as one
        tokens = int((inputs["input_ids"][0] == AUDIO).sum())
        assert tokens / seconds == pytest.approx(family_of(model).rate, rel=0.06)  # the last token may be padded

    @pytest.mark.parametrize("name", sorted(set(MODELS) - {"phi4_multimodal"}))  # which stumbles over it
    def test_audio_that_the_model_writes_itself(self, name):
        model, inputs = make(name)
        pruner = Drawn()
        expected = masked(model, inputs, pruner, **HIGH)
        with prune.apply(model, pruner):
            pruned = model.generate(**inputs, **GREEDY, **HIGH)
            assert prune.stats(model).prompts == 1
        assert (pruned.sequences[:, inputs["input_ids"].shape[1] :] == AUDIO).all()
        assert furthest(expected, pruned) < 2e-4  # of 500

    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_silence(self, name):
        """Of the first clip the second half is silent."""
        model, inputs = make(name)
        columns = FRAMES * (2 if name == "granite_speech" else 1)
        heard = 0.02 * torch.randn(len(inputs["input_ids"]), MELS, columns, generator=torch.Generator().manual_seed(4))
        heard[:1, :, : columns // 2] += 2
        heard[1:] += 2 * (torch.arange(columns) % 40 > 0)
        if name == "granite_speech":
            given = heard[:, : MELS // 2].mT.unflatten(1, (-1, 2)).flatten(2)
        elif name == "phi4_multimodal":
            given = heard.mT * 9.21
        else:
            given = heard.mT * 4.6 if name == "gemma3n" else heard
        pruner = Looking()
        with prune.apply(model, pruner), torch.no_grad():
            model(**inputs | {next(key for key in inputs if key.endswith("input_features")): given})
        _, meta = pruner.shown[0]
        silent, tokens = meta.silent, int(meta.present[0].sum())
        assert silent[0, tokens // 2 + 3 : tokens].all() and not silent[0, : tokens // 2 - 2].any()
        assert not silent[1, : int(meta.present[1].sum()) - 1].any()


class TestOfOmni:
    @staticmethod
    def whole(name):
        """A whole model around a tiny thinker: what speaks is left out."""
        thinker, inputs = make(name)
        if name == "qwen3_omni":
            model = T.Qwen3OmniMoeForConditionalGeneration(T.Qwen3OmniMoeConfig(
                thinker_config=thinker.config.to_dict(), enable_audio_output=False))  # fmt: skip
        else:
            model = T.Qwen2_5OmniForConditionalGeneration(T.Qwen2_5OmniConfig(
                thinker_config=thinker.config.to_dict(), enable_audio_output=False))  # fmt: skip
            model.speaker_map = {"Chelsie": {}}  # it asks for these
            model.talker = types.SimpleNamespace(codec_pad_token=0)
        model.thinker = thinker
        return model.eval(), inputs

    @pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])
    def test_a_whole_model(self, name):
        model, inputs = self.whole(name)
        options = {"generation_mode": "text"} if name == "qwen2_5_omni" else {"return_audio": False}
        options |= {"thinker_max_new_tokens": 12, "thinker_do_sample": False, "thinker_eos_token_id": None}
        before = model.generate(**inputs, **options)
        with prune.apply(model, Drawn()) as pruning:
            pruned = model.generate(**inputs, **options)
            stats = prune.stats(model)
            assert stats is prune.stats(model.thinker) and stats.prompts == 1 and len(stats.kept) == LAYERS
            assert pruning.language_model is language_model(model.thinker)
        with prune.apply(model.thinker, Drawn()):
            assert torch.equal(model.generate(**inputs, **options), pruned)
        assert not torch.equal(before, pruned)
        prune.apply(model, Drawn())
        prune.remove(model)
        with pytest.raises(ValueError, match="prune.apply"):
            prune.stats(model)
        assert not model.thinker._forward_pre_hooks and torch.equal(model.generate(**inputs, **options), before)


class TestOfGemma3n:
    def test_layers(self):
        model, inputs = make("gemma3n")
        with prune.apply(model, "window", budget=4), torch.no_grad():
            layers = model(**inputs, use_cache=True).past_key_values.layers
            stats = prune.stats(model)
        kinds = [type(layer).__name__ for layer in layers]
        assert kinds[:4] == ["DynamicSlidingWindowLayer", "PrunedLayer"] * 2 and "PrunedLayer" not in kinds[4:]
        assert stats.kept == ((4.0,) * KV_HEADS,) * 2

    def test_attention_of_all_that_read_a_layer(self):
        model, inputs = make("gemma3n")
        pruner = Looking()
        language_model(model).config._attn_implementation = {"": "eager"}
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
            with prune.apply(model, pruner):
                model(**inputs)
        visible = inputs["attention_mask"]
        for (received, meta), layers in zip(pruner.shown, ([1], [3, 5]), strict=True):
            attention = sum(attentions[layer] for layer in layers) * visible[:, None, :, None]
            expected = attention.sum(2).unflatten(1, (KV_HEADS, -1)).sum(2)
            expected = expected.gather(2, meta.tokens[:, None].expand(-1, KV_HEADS, -1))
            assert meta.layer == layers[0] and torch.allclose(received, expected, atol=1e-4)


class TestOfPhi4:
    def test_a_window_that_is_one(self):
        model, inputs = make("phi4_multimodal")
        model.config.sliding_window = 20
        before = model.generate(**inputs, **GREEDY)
        with prune.apply(model, "random"):
            after = model.generate(**inputs, **GREEDY)
            assert "no layer" in prune.stats(model).note and prune.stats(model).prompts == 0
        assert furthest(before, after) == 0

    def test_a_prompt_longer_than_it_was_trained_with(self):
        """generate() then gives the model no cache for the prompt."""
        model, inputs = make("phi4_multimodal")
        model.config.original_max_position_embeddings = 20
        pruner = Drawn()
        expected = masked(model, inputs, pruner)
        with prune.apply(model, pruner):
            assert furthest(expected, model.generate(**inputs, **GREEDY)) < 1e-4

    def test_a_cache_that_is_reset(self):
        model, inputs = make("phi4_multimodal")
        cache = DynamicCache(config=model.config)
        with prune.apply(model, "random"):
            before = model.generate(**inputs, **GREEDY, **{CACHE: cache})
            cache.reset()
            after = model.generate(**inputs, **GREEDY, **{CACHE: cache})
            assert prune.stats(model).prompts == 2
        assert furthest(before, after) == 0


def test_attention_unlike_ours():
    torch.manual_seed(0)
    config = Listening()
    config.text = T.Gemma2Config(**TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=512)
    model, (_, inputs) = Stacking(config).eval(), make("whisper_llm")
    before = model.generate(**inputs, **GREEDY)
    with prune.apply(model, "random"):
        after = model.generate(**inputs, **GREEDY)
        assert "caps its logits" in prune.stats(model).note
    assert furthest(before, after) == 0


class TestOfBadInput:
    def test_a_prompt_of_an_old_processor(self):
        """It has one token a clip, and the model makes room for the others itself."""
        model, inputs = make("qwen2_audio")
        old = {**inputs, **prompt([1, 1, 1])}
        assert model.generate(**old, **GREEDY).sequences.shape[0] == 3
        with prune.apply(model, "random"):
            with pytest.raises(ValueError, match="stands as one token for each clip, from a processor before"):
                model.generate(**old, **GREEDY)
            assert model.generate(**inputs, **GREEDY).sequences.shape[0] == 3

    def test_what_is_no_speech_llm(self):
        whisper = T.WhisperForConditionalGeneration(T.WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            vocab_size=60, pad_token_id=0, decoder_start_token_id=1))  # fmt: skip
        encoder = next(part for part in make("qwen2_audio")[0].modules() if type(part).__name__ == "Qwen2AudioEncoder")
        for model in (whisper, whisper.model.encoder, encoder, T.LlamaForCausalLM(T.LlamaConfig(**TEXT))):
            with pytest.raises(TypeError) as raised:
                prune.apply(model)
            assert all(name in str(raised.value) for family in FAMILIES for name in family.names)
            assert model.config.model_type in str(raised.value) and not model._forward_pre_hooks

    def test_what_people_build_themselves(self):
        model, _ = make("whisper_llm")
        model.config.audio_token_id = None
        with pytest.raises(TypeError, match="Stacking must have an audio_token_id"):
            prune.apply(model)
        model.config.audio_token_id = AUDIO
        model.llama = model.language_model
        del model.language_model
        with pytest.raises(TypeError, match="which part of Stacking is its language model"):
            prune.apply(model)
        model.get_decoder = lambda: model.llama
        prune.apply(model).remove()


def test_peft():
    peft = pytest.importorskip("peft")
    model, inputs = make("qwen2_audio")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, adapter).eval()
    before = wrapped.generate(**inputs, **GREEDY)
    with prune.apply(wrapped, "random", budget=1.0):
        after = wrapped.generate(**inputs, **GREEDY)
        assert prune.stats(wrapped).prompts == 1
    assert furthest(before, after) < 1e-3
