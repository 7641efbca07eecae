"""Builds the C extensions. One wheel serves every Python >= 3.10 and every torch >= 2.10: neither is linked against."""

import os
import platform
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CFLAGS = "-std=c11 -O3 -g0 -Wall -Wextra -fexceptions -fvisibility=hidden -fno-math-errno".split()
CFLAGS += os.environ.get("WHISPERKV_CFLAGS", "").split()
LDFLAGS = os.environ.get("WHISPERKV_LDFLAGS", "").split()

ISAS = {"portable": []}  # the flags of each instruction set that the kernels are compiled for
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-mavx2 -mfma -mf16c".split()
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq".split() + ISAS["avx2"]
    ISAS["avx512_vnni"] = ["-mavx512vnni", *ISAS["avx512"]]
    ISAS["avx512_bf16"] = ["-mavx512bf16", *ISAS["avx512_vnni"]]
    ISAS["amx"] = ["-DWKV_AMX", "-mamx-tile", "-mamx-int8", *ISAS["avx512_bf16"]]

KERNELS = [f"csrc/cpu/{name}.c" for name in ("self", "cross", "pack")]

HEADERS = glob("csrc/**/*.h", recursive=True)


def extension(name, *sources, **options):
    return Extension(
        f"whisperkv.{name}",
        ["csrc/cpu/dispatch.c", "csrc/cpu/plan.c", *sources],
        depends=HEADERS,
        define_macros=[("Py_LIMITED_API", "0x030A0000"), *((f"WKV_HAVE_{isa.upper()}", None) for isa in ISAS)],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
        py_limited_api=True,
        **options,
    )


class BuildExt(build_ext):
    def build_extensions(self):
        """Compiles the kernels once per instruction set, for all extensions to link."""
        kernels = []
        for isa, flags in ISAS.items():
            kernels += self.compiler.compile(
                KERNELS,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("WKV_ISA", isa)],
                extra_postargs=CFLAGS + flags,
            )
        for ext in self.extensions:
            ext.extra_objects += kernels
            ext.depends = [*ext.depends, *kernels]  # else a change in a kernel would not be linked in
        super().build_extensions()


setup(
    ext_modules=[
        extension("_torch", *sorted(glob("csrc/bind/torch*.c"))),
        extension("_numpy", "csrc/bind/numpy.c", include_dirs=[numpy.get_include()]),
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
