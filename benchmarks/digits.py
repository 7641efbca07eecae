"""Connected spoken digits, made of single ones, and the prompts that a WhisperLLM is asked about them.

digits   3 to 7 of a speaker, close together; an audio token is 80 ms
pauses   5 to 8 with pauses of 0.3 to 1.5 s in a room's noise; an audio token is 40 ms
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import clips
import numpy
import torch
from audio import DATA, RATE
from transformers import WhisperFeatureExtractor

from whisperkv.features import log_mel

PAD, START, END, AUDIO, AUDIO_END, TRANSCRIBE = range(6)  # PAD is the blank of CTC as well
VOCABULARY = ("<pad>", "<s>", "</s>", "<audio>", "</audio>", "<transcribe>", *"0123456789")
ZERO = VOCABULARY.index("0")
FRAME = RATE // 50  # samples in a frame of the encoder
SPLITS = {"test": range(5), "validation": range(5, 10), "train": range(10, 50)}  # by a recording's index
EXTRACTOR = WhisperFeatureExtractor()


@dataclass(frozen=True)
class Task:
    name: str
    stack: int  # frames in an audio token
    digits: tuple[int, int]
    gap: tuple[float, float]  # seconds between two digits
    quieter: tuple[float, float]  # decibels from the speech to the noise
    noises: tuple = (clips.noise, clips.pink_noise)
    pool: int = 3000  # sequences to train on
    steps: int = 1500
    batch: int = 32

    @property
    def token(self):
        """Samples in an audio token."""
        return self.stack * FRAME


TASKS = {
    task.name: task
    for task in (
        Task("digits", stack=4, digits=(3, 7), gap=(0.05, 0.4), quieter=(15, 35)),
        Task(
            "pauses", stack=2, digits=(5, 8), gap=(0.3, 1.5), quieter=(12, 30), noises=(clips.pink_noise, clips.hum),
            pool=2500, steps=1000, batch=16,
        ),  # fmt: skip
    )
}


@dataclass
class Spoken:
    samples: numpy.ndarray  # float32, whole audio tokens of them
    digits: list[int]
    spans: list[tuple[int, int]]  # of each digit, in audio tokens, the end excluded

    @property
    def text(self):
        return " ".join(map(str, self.digits))


def recordings(split, data=DATA):
    """{speaker: {digit: its recordings, float32 at 16 kHz, all equally loud}}"""
    import soundfile
    import soxr

    folder, found = Path(data) / "fsdd", defaultdict(lambda: defaultdict(list))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --data names the folder that holds fsdd/")
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, index = path.stem.split("_")
        if int(index) in SPLITS[split]:
            samples, rate = soundfile.read(path, dtype="float32")
            samples = soxr.resample(samples, rate, RATE)
            found[speaker][int(digit)].append(0.05 * samples / numpy.sqrt(numpy.mean(samples**2)))
    return found


def spoken(task, speakers, random):
    """Digits of one speaker, with silence before, between and after them, in noise."""
    speaker = speakers[random.choice(sorted(speakers))]
    digits = random.integers(10, size=random.integers(task.digits[0], task.digits[1] + 1)).tolist()
    parts, spans = [numpy.zeros(int(random.uniform(0.1, 0.5) * RATE))], []
    for digit in digits:
        start = sum(map(len, parts))
        said = speaker[digit][random.integers(len(speaker[digit]))] * 10 ** random.uniform(-0.2, 0.2)
        parts += [said, numpy.zeros(int(random.uniform(*task.gap) * RATE))]
        spans.append((start // task.token, -(-(start + len(said)) // task.token)))
    speech = numpy.concatenate([*parts, numpy.zeros(int(random.uniform(0.1, 0.5) * RATE))])
    speech = numpy.pad(speech, (0, -len(speech) % task.token))
    noise = task.noises[random.integers(len(task.noises))](random, len(speech))
    noise *= 0.05 * 10 ** (-random.uniform(*task.quieter) / 20) / numpy.sqrt(numpy.mean(noise**2))
    level = 10 ** random.uniform(-0.5, 0.5)
    return Spoken(clips.as_float32(level * (speech + noise)), digits, spans)


def sequences(task, split, count, seed, data=DATA):
    """The same ones for the same seed."""
    speakers, random = recordings(split, data), numpy.random.default_rng([seed, sorted(SPLITS).index(split)])
    for _ in range(count):
        yield spoken(task, speakers, random)


def prompt(tokens):
    """What is asked about an audio of so many tokens."""
    return [START, *[AUDIO] * tokens, AUDIO_END, TRANSCRIBE]


def text_of(tokens):
    """The digits among the tokens."""
    return " ".join(VOCABULARY[token] for token in tokens if token >= ZERO)


def inputs_of(task, group):
    """What generate() is given: the prompts padded on the left, the features on the right."""
    prompts = [torch.tensor(prompt(len(one.samples) // task.token)) for one in group]
    input_ids = torch.nn.utils.rnn.pad_sequence(prompts, True, PAD, padding_side="left")
    columns = max(len(one.samples) for one in group) // EXTRACTOR.hop_length
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "input_features": log_mel([one.samples for one in group], EXTRACTOR)[..., :columns],
    }
