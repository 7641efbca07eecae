"""The structs of csrc/whisperkv.h as kernels get them: a C compiler says where their fields are."""

import functools
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

HEADER = Path(__file__).parents[2] / "csrc/whisperkv.h"
COMPILER = shutil.which("cc") or shutil.which("gcc")


@functools.cache
def fields(name):
    """The size of a struct, and of each field its offset, size and whether it is a float."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.S)[1]
    declared = []
    for declaration in filter(str.strip, body.split(";")):
        *_, first = declaration.split(",")[0].split()
        names = [first, *declaration.split(",")[1:]]
        is_float = re.match(r"\s*(const )?float\b", declaration) is not None
        declared += [(re.sub(r"[*\s]", "", each), is_float and "*" not in each) for each in names]
    of = f"struct {name}"
    prints = [f'printf("%zu %zu\\n", offsetof({of}, {each}), sizeof((({of} *)0)->{each}));' for each, _ in declared]
    prints.append(f'printf("%zu 0\\n", sizeof({of}));')
    code = f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{ {" ".join(prints)} }}\n'
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "fields.c"), Path(folder, "fields")
        source.write_text(code)
        subprocess.run([COMPILER, source, "-o", program], check=True)
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    numbers = list(zip(map(int, printed[::2]), map(int, printed[1::2])))
    return numbers[-1][0], {each: (*place, is_float) for (each, is_float), place in zip(declared, numbers)}


def packed(name, **values):
    """The struct's bytes; a field that is not named is 0, and one that is not there is refused. A struct in it is given
    as its bytes."""
    size, places = fields(name)
    data = bytearray(size)
    for each, value in values.items():
        offset, width, is_float = places[each]
        if isinstance(value, bytes):
            assert len(value) == width
            data[offset : offset + width] = value
            continue
        kind = "f" if is_float else {1: "b", 4: "i", 8: "q"}[width]
        struct.pack_into(f"<{kind}", data, offset, value)
    return bytes(data)
