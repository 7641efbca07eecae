"""tune(): which settings go on, which is chosen, and what is said of too little audio. Measurements are made up."""

import numpy as np
import pytest
import torch

from whisperkv.evaluation import Audio, metrics, tune, tuning
from whisperkv.evaluation.measuring import CACHES, Measured

pytest.importorskip("jiwer")

WORDS = "we went over there and saw what they had done"


class Whisper:
    device, dtype, name_or_path = torch.device("cpu"), torch.float32, "made up"


def audios(count, text=5 * f"{WORDS} "):
    return [Audio(f"audio {number}", text, [np.ones(16000, np.float32)]) for number in range(count)]


@pytest.fixture
def made_up(monkeypatch):
    """Settings take as long as `seconds` says, lose as much as `nats` says, and are noted in `heard`."""

    class World:
        seconds = staticmethod(lambda setting: 1.0)
        nats = staticmethod(lambda setting: 0.0)
        size = staticmethod(lambda setting: 100)
        wrong = staticmethod(lambda setting, number: "")
        heard: list = []

        @classmethod
        def measure(cls, model, processor, audios, setting, options, given=None, on_window=None):
            cls.heard.append((setting.name, len(audios)))
            random = np.random.default_rng([len(cls.heard)])
            texts = [5 * f"{WORDS} " + cls.wrong(setting, int(audio.name.split()[-1])) for audio in audios]
            lost = cls.nats(setting) * (1 + 0.1 * random.standard_normal(len(audios)))
            held = dict(zip(CACHES, (cls.size(setting), 0, 0, 0, 0, 0, 1.0)))
            about = dict.fromkeys(("device", "dtype", "threads", "isa", "whisperkv", "transformers", "torch"), "x")
            return Measured(
                setting, [[text] for text in texts], [[0] * 10 for _ in audios],
                [[10 * (0.2 + float(more))] for more in lost], [[10] for _ in audios],
                [cls.seconds(setting) * len(audios)], held, 0, 0, {"language": "en", **about},
            )  # fmt: skip

    World.heard = []
    monkeypatch.setattr(tuning, "measure", World.measure)
    monkeypatch.setattr(metrics, "ROUNDS", 1000)
    return World


def test_rounds():
    assert list(tuning.rounds(100, 48)) == [(4, 16), (12, 6), (34, 4), (100, 4)]
    assert list(tuning.rounds(3, 48)) == [(3, 48)] and list(tuning.rounds(11, 2)) == [(11, 2)]


def test_candidates():
    found = tuning.candidates(Whisper, 1000)
    names = [each.name for each in found]
    assert names[:3] == ["lossless", "fastest", "smallest"] and len(set(names)) == len(names) == 6 * 9 * 3 + 1
    assert len({(each.eviction, each.cross, each.weights) for each in found}) == len(found)
    assert [each.name for each in tuning.candidates(Whisper, 7)] == names[:7]

    class Half(Whisper):
        dtype = torch.float16

    assert {each.weights for each in tuning.candidates(Half, 1000)} == {"model"}


def test_the_fastest_within_the_bounds(made_up):
    """int8 matrices are fast, merging is faster and loses too much."""
    made_up.seconds = lambda each: 1.0 / (1 + 2 * (each.weights == "int8") + 4 * (each.cross.merge > 0))
    made_up.nats = lambda each: 0.5 * (each.cross.merge > 0) + 0.001 * (each.weights == "int8")
    found = tune(Whisper, None, audios(40), count=80)
    assert found.setting.weights == "int8" and found.setting.cross.merge == 0 and found.goal == "speed"
    assert found.python == found.setting.python and "weights='int8'" in found.python and not found.advice
    assert found.options.startswith("--weights int8 --cross ") and found.entries[0].setting.name == "unpatched"
    counts = dict.fromkeys((each.setting.name for each in found.entries), 0)
    for name, many in made_up.heard:
        counts[name] += many
    assert counts["unpatched"] == counts[found.setting.name] == counts["lossless"] == 40, "no audio is heard twice"
    lost = [each for each in found.entries if each.setting.cross.merge > 0]
    assert lost and all(counts[each.setting.name] == each.audios == 5 for each in lost), "they go at once"
    assert sum(counts.values()) < 40 * len(counts) / 3 and len(found.finalists) < 12


def test_the_smallest(made_up):
    made_up.size = lambda each: 100 if each.cross.format == "model" else 10 if "int8" in each.cross.format else 5
    made_up.nats = lambda each: 0.03 if "int4" in each.cross.format else 0.004
    found = tune(Whisper, None, audios(40), goal="memory", count=80)
    assert "int8" in found.setting.cross.format
    (entry,) = [each for each in found.entries if each.setting == found.setting]
    assert entry.share == 0.1 and entry.audios == 40


def test_words_count_too(made_up):
    """A setting that is fast and likely, but adds a word to every recording."""
    made_up.seconds = lambda each: 0.2 if each.weights == "int8" else 1.0 if each.weights == "model" else 0.5
    made_up.wrong = lambda setting, number: " more" if setting.weights == "int8" else ""
    found = tune(Whisper, None, audios(40), count=40)
    assert found.setting.weights == "bfloat16"


def test_too_little_audio_is_said_to_be_too_little(made_up):
    made_up.seconds = lambda each: 0.2 if each.weights == "int8" else 1.0
    made_up.wrong = lambda setting, number: " more" * 5 if setting.weights == "int8" and number == 1 else ""
    found = tune(Whisper, None, audios(40), within_wer=0.3, count=20)
    assert found.setting.name == "lossless" or found.setting.weights != "int8"
    assert "40 recordings are too few to be sure of it: WER +0.25 (+0.00 to +0.75) points" in found.advice
    assert int(found.advice.split("Some ")[1].split()[0]) > 1000
    found = tune(Whisper, None, audios(40), within_wer=0.8, count=20)
    assert found.setting.weights == "int8" and not found.advice
    made_up.wrong = lambda setting, number: ""
    found = tune(Whisper, None, audios(tuning.FEW - 1), within_wer=1, count=20)
    assert found.setting.name == "lossless" and f"Some {tuning.FEW} would tell" in found.advice
    found = tune(Whisper, None, audios(15), within_wer=0.3, count=20)
    assert found.setting.name == "lossless" and "too few" in found.advice, "750 words prove no 0.3 points"


def test_windows_where_there_are_no_references():
    long = [Audio("a", "", [np.ones(3)] * 3), Audio("b", "", [np.ones(3)])]
    assert [each.name for each in tuning.units_of(long)] == ["a, window 1", "a, window 2", "a, window 3", "b, window 1"]
    long[0].text = "said"
    assert tuning.units_of(long) == long


@pytest.mark.parametrize(
    "given, message",
    [
        ({"goal": "size"}, "goal must be one of speed, memory; got 'size'"),
        ({"within_wer": -1}, "within_wer must be a number of 0 or more; got -1"),
        ({"within_nll": "a"}, "within_nll must be a number of 0 or more; got 'a'"),
        ({"count": 0}, "count must be 1 or more; got 0"),
    ],
)
def test_what_tune_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        tune(Whisper, None, audios(3), **given)
