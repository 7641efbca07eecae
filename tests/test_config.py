"""Settings that cannot work are refused by name, before a model is touched."""

import pytest

from whisperkv import EvictionConfig


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("recent", 0, "1 or more"),
        ("recent", -3, "1 or more"),
        ("recent", 12.5, "whole number"),
        ("recent", 64.0, "whole number"),
        ("recent", True, "whole number"),
        ("recent", "64", "whole number"),
        ("heavy", -1, "0 or more"),
        ("heavy", 0.5, "whole number"),
        ("policy", "heavy", "'heavy_hitter', 'magnitude', 'window'"),
        ("policy", None, "a function"),
        ("decay", 0, "above 0"),
        ("decay", 1.01, "up to 1"),
        ("decay", float("nan"), "above 0"),
        ("decay", "0.9", "a number"),
        ("pin_prompt", 1, "True or False"),
    ],
)
def test_refuses(field, value, allowed):
    with pytest.raises(ValueError, match=f"EvictionConfig.{field} must be .*{allowed}.*got"):
        EvictionConfig(**{field: value})


def test_defaults_and_budget():
    config = EvictionConfig()
    assert (config.policy, config.recent, config.heavy, config.pin_prompt) == ("heavy_hitter", 64, 32, True)
    assert config.budget == 96
    assert EvictionConfig(lambda *layer: layer[0], recent=4).budget == 36


def test_prompt_must_fit():
    config = EvictionConfig(recent=8, heavy=4)
    config.check_prompt(11)
    with pytest.raises(ValueError, match="raise heavy to 5 or more, or set pin_prompt=False"):
        config.check_prompt(12)
    EvictionConfig(recent=8, heavy=4, pin_prompt=False).check_prompt(400)
