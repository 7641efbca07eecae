"""A recording on its way: its windows, one after another or as many as there are, and the segments found so far.

Both ways give out windows and take attempts back:
Spoken      windows of speech (Silero), which know nothing of one another and can be decoded together
Sequential  Whisper's own way: a window of 30 s begins where the last one's phrases ended, with its text as the prompt
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .audio import RATE, Samples
from .decoding import Attempt, Decoder
from .phrases import Phrase, phrases
from .results import Segment, Transcript, Word
from .speech import Cut, cuts
from .tape import Tape

WINDOW = 30 * RATE
REST = 1.0  # seconds of speech after the last phrase that are worth a window of their own
COLD = 0.5  # a text that was decoded above this temperature is no prompt
SHORTEST = RATE // 10  # samples that are worth a window
LEAST = 0.5  # seconds by which the windows go on

Words = Callable[[list[Phrase]], list[list[Word]]]  # of each phrase, in seconds from the window's beginning


@dataclass(eq=False)
class Window:
    recording: "Recording"
    cut: Cut
    prompt: list[int]

    @property
    def begin(self) -> int:
        """Its place in the recording."""
        return self.cut.begin

    @property
    def samples(self) -> Samples:
        return self.cut.samples

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


class Recording:
    def __init__(self, number: int, name: str, tape: Tape, decoder: Decoder) -> None:
        self.number, self.tape, self.decoder, self.settings = number, tape, decoder, decoder.settings
        language = self.settings.language or (None if decoder.languages else "en")
        self.transcript = Transcript(name, language or "", 1.0 if language else 0.0, 0.0)
        self.ready: list[Window] = []  # to be decoded
        self.is_over = False  # no further windows
        self.prompt = decoder.prompt_of(self.settings.initial_prompt) if self.settings.initial_prompt else []
        self._waiting: dict[int, list[Segment] | None] = {}  # of the windows by where they begin; None: not decoded

    @property
    def language(self) -> str | None:
        return self.transcript.language or None

    @property
    def is_done(self) -> bool:
        return self.is_over and not self.ready and not self._waiting

    def fill(self, count: int) -> None:
        """Let up to `count` windows be ready, if there are as many; one until the language is known."""
        while not self.is_over and len(self.ready) < (count if self.language else 1 - len(self._waiting)):
            window = self._next()
            if window is None:
                self.is_over = True
                self.transcript.duration = self.tape.end / RATE
            else:
                self._give(window)

    def take(self, window: Window, attempt: Attempt, words: Words | None) -> list[Segment]:
        """What was heard in a window. Returns the segments that are now known with all before them."""
        if not self.language:
            self.transcript.language, self.transcript.language_probability = (
                attempt.language,
                attempt.language_probability,
            )
        found: list[Phrase] = []
        go_on, is_cut = window.seconds, False
        if not self.decoder.is_silence(attempt):
            found, go_on, is_cut = phrases(attempt.tokens, self.decoder.first_time, window.seconds)
        found = self._kept(window, attempt, found, go_on, is_cut)
        segments = [self._segment(window, attempt, phrase) for phrase in found]
        said = words(found) if words and found else []
        for segment, these in zip(segments, said):
            _place(segment, these, window.cut)
        self._waiting[window.begin] = [one for one in segments if one.text.strip()]
        return self._known()

    def _next(self) -> Window | None:
        raise NotImplementedError

    def _kept(self, window: Window, attempt: Attempt, found: list[Phrase], go_on: float, is_cut: bool) -> list[Phrase]:
        """Those phrases that are not to be heard again in another window."""
        raise NotImplementedError

    def _give(self, window):
        self.ready.append(window)
        self._waiting[window.begin] = None

    def _segment(self, window, attempt, phrase):
        text = self.decoder.text_of(phrase.tokens)
        begin, end = _seconds(window.cut.phrase_places, phrase.begin, phrase.end)
        return Segment(
            0, window.begin * 100 // RATE, begin, end, text, phrase.tokens, attempt.temperature, attempt.avg_logprob,
            attempt.compression_ratio, attempt.no_speech_prob,
        )  # fmt: skip

    def _known(self):
        known = []
        for begin in sorted(self._waiting):
            segments = self._waiting[begin]
            if segments is None:
                break
            known += segments
            del self._waiting[begin]
        for segment in known:
            segment.id = len(self.transcript.segments)
            self.transcript.segments.append(segment)
        return known


class Spoken(Recording):
    def __init__(self, *given) -> None:
        super().__init__(*given)
        self._cuts: Iterator[Cut] = cuts(self.tape)

    def _next(self):
        cut = next(self._cuts, None)
        return cut and Window(self, cut, self.prompt)

    def _kept(self, window, attempt, found, go_on, is_cut):
        """All, but a last one that the limit of tokens has cut; what is spoken after them is heard in a window of its
        own."""
        if not found:
            return found
        if is_cut:
            if attempt.is_whole or go_on <= 0:
                return found
            found = found[:-1]
        left = window.cut.after(min(int(found[-1].end * RATE), len(window.samples)))
        if sum(stop - begin for begin, stop in left.spoken) > REST * RATE and len(left.samples) < len(window.samples):
            self._give(Window(self, left, self.prompt))
        return found


class Sequential(Recording):
    def __init__(self, *given) -> None:
        super().__init__(*given)
        self._place, self._is_open = 0, False
        self._said: list[int] = list(self.prompt)

    def _next(self):
        self.tape.forget(self._place)
        if self._is_open or not self.tape.reaches(self._place + SHORTEST):
            return None
        self._is_open = True
        return Window(self, Cut(self.tape.cut(self._place, self._place + WINDOW), [(0, self._place)]), self._said)

    def fill(self, count):
        if not self._is_open:
            super().fill(1)

    def _kept(self, window, attempt, found, go_on, is_cut):
        """All but the last, where the window cuts it off and another one hears it whole."""
        is_last = not self.tape.reaches(window.begin + len(window.samples) + SHORTEST)
        if go_on < LEAST or is_cut and is_last:
            go_on = window.seconds
        elif is_cut:
            found = found[:-1]
        self._place = window.begin + int(go_on * RATE)
        self._is_open = False
        if self.settings.condition_on_previous_text and attempt.temperature <= COLD:
            self._said = self._said + [token for phrase in found for token in phrase.tokens]
        else:
            self._said = []
        return found


def _seconds(places, begin, end):
    """Of a recording, from those of a window; to hundredths, none of them after its end."""
    return (place * 100 // RATE / 100 for place in places(round(begin * RATE), round(end * RATE)))


def _place(segment, words, cut):
    """Give a segment its words, and their begin and end."""
    segment.words = [Word(*_seconds(cut.word_places, one.start, one.end), one.word, one.probability) for one in words]
    if segment.words:
        segment.start, segment.end = segment.words[0].start, segment.words[-1].end
