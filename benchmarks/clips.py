"""Audio that a transcriber may trip over: clips without speech, very short ones, and speech in noise. From a seed."""

from dataclasses import replace

import numpy
from audio import RATE, Speech

NOTES = 220 * 2 ** (numpy.arange(25) / 12)  # two octaves


def speechless(count=30, seed=0):
    """Noise, hum, chords and melodies in turn, of 2 to 29 seconds and of different loudness."""
    random = numpy.random.default_rng(seed)
    kinds, clips = (noise, pink_noise, hum, chord, melody), []
    for number in range(count):
        length = int(random.uniform(2, 29) * RATE)
        samples = kinds[number % len(kinds)](random, length)
        level = 10 ** random.uniform(-2.5, -0.5)
        clips.append(Speech(kinds[number % len(kinds)].__name__, as_float32(level * samples / abs(samples).max()), ""))
    return clips


def short(speeches, count=30, seed=0):
    """Pieces of 0.2 to 1 second, one of each speech."""
    random = numpy.random.default_rng(seed)
    pieces = []
    for speech in speeches[:count]:
        length = int(random.uniform(0.2, 1) * RATE)
        start = random.integers(len(speech.samples) - length)
        pieces.append(Speech(speech.speaker, speech.samples[start : start + length], ""))
    return pieces


def noisy(speeches, count=30, decibels=15, seed=0):
    """White noise over speech, that much below it."""
    random = numpy.random.default_rng(seed)
    clips = []
    for speech in speeches[:count]:
        power = numpy.mean(speech.samples.astype(numpy.float64) ** 2) / 10 ** (decibels / 10)
        added = speech.samples + power**0.5 * random.standard_normal(len(speech.samples))
        clips.append(replace(speech, samples=as_float32(added)))
    return clips


def as_float32(samples):
    return samples.astype(numpy.float32)


def noise(random, length):
    return random.standard_normal(length)


def pink_noise(random, length):
    spectrum = numpy.fft.rfft(random.standard_normal(length))
    return numpy.fft.irfft(spectrum / numpy.sqrt(numpy.arange(1, len(spectrum) + 1)), length)


def hum(random, length):
    """Of the mains, and a little noise."""
    pitch = random.choice([50, 60])
    tones = sum(random.uniform(0, 1 / part) * tone(pitch * part, length) for part in range(1, 8))
    return tones + 0.02 * random.standard_normal(length)


def chord(random, length):
    return sum(tone(pitch, length) for pitch in random.choice(NOTES, 3, replace=False))


def melody(random, length):
    notes, left = [], length
    while left > 0:
        part = min(left, int(random.uniform(0.15, 0.6) * RATE))
        fading = numpy.exp(-3 * numpy.arange(part) / part)
        notes.append(fading * tone(random.choice(NOTES), part))
        left -= part
    return numpy.concatenate(notes)


def tone(pitch, length):
    return numpy.sin(2 * numpy.pi * pitch * numpy.arange(length) / RATE)
