"""LibriSpeech as Whisper meets it: windows of up to 30 s, whole recordings, and the word error rate."""

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy

from whisperkv import evaluation

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RATE, LONGEST = 16000, 29.5  # seconds in a window

# Without the table of British and American spellings, which comes with a model's tokenizer and not with transformers.
normalized = evaluation.normalizer("en")


@dataclass
class Speech:
    speaker: str
    samples: numpy.ndarray
    text: str
    language: str = "en"

    @property
    def seconds(self):
        return len(self.samples) / RATE

    def __add__(self, other):
        samples = numpy.concatenate([self.samples, other.samples])
        return replace(self, samples=samples, text=f"{self.text} {other.text}")


def utterances(data=DATA):
    """All of them, in the order in which they were read."""
    import soundfile  # here, so that what needs no recordings needs no such package either

    folder = Path(data) / "librispeech"
    table = folder / "transcripts.tsv"
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file; --data names the folder that holds librispeech/")
    found = []
    for line in table.read_text().splitlines()[1:]:
        name, text = line.split("\t")
        samples, rate = soundfile.read(folder / "test-other" / f"{name}.flac", dtype="float32")
        assert rate == RATE, f"{name} has {rate} samples a second"
        found.append((name, Speech(name.split("-")[0], samples, text)))
    return [speech for _, speech in sorted(found, key=lambda pair: pair[0])]


def windows(data=DATA, most=None):
    """A speaker's utterances joined, in order, for as long as they fit into 29.5 s. No utterance is split."""
    packed = []
    for speech in utterances(data):
        if packed and packed[-1].speaker == speech.speaker and packed[-1].seconds + speech.seconds <= LONGEST:
            packed[-1] += speech
        else:
            packed.append(speech)
    return packed[:most]


def recordings(data=DATA, most=None):
    """All that a speaker says, as one long recording."""
    speakers = groupby(utterances(data), key=lambda speech: speech.speaker)
    return [sum_of(speeches) for _, speeches in speakers][:most]


def sum_of(speeches):
    first, *others = speeches
    for other in others:
        first += other
    return first


def word_error_rate(speeches, texts):
    """In percent, over all words, both sides through the normalizer of transformers."""
    import jiwer

    return 100 * jiwer.wer([normalized(speech.text) for speech in speeches], [normalized(text) for text in texts])


def errors(speeches, texts):
    """(wrong words, words) of each audio, int [audios] twice"""
    counts = []
    for speech, text in zip(speeches, texts):
        clean = evaluation.normalizer(speech.language)
        counts.append(evaluation.word_errors(clean(text), clean(speech.text)))
    return numpy.array(counts).T


def interval(more, words):
    """Of the difference in WER, in points: audios drawn with replacement, both settings on the same ones.

    more   wrong words beyond the full model's, of each audio
    words  spoken, of each audio
    """
    return [100 * edge for edge in evaluation.interval(more, words)]
