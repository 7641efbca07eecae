"""What a type checker sees of whisperkv, which loads its names only when they are used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import whisperkv

ROOT = Path(__file__).parents[1]

# torch and transformers are not looked into, for the sake of time: what comes from them is Any.
SETTINGS = """
[mypy]
strict = True
[mypy-torch.*,transformers.*,tokenizers.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-whisperkv.*]
follow_imports = silent
"""
USE = """
import numpy as np
import whisperkv
from whisperkv import CrossConfig, EvictionConfig, attention_kept, listen, patch, simulate_eviction, stats, unpatch

class Whisper: ...
whisper = patch(Whisper(), EvictionConfig("window", recent=64), CrossConfig(format="int8"), graphs=False)
reveal_type(whisper)  # Revealed type is "use.Whisper"
reveal_type(unpatch(whisper))  # Revealed type is "use.Whisper"
reveal_type(listen(whisper, on=False))  # Revealed type is "use.Whisper"
reveal_type(stats(whisper).self_bytes)  # int"
reveal_type(EvictionConfig().budget)  # int"
reveal_type(CrossConfig().is_latent)  # bool"
reveal_type(whisperkv.demo_audio()[1])  # str"
reveal_type(whisperkv.transcribe("a.wav", beam_size=5).text)  # str"
reveal_type(whisperkv.transcribe(["a.wav"], lossless=True))  # list[whisperkv.transcription.results.Transcript]"
reveal_type(next(whisperkv.transcribe("a.wav", stream=True)))  # whisperkv.transcription.results.Segment"
whisperkv.transcribe("a.wav", beams=5)  # No overload variant of "transcribe"
model, processor = whisperkv.load_ctranslate2("folder")
model, processor = whisperkv.demo_model()
with whisperkv.trace(whisper) as recorded:
    reveal_type(recorded.attention(layer=0))  # numpy.float
reveal_type(whisperkv.plot.size(3))  # str"
kept = simulate_eviction(np.ones((3, 2, 3)), EvictionConfig(policy=lambda scores, *rest: scores))
reveal_type(kept)  # numpy.bool
reveal_type(attention_kept([[[1.0]]], kept))  # numpy.float
CrossConfig(formatt="int8")  # Unexpected keyword argument "formatt"
CrossConfig(group="64")  # Argument "group" to "CrossConfig" has incompatible type "str"
EvictionConfig(budget=96)  # Unexpected keyword argument "budget"
EvictionConfig(policy=3)  # Argument "policy" to "EvictionConfig" has incompatible type "int"
EvictionConfig().recent = 3  # Property "recent" defined in "EvictionConfig" is read-only
patch(whisper, CrossConfig())  # Argument 2 to "patch" has incompatible type "CrossConfig"
patch(whisper, cross="int8")  # Argument "cross" to "patch" has incompatible type "str"
patch(whisper).nothing  # "Whisper" has no attribute "nothing"
stats(whisper).byts  # "Stats" has no attribute "byts"
simulate_eviction(kept)  # Missing positional argument "config"
whisperkv.load_ctranslate2(3)  # Argument 1 to "load_ctranslate2" has incompatible type "int"
whisperkv.pach(whisper)  # Module has no attribute "pach"
"""


def test_what_mypy_says_of_each_line(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", "use.py"]
    checked = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    said = {}
    for line in checked.stdout.splitlines():
        place, number, text = line.split(":", 2)
        assert place == "use.py", line
        said[int(number)] = said.get(int(number), "") + text
    for number, line in enumerate(USE.splitlines(), 1):
        code, _, expected = line.partition("  # ")
        assert bool(expected) == (number in said) and expected in said.get(number, ""), (code, said.get(number))
    assert checked.stderr == ""


def test_every_name_is_seen():
    """The names for type checkers are those that are loaded on first use, from the same files."""
    text = (ROOT / "whisperkv" / "__init__.py").read_text()
    seen = {line.split()[-1]: line.split()[1][1:] for line in text.splitlines() if line.startswith("    from .")}
    assert seen == whisperkv._HOME
    assert all(f" import {name} as {name}\n" in text for name in seen)


def test_the_marker_is_installed(tmp_path):
    pytest.importorskip("setuptools", "77")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "WHISPERKV_CUDA": "off"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (tmp_path / "whisperkv" / "py.typed").exists(), built.stderr
