"""AMX tiles on machines that have none: the same source, with the tile instructions in plain C."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Many queries over packed caches of every width, in groups and lengths that do not fill a tile.
BITS = """
import hashlib, torch
from whisperkv import ops
digest, draw, none = hashlib.sha256(), torch.manual_seed(0), torch.empty(0)
for bits in (8, 4):
    for beams, tokens, frames, dim, group in (
        (1, 8, 1500, 512, 256), (5, 8, 100, 384, 64), (9, 4, 900, 1280, 512), (3, 5, 70, 64, 16), (1, 7, 300, 64, 256),
        (2, 30, 17, 128, 256), (4, 4, 333, 96, 32),
    ):
        states, query = torch.randn(2, frames, 1, dim), torch.randn(2 * beams, tokens, 1, dim)
        lengths, owner = torch.tensor([frames, frames // 2 + 1]).int(), torch.arange(2).repeat_interleave(beams).int()
        codes, scales = ops.pack_frames(states, lengths, bits, group)
        cache = codes, codes, scales, scales, owner, lengths, none, none.int(), frames, group
        for out in ops.cross_attention(query, *cache, 0.2, True):
            digest.update(out.numpy().tobytes())
print(ops.ISA, digest.hexdigest())
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A folder with a whisperkv whose tiles are emulated."""
    place = tmp_path_factory.mktemp("emulated")
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", place / "objects", "--build-lib", place],
        cwd=ROOT,
        env=os.environ
        | {"WHISPERKV_CFLAGS": "-DWKV_EMULATE_AMX", "WHISPERKV_CUDA": "off", "WHISPERKV_ISAS": "avx512_bf16;amx"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    for source in (ROOT / "whisperkv").glob("*.py"):
        shutil.copy(source, place / "whisperkv")
    return place


def run(command, isa, folder):
    environment = {**os.environ, "WHISPERKV_ISA": isa, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_emulated_tiles(emulated):
    tiles = run([sys.executable, "-c", BITS], "amx", emulated)
    if "is not an instruction set that runs here" in tiles.stderr:
        pytest.skip("the emulation needs the AVX-512 around it (VNNI and BF16)")
    assert tiles.returncode == 0, tiles.stderr
    vectors = run([sys.executable, "-c", BITS], "avx512_bf16", emulated)
    assert vectors.returncode == 0, vectors.stderr
    assert tiles.stdout.split() == ["amx", vectors.stdout.split()[1]]
