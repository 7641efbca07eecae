"""Reads CTranslate2's model.bin: its variables, by name.

Little endian: the binary version, the spec's name and revision; a count and the variables (name, rank, dimensions,
dtype, byte size, data); a count and pairs of names, where the first is an alias of the second. Every size is checked
against the file before anything of that size is allocated.
"""

import struct
from collections import namedtuple
from math import prod

import torch

Variable = namedtuple("Variable", "dtype shape offset")

SPEC, BINARY_VERSION, REVISION = "WhisperSpec", 6, 3
DTYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]  # by id in the file
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOST_VARIABLES = 10_000  # large-v3 in int8 has about 1700
MOST_ROWS = 1 << 20  # of one dimension; the vocabulary has 51866


def broken(path, what, remedy="copy the file again, or convert the model again with ct2-transformers-converter"):
    return ValueError(f"{path}: {what}; {remedy}")


def read_index(file):
    """{name or alias: Variable} of an open model.bin."""
    size = file.seek(0, 2)
    file.seek(0)

    def read(layout, what):
        data = file.read(struct.calcsize(layout))
        if len(data) < struct.calcsize(layout):
            raise broken(file.name, f"the file ends inside {what}")
        return struct.unpack(layout, data)

    def read_name(what):
        (length,) = read("<H", what)
        (name,) = read(f"<{length}s", what)
        text = name[:-1].decode("ascii", "replace")
        if not text or name[-1] or not (text.isascii() and text.isprintable()):
            raise broken(file.name, f"{what} has no valid name")
        return text

    (version,) = read("<I", "the header")
    if version != BINARY_VERSION:
        raise broken(file.name, f"binary version {version}, and only {BINARY_VERSION} can be read")
    spec = read_name("the header")
    if spec != SPEC:
        raise broken(file.name, f"holds a {spec!r}, not a {SPEC!r}", "pass the folder of a Whisper model")
    revision, count = read("<II", "the header")
    if revision != REVISION:
        raise broken(file.name, f"{SPEC} revision {revision}, and only {REVISION} can be read")
    if count > MOST_VARIABLES:
        raise broken(file.name, f"claims {count} variables, and no Whisper has over {MOST_VARIABLES}")

    variables = {}
    for number in range(count):
        what = f"variable {number} of {count}"
        name = read_name(what)
        (rank,) = read("<B", what)
        if rank > 3 or name in variables:
            raise broken(file.name, f"variable {name!r} " + (f"has rank {rank}" if rank > 3 else "stands there twice"))
        *shape, dtype, length = read(f"<{rank}IBI", what)
        if dtype >= len(DTYPES):
            raise broken(file.name, f"variable {name!r} has dtype {dtype}, not 0 to {len(DTYPES) - 1}")
        dtype, offset = DTYPES[dtype], file.tell()
        if not all(0 < rows <= MOST_ROWS for rows in shape) or prod(shape) * dtype.itemsize != length:
            raise broken(file.name, f"variable {name!r} of shape {shape} and {dtype} cannot have {length} bytes")
        if offset + length > size:
            raise broken(file.name, f"the file ends inside variable {name!r}")
        variables[name] = Variable(dtype, shape, offset)
        file.seek(offset + length)

    (count,) = read("<I", "the aliases")
    if count > MOST_VARIABLES:
        raise broken(file.name, f"claims {count} aliases")
    for number in range(count):
        alias, name = read_name(f"alias {number}"), read_name(f"alias {number}")
        if alias in variables or name not in variables:
            raise broken(file.name, f"alias {alias!r} of {name!r} is taken or leads nowhere")
        variables[alias] = variables[name]
        if f"{name}_scale" in variables:
            variables[f"{alias}_scale"] = variables[f"{name}_scale"]
    if file.tell() != size:
        raise broken(file.name, f"{size - file.tell()} bytes follow the end of the model")
    return variables


def read_tensor(file, variable):
    length = prod(variable.shape) * variable.dtype.itemsize
    file.seek(variable.offset)
    data = bytearray(length)
    if file.readinto(data) < length:
        raise broken(file.name, "the file became shorter while it was read")
    return torch.frombuffer(data, dtype=variable.dtype).reshape(variable.shape)


def dequantized(file, variables, name):
    """The variable as floats. int8 has one scale a row, int16 one in all."""
    variable, scale = variables[name], variables.get(f"{name}_scale")
    if variable.dtype in FLOATS:
        return read_tensor(file, variable)
    scales = {torch.int8: variable.shape[:1], torch.int16: []}.get(variable.dtype)
    if scale is None or scale.shape != scales or scale.dtype not in FLOATS:
        raise broken(
            file.name,
            f"variable {name!r} is {variable.dtype} without its scales",
            "convert the model with --quantization float32, float16, bfloat16, int8 or int16",
        )
    rows = read_tensor(file, scale).float().reshape(-1, *[1] * (len(variable.shape) - 1))
    return read_tensor(file, variable).float() / rows
