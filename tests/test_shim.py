"""What binds us to torch: our prototypes of its C shim, and what is said when torch is missing, old or incomplete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import whisperkv._torch

HERE = Path(__file__).parent
SHIM = (HERE.parent / "csrc/bind/torch_shim.h").read_text()
OLDEST = 2 << 56 | 10 << 48
FUNCTIONS = re.findall(r"F\([^,]+?, (\w+),", SHIM.split("#define TORCH_FUNCTIONS")[1].split("\n\n")[0])
NUMBERS = [
    prefix + name
    for prefix, macro in (("aoti_torch_dtype_", "DTYPES"), ("aoti_torch_device_type_", "DEVICES"))
    for name in re.findall(r"N\((\w+)\)", SHIM.split(f"#define TORCH_{macro}(N)")[1].split("\n\n")[0].split("#")[0])
]


def program(name):
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize("target", [OLDEST, None], ids=["as of 2.10", "as installed"])
def test_prototypes_are_those_of_torch(target, tmp_path):
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("this torch comes without headers")
    command = [program("g++"), "-std=c++20", "-fsyntax-only", f"-I{include}", str(HERE / "shim_check.cpp")]
    command += [f"-DTORCH_TARGET_VERSION={target}"] if target else []
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr

    wrong = tmp_path / "csrc/bind/torch_shim.h"  # the check itself is worth something: one wrong type is noticed
    wrong.parent.mkdir(parents=True)
    wrong.write_text(SHIM.replace("aoti_torch_get_dim, (AtenTensorHandle, int64_t *)", "aoti_torch_get_dim, (int)"))
    (tmp_path / "tests").mkdir()
    shutil.copy(HERE / "shim_check.cpp", tmp_path / "tests")
    command[4] = str(tmp_path / "tests/shim_check.cpp")
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode != 0 and "prototype of aoti_torch_get_dim" in checked.stderr


def fake_torch(folder, version, without=()):
    """A libtorch_cpu of another version that can do nothing: the path of it."""
    source = [f"unsigned long long aoti_torch_abi_version(void) {{ return {version}ULL; }}"] if version else []
    source += [f"int {name}(void) {{ return 1; }}" for name in [*FUNCTIONS[1:], *NUMBERS] if name not in without]
    (folder / "fake.c").write_text("\n".join(source))
    library = folder / "libtorch_cpu.so"
    subprocess.run([program("gcc"), "-w", "-shared", "-fPIC", "-o", library, folder / "fake.c"], check=True)
    return library


@pytest.mark.parametrize(
    "version, without, text",
    [
        (2 << 56 | 6 << 48, [], "whisperkv needs torch >= 2.10, found 2.6: pip install -U torch"),
        (0, [], "whisperkv needs torch >= 2.10, found an older one: pip install -U torch"),
        (OLDEST, ["torch_parallel_for"], "has no torch_parallel_for, which whisperkv needs: pip install -U torch"),
        (OLDEST, ["aoti_torch_dtype_bfloat16"], "has no aoti_torch_dtype_bfloat16, which whisperkv needs"),
        (OLDEST, ["aoti_torch_device_type_cpu"], "has no aoti_torch_device_type_cpu, which whisperkv needs"),
        (OLDEST, [], "torch refused the ops of whisperkv: opening the namespace whisperkv failed"),
    ],
)
def test_another_torch(version, without, text, tmp_path):
    library = fake_torch(tmp_path, version, without)
    run = python(f"import ctypes, whisperkv._torch as t; path = {str(library)!r}; ctypes.CDLL(path); t.register(path)")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and text in last


def test_torch_is_not_loaded():
    run = python("import whisperkv._torch as t; t.register('/nowhere/libtorch_cpu.so')")
    assert run.stderr.endswith(
        "ImportError: libtorch_cpu is not loaded: import torch first (looked for /nowhere/libtorch_cpu.so)\n"
    )


def test_torch_is_elsewhere():
    """As some distributions have it: found by its name in the process."""
    run = python("import torch, whisperkv._torch as t; t.register('/no.so'); print(torch.ops.whisperkv.score_evict)")
    assert run.stdout == "whisperkv.score_evict\n", run.stderr


def test_registering_twice_does_no_harm():
    import whisperkv.ops

    whisperkv._torch.register("anything")
    assert whisperkv.ops.compact_attention.name() == "whisperkv::compact_attention"


def test_path_must_be_a_path():
    run = python("import whisperkv._torch as t; t.register(3)")
    assert "TypeError" in run.stderr


def test_torch_is_missing():
    run = python("import sys; sys.modules['torch'] = None; import whisperkv; print('fine'); import whisperkv.ops")
    assert run.stdout == "fine\n"
    assert run.stderr.endswith("ImportError: whisperkv needs torch for this: pip install torch\n")


@pytest.mark.parametrize("module", ["_torch", "_numpy"])
def test_bad_isa(module):
    run = python(f"import whisperkv.{module}", WHISPERKV_ISA="sse9")
    last = run.stderr.splitlines()[-1]
    assert re.fullmatch(r'ImportError: environment variable WHISPERKV_ISA: "sse9" .*these do: .*portable', last), last


def test_empty_isa_means_the_best():
    run = python("import whisperkv._torch as t; print(t.ISA)", WHISPERKV_ISA="")
    assert run.stdout.strip() in ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def test_no_torch_and_no_python_version_at_build_time():
    """The extension links neither libtorch nor a certain Python, and shows nothing but its entry."""
    library = whisperkv._torch.__file__
    assert library.endswith(".abi3.so")
    needed = subprocess.run([program("readelf"), "-d", library], capture_output=True, text=True).stdout
    assert "torch" not in needed and "libpython" not in needed
    shown = subprocess.run([program("nm"), "-D", "--defined-only", library], capture_output=True, text=True).stdout
    assert [line.split()[-1] for line in shown.splitlines()] == ["PyInit__torch"]
