"""Runs PTX on a CPU: one block at a time, its threads side by side in NumPy's arrays, and of those the ones that are
furthest behind. It knows values, and what memory.py watches for, barriers that not all reach and copies that nobody
awaits; and it counts. It knows nothing of time."""

from collections import Counter

import numpy as np
from instructions import compiled
from memory import WARP, Fault, SharedMemory

DONE, WAITING = 1 << 40, 1 << 30


class Machine:
    def __init__(self, kernel, memory, most_warp_instructions=10**7):
        self.kernel, self.memory = kernel, memory
        self.counts, self.wavefronts = Counter(), Counter()  # of each instruction: how many warps ran it, shared memory
        self.left = most_warp_instructions
        self.steps = [compiled(self, number, instruction) for number, instruction in enumerate(kernel.code)]
        self.targets = set(kernel.labels.values())

    def run(self, parameters, grid, threads, dynamic_bytes=0, blocks=None):
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.grid, self.threads = grid, threads
        self.memory.start()
        for self.block in range(grid) if blocks is None else blocks:
            self.run_block(dynamic_bytes)
        return self

    def run_block(self, dynamic_bytes):
        self.shared = SharedMemory(self.kernel.static_bytes + dynamic_bytes, self.threads)
        self.memory.enter(self.block, self.threads)
        kinds = self.kernel.registers
        self.registers = {r: np.zeros(self.threads, t if t.kind == "b" else f"u{t.itemsize}") for r, t in kinds.items()}
        self.copies = [[[]] for _ in range(self.threads)]  # of each thread, in groups; the last one is open
        at = np.zeros(self.threads, np.int64)
        while not (at == DONE).all():
            running = at < WAITING
            if running.any():
                self.run_some(at, int(at[running].min()))
            else:
                self.meet(at)
        if any(group for groups in self.copies for group in groups):
            raise Fault("copies that nobody awaited")
        self.wavefronts += self.shared.wavefronts

    def meet(self, at):
        """All threads wait at a barrier."""
        if (at == DONE).any():
            raise Fault("threads are gone while others wait at a barrier")
        if len(np.unique(at)) > 1:
            raise Fault("threads wait at different barriers")
        at -= WAITING
        self.shared.barrier()
        self.memory.barrier()

    def run_some(self, at, number):
        """The threads that are there go on together until a branch, or until others may join them."""
        active = np.nonzero(at == number)[0]
        while True:
            guard, name = self.kernel.code[number].guard, self.kernel.code[number].name
            chosen = active if guard is None else active[self.registers[guard[0]][active] ^ guard[1]]
            warps = len(np.unique(active // WARP))
            self.counts[number] += warps
            self.left -= warps
            if self.left < 0:
                raise Fault("it does not end")
            step = self.steps[number]
            number += 1
            at[active] = number
            if name.startswith("bra"):
                at[chosen] = step
                return
            if name == "ret":
                at[chosen] = DONE
                return
            if name.startswith("bar.sync"):
                at[active] += WAITING
                return
            if len(chosen):
                step(chosen)
            if number in self.targets:
                return

    # What instructions ask of it

    def reader(self, operand, dtype):
        """A function from threads to the operand's values."""
        dtype = np.dtype(dtype)
        special = {
            "%tid.x": lambda threads: threads,
            "%ntid.x": lambda threads: np.full(len(threads), self.threads),
            "%ctaid.x": lambda threads: np.full(len(threads), self.block),
            "%nctaid.x": lambda threads: np.full(len(threads), self.grid),
        }
        if operand in special:
            return lambda threads: special[operand](threads).astype(dtype)
        if operand in self.kernel.registers:
            return lambda threads: seen_as(self.registers[operand][threads], dtype)
        value = np.array([self.constant(operand, dtype)])
        return lambda threads: np.broadcast_to(value, len(threads))

    def constant(self, operand, dtype):
        for table in (self.kernel.parameters, self.kernel.shared):
            if operand in table:
                return dtype.type(table[operand])
        if operand.startswith("0f"):
            return np.uint32(int(operand[2:], 16)).view(np.float32)
        if dtype.kind == "b":
            return bool(int(operand, 0))
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.array(int(operand, 0) & (1 << 8 * dtype.itemsize) - 1, unsigned).view(dtype)[()]

    def writer(self, operand):
        """A function that gives threads' values to a register."""
        if operand == "_":
            return lambda threads, values: None

        def write(threads, values):
            register = self.registers[operand]
            if register.dtype != values.dtype and register.dtype != bool:
                if values.dtype.itemsize < register.dtype.itemsize and values.dtype.kind == "i":
                    values = values.astype(f"i{register.dtype.itemsize}")  # loads extend the sign
                elif values.dtype.itemsize < register.dtype.itemsize:
                    values = values.view(f"u{values.dtype.itemsize}").astype(register.dtype)
                values = np.ascontiguousarray(values).view(register.dtype)
            register[threads] = values

        return write

    def need_whole_warps(self, threads, instruction):
        if (np.unique(threads // WARP, return_counts=True)[1] != WARP).any():
            raise Fault(f"not all lanes of a warp are at {instruction}")

    def tally(self):
        """Warp instructions, and wavefronts of shared memory."""
        return sum(self.counts.values()), sum(self.wavefronts.values())


def seen_as(values, dtype):
    if values.dtype == dtype or values.dtype == bool:
        return values
    return values.astype(f"u{dtype.itemsize}").view(dtype)
