"""Settings that cannot work are refused by name, before a model is touched."""

import copy
import pickle

import numpy as np
import pytest

from whisperkv import CrossConfig, EvictionConfig

MOST = 2**31 - 1


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("recent", 0, "1 or more"),
        ("recent", -3, "1 or more"),
        ("recent", 12.5, "whole number"),
        ("recent", 64.0, "whole number"),
        ("recent", True, "whole number"),
        ("recent", "64", "whole number"),
        ("recent", 10**12, "up to 2147483647"),
        ("heavy", 10**12, "up to 2147483647"),
        ("heavy", MOST, "2147483583 or less, as recent . heavy"),
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


def test_the_most_there_can_be():
    assert EvictionConfig(recent=MOST, heavy=0).budget == EvictionConfig(recent=1, heavy=MOST - 1).budget == MOST
    assert EvictionConfig(recent=np.int8(100), heavy=np.int8(100)).budget == 200  # would wrap around
    with pytest.raises(ValueError, match=r"EvictionConfig.heavy must be 2147483583 or less.*got .*2147483584"):
        EvictionConfig(recent=np.int32(64), heavy=np.int32(MOST - 63))
    assert CrossConfig(group=2**31 - 256).group == 2**31 - 256
    with pytest.raises(ValueError, match="CrossConfig.group must be .*up to 2147483647; got 2147483648"):
        CrossConfig(group=2**31)


@pytest.mark.parametrize(
    "kind, given, text",
    [
        (EvictionConfig, dict(budget=96), "no 'budget', it takes policy, recent, .*: recent . heavy are the budget"),
        (EvictionConfig, dict(recent=3, hevy=4), "no 'hevy', it takes policy, recent, heavy, decay, pin_prompt"),
        (CrossConfig, dict(formatt="int8"), "has no 'formatt', it takes format, trim, share_beams, group, merge, "),
    ],
)
def test_fields_that_are_not_there(kind, given, text):
    with pytest.raises(TypeError, match=text):
        kind(**given)


def test_copies():
    for config in (EvictionConfig("window", recent=3), CrossConfig("int8", group=512, merge=0.25)):
        assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_prompt_must_fit():
    config = EvictionConfig(recent=8, heavy=4)
    config.check_prompt(11)
    with pytest.raises(ValueError, match="raise heavy to 5 or more, or set pin_prompt=False"):
        config.check_prompt(12)
    EvictionConfig(recent=8, heavy=4, pin_prompt=False).check_prompt(400)
