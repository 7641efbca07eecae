"""Builds the C extensions. One wheel serves every Python >= 3.10 and every torch >= 2.10: neither is linked against.

WHISPERKV_CUDA     auto (default): the kernels for CUDA if nvcc is there; on: they must be; off: without them;
                   on_cpu: these kernels, compiled for the CPU, in the place of its own, to be tested (see tests/cuda)
WHISPERKV_ARCHS    compute capabilities to compile for, as "80;90"; the first as PTX too, for all newer GPUs. By default
                   those of 80, 89, 90, 100 and 120 that nvcc has
WHISPERKV_ISAS     instruction sets to compile for beside "portable", as "avx2;avx512"; "" for none. By default all
WHISPERKV_CFLAGS, WHISPERKV_LDFLAGS  more flags
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Python's own flags come before these, and may let integers wrap around: nothing here does.
CFLAGS = "-std=c11 -O3 -g0 -Wall -Wextra -fexceptions -fvisibility=hidden -fno-math-errno -fno-wrapv".split()
CFLAGS_OF_USER = os.environ.get("WHISPERKV_CFLAGS", "").split()
CFLAGS += CFLAGS_OF_USER
LDFLAGS = os.environ.get("WHISPERKV_LDFLAGS", "").split()

ON_EVERY_ISA = ("self", "cross", "pack", "frames", "linear", "ragged", "received", "choose")
KERNELS = [f"csrc/cpu/{name}.c" for name in ON_EVERY_ISA]
CUDA_KERNELS = [f"csrc/cuda/{name}.cu" for name in ("self", "cross", "pack", "prune")]
CUDA_PROBE = "csrc/cuda/probe.cu"
ARCHS = ("80", "89", "90", "100", "120")
HEADERS = glob("csrc/**/*.h", recursive=True)

BOUND = ("call", "choose", "cross", "frames", "linear", "ops", "prune", "self", "shim", "step")
BINDING = [f"csrc/bind/torch_{name}.c" for name in BOUND]
ON_CPU = ["csrc/cpu/dispatch.c", "csrc/cpu/plan.c"]

CUDA = os.environ.get("WHISPERKV_CUDA", "auto")
if CUDA not in ("auto", "on", "off", "on_cpu"):
    sys.exit(f"WHISPERKV_CUDA={CUDA}: must be auto, on, off or on_cpu")


ISAS = {"portable": []}  # the flags of each instruction set that the kernels are compiled for
if platform.machine() in ("x86_64", "AMD64") and CUDA != "on_cpu":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c".split()
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq".split() + ISAS["avx2"]
    ISAS["avx512_vnni"] = ["-mavx512vnni", *ISAS["avx512"]]
    ISAS["avx512_bf16"] = ["-mavx512bf16", *ISAS["avx512_vnni"]]
    ISAS["amx"] = ["-DWKV_AMX", "-mamx-tile", "-mamx-int8", *ISAS["avx512_bf16"]]
if "WHISPERKV_ISAS" in os.environ:
    wanted = {"portable", *filter(None, os.environ["WHISPERKV_ISAS"].split(";"))}
    if wanted - set(ISAS):
        sys.exit(f"WHISPERKV_ISAS={os.environ['WHISPERKV_ISAS']}: must be some of {';'.join(ISAS)}")
    ISAS = {isa: flags for isa, flags in ISAS.items() if isa in wanted}


def cuda_home():
    """The folder of a CUDA toolkit that has a compiler and the static runtime, or None."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next((Path(p) for p in places if p and (Path(p) / "bin/nvcc").exists() and cudart(Path(p))), None)


def cudart(home):
    """The folder of the static runtime."""
    folders = (home / "lib64", home / "lib", *home.glob("targets/*/lib"))
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


HOME = cuda_home() if CUDA in ("auto", "on") else None
if CUDA == "on" and not HOME:
    sys.exit("WHISPERKV_CUDA=on: no CUDA toolkit with nvcc and libcudart_static.a found; set CUDA_HOME")
if CUDA == "auto" and not HOME:
    print("whisperkv: built without CUDA, as no nvcc was found (set CUDA_HOME to have it)", file=sys.stderr)


def extension(name, *sources, **options):
    return Extension(
        f"whisperkv.{name}",
        list(sources),
        depends=[*HEADERS, "setup.py"],
        extra_compile_args=CFLAGS,
        extra_link_args=[*LDFLAGS, *options.pop("link", [])],
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),
            *((f"WKV_HAVE_{isa.upper()}", None) for isa in ISAS),
            *([("WKV_CUDA_ON_CPU", None)] if CUDA == "on_cpu" else []),
        ],
        py_limited_api=True,
        **options,
    )


class BuildExt(build_ext):
    """Compiles the kernels once, for all extensions that link them."""

    def build_extensions(self):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for objects in pool.map(self.compile_cpu, ISAS):
                self.link(objects, lambda ext: "csrc/cpu/dispatch.c" in ext.sources)
        if HOME or CUDA == "on_cpu":
            command, sources = on_cpu_command(), CUDA_KERNELS
            if HOME:
                command, sources = nvcc_command(), [*CUDA_KERNELS, CUDA_PROBE]
            objects = [self.compile_cuda(command, source) for source in sources]
            self.link(objects, lambda ext: "csrc/bind/torch_cuda.c" in ext.sources)
        super().build_extensions()

    def compile_cpu(self, isa):
        return self.compiler.compile(
            KERNELS,
            output_dir=os.path.join(self.build_temp, isa),
            macros=[("WKV_ISA", isa)],
            extra_postargs=CFLAGS + ISAS[isa],
        )

    def link(self, objects, wants):
        for ext in filter(wants, self.extensions):
            ext.extra_objects += objects
            ext.depends = [*ext.depends, *objects]  # else a change in a kernel would not be linked in

    def compile_cuda(self, command, source):
        flags = hashlib.sha1(" ".join(command).encode()).hexdigest()[:8]
        place = Path(self.build_temp, f"cuda-{flags}", source).with_suffix(".o")
        newest = max(os.path.getmtime(file) for file in (source, "setup.py", *HEADERS, *glob("tests/cuda/*.h")))
        if self.force or not place.exists() or place.stat().st_mtime < newest:
            place.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-c", source, "-o", str(place)], check=True)
        return str(place)


def nvcc_command():
    nvcc = str(HOME / "bin/nvcc")
    archs = os.environ.get("WHISPERKV_ARCHS", "").split(";")
    if archs == [""]:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        archs = [arch for arch in ARCHS if f"sm_{arch}" in known]
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"arch=compute_{archs[0]},code=compute_{archs[0]}")
    host = "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics"  # no C++ runtime to link
    options = ["-O3", "-std=c++17", "--threads", "0", "-Xcompiler", host]
    return [nvcc, *options, *(word for code in codes for word in ("-gencode", code))]


def on_cpu_command():
    flags = "-x c++ -std=c++17 -O2 -g1 -Wall -Wextra -Wno-unknown-pragmas -fPIC -fvisibility=hidden"
    return ["g++", *flags.split(), *CFLAGS_OF_USER, "-include", "tests/cuda/cudashim.h"]


extensions = [extension("_numpy", "csrc/bind/numpy.c", *ON_CPU, include_dirs=[numpy.get_include()])]
if CUDA == "on_cpu":
    extensions.append(extension("_torch", "csrc/bind/torch.c", "csrc/bind/torch_cuda.c", *BINDING, link=["-lstdc++"]))
else:
    for_cpu = ("csrc/bind/torch_cpu.c", "csrc/bind/torch_cpu_prune.c", "csrc/bind/torch_cpu_step.c")
    extensions.append(extension("_torch", "csrc/bind/torch.c", *for_cpu, *BINDING, *ON_CPU))
if HOME:
    libraries = {"library_dirs": [str(cudart(HOME))], "libraries": ["cudart_static", "rt", "pthread", "dl"]}
    extensions.append(extension("_cuda", "csrc/bind/cuda.c", "csrc/bind/torch_cuda.c", *BINDING, **libraries))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
