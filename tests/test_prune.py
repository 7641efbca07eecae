"""Speech LLMs with their audio pruned: what stays, and that nothing else changes."""

import dataclasses
import math
import threading

import pytest
import torch
from speech_models import AUDIO, KV_HEADS, LAYERS, MODELS, make, prompt
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from whisperkv import prune
from whisperkv.prune import BasePruner
from whisperkv.prune.base import places

GREEDY = dict(
    max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True, eos_token_id=None, pad_token_id=0,
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
    for layer in range(LAYERS):
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
        if key.shape[2] > tokens and getattr(module, "layer_idx", None) is not None:
            keep = attention[module.layer_idx].repeat_interleave(groups, 1)
            logits[..., :tokens] = logits[..., :tokens].masked_fill(~keep[:, :, None], torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("hide", hide)
    ALL_MASK_ATTENTION_FUNCTIONS.register("hide", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = {"": "hide"}
    try:
        return model.generate(**inputs, **{**GREEDY, **options}, num_beams=beams)
    finally:
        config._attn_implementation = {"": before}


def furthest(one, other):
    assert torch.equal(one.sequences, other.sequences)
    return max((a - b).abs().max().item() for a, b in zip(one.scores, other.scores, strict=True) if a.isfinite().all())


@pytest.mark.parametrize("beams", [1, 3])
class TestOfEveryFamily:
    def test_all_kept_is_unpruned(self, family, beams):
        model, inputs = family
        before = model.generate(**inputs, **GREEDY, num_beams=beams)
        with prune.apply(model, "random", budget=1.0):
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
        assert not torch.equal(full.sequences, pruned.sequences)  # it did drop something
