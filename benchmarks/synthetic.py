"""Speech of a synthesizer (espeak-ng), to calibrate and to train with: it reads the novel that ships, and licences."""

import re
import subprocess
import tempfile
from itertools import cycle
from pathlib import Path

from whisperkv.transcription.audio import read_audio

VOICES = ("en-us", "en-gb", "en-us+m3", "en-gb+f2", "en-us+f4", "en-gb-scotland", "en-us+m7", "en-gb-x-rp+f3")
LICENCES = ("GPL-3", "Artistic", "MPL-2.0", "GFDL-1.3", "Apache-2.0")  # as Debian has them
LETTERS, LOUD = 330, 0.3  # in a recording; of the synthesizer's loudness


def passages():
    import whisperkv.lowrank

    text = Path(whisperkv.lowrank.__file__).with_name("data").joinpath("calibration.txt").read_text()
    for name in LICENCES:
        file = Path("/usr/share/common-licenses", name)
        text += "\n" + file.read_text()[:9000] if file.exists() else ""
    text = re.sub(r"\s+", " ", re.sub(r"[^A-Za-z0-9 .,;:'\n-]", " ", text))
    passage = ""
    for sentence in re.split(r"(?<=[.;:]) ", text):
        if passage and len(passage) + len(sentence) > LETTERS:
            yield passage
            passage = ""
        passage += f" {sentence}"
    yield passage


def recordings(every=1):
    """Of every so-many-th passage, samples at 16 kHz."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "speech.wav")
        for number, (passage, voice) in enumerate(zip(passages(), cycle(VOICES))):
            if number % every == 0:
                said = ["espeak-ng", "-v", voice, "-s", str(140 + number * 7 % 36), "-w", str(file), passage]
                subprocess.run(said, check=True)
                found.append(LOUD * read_audio(file))
    return found
