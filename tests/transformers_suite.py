"""transformers' own tests of Whisper and of generate() with it, plain and patched: prints which end differently.

    python tests/transformers_suite.py CHECKOUT [arguments of pytest]

CHECKOUT is a clone of transformers, 5.10 or newer, with its tests; its own source is what is tested. They need
`parameterized` and `datasets` beside whisperkv, and no network: what asks for the hub is skipped or fails both times.
In the second run every Whisper is patched as it is made: this file is a plugin of pytest as well. A test that ended
differently is run once more, both ways, as some are left to chance. Exits with 1 if any still differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
PLACES = ["tests/models/whisper/test_modeling_whisper.py", "tests/generation"]


# As a plugin


def pytest_configure():
    import functools

    from transformers import PreTrainedModel, WhisperForCausalLM, WhisperForConditionalGeneration, WhisperModel

    import whisperkv

    whispers = (WhisperForConditionalGeneration, WhisperModel, WhisperForCausalLM)

    def patching(init):
        @functools.wraps(init)
        def wrapped(self, *args, **kwargs):
            init(self, *args, **kwargs)
            if self.device.type != "meta":  # from_pretrained() has the weights still to come
                whisperkv.patch(self)

        return wrapped

    for kind in whispers:
        kind.__init__ = patching(kind.__init__)
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model, whispers):
            whisperkv.patch(model)
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


# As a script


def run(checkout, patched, arguments):
    """{name of a test: (how it ended, what it said)}"""
    paths = [*([checkout / "src"] if (checkout / "src").is_dir() else []), HERE.parent, HERE]
    paths += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        command += [*(["-p", Path(__file__).stem] if patched else []), *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
        ran = subprocess.run(command, cwd=checkout, env=environment, stdout=sys.stderr)
        if ran.returncode not in (0, 1):  # 1: some failed
            sys.exit(f"pytest ended with {ran.returncode}: {' '.join(command)}")
        return {name_of(case): ending(case) for case in ElementTree.parse(results).iter("testcase")}


def name_of(case):
    module, kind = case.get("classname").rsplit(".", 1)
    return f"{module.replace('.', '/')}.py::{kind}::{case.get('name')}"


def ending(case):
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            return child.tag, " ".join((child.get("message") or "").split())[:200]
    return "passed", ""


def differences(plain, patched):
    missing = ("not run", "")
    pairs = {name: (plain.get(name, missing), patched.get(name, missing)) for name in sorted({*plain, *patched})}
    return {name: pair for name, pair in pairs.items() if pair[0][0] != pair[1][0]}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="transformers_suite.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of transformers")
    options, more = parser.parse_known_args(arguments)
    checkout = options.checkout.resolve()
    for place in PLACES:
        if not (checkout / place).exists():
            parser.error(f"{checkout / place}: not there; pass a clone of transformers")
    plain, patched = (run(checkout, patched, [*PLACES, "-k", "whisper", *more]) for patched in (False, True))
    differ = differences(plain, patched)
    if again := [name for name in differ if name in plain and name in patched]:
        still = differences(*(run(checkout, patched, again) for patched in (False, True)))
        differ = {name: pair for name, pair in differ.items() if name in still or name not in again}

    for title, endings in (("plain", plain), ("patched", patched)):
        counts = Counter(how for how, _ in endings.values())
        print(f"{title:<8}" + ", ".join(f"{count} {how}" for how, count in sorted(counts.items())))
    for name, ((before, _), (after, said)) in differ.items():
        print(f"{name}: {before}, patched {after}: {said}")
    print(f"{len(differ)} differ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
