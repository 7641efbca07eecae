"""Pictures show what was recorded and measured; the documentation's code makes them."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from whisperkv import EvictionConfig, attention_kept, patch, plot, simulate_eviction, trace, unpatch
from whisperkv.evaluation import Result

pytest.importorskip("matplotlib")

DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
FEATURES = torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(1))


def recorded(model):
    with trace(model) as found:
        model.generate(FEATURES, max_new_tokens=24, min_new_tokens=24)
    return found


def result(setting, caches, wer, nll, **more):
    zero = dict.fromkeys(
        "audios seconds words substitutions deletions insertions tokens self_bytes self_bytes_transformers "
        "cross_bytes_transformers weight_bytes evicted memory_before loops same_texts".split(), 0,
    )  # fmt: skip
    given = dict(
        setting=setting, python="", model="", language="en", wer=wer, wer_interval=(0, 9), wer_difference=wer - 5,
        wer_difference_interval=(wer - 6, wer - 3), nll=nll, nll_difference=nll - 0.2, nll_difference_interval=None,
        rtfx=1, seconds_taken=3, cross_bytes=caches, frames_share=1, peak_memory=caches,
    )  # fmt: skip
    return Result(**{**zero, **given, **more})


def test_which_tokens_stay(small):
    found = recorded(patch(small, EvictionConfig("window", recent=8, heavy=0)))
    figure = plot.tokens_kept(found)
    one, two = figure.axes
    shown = one.images[0].get_array()
    held = found.kept(0)
    assert ((shown == 2) == held).all() and (shown == 1).sum() == np.tri(*held.shape, 1, dtype=bool).sum() - held.sum()
    assert (one.get_title("left"), two.get_title("left")) == ("layer 0", "layer 1")
    assert len(plot.tokens_kept(found, layers=[1]).axes) == 1


def test_attention_kept(small):
    found = recorded(small)
    configs = {"much": EvictionConfig(recent=8, heavy=8), "little": EvictionConfig("magnitude", recent=4, heavy=2)}
    (panel,) = plot.attention_over_time(found, configs, layer=1).axes
    attention = found.attention(1)
    for line, (name, config) in zip(panel.lines, configs.items()):
        keys = found.keys(1) if config.policy == "magnitude" else None
        right = attention_kept(attention, simulate_eviction(attention, config, keys))
        assert line.get_label() == name and np.allclose(line.get_ydata(), right)
    (mean,) = plot.attention_over_time(found, [configs["much"]]).axes
    assert mean.lines[0].get_label() == "heavy_hitter 8+8"


def test_bytes_over_time(small):
    found = recorded(small)
    left, right = plot.cache_over_time({"all": found}).axes
    assert np.allclose(left.lines[0].get_ydata() * 1e6, found.cache_bytes()[:, 0]) and right.get_title("left")


def test_tradeoff():
    results = [result("all", 100e6, 5, 0.2), result("some", 10e6, 5.5, 0.21), result("bad", 50e6, 7, 0.4)]
    (panel,) = plot.tradeoff(results).axes
    assert panel.get_xscale() == "log" and panel.lines[0].get_xdata().tolist() == [10e6, 100e6], "none beats these"
    (panel,) = plot.tradeoff(results, "nll", "seconds").axes
    assert panel.get_ylabel() == "NLL, nats a token" and panel.get_xscale() == "linear"
    with pytest.raises(ValueError, match="y must be one of wer, nll and x one of bytes, seconds, memory; got y='cer'"):
        plot.tradeoff(results, "cer")
    with pytest.raises(ValueError, match="no result has wer"):
        plot.tradeoff([replace(each, wer=None) for each in results])


def test_pareto():
    assert plot.pareto([3, 1, 2, 2], [1, 5, 4, 2]) == [1, 3, 0] and plot.pareto([1, 2], [1, 1]) == [0]


def test_sizes():
    assert [plot.size(count) for count in (999, 1530, 2.5e6, 7e10)] == ["999 B", "1.53 kB", "2.5 MB", "70 GB"]


def test_the_same_picture_again():
    figure = plot.bars(["a", "b"], [1, 2], "title")
    text = plot.svg(figure)
    assert text == plot.svg(figure) and text.startswith("<svg") and "<text" in text and "title" in text


def test_the_code_of_the_documentation(small):
    (block,) = [code for code in BLOCKS if "plot.tokens_kept" in code]
    small.generation_config.max_length, names = 40, {"model": small, "features": FEATURES}
    exec(compile(block, DOCS.name, "exec"), names)
    assert names["recorded"].kept().sum() > names["evicting"].kept().sum()
    unpatch(small)
