"""Language models whose cache holds latents: whisperkv.lowrank."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from language_models import MODELS, byte_tokenizer, language_model
from transformers import DynamicCache, StaticCache, pipeline

from whisperkv import compat, lowrank
from whisperkv.lowrank import convert_to_mla, measure_cache_memory, restore

SETTINGS = {
    "separate": {},
    "joint": {},
    "xkv": {"cross_layer_group_size": 3},
    "xkv bases": {"xkv_share": "bases", "cross_layer_group_size": 2, "xkv_skip_early_layers": 1},
    "decoupled_rope": {},
}
CASES = [
    (name, method)
    for name in MODELS
    for method in SETTINGS
    if method != "decoupled_rope" or name not in ("gpt2", "qwen3")
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def models():
    return {name: language_model(name) for name in MODELS}


@pytest.fixture(scope="module")
def rows():
    return numbers(6, 40)


@pytest.fixture(scope="module")
def batch():
    tokens = numbers(3, 20, seed=1)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[2, :3] = 0, 0
    return {"input_ids": tokens.masked_fill(mask == 0, 256), "attention_mask": mask}


def numbers(rows, tokens, seed=0):
    return torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def converted(model, method, rows, ratio=1.0, **others):
    model = copy.deepcopy(model)
    settings = {**SETTINGS[method], **others}
    if method == "decoupled_rope" and ratio == 1:
        kind = model.config
        settings["rope_pairs"] = kind.hidden_size // kind.num_attention_heads // 2
    return convert_to_mla(model, ratio, method.split()[0], calibration=list(rows), verbose=False, **settings)[0]


def say(model, batch, seed=3, **settings):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**batch, max_new_tokens=14, **settings)


def logits(model, batch, **settings):
    with torch.no_grad():
        return model(**batch, **settings).logits * batch["attention_mask"][..., None]


class TestFullRank:
    @pytest.mark.parametrize(("name", "method"), CASES)
    def test_is_the_model(self, models, rows, batch, name, method):
        model, small = models[name], converted(models[name], method, rows)
        assert torch.allclose(logits(model, batch), logits(small, batch), atol=1e-4, rtol=0)
        for settings in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
            assert torch.equal(say(model, batch, **settings), say(small, batch, **settings)), settings

    @pytest.mark.parametrize("name", ["gpt2", "llama_grouped"])
    @pytest.mark.parametrize("method", ["joint", "xkv"])
    def test_other_ways_to_decode(self, models, rows, batch, name, method):
        model, small = models[name], converted(models[name], method, rows)
        one = {"input_ids": batch["input_ids"][1:2]}
        for given, settings in (
            (batch, {"cache_implementation": "static"}),
            (batch, {"num_beams": 2, "num_return_sequences": 2}),
            (one, {"prompt_lookup_num_tokens": 3}),
            (one, {"assistant_model": language_model(name, seed=1)}),
        ):
            assert torch.equal(say(model, given, **settings), say(small, given, **settings)), settings

    def test_a_window_of_static_shape(self, models, rows, batch):
        model, small = models["mistral"], converted(models["mistral"], "joint", rows)
        settings = {"cache_implementation": "static"}
        assert torch.equal(say(model, batch, **settings), say(small, batch, **settings))
        with pytest.raises(ValueError, match="xkv_share='bases'"):
            say(converted(models["mistral"], "xkv", rows), batch, **settings)

    @pytest.mark.parametrize("name", ["gpt2", "qwen3"])
    def test_eager_and_its_attentions(self, rows, batch, name):
        model = language_model(name, attn_implementation="eager")
        small = converted(model, "joint", rows)
        with torch.no_grad():
            expected, got = (each(**batch, output_attentions=True).attentions for each in (model, small))
        assert len(got) == 4
        there = batch["attention_mask"].bool()
        for one, other in zip(expected, got):
            one, other = (each.transpose(1, 2)[there] for each in (one, other))
            assert torch.allclose(one, other, atol=1e-4)

    @pytest.mark.parametrize("method", ["separate", "xkv"])
    def test_turns_of_a_conversation(self, models, rows, method):
        """A cache that goes on, with several tokens at once and after some were taken back."""
        model, small = models["qwen2_sliding"], converted(models["qwen2_sliding"], method, rows)
        tokens, outputs = numbers(2, 30, seed=5), []
        for each in (model, small):
            cache = DynamicCache(config=each.config)
            with torch.no_grad():
                each(input_ids=tokens[:, :8], **{compat.CACHE: cache})
                cache.crop(-2 if compat.tokens_to_remove(-2, 8) == 2 else 6)
                parts = [each(input_ids=tokens[:, 6:10], **{compat.CACHE: cache}).logits]
                cache.batch_select_indices(torch.tensor([1, 0]))
                cache.batch_repeat_interleave(2)
                again = tokens[[1, 1, 0, 0]]
                parts += [each(input_ids=again[:, 10:25], **{compat.CACHE: cache}).logits]
                cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
                parts += [each(input_ids=again[[3, 0, 1, 2], 25:], **{compat.CACHE: cache}).logits]
                assert cache.get_seq_length() == 30
            outputs.append(parts)
        for one, other in zip(*outputs):
            assert torch.allclose(one, other, atol=1e-4)

    def test_positions_with_holes(self, models, rows):
        """Padding inside: positions are those that were given, not counted."""
        model, small = models["llama"], converted(models["llama"], "separate", rows)
        tokens = numbers(1, 16)
        positions = torch.tensor([[0, 1, 2, 7, 8, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]])
        outputs = []
        for each in (model, small):
            cache = DynamicCache(config=each.config)
            with torch.no_grad():
                for begin in (0, 8):
                    part = slice(begin, begin + 8)
                    given = {"input_ids": tokens[:, part], "position_ids": positions[:, part], compat.CACHE: cache}
                    out = each(**given).logits
            outputs.append(out)
        assert torch.allclose(*outputs, atol=1e-4)


class TestSmall:
    def test_auto(self, models, rows):
        for name, method in (("gpt2", "joint"), ("llama", "joint"), ("llama_grouped", "xkv"), ("qwen3", "xkv")):
            model = convert_to_mla(copy.deepcopy(models[name]), calibration=list(rows), verbose=False)[0]
            assert model.lowrank.method == method and model.lowrank.ratio == pytest.approx(4, rel=0.05)

    @pytest.mark.parametrize("method", ["separate", "joint", "xkv", "xkv bases", "decoupled_rope"])
    def test_what_is_cached_is_what_was_said(self, models, rows, batch, method):
        """Reading token by token gives what one pass gives, except where layers share latents."""
        small = converted(models["llama_grouped"], method, rows, 4.0)
        tokens = numbers(2, 18, seed=2)
        with torch.no_grad():
            whole = small(input_ids=tokens, use_cache=False).logits
            cache = DynamicCache(config=small.config)
            steps = [
                small(input_ids=tokens[:, place : place + 1], **{compat.CACHE: cache}).logits for place in range(18)
            ]
        close = torch.allclose(whole, torch.cat(steps, 1), atol=1e-4)
        assert close == (method != "xkv")
        assert not torch.allclose(whole, models["llama_grouped"](input_ids=tokens).logits, atol=1e-2) or method == "xkv"

    def test_skipped_layers(self, models, rows):
        small = converted(models["llama"], "xkv", rows, 4.0, xkv_skip_early_layers=1, cross_layer_group_size=2)
        kinds = [(each.kind, each.group) for each in small.lowrank.layers.values()]
        assert kinds == [("separate", [0]), ("shared", [1, 2]), ("shared", [1, 2]), ("shared", [3])]
        kept = converted(models["llama"], "xkv", rows, 4.0, xkv_skip_early_layers=1, keep_early_layers_original=True)
        assert list(kept.lowrank.layers) == [1, 2, 3]
        assert type(kept.model.layers[0].self_attn).__name__ == "LlamaAttention"

    def test_decoupled_turns_some_pairs(self, models, rows):
        small = converted(models["llama"], "decoupled_rope", rows, 2.0, rope_pairs=2)
        assert all(len(each.turned) == 2 for each in small.lowrank.layers.values())
        assert int(small.model.layers[0].self_attn.turns.sum()) == 4

    def test_pipeline(self, models, rows, tokenizer):
        model = copy.deepcopy(models["gpt2"])
        small, same = convert_to_mla(
            model, 2, calibration=["some text of ours"] * 4, tokenizer=tokenizer, verbose=False
        )
        assert small is model and same is tokenizer
        greedy = {"max_new_tokens": 5, "do_sample": False}
        texts = [
            pipeline("text-generation", model=each, tokenizer=tokenizer)("Call me", **greedy)
            for each in (small, models["gpt2"])
        ]
        assert texts[0] == texts[1]  # at half the numbers GPT-2 loses nothing: keys and values are made of one input

    def test_from_a_folder(self, models, tokenizer, tmp_path):
        """A folder, and a text from each place that it may come from."""
        models["gpt2"].save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        text = "A paragraph.\n\nAnother one, which is longer." * 20
        (tmp_path / "text.txt").write_text(text)

        class Columns(dict):  # as a Dataset of the library datasets
            column_names = ["number", "content"]

        texts = text.split("\n\n")
        settings = {"num_calibration_samples": 4, "max_calibration_length": 64, "verbose": False}
        made = [
            convert_to_mla(str(tmp_path), 4, calibration=given, **settings)
            for given in (texts, str(tmp_path / "text.txt"), Columns(number=[1], content=[*texts, " "]))
        ]
        for small, same in made:
            assert same("a b").input_ids == tokenizer("a b").input_ids
            first, own = (each.transformer.h[1].attn.factors.down for each in (made[0][0], small))
            assert torch.equal(first, own) and not small.training
        with pytest.raises(ValueError, match="must have a column 'text' or 'content'; it has number"):
            Columns.column_names = ["number"]
            convert_to_mla(str(tmp_path), calibration=Columns(number=[1]))

    def test_shipped_text(self, models, tokenizer, capsys):
        small, _ = convert_to_mla(copy.deepcopy(models["qwen2"]), tokenizer=tokenizer, num_calibration_samples=4)
        said = capsys.readouterr()
        assert said.out == "" and "2048 tokens" in said.err and repr(small.lowrank) in said.err

    def test_bfloat16_and_gradients(self, models, rows):
        small = converted(models["llama_grouped"], "joint", rows, 4.0, dtype=torch.bfloat16)
        assert small.model.layers[0].self_attn.factors.down.dtype == torch.bfloat16
        say(small, {"input_ids": numbers(2, 5)})
        small.float().train()
        small(input_ids=numbers(2, 9), labels=numbers(2, 9)).loss.backward()
        assert float(small.model.layers[0].self_attn.factors.down.grad.abs().sum()) > 0


class TestMemory:
    @pytest.mark.parametrize("bits", [None, 4])
    @pytest.mark.parametrize("method", ["separate", "joint", "xkv", "xkv bases"])
    @pytest.mark.parametrize("name", ["gpt2", "mistral", "qwen2_sliding"])
    def test_measured_is_computed(self, models, rows, name, method, bits):
        small = converted(models[name], method, rows, 4.0, cache_bits=bits)
        for tokens, many in ((1, 1), (11, 2), (12, 1), (40, 3)):
            memory = measure_cache_memory(small, tokens, many)
            assert memory.measured == memory.latent
            plain = measure_cache_memory(models[name], tokens, many)
            assert plain.measured == plain.latent == plain.full == memory.full
        assert memory.ratio > (3 if bits is None else 20)

    def test_is_what_was_asked_for(self, models, rows):
        assert measure_cache_memory(converted(models["gpt2"], "separate", rows, 4.0), measure=False).ratio == 4
        with pytest.raises(ValueError, match="sequence_length must be a whole number of at least 1; got 0"):
            measure_cache_memory(models["gpt2"], 0)


class TestCodes:
    @pytest.mark.parametrize("method", ["separate", "joint", "xkv"])
    def test_more_bits_are_nearer(self, models, rows, method):
        tokens, errors = numbers(4, 24, seed=2), {}
        small = converted(models["llama_grouped"], method, rows, 2.0)
        for bits in (None, 8, 4, 3, 2):
            lowrank.quantize_latents(small, bits, list(rows))
            cache = DynamicCache(config=small.config)
            with torch.no_grad():
                steps = [small(input_ids=tokens[:, n : n + 1], **{compat.CACHE: cache}).logits for n in range(24)]
            said = torch.cat(steps, 1)
            if bits is None:
                meant = said
            else:
                held = cache.layers[0].keys
                assert held.dtype == torch.uint8
                assert held.shape[-1] == -(-bits * small.lowrank.layers[0].width // 8)
                errors[bits] = float((said - meant).square().mean())
        assert errors[8] < errors[4] < errors[3] < errors[2] and errors[8] < 0.02 * errors[2]

    def test_bytes_and_back(self):
        from whisperkv.lowrank.codes import Codes

        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(40, 40, generator=generator, dtype=torch.float64) * torch.logspace(1, -2, 40)
        latents = torch.randn(2000, 40, generator=generator, dtype=torch.float64) @ spread.T + 3
        mean, covariance = latents.mean(0), torch.cov(latents.T)
        previous = None
        for bits in (8, 4, 3, 2):
            codes = Codes.of(mean, covariance, torch.eye(40, dtype=torch.float64), latents, bits)
            assert sum(codes.widths) == 40 * bits and codes.widths == sorted(codes.widths, reverse=True)
            stored = codes.encode(latents)
            assert stored.dtype == torch.uint8 and stored.shape == (2000, 5 * bits)
            assert torch.equal(codes.decode(stored), codes.latents_of(codes.codes_of(latents)))
            error = float((codes.decode(stored) - latents).square().sum(-1).mean())
            assert previous is None or error > previous
            previous = error
        # half as many bits as a step for each alike would need
        assert error < 0.25 * float((latents - mean).square().sum(-1).mean())


class TestUndo:
    @pytest.mark.parametrize("name", ["gpt2", "qwen2"])
    @pytest.mark.parametrize("method", ["joint", "xkv", "xkv bases"])
    def test_restore(self, models, rows, batch, name, method):
        model = models[name]
        small = converted(model, method, rows, 4.0, store_original_weights=True)
        assert "can be restored" in repr(small.lowrank) and "over latents" in repr(small)
        copied = copy.deepcopy(small)
        assert torch.equal(say(copied, batch), say(small, batch))
        back = restore(small)
        assert back is small and not hasattr(back, "lowrank")
        assert repr(back) == repr(model)
        ours, theirs = back.state_dict(), model.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[each], theirs[each]) for each in ours)
        assert torch.equal(logits(back, batch), logits(model, batch))
        assert restore(back) is back
        assert copied.lowrank.layers  # the copy is its own

    def test_without_what_was(self, models, rows):
        with pytest.raises(ValueError, match="store_original_weights=True"):
            restore(converted(models["gpt2"], "joint", rows, 4.0))


class TestRefusals:
    @pytest.mark.parametrize(("settings", "error"), [
        ({"compression_ratio": 0.5}, "compression_ratio must be a number of at least 1.*got 0.5"),
        ({"compression_method": "svd"}, "compression_method must be one of auto, separate, xkv.*got 'svd'"),
        ({"d_latent": 1}, "d_latent must be a whole number of at least 2"),
        ({"d_latent": 97}, "d_latent must be at most 96.*got 97"),
        ({"xkv_skip_early_layers": 1}, "xkv_skip_early_layers is for compression_method='xkv'; got 'auto'"),
        ({"compression_method": "joint", "keep_early_layers_original": True}, "keep_early_layers_original is for"),
        ({"compression_method": "xkv", "keep_early_layers_original": True}, "needs xkv_skip_early_layers"),
        ({"compression_method": "xkv", "xkv_skip_early_layers": 4}, "must be less than the 4 layers; got 4"),
        ({"compression_method": "decoupled_rope"}, "gpt2 has none: take 'joint'"),
        ({"cache_bits": 5}, "cache_bits must be 8, 4, 3, 2 or None; got 5"),
        ({"use_calibration": False, "cache_bits": 4}, "cache_bits needs"),
        ({"use_calibration": False}, "calibration is given and use_calibration=False"),
        ({"calibration": []}, "calibration holds no text"),
        ({"calibration": None}, "calibration of texts needs a tokenizer"),
        ({"calibration": "/no/such/file"}, "no file /no/such/file"),
        ({"rope_pairs": 2}, "rope_pairs is for"),
        ({"xkv_share": "all"}, "xkv_share must be 'latents' or 'bases'; got 'all'"),
        ({"cross_layer_group_size": 0}, "cross_layer_group_size must be a whole number of at least 1; got 0"),
    ])  # fmt: skip
    def test_settings(self, models, rows, settings, error):
        before = {name: tensor.clone() for name, tensor in models["gpt2"].state_dict().items()}
        with pytest.raises(ValueError, match=error):
            convert_to_mla(models["gpt2"], **{"calibration": list(rows), "verbose": False, **settings})
        after = models["gpt2"].state_dict()
        assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)

    def test_models(self, models, rows):
        from transformers import BertConfig, BertModel, DeepseekV3Config, OPTConfig, OPTForCausalLM

        class Deep(torch.nn.Module):
            config = DeepseekV3Config()

        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
        opt = OPTForCausalLM(OPTConfig(hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
                                       vocab_size=9, word_embed_proj_dim=16, max_position_embeddings=9))  # fmt: skip
        for model, kind, error in (
            (Deep(), ValueError, "holds latents already"),
            (BertModel(BertConfig(**sizes)), ValueError, "encoder-only"),
            (opt, TypeError, "no architecture for 'opt'; there are gpt2, llama"),
            (torch.nn.Linear(2, 2), TypeError, "a model of transformers is needed; got Linear"),
        ):
            with pytest.raises(kind, match=error):
                convert_to_mla(model, calibration=list(rows), verbose=False)
        with pytest.raises(ValueError, match="converted already"):
            convert_to_mla(converted(models["gpt2"], "joint", rows), calibration=list(rows))
        with pytest.raises(ValueError, match="normalizes keys"):
            convert_to_mla(models["qwen3"], compression_method="decoupled_rope", calibration=list(rows))
        with pytest.raises(ValueError, match="GPT2LMHeadModel holds no latents"):
            lowrank.quantize_latents(models["gpt2"], 4)

    def test_float16(self, rows):
        model = language_model("llama")
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight *= 5000
        with pytest.raises(ValueError, match="layer 1 reach .* too much for float16: pass dtype=torch.bfloat16"):
            convert_to_mla(model, calibration=list(rows), dtype=torch.float16, verbose=False)

    def test_adapters(self, models, rows):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(models["llama"]), config).base_model.model
        with pytest.raises(ValueError, match="k_proj must be a plain projection.*merge_and_unload"):
            convert_to_mla(model, calibration=list(rows), verbose=False)

    def test_caches(self, models, rows, batch):
        small = converted(models["llama"], "joint", rows, 4.0)
        cache = DynamicCache(config=small.config)
        with torch.no_grad():
            models["llama"](**batch, **{compat.CACHE: cache})
        with pytest.raises(ValueError, match="keys and values of before the conversion"):
            small(input_ids=batch["input_ids"][:, :1], **{compat.CACHE: cache})
        static = StaticCache(config=small.config, max_cache_len=24)
        with torch.no_grad():
            small(**batch, **{compat.CACHE: static})
        assert static.layers[0].keys.shape == (3, 1, 24, small.lowrank.layers[0].width)


def test_names():
    assert {"convert_to_mla", "MLATrainer", "restore"} <= set(dir(lowrank))
    assert all(getattr(lowrank, name) is not None for name in lowrank.__all__)
    with pytest.raises(AttributeError, match="no attribute 'convert'"):
        lowrank.convert


class TestDocs:
    TEXT = (Path(__file__).parents[1] / "docs" / "lowrank.md").read_text()

    def test_every_block_runs(self, tmp_path, monkeypatch, tokenizer, rows, batch):
        monkeypatch.chdir(tmp_path)
        blocks = re.findall(r"^```python\n(.*?)^```$", self.TEXT, re.MULTILINE | re.DOTALL)
        assert len(blocks) == 5
        names = {"model": language_model("llama"), "tokenizer": tokenizer}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in blocks:
                exec(compile(block, "docs/lowrank.md", "exec"), names)
        assert names["model"].lowrank.layers[0].widths is not None and len(names["losses"]) == 1

        from transformers import GemmaConfig, GemmaForCausalLM

        sizes = {**MODELS["llama_grouped"][1], "head_dim": 12}
        model = GemmaForCausalLM(GemmaConfig(**sizes)).eval()
        small = converted(model, "joint", rows)
        assert torch.allclose(logits(model, batch), logits(small, batch), atol=1e-4)
        assert torch.equal(say(model, batch), say(small, batch))

    def test_tables_are_whole(self):
        from whisperkv.lowrank.architectures import _KNOWN
        from whisperkv.lowrank.record import METHODS

        assert all(f'"{method}"' in self.TEXT for method in METHODS)
        assert all(name in self.TEXT.lower().replace("-", "") for name in _KNOWN)
