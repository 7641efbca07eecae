"""Reads the PTX that nvcc makes: kernels, their instructions, registers, parameters and shared memory."""

import re
from dataclasses import dataclass, field

import numpy as np

TYPES = {f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
         for kind, code in (("b", "u"), ("u", "u"), ("s", "i")) for bits in (8, 16, 32, 64)}  # fmt: skip
SHARED = r"(\.extern )?\.shared \.align (\d+) \.(\w+) (\S+?)(?:\[(\d*)\])?;"
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "pred": np.dtype("?")}


@dataclass
class Instruction:
    guard: tuple  # name of the predicate and whether it must be false, or None
    name: str  # "ld.shared.f32"
    operands: list
    line: str  # of the source: "cross.cu:12"
    parts: list = field(init=False)

    def __post_init__(self):
        self.parts = re.split(r"\.|::", self.name)

    def __str__(self):
        return f"{self.name} {', '.join(self.operands)} ({self.line})"


@dataclass
class Kernel:
    name: str
    parameters: dict = field(default_factory=dict)  # name -> offset
    shared: dict = field(default_factory=dict)  # name -> offset; what is dynamic comes last
    static_bytes: int = 0
    registers: dict = field(default_factory=dict)  # name -> dtype
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)  # name -> number of an instruction


def up(n, unit):
    return -(-n // unit) * unit


class Program:
    """A file of PTX, whose kernels are read when they are asked for."""

    def __init__(self, text):
        self.files = {number: path.split("/")[-1] for number, path in re.findall(r'\.file\s+(\d+) "([^"]*)"', text)}
        text = re.sub(r"//[^\n]*", "", text)
        self.shared = re.findall(SHARED, text)
        entries = re.finditer(r"\.entry (\S+)\((.*?)\)\s*[^{]*\{(.*?)^\}", text, re.S | re.M)
        self.entries = {entry[1]: entry.groups() for entry in entries}

    def kernel(self, *parts):
        """The one whose mangled name has all these parts."""
        names = [name for name in self.entries if all(part in name for part in parts)]
        assert len(names) == 1, f"{parts}: {len(names)} kernels"
        return _kernel(*self.entries[names[0]], self.shared, self.files)


def _kernel(name, parameters, body, shared, files):
    kernel = Kernel(name)
    end = 0
    for parameter in parameters.split(","):
        align = re.search(r"\.align (\d+)", parameter)
        kind, own_name, count = re.search(r"\.([bus]\d+|f32)\s+(\S+?)(?:\[(\d+)\])?\s*$", parameter).groups()
        size = TYPES[kind].itemsize
        kernel.parameters[own_name] = end = up(end, int(align[1]) if align else size)
        end += size * int(count or 1)
    _place_shared(kernel, body, shared + re.findall(SHARED, body))
    for kind, prefix, count in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", body):
        kernel.registers |= {f"%{prefix}{i}": TYPES[kind] for i in range(int(count))}
    line = "?"
    for statement in body.split("\n"):
        statement = statement.strip()
        if place := re.match(r"\.loc\s+(\d+) (\d+)", statement):
            if place[2] != "0":
                line = f"{files.get(place[1], '?')}:{place[2]}"
        elif label := re.match(r"(\$?\w+):$", statement):
            kernel.labels[label[1]] = len(kernel.code)
        elif statement and statement[0] not in ".":
            for one in statement.split(";"):
                _add(kernel, one, line)
    return kernel


def _place_shared(kernel, body, declared):
    end, dynamic = 0, []
    for is_extern, align, kind, name, count in declared:
        if name not in body or name in kernel.shared:
            continue
        if is_extern:
            dynamic.append(name)
            continue
        kernel.shared[name] = end = up(end, int(align))
        end += TYPES[kind].itemsize * int(count or 1)
    kernel.static_bytes = up(end, 16)
    kernel.shared |= dict.fromkeys(dynamic, kernel.static_bytes)


def _add(kernel, statement, line):
    statement = re.sub(r"^[{}\s]+(?=[a-z@]|$)", "", statement).strip()
    if statement in ("", "}"):
        return
    if statement.startswith("."):  # a register of inline assembly
        kind, names = re.match(r"\.reg \.(\w+) (.*)", statement).groups()
        kernel.registers |= {name.strip(): TYPES[kind] for name in names.split(",")}
        return
    guarded = re.match(r"@(!?)(%\w+)\s+(.*)", statement)
    guard = (guarded[2], bool(guarded[1])) if guarded else None
    name, _, operands = (guarded[3] if guarded else statement).partition(" ")
    name, operands = name.strip(), re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,|\s]+", operands)
    kernel.code.append(Instruction(guard, name, operands, line))
