"""Speech LLMs with their audio pruned: what stays, and that nothing else changes."""

import copy
import dataclasses
import threading
from importlib.metadata import EntryPoint

import pytest
import torch
from speech_models import (
    AUDIO,
    KV_HEADS,
    LAYERS,
    MODELS,
    TEXT,
    VOCABULARY,
    language_model,
    layers_read,
    lengths,
    make,
    mels,
    prompt,
)  # fmt: skip
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from whisperkv import prune
from whisperkv.prune import BasePruner, pruners
from whisperkv.prune.base import places
from whisperkv.prune.families import family_of
from whisperkv.prune.layer import PrunedLayer

GREEDY = dict(
    max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip


@dataclasses.dataclass
class Drawn(BasePruner):
    """Tokens drawn for each layer, row and head on their own."""

    share: float = 0.4

    def keeps(self, layer, rows, heads, audio):
        drawn = torch.rand(64, 8, 512, generator=torch.Generator().manual_seed(layer))[:rows, :heads, :audio]
        return drawn < self.share + 0.1 * layer

    def score(self, k, v, attn_weights, meta):
        rows, heads, audio = k.shape[:3]
        beams = getattr(self, "beams", 1)
        drawn = self.keeps(meta.layer, rows // beams, heads, audio).repeat_interleave(beams, 0)
        return drawn.float()

    def select(self, scores, budget):
        return places(scores > 0)


@pytest.fixture(params=sorted(MODELS))
def family(request):
    model, inputs = make(request.param)
    yield model, inputs
    prune.remove(model)


@pytest.fixture
def qwen():
    model, inputs = make("qwen2_audio")
    yield model, inputs
    prune.remove(model)


def masked(model, inputs, pruner, beams=1, **options):
    """What an unpruned model says if those keys are hidden from it once the prompt is read."""
    audio = inputs["input_ids"] == AUDIO
    tokens = audio.shape[1]
    index = places(audio)
    attention = {}
    rows = audio.shape[0]
    read = layers_read(model)
    for layer in set(read) - {None}:
        keeps = pruner.keeps(layer, rows, KV_HEADS, index.shape[1])
        keep = ~audio[:, None].expand(-1, KV_HEADS, -1).clone()
        for row in range(rows):
            count = int(audio[row].sum())
            keep[row, :, index[row, :count]] = keeps[row, :, :count]
        attention[layer] = keep.repeat_interleave(beams, 0)

    def hide(module, query, key, value, attention_mask, scaling, dropout=0.0, **others):
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).mT * scaling
        if attention_mask is not None:
            logits = logits + attention_mask[..., : logits.shape[-1]]
        layer = read[module.layer_idx]
        if layer is not None and key.shape[2] > tokens:
            keep = attention[layer].repeat_interleave(groups, 1)
            logits[..., :tokens] = logits[..., :tokens].masked_fill(~keep[:, :, None], torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("hide", hide)
    ALL_MASK_ATTENTION_FUNCTIONS.register("hide", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    config = language_model(model).config
    before = config._attn_implementation
    config._attn_implementation = {"": "hide"}
    try:
        return model.generate(**inputs, **{**GREEDY, **options}, num_beams=beams)
    finally:
        config._attn_implementation = {"": before}


def furthest(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(one.scores, other.scores, strict=True))
    return max((a - b)[a.isfinite()].abs().max().item() for a, b in zip(one.scores, other.scores, strict=True))


@pytest.mark.parametrize("beams", [1, 3])
class TestOfEveryFamily:
    def test_all_kept_is_unpruned(self, family, beams):
        model, inputs = family
        before = model.generate(**inputs, **GREEDY, num_beams=beams)
        with prune.apply(model, "merge", budget=1.0):
            pruned = model.generate(**inputs, **GREEDY, num_beams=beams)
        assert furthest(before, pruned) < 1e-3
        assert any(type(layer).__name__ == "PrunedLayer" for layer in pruned.past_key_values.layers)
        after = model.generate(**inputs, **GREEDY, num_beams=beams)
        assert furthest(before, after) == 0

    def test_pruned_is_masked(self, family, beams):
        model, inputs = family
        pruner = Drawn()
        pruner.beams = beams
        expected = masked(model, inputs, pruner, beams)
        with prune.apply(model, pruner):
            pruned = model.generate(**inputs, **GREEDY, num_beams=beams)
        assert furthest(expected, pruned) < 1e-4
        full = model.generate(**inputs, **GREEDY, num_beams=beams)
        one, other = full.scores[1], pruned.scores[1]
        assert (one - other)[one.isfinite()].abs().max() > 0.01  # it did drop something


@pytest.mark.parametrize("beams", [1, 2])
def test_read_in_pieces(family, beams, monkeypatch):
    """Of a prompt that is read in pieces nothing is lost but what is pruned."""
    monkeypatch.setattr("whisperkv.prune.applying.PIECE", 9)
    model, inputs = family
    before = model.generate(**inputs, **GREEDY, num_beams=beams)
    passes = []
    language_model = family_of(model).language_model(model)
    hook = language_model.register_forward_hook(lambda *_: passes.append(1))
    with prune.apply(model, "window", budget=1.0, stream=True):
        read = model.generate(**inputs, **GREEDY, num_beams=beams)
        stats = prune.stats(model)
    hook.remove()
    # Where experts are chosen, a rounding may choose another one.
    assert furthest(before, read) < (1 if "moe" in model.config.model_type else 1e-3)
    tokens = inputs["input_ids"].shape[1]
    pieces = 1 if model.config.model_type == "phi4_multimodal" else -(-tokens // 9)
    assert len(passes) == pieces + len(read.scores) - 1
    assert (stats.prompts, stats.note) == (1, "") and stats.audio_tokens == int(
        (inputs["input_ids"] == AUDIO).sum(-1).max()
    )


def layers_of(output):
    return output.past_key_values.layers


class TestOfWhatIsKept:
    @pytest.mark.parametrize(
        "budget, expected", [(0.5, [25, 15, 10]), (1, [1, 1, 1]), (24, [24, 24, 20]), (0.01, [1, 1, 1])]
    )
    @pytest.mark.parametrize("name", ["random", "stride", "window", "token_attn_recency"])
    def test_budget(self, qwen, name, budget, expected):
        model, inputs = qwen
        text = inputs["attention_mask"].sum(-1) - torch.tensor([50, 30, 20])
        with prune.apply(model, name, budget=budget):
            output = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1})
            stats = prune.stats(model)
        for layer in layers_of(output):
            assert torch.equal(layer.lengths - text[:, None], torch.tensor(expected)[:, None].expand(3, KV_HEADS))
        assert all(layer == pytest.approx([sum(expected) / 3] * KV_HEADS) for layer in stats.kept)
        assert (stats.rows, stats.audio_tokens, stats.prompts) == (3, 50, 1)
        assert 0 < stats.bytes and stats.bytes_full == 2 * LAYERS * 3 * KV_HEADS * inputs["input_ids"].shape[1] * 16 * 4

    def test_window_keeps_the_last(self, qwen):
        model, inputs = qwen
        with torch.no_grad():
            full = model(**inputs).past_key_values.layers[1]
            with prune.apply(model, "window", budget=4):
                layer = model(**inputs).past_key_values.layers[1]
        ends = (inputs["input_ids"] == AUDIO).cumsum(-1).argmax(-1)
        for row, end in enumerate(ends.tolist()):
            mine = layer.keys[row, layer.offsets[row, 1] :][: layer.lengths[row, 1]]
            text = int(layer.lengths[row, 1]) - 6
            assert torch.allclose(mine[2:6], full.keys[row, 1, end - 3 : end + 1], atol=1e-5)
            assert torch.allclose(mine[6:], full.keys[row, 1, end + 1 :][:text], atol=1e-5)

    def test_whole_heads(self, qwen):
        model, inputs = qwen
        with prune.apply(model, "head_l1", budget=0.5):
            model.generate(**inputs, **GREEDY)
            stats = prune.stats(model)
        assert all(sum(layer) == pytest.approx(100 / 3) for layer in stats.kept)
        assert "0.00 MB" not in str(stats) and "audio tokens kept" in str(stats)

    def test_several_clips_in_a_row(self, qwen):
        model, _ = qwen
        both = prompt([50]), prompt([30], seed=3)
        inputs = {name: torch.cat([each[name] for each in both], -1) for name in both[0]}
        inputs |= {"input_features": mels(2), "feature_attention_mask": lengths(200, 120)}
        clips = []

        class Listening(Drawn):
            def score(self, k, v, attn_weights, meta):
                clips.append(meta.clip)
                assert meta.rate == 25 and meta.layers == LAYERS and meta.embeddings.shape == (1, 80, 64)
                return super().score(k, v, attn_weights, meta)

        pruner = Listening()
        expected = masked(model, inputs, pruner)
        with prune.apply(model, pruner):
            assert furthest(expected, model.generate(**inputs, **GREEDY)) < 1e-4
        assert clips[0].tolist() == [[0] * 50 + [1] * 30]

    def test_attention_received(self, qwen):
        """What token_attn_recency is shown is what eager attention gives."""
        model, inputs = qwen
        shown = []

        class Looking(BasePruner):
            needs_attention, every = True, 1

            def score(self, k, v, attn_weights, meta):
                shown.append((attn_weights, meta))
                return attn_weights

        model.get_decoder().config._attn_implementation = {"": "eager"}
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
            with prune.apply(model, Looking()):
                model(**inputs)
        visible = inputs["attention_mask"]
        first = int((inputs["input_ids"] == AUDIO).int().argmax(-1).min())
        for attention, (received, meta) in zip(attentions, shown, strict=True):
            attention = attention * visible[:, None, :, None]
            expected = attention.sum(2).view(3, KV_HEADS, -1, attention.shape[-1]).sum(2)
            expected = expected.gather(2, meta.tokens[:, None].expand(-1, KV_HEADS, -1))
            present = meta.present[:, None]
            assert first == 2 and torch.allclose(received * present, expected * present, atol=1e-4)
            last = inputs["input_ids"].shape[1]
            assert torch.equal(meta.seen * meta.present, (last - meta.tokens) * meta.present)

    def test_merged_tokens_count(self):
        """Of two equal tokens one that counts twice does for both."""
        torch.manual_seed(0)
        keys, values = torch.randn(1, KV_HEADS, 6, 16), torch.randn(1, KV_HEADS, 6, 16)
        keys[:, :, 3], values[:, :, 3] = keys[:, :, 2], values[:, :, 2]
        query = torch.randn(1, 4, 1, 16)
        from whisperkv.prune.attention import ragged_attention

        def attended(index, counts=None):
            index = torch.tensor(index).expand(1, KV_HEADS, -1)
            layer = PrunedLayer.gather(keys, values, index, 6)
            if counts is not None:
                there = index[..., None].expand(-1, -1, -1, 16)
                weights = torch.tensor(counts).expand(1, KV_HEADS, -1)
                kept = prune.Kept(keys.gather(2, there), values.gather(2, there), weights)
                layer.hold(torch.arange(len(counts)).expand(1, KV_HEADS, -1), kept)
            return ragged_attention(query, layer, 0.25)

        full, merged = attended([0, 1, 2, 3, 4, 5]), attended([0, 1, 2, 4, 5], [1.0, 1.0, 2.0, 1.0, 1.0])
        assert torch.allclose(full, merged, atol=1e-6)
        assert not torch.allclose(full, attended([0, 1, 2, 4, 5]), atol=1e-3)


class TestOfDecoding:
    def test_two_threads_and_two_models(self, qwen):
        model, inputs = qwen
        other, given = make("voxtral")
        jobs = [(model, inputs), (other, given)] * 2
        with prune.apply(model, Drawn()), prune.apply(other, "token_attn_recency"):
            alone = [each.generate(**what, **GREEDY).sequences for each, what in jobs]
            together = [None] * len(jobs)

            def work(number):
                each, what = jobs[number]
                together[number] = each.generate(**what, **GREEDY).sequences

            threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for one, two in zip(alone, together, strict=True):
            assert torch.equal(one, two)

    def test_long_decodes_find_room(self, qwen):
        model, inputs = qwen
        pruner = Drawn()
        expected = masked(model, inputs, pruner, max_new_tokens=80)
        with prune.apply(model, pruner):
            assert furthest(expected, model.generate(**inputs, **{**GREEDY, "max_new_tokens": 80})) < 1e-4

    @pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
    def test_assisted(self, qwen, how):
        model, inputs = qwen
        one = {name: value[:1] for name, value in inputs.items()}
        options = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {}
        greedy = {**GREEDY, "eos_token_id": 2}  # prompt lookup of transformers 5.10 must have one
        with prune.apply(model, Drawn()):
            expected = model.generate(**one, **greedy).sequences
            if how == "assistant":
                options["assistant_model"] = make("qwen2_audio")[0]  # it hears for itself
            assert torch.equal(model.generate(**one, **greedy, **options).sequences, expected)

    def test_where_there_are_no_ops(self, qwen, monkeypatch):
        """What they do is done in PyTorch, as on devices that have none."""
        model, inputs = qwen

        def decoded():
            outputs = []
            for pruner in ("merge", "token_attn_recency"):
                with prune.apply(model, pruner, budget=0.4):
                    outputs.append(model.generate(**inputs, **GREEDY))
            return outputs

        by_ops = decoded()
        monkeypatch.setattr("whisperkv.ops.prunes", lambda tensor: False)
        for ours, plain in zip(by_ops, decoded(), strict=True):
            assert furthest(ours, plain) < 1e-3

    def test_sampling_with_a_seed(self, qwen):
        model, inputs = qwen
        sampling = {**GREEDY, "do_sample": True}

        def sample():
            torch.manual_seed(5)
            return model.generate(**inputs, **sampling).sequences

        before = sample()
        with prune.apply(model, "stride", budget=1.0):
            assert torch.equal(sample(), before)

    def test_turns(self, qwen):
        """A second turn of text alone, and a third one that brings audio, over the same cache."""
        model, inputs = qwen
        one = {name: value[:1] for name, value in inputs.items()}
        more, third = torch.tensor([[30, 31, 32]]), prompt([30], texts=(4,), seed=9)["input_ids"]

        def chat():
            with torch.no_grad():
                cache = model(**one).past_key_values
                second = model(input_ids=more, past_key_values=cache).logits
                given = {"input_features": mels(1, seed=4), "feature_attention_mask": lengths(120)}
                last = model(input_ids=third, past_key_values=cache, **given).logits
                end = model(input_ids=more, past_key_values=cache).logits
            return cache, [second, last, end]

        _, before = chat()
        with prune.apply(model, "random", budget=1.0):
            _, all_kept = chat()
        for a, b in zip(before, all_kept, strict=True):
            assert torch.allclose(a, b, atol=1e-3)
        with prune.apply(model, "random", budget=10):
            cache, pruned = chat()
            assert prune.stats(model).prompts == 2
        tokens = one["input_ids"].shape[1] + 3 + third.shape[1] + 3
        assert cache.get_seq_length() == tokens
        for layer in cache.layers:
            assert layer.lengths.tolist() == [[tokens - 50 - 30 + 20] * KV_HEADS]
        assert not torch.allclose(before[2], pruned[2], atol=1e-2)

    def test_a_turn_with_padding(self, qwen):
        """Rows whose second turn is shorter are padded on the left: what pads enters no slot."""
        model, inputs = qwen
        more = torch.tensor([[30, 31, 32], [0, 33, 34], [0, 0, 35]])
        mask = torch.cat([inputs["attention_mask"], (more > 0).long()], -1)
        position = (mask.cumsum(-1) - 1).clamp(min=0)

        def chat():
            with torch.no_grad():
                first = inputs["input_ids"].shape[1]
                cache = model(**inputs, position_ids=position[:, :first]).past_key_values
                return model(input_ids=more, past_key_values=cache, attention_mask=mask,
                             position_ids=position[:, first:]).logits[:, -1], cache  # fmt: skip

        before, _ = chat()
        with prune.apply(model, "random", budget=1.0):
            after, cache = chat()
        assert torch.allclose(before, after, atol=1e-3)
        assert torch.equal(cache.layers[0].lengths[:, 0], mask.sum(-1).int())

    def test_text_before_the_pruner(self, qwen):
        """A conversation that began without it: what was cached before stays, padding left out."""
        model, inputs = qwen
        early = torch.tensor([[0, 40, 41], [42, 43, 44], [0, 0, 45]])
        mask = torch.cat([(early > 0).long(), inputs["attention_mask"]], -1)
        position = (mask.cumsum(-1) - 1).clamp(min=0)

        def chat():
            with torch.no_grad():
                text = dict(attention_mask=mask[:, :3], position_ids=position[:, :3], use_cache=True)
                cache = model(input_ids=early, **text).past_key_values

                @torch.no_grad()
                def go_on():
                    given = inputs | dict(attention_mask=mask, position_ids=position[:, 3:], past_key_values=cache)
                    return model(**given).logits[:, -1]

                return cache, go_on

        _, go_on = chat()
        before = go_on()
        cache, go_on = chat()
        with prune.apply(model, "random", budget=5):
            after = go_on()
        assert torch.allclose(before, after, atol=1e-3)  # the prompt itself is read in full
        assert torch.equal(cache.layers[0].lengths[:, 0], (mask.sum(-1) - torch.tensor([45, 25, 15])).int())

    def test_crop_stops_at_the_audio(self, qwen):
        model, inputs = qwen
        with torch.no_grad(), prune.apply(model, "random"):
            cache = model(**inputs).past_key_values
        before = [layer.lengths.clone() for layer in cache.layers]
        cache.crop(-3)
        assert all(torch.equal(layer.lengths, was - 3) for layer, was in zip(cache.layers, before, strict=True))
        with pytest.raises(ValueError, match="only the last 0 stand behind it"):
            cache.layers[0].crop(-1)

    def test_a_cache_outlives_its_pruner(self, qwen):
        model, inputs = qwen
        with torch.no_grad():
            with prune.apply(model, "random"):
                cache = model(**inputs).past_key_values
                expected = model(input_ids=torch.tensor([[30]] * 3), past_key_values=copy.deepcopy(cache)).logits
            with pytest.raises(RuntimeError, match="prune.apply"):
                model(input_ids=torch.tensor([[30]] * 3), past_key_values=copy.deepcopy(cache))
            with prune.apply(model, "window"):
                again = model(input_ids=torch.tensor([[30]] * 3), past_key_values=cache).logits
        assert torch.equal(expected, again)

    def test_no_gradients(self, qwen):
        model, inputs = qwen
        with prune.apply(model, "random"):
            model(**inputs)
            assert "gradients are on" in prune.stats(model).note
            with torch.no_grad():
                cache = model(**inputs).past_key_values
            with pytest.raises(RuntimeError, match="torch.no_grad"):
                model(input_ids=torch.tensor([[30]] * 3), past_key_values=cache)

    def test_left_alone(self, qwen):
        model, inputs = qwen
        before = model.generate(**inputs, **GREEDY)
        for options, note in (
            ({"cache_implementation": "static"}, "static"),
            ({"output_attentions": True}, "attentions"),
        ):
            if note == "attentions":
                model.set_attn_implementation("eager")
            with prune.apply(model, "random"):
                after = model.generate(**inputs, **GREEDY, **options)
                assert note in prune.stats(model).note.lower() or "keeps its shape" in prune.stats(model).note
            assert torch.equal(before.sequences, after.sequences)

    def test_same_bits_for_any_number_of_threads(self, qwen):
        model, inputs = qwen
        before = torch.get_num_threads()
        outputs = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with prune.apply(model, "token_attn_recency"):
                    outputs.append(model.generate(**inputs, **GREEDY))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)


class TestOfStreams:
    @pytest.fixture(autouse=True)
    def short_pieces(self, monkeypatch):
        monkeypatch.setattr("whisperkv.prune.applying.PIECE", 10)

    @pytest.mark.parametrize("budget, expected", [(12, [12, 12, 12]), (0.5, [25, 15, 10])])
    def test_window(self, qwen, budget, expected):
        model, inputs = qwen
        with torch.no_grad(), prune.apply(model, "window", budget=budget, stream=True):
            cache = model(**inputs).past_key_values
            stats = prune.stats(model)
        text = inputs["attention_mask"].sum(-1) - torch.tensor([50, 30, 20])
        for layer in cache.layers:
            assert torch.equal(layer.lengths - text[:, None], torch.tensor(expected)[:, None].expand(3, KV_HEADS).int())
            assert layer.get_seq_length() == inputs["input_ids"].shape[1]
        assert stats.kept[0][0] == pytest.approx(sum(expected) / 3) and stats.audio_tokens == 50

    def test_the_first_layer_keeps_what_it_is_told(self, qwen):
        """Below it nothing has been pruned: the keys of the last tokens are those of the full cache."""
        model, inputs = qwen
        one = {name: value[:1] for name, value in inputs.items()}
        with torch.no_grad():
            full = model(**one).past_key_values.layers[0].keys[0]
            with prune.apply(model, "window", budget=12, stream=True):
                layer = model(**one).past_key_values.layers[0]
        kept = [*range(2), *range(52 - 12, full.shape[1])]
        for head in range(KV_HEADS):
            mine = layer.keys[0, layer.offsets[0, head] :][: layer.lengths[0, head]]
            assert torch.allclose(mine, full[head, kept], atol=1e-5)

    def test_budget_counts_over_turns(self, qwen):
        model, inputs = qwen
        one = {name: value[:1] for name, value in inputs.items()}
        more = prompt([30], texts=(4,), seed=9)["input_ids"]
        with torch.no_grad(), prune.apply(model, "window", budget=20, stream=True):
            cache = model(**one).past_key_values
            for _ in range(30):
                model(input_ids=torch.tensor([[30]]), past_key_values=cache)
            given = {"input_features": mels(1, seed=4), "feature_attention_mask": lengths(120)}
            model(input_ids=more, past_key_values=cache, **given)
            assert prune.stats(model).audio_tokens == 80 and prune.stats(model).kept[0] == (20.0, 20.0)
        text = one["input_ids"].shape[1] - 50 + 30 + 6
        assert cache.layers[0].lengths.tolist() == [[text + 20] * KV_HEADS]

    def test_sentence_starts_outlive_the_rest(self, qwen):
        model, inputs = qwen
        one = {name: value[:1].clone() for name, value in inputs.items()}
        features = one["input_features"]
        features[:, :, 60:110] = features.min() - 3
        shown = []

        class Looking(prune.pruners.PRUNERS["streaming_anchor"]):
            def score(self, k, v, attn_weights, meta):
                scores = super().score(k, v, attn_weights, meta)
                shown.append((meta.heard if isinstance(meta.heard, int) else int(meta.heard), scores[0, 0].tolist()))
                return scores

        with torch.no_grad(), prune.apply(model, Looking(anchor=3), budget=16, stream=True):
            model(**one)
        scores = [number for heard, some in shown[::LAYERS] for number in some]
        anchors = [place for place, number in enumerate(scores) if number > place + 1]
        assert anchors[:3] == [0, 1, 2] and len(anchors) == 6 and 26 <= anchors[3] <= 29
        assert [heard for heard, _ in shown[::LAYERS]] == [0, 8, 18, 28, 38, 48][: len(shown) // LAYERS]

    def test_who_can(self, qwen):
        with pytest.raises(ValueError, match="streaming_anchor, window"):
            prune.apply(qwen[0], "merge", stream=True)
        with pytest.raises(TypeError, match="True or False"):
            prune.apply(qwen[0], "window", stream="yes")


class TestOfBadInput:
    @pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, 1.5, float("nan"), True, "half", None])
    def test_budget(self, qwen, budget):
        with pytest.raises((ValueError, TypeError), match="budget must be"):
            prune.apply(qwen[0], "random", budget=budget)
        assert qwen[0].get_decoder().config._attn_implementation == "sdpa"

    def test_pruner(self, qwen):
        with pytest.raises(ValueError, match="token_attn_recency.*window"):
            prune.apply(qwen[0], "token_salience")
        with pytest.raises(TypeError, match="sead"):
            prune.apply(qwen[0], "random", sead=3)
        with pytest.raises(ValueError, match="recency"):
            prune.apply(qwen[0], "token_attn_recency", recency=2)

    def test_model(self):
        model = LlamaForCausalLM(LlamaConfig(**TEXT))
        with pytest.raises(TypeError, match="llama.*qwen2_audio"):
            prune.apply(model)
        with pytest.raises(TypeError, match="int"):
            prune.apply(3)
        with pytest.raises(ValueError, match="prune.apply"):
            prune.stats(make("voxtral")[0])

    def test_prompt(self, qwen):
        model, inputs = qwen
        text = torch.randint(20, VOCABULARY, (1, 6))
        with prune.apply(model, "random"):
            with pytest.raises(ValueError, match="no audio in the prompt"):
                model.generate(input_ids=text, **GREEDY)
            cut = {name: inputs[name][:, :40] for name in ("input_ids", "attention_mask")}
            with pytest.raises(ValueError, match="ends inside its audio"):
                model.generate(**inputs | cut, **GREEDY)
            assert model.generate(**inputs, **GREEDY).sequences.shape[0] == 3
        assert torch.equal(model.generate(input_ids=text, **GREEDY).sequences[:, :6], text)

    def test_scores_of_another_shape(self, qwen):
        class Wrong(BasePruner):
            def score(self, k, v, attn_weights, meta):
                return torch.zeros(3)

        with prune.apply(qwen[0], Wrong()), pytest.raises(ValueError, match="Wrong.score must return"):
            qwen[0].generate(**qwen[1], **GREEDY)


class TestOfTheWayIn:
    def test_apply_again_and_remove(self, qwen):
        model, inputs = qwen
        before = model.generate(**inputs, **GREEDY)
        hooks = len(model._forward_pre_hooks), len(model.get_decoder()._forward_hooks)
        first = prune.apply(model, "random", budget=0.3)
        second = prune.apply(model, "window", budget=0.6)
        model.generate(**inputs, **GREEDY)
        assert prune.stats(model).kept[0][0] == pytest.approx((30 + 18 + 12) / 3)
        first.remove()  # it has been replaced: nothing is left to undo
        assert prune.stats(model).prompts == 1
        prune.remove(model)
        prune.remove(model)
        second.remove()
        assert (len(model._forward_pre_hooks), len(model.get_decoder()._forward_hooks)) == hooks
        assert torch.equal(model.generate(**inputs, **GREEDY).sequences, before.sequences)

    def test_what_it_is(self, qwen):
        assert repr(prune.apply(qwen[0], "stride", budget=8)) == "Pruning(Stride(), budget=8)"

    def test_saving(self, qwen, tmp_path):
        model, inputs = qwen
        with prune.apply(model, "random"):
            model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.get_decoder().config._attn_implementation == "sdpa"
        assert torch.equal(again.generate(**inputs, **GREEDY).sequences, model.generate(**inputs, **GREEDY).sequences)

    def test_others_bring_their_own(self, qwen, monkeypatch):
        entry = EntryPoint("drawn", "test_prune:Drawn", pruners.GROUP)
        monkeypatch.setattr(pruners, "entry_points", lambda group: [entry] if group == pruners.GROUP else [])
        assert "drawn" in prune.names() and "random" in prune.names()
        with prune.apply(qwen[0], "drawn", share=0.2) as pruning:
            assert type(pruning.pruner).__name__ == "Drawn" and pruning.pruner.share == 0.2
