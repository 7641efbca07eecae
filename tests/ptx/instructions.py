"""What each instruction does: compiled(machine, number, instruction) is a function from the threads that run it. Of a
branch it is the number where it goes."""

import re

import numpy as np
from memory import GLOBAL, SHARED, WARP, Fault
from program import TYPES

np.seterr(all="ignore")
ROW, QUAD = np.arange(WARP) // 4, np.arange(WARP) % 4  # of a lane, in the squares of the tensor cores


def compiled(machine, number, instruction):
    family = instruction.parts[0]
    if family == "bra":
        return machine.kernel.labels[instruction.operands[0]]
    if family == "ret" or instruction.name == "bar.sync":
        return None
    if family in SPECIAL:
        return SPECIAL[family](machine, number, instruction)
    return arithmetic(machine, instruction)


def of_braces(operand):
    return [name.strip() for name in operand.strip("{}").split(",")]


def bits(values, size=4):
    return np.ascontiguousarray(values).view(f"u{size}")


def halves(words, is_bfloat):
    """The two numbers in each word, as float32."""
    two = bits(words).view(np.uint16).reshape(-1, 2)
    numbers = (two.astype(np.uint32) << 16).view(np.float32) if is_bfloat else two.view(np.float16).astype(np.float32)
    return numbers[:, 0], numbers[:, 1]


def to_bfloat(x):
    word = bits(x.astype(np.float32)).astype(np.uint64)
    rounded = ((word + 0x7FFF + (word >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


# ---- arithmetic: a register from registers ----


def divided(x, y):
    if x.dtype.kind == "f":
        return x / y
    quotient = np.abs(x.astype(object)) // np.where(y == 0, 1, np.abs(y.astype(object)))
    return (quotient * np.where((x < 0) == (y < 0), 1, -1)).astype(x.dtype)


def shifted(x, by, is_left):
    width, by = 8 * x.dtype.itemsize, by.astype(np.int64)
    most = np.minimum(by, width - 1).astype(x.dtype)
    if is_left or x.dtype.kind == "u":
        return np.where(by >= width, 0, x << most if is_left else x >> most).astype(x.dtype)
    return x >> most


def permuted(x, y, selector):
    """Bytes of two words."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros(len(x), np.uint64)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i) & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        result |= (both >> chosen & np.uint64(255)) << np.uint64(8 * i)
    return result.astype(np.uint32)


def multiplied_and_added(x, y, z, rounds_down):
    if x.dtype.kind != "f":
        return x * y + z
    exact = x.astype(np.float64) * y + z
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded) if rounds_down else rounded


def any_logic(x, y, z, table):
    result = np.zeros_like(x)
    for i in np.nonzero([int(table[0]) >> i & 1 for i in range(8)])[0]:
        result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    return result


def inserted(bits_of, into, at, count):
    mask = ((np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)) << at.astype(np.uint64)
    mask = (mask & np.uint64((1 << 8 * into.dtype.itemsize) - 1)).astype(into.dtype)
    return (into & ~mask) | (bits_of << at.astype(into.dtype) & mask)


BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divided, "rem": lambda x, y: x - divided(x, y) * y,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": lambda x, y: np.fmin(x, y), "max": lambda x, y: np.fmax(x, y),
}  # fmt: skip
UNARY = {
    "neg": np.negative, "not": np.invert, "abs": np.abs, "mov": lambda x: x, "ex2": np.exp2,
    "rcp": lambda x: np.float32(1) / x, "popc": np.bitwise_count,
}  # fmt: skip
ORDERED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal}  # fmt: skip


def arithmetic(machine, instruction):
    family, parts, operands = instruction.parts[0], instruction.parts, instruction.operands
    dtype = TYPES[parts[-1]]
    write = machine.writer(operands[0])
    kinds = [dtype] * (len(operands) - 1)
    if family in ("shl", "shr"):
        kinds[1] = np.uint32
        apply = lambda x, by: shifted(x, by, family == "shl")  # noqa: E731
    elif family in ("mad", "fma"):
        apply = lambda x, y, z: multiplied_and_added(x, y, z, "rm" in parts)  # noqa: E731
    elif family == "mul" and "wide" in parts:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        apply = lambda x, y: x.astype(wide) * y.astype(wide)  # noqa: E731
    elif family == "selp":
        kinds[2] = bool
        apply = lambda x, y, condition: np.where(condition, x, y)  # noqa: E731
    elif family == "lop3":
        apply = any_logic
    elif family == "bfi":
        kinds[2:] = [np.uint32] * 2
        apply = inserted
    elif family == "prmt":
        apply = permuted
    elif family == "setp":
        apply = comparison(parts[1])
    elif family in BINARY:
        apply = BINARY[family]
    elif family in UNARY:
        apply = UNARY[family]
    else:
        raise NotImplementedError(str(instruction))
    results_in = dtype if family not in ("setp", "popc") and "wide" not in parts else None
    readers = [machine.reader(operand, kind) for operand, kind in zip(operands[1:], kinds)]

    def step(threads):
        result = apply(*(read(threads) for read in readers))
        if family == "popc":
            result = result.astype(np.uint32)
        write(threads, result.astype(results_in) if results_in is not None else result)

    return step


def comparison(name):
    if name == "nan":
        return lambda x, y: np.isnan(x) | np.isnan(y)
    if name in ORDERED:
        compare = ORDERED[name]
        if name == "ne":
            return lambda x, y: compare(x, y) & (x == x) & (y == y)
        return compare
    return lambda x, y: ORDERED[name[:-1]](x, y) | np.isnan(x) | np.isnan(y)  # of floats, "or unordered"


def convert(machine, number, instruction):
    parts, (to, *sources) = instruction.parts, instruction.operands
    write = machine.writer(to)
    if "f16x2" in parts or "bf16x2" in parts:
        high, low = (machine.reader(source, np.float32) for source in sources)
        narrow = to_bfloat if "bf16x2" in parts else lambda x: bits(x.astype(np.float16), 2)
        both = lambda threads: narrow(low(threads)) | narrow(high(threads)).astype(np.uint32) << 16  # noqa: E731
        return lambda threads: write(threads, both(threads))
    if parts[-2] == "bf16":
        read = machine.reader(sources[0], np.float32)
        return lambda threads: write(threads, to_bfloat(read(threads)))
    target, read = TYPES[parts[-2]], machine.reader(sources[0], TYPES[parts[-1]])
    change = lambda x: x.astype(target)  # noqa: E731
    if "sat" in parts:
        change = lambda x: np.clip(np.nan_to_num(x, nan=0), 0, 1).astype(target)  # noqa: E731
    elif "rzi" in parts:
        change = lambda x: np.trunc(x).astype(target)  # noqa: E731
    return lambda threads: write(threads, change(read(threads)))


def move(machine, number, instruction):
    to, source = instruction.operands
    kind = instruction.parts[-1]
    if to.startswith("{"):
        writers, read = [machine.writer(name) for name in of_braces(to)], machine.reader(source, TYPES[kind])

        def step(threads):
            pieces = bits(read(threads), TYPES[kind].itemsize // len(writers)).reshape(len(threads), -1)
            for i, write in enumerate(writers):
                write(threads, pieces[:, i].copy())

        return step
    if source.startswith("{"):
        names, write = of_braces(source), machine.writer(to)
        size = TYPES[kind].itemsize
        readers = [machine.reader(name, f"u{size // len(names)}") for name in names]
        return lambda threads: write(threads, bits(np.stack([read(threads) for read in readers], 1), size)[:, 0])
    return arithmetic(machine, instruction)


# ---- memory ----


def address_of(machine, operand):
    base, offset = re.match(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
    read = machine.reader(base, np.uint64)
    return lambda threads: read(threads).astype(np.int64) + int(offset or 0)


def space_of(instruction, addresses):
    """Where addresses are, and their offsets there. Generic ones tell by themselves."""
    for space in ("param", "shared", "global"):
        if space in instruction.parts:
            return space, addresses
    is_shared = (addresses >= SHARED) & (addresses < GLOBAL)
    if is_shared.all() != is_shared.any():
        raise Fault(f"addresses of two kinds at once: {instruction}")
    return ("shared", addresses - SHARED) if is_shared.all() else ("global", addresses)


def count_in(instruction):
    return next((int(part[1]) for part in instruction.parts if re.fullmatch(r"v\d", part)), 1)


def load(machine, number, instruction):
    dtype, count = TYPES[instruction.parts[-1]], count_in(instruction)
    writers = [machine.writer(name) for name in of_braces(instruction.operands[0])]
    address, size = address_of(machine, instruction.operands[1]), dtype.itemsize * count

    def step(threads):
        space, at = space_of(instruction, address(threads))
        if space == "param":
            data = machine.parameters[at[:, None] + np.arange(size)]
        elif space == "shared":
            data = machine.shared.bytes[machine.shared.cells(threads, at, size, False, instruction, number)]
        else:
            cells = machine.memory.cells(at, size, instruction)
            machine.memory.check_read(threads, cells, instruction)
            data = machine.memory.bytes[cells]
        numbers = np.ascontiguousarray(data).view(dtype)
        for i, write in enumerate(writers):
            write(threads, numbers[:, i].copy())

    return step


def store(machine, number, instruction):
    dtype, count = TYPES[instruction.parts[-1]], count_in(instruction)
    readers = [machine.reader(name, dtype) for name in of_braces(instruction.operands[1])]
    address, size = address_of(machine, instruction.operands[0]), dtype.itemsize * count

    def step(threads):
        space, at = space_of(instruction, address(threads))
        data = bits(np.stack([read(threads) for read in readers], 1), 1)
        if space == "shared":
            machine.shared.bytes[machine.shared.cells(threads, at, size, True, instruction, number)] = data
        else:
            cells = machine.memory.cells(at, size, instruction)
            machine.memory.note_write(threads, cells)
            machine.memory.bytes[cells] = data

    return step


def fence(machine, number, instruction):
    return machine.memory.fence


def count(machine, number, instruction):
    """atom.inc, one thread after the other."""
    assert instruction.name == "atom.global.inc.u32", instruction
    write, most = machine.writer(instruction.operands[0]), machine.reader(instruction.operands[2], np.uint32)
    address = address_of(machine, instruction.operands[1])

    def step(threads):
        machine.memory.count(threads)
        for thread in threads:
            one = np.array([thread])
            cells = machine.memory.cells(address(one), 4, instruction)[0]
            was = machine.memory.bytes[cells].view(np.uint32)[0]
            machine.memory.bytes[cells] = np.array([0 if was >= most(one)[0] else was + 1], np.uint32).view(np.uint8)
            write(one, np.array([was], np.uint32))

    return step


def to_address_space(machine, number, instruction):
    """cvta: shared memory's own addresses begin at 0."""
    read, write = machine.reader(instruction.operands[1], np.uint64), machine.writer(instruction.operands[0])
    base = np.uint64(SHARED if "shared" in instruction.parts else 0)
    if "to" in instruction.parts:
        return lambda threads: write(threads, read(threads) - base)
    return lambda threads: write(threads, read(threads) + base)


def copy(machine, number, instruction):
    """cp.async: the bytes arrive when their thread waits for them, and no sooner."""
    if "commit_group" in instruction.parts:
        return lambda threads: [machine.copies[thread].append([]) for thread in threads]
    if "wait_group" in instruction.parts:
        return lambda threads: arrive(machine, threads, int(instruction.operands[0]))
    to, source = (address_of(machine, operand) for operand in instruction.operands[:2])
    size = int(instruction.operands[2])
    read_size = machine.reader(instruction.operands[3] if len(instruction.operands) > 3 else str(size), np.uint32)

    def step(threads):
        places, froms, read = to(threads), source(threads), read_size(threads)
        exist = read > 0
        machine.memory.cells(froms[exist], size, instruction)
        shared = machine.shared
        if (places < 0).any() or (places + size > shared.size).any() or (places % size).any():
            raise Fault(f"shared memory out of bounds or misaligned: {instruction}")
        cells = places[:, None] + np.arange(size)
        shared.check_races(threads, cells, True, instruction)
        if shared.on_their_way[cells].any():
            raise Fault(f"two copies on their way to one place: {instruction}")
        shared.on_their_way[cells] += 1
        shared.count_wavefronts(threads, places, size, number)
        for i, thread in enumerate(threads):
            data = machine.memory.bytes[froms[i] - GLOBAL :][: read[i]].copy()
            machine.copies[thread][-1].append((cells[i], np.pad(data, (0, size - read[i]))))

    return step


def arrive(machine, threads, newest):
    shared = machine.shared
    for thread in threads:
        groups = machine.copies[thread]
        while len(groups) > newest + 1:
            for cells, data in groups.pop(0):
                shared.bytes[cells] = data
                shared.on_their_way[cells] -= 1
                shared.note_write(np.array([thread]), cells[None])


# ---- a warp together ----


def barrier(machine, number, instruction):
    def step(threads):
        machine.need_whole_warps(threads, instruction)
        machine.shared.barrier_of_warps(np.unique(threads // WARP))

    return step if "warp" in instruction.parts else None


def shuffle(machine, number, instruction):
    assert "bfly" in instruction.parts
    to, *sources = [operand for operand in instruction.operands if not operand.startswith("%p")]
    read, by, write = machine.reader(sources[0], np.uint32), machine.reader(sources[1], np.uint32), machine.writer(to)

    def step(threads):
        machine.need_whole_warps(threads, instruction)
        values = np.zeros(machine.threads, np.uint32)
        values[threads] = read(threads)
        write(threads, values[threads ^ by(threads).astype(np.int64)])

    return step


def vote(machine, number, instruction):
    read, write = machine.reader(instruction.operands[1], bool), machine.writer(instruction.operands[0])

    def step(threads):
        machine.need_whole_warps(threads, instruction)
        votes = read(threads).reshape(-1, WARP)
        if "any" in instruction.parts:
            answers = votes.any(1)
        else:
            answers = (votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        write(threads, np.repeat(answers, WARP))

    return step


def load_matrix(machine, number, instruction):
    """ldmatrix: squares of 8 x 8 numbers of 16 bits; a lane gets two that stand side by side (turned: on top)."""
    writers = [machine.writer(name) for name in of_braces(instruction.operands[0])]
    address, is_turned = address_of(machine, instruction.operands[1]), "trans" in instruction.parts

    def step(threads):
        machine.need_whole_warps(threads, instruction)
        at = address(threads).reshape(-1, WARP)
        for i, write in enumerate(writers):
            rows, lanes = at[:, 8 * i : 8 * i + 8], threads.reshape(-1, WARP)[:, 8 * i : 8 * i + 8]
            cells = machine.shared.cells(lanes.reshape(-1), rows.reshape(-1), 16, False, instruction, number)
            squares = machine.shared.bytes[cells].view(np.uint16).reshape(-1, 8, 8)
            if is_turned:
                squares = squares.swapaxes(1, 2)
            write(threads, bits(squares.reshape(len(squares), WARP, 2)).reshape(-1))

    return step


def multiply_matrices(machine, number, instruction):
    """mma.m16n8k16."""
    assert instruction.parts[3] == "m16n8k16", instruction
    names = [of_braces(operand) for operand in instruction.operands]
    readers = [[machine.reader(name, kind) for name in group] for group, kind in
               zip(names[1:], (np.uint32, np.uint32, np.float32))]  # fmt: skip
    writers, is_bfloat = [machine.writer(name) for name in names[0]], "bf16" in instruction.parts

    def step(threads):
        machine.need_whole_warps(threads, instruction)
        warps = len(threads) // WARP
        left, right, sums = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        words, others, before = ([read(threads) for read in group] for group in readers)
        for i, two in enumerate(words):
            for j, numbers in enumerate(halves(two, is_bfloat)):
                left[:, ROW + i % 2 * 8, QUAD * 2 + i // 2 * 8 + j] = numbers.reshape(warps, WARP)
        for i, two in enumerate(others):
            for j, numbers in enumerate(halves(two, is_bfloat)):
                right[:, QUAD * 2 + i * 8 + j, ROW] = numbers.reshape(warps, WARP)
        for i, numbers in enumerate(before):
            sums[:, ROW + i // 2 * 8, QUAD * 2 + i % 2] = numbers.reshape(warps, WARP)
        sums = (sums + left @ right).astype(np.float32)
        for i, write in enumerate(writers):
            write(threads, sums[:, ROW + i // 2 * 8, QUAD * 2 + i % 2].reshape(-1))

    return step


SPECIAL = {
    "cvt": convert, "mov": move, "ld": load, "st": store, "cvta": to_address_space, "cp": copy, "bar": barrier,
    "shfl": shuffle, "vote": vote, "ldmatrix": load_matrix, "mma": multiply_matrices, "atom": count, "membar": fence,
    "fence": fence,
}  # fmt: skip
