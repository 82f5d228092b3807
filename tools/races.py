"""Races between the warps of a program, read from its PTX.

Triton orders shared memory between the warps of a program, and never global memory. A scalar load
is done by every thread, a scalar store by one. So a program that reads a number, works with it in
all its threads, and stores another in its place has to have a barrier in between: without one, a
delayed warp reads the new number. Neither the interpreter (one thread) nor a tool that watches
shared memory sees it, and on a GPU it takes bad luck.

A barrier is not needed where nothing but scalar stores follow from what was read: those are done by
the thread that read it.

Warps only: the lanes of a warp load together, so a program of one warp has no such race; and that
two programs do not meet is for each kernel's docstring to say. Addresses are told apart by the
argument they come from, so two arguments with the same memory have to be named as such.

The assembler keeps loads and stores on their side of a barrier; ``traffic`` is for holding it to
that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_REGISTER = re.compile(r"%[a-z]+\d+")
# what differs from thread to thread, or may
_OF_A_THREAD = re.compile(r"%(?:tid|laneid|warpid)\b|\bld\.shared|\bshfl\.|\bmma|\bldmatrix")
_STATEMENT = re.compile(r"(?:@!?(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_NO_RESULT = ("st.", "bra", "bar.", "barrier.", "ret", "red.", "cp.", "mbarrier.", "fence.")


@dataclass
class _Instruction:
    """One instruction: what it writes and reads, and the address if it is of global memory."""

    name: str
    text: str
    results: set[str] = field(default_factory=set)
    operands: set[str] = field(default_factory=set)
    address: set[str] = field(default_factory=set)
    guard: str | None = None

    @property
    def loads(self) -> bool:
        return self.name.startswith("ld.global")

    @property
    def stores(self) -> bool:
        return self.name.startswith("st.global")

    @property
    def branches(self) -> bool:
        return self.name.startswith("bra")

    @property
    def width(self) -> int:
        """Bytes of a thread: of ld.global.v4.b32, 16."""
        numbers = re.search(r"\.v(\d)\.", self.name)
        bits = re.search(r"\d+$", self.name)
        assert bits is not None, self.text
        return int(bits[0]) // 8 * (int(numbers[1]) if numbers else 1)

    @property
    def orders(self) -> bool:
        return self.name.startswith(("bar.sync", "barrier.sync"))


def races(
    ptx: str, arguments: Sequence[str], same: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Arguments that a program reads and writes with no barrier in between.

    Args:
        ptx: of one kernel.
        arguments: the names of its parameters.
        same: names of arguments by the name of another that may be the same memory.
    """
    program = _Program(ptx, arguments, same or {})
    return tuple(sorted({program.argument(load) for load, _ in program.races()}))


def traffic(ptx: str) -> list[Counter[str]]:
    """Loads and stores of global memory, by bytes of a thread, from barrier to barrier.

    As far as the program runs straight on: up to its first label.
    """
    program = _Program(ptx, (), {})
    straight = min((program.target(x) for x in program.instructions if x.branches), default=None)
    found: list[Counter[str]] = [Counter()]
    for x in program.instructions[:straight]:
        if x.orders:
            found.append(Counter())
        elif x.loads or x.stores:
            found[-1][f"{x.name[:2]} {x.width}"] += 1
    return found


class _Program:
    def __init__(self, ptx: str, arguments: Sequence[str], same: Mapping[str, str]) -> None:
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
        self.instructions: list[_Instruction] = []
        self.labels: dict[str, int] = {}
        for statement in _statements(body):
            if label := re.fullmatch(r"(\$?\w+):", statement):
                self.labels[label[1]] = len(self.instructions)
            else:
                self.instructions.append(_instruction(statement))
        self.arguments, self.same = arguments, same
        self.writers: dict[str, list[int]] = {}
        self.readers: dict[str, list[int]] = {}
        for i, instruction in enumerate(self.instructions):
            for register in instruction.results:
                self.writers.setdefault(register, []).append(i)
            for register in instruction.operands | instruction.address:
                self.readers.setdefault(register, []).append(i)

    def races(self) -> Iterator[tuple[int, int]]:
        """A scalar load whose number all threads use, and a store that no barrier keeps off it."""
        memory = [i for i, x in enumerate(self.instructions) if x.loads or x.stores]
        scalar = [i for i in memory if self._is_scalar(i)]
        stores = [i for i in memory if self.instructions[i].stores]
        for load in (i for i in scalar if self.instructions[i].loads):
            targets = {s for s in stores if self.argument(s) == self.argument(load)}
            if not targets or not self._used_by_all(load, scalar):
                continue
            after = self._until_a_barrier(load)
            for store in targets:
                if store in after or load in self._until_a_barrier(store):
                    yield load, store

    def argument(self, i: int) -> str:
        """The parameter that the address comes from; of several, the first."""
        found = [
            int(match[1])
            for j in self._origins(self.instructions[i].address)
            if (match := re.search(r"\[\w+_param_(\d+)", self.instructions[j].text))
            and self.instructions[j].name.startswith("ld.param")
            and self.instructions[j].name.endswith("64")
        ]
        if not found or min(found) >= len(self.arguments):
            return "?"
        name = self.arguments[min(found)]
        return self.same.get(name, name)

    def _origins(self, registers: set[str]) -> set[int]:
        """Instructions that have a part in the registers' values; loaded addresses end it."""
        seen: set[int] = set()
        left = list(registers)
        while left:
            for j in self.writers.get(left.pop(), ()):
                if j not in seen:
                    seen.add(j)
                    left += self.instructions[j].operands
        return seen

    def _is_scalar(self, i: int) -> bool:
        x = self.instructions[i]
        return not any(
            _OF_A_THREAD.search(self.instructions[j].text) for j in self._origins(x.address)
        )

    def _used_by_all(self, load: int, scalar: Sequence[int]) -> bool:
        """Whether anything but scalar stores follows from what is loaded."""
        seen: set[int] = set()
        left = list(self.instructions[load].results)
        while left:
            for j in self.readers.get(left.pop(), ()):
                if j in seen:
                    continue
                seen.add(j)
                x = self.instructions[j]
                if not x.results and not (x.stores and j in scalar):
                    return True
                left += x.results
        return False

    def _until_a_barrier(self, start: int) -> set[int]:
        """Instructions that can run after this one before any barrier."""
        seen: set[int] = set()
        left = self._next(start)
        while left:
            i = left.pop()
            if i in seen or i >= len(self.instructions) or self.instructions[i].orders:
                continue
            seen.add(i)
            left += self._next(i)
        return seen

    def _next(self, i: int) -> list[int]:
        x = self.instructions[i]
        if x.name.startswith("ret"):
            return [] if x.guard is None else [i + 1]
        if not x.branches:
            return [i + 1]
        return [self.target(x)] if x.guard is None else [self.target(x), i + 1]

    def target(self, branch: _Instruction) -> int:
        """Where it goes on; a loop around one instruction, which has no such label, ends."""
        return self.labels.get(branch.text.split()[-1], len(self.instructions))


def _statements(body: str) -> Iterator[str]:
    """Labels with their colon, and instructions without their semicolon."""
    lines = (re.sub(r"//.*", "", line).strip() for line in body.splitlines())
    # a directive stands on a line of its own, without a semicolon some of them
    code = "\n".join(line for line in lines if not line.startswith("."))
    for part in re.findall(r"\$\w+:|[^;:]+(?:::[^;:]+)*;", code):
        # braces around instructions, not around operands
        text = re.sub(r"^[{}\s]+", "", part.rstrip(";")).strip()
        if text and not text.startswith("."):
            yield text


def _instruction(text: str) -> _Instruction:
    match = _STATEMENT.fullmatch(text)
    if match is None:
        raise RuntimeError(f"no instruction of PTX: {text!r}")
    guard, name, rest = match.groups()
    made = _Instruction(name, text, guard=guard)
    bracket = re.search(r"\[([^]]*)\]", rest)
    if bracket and (made.loads or made.stores):
        made.address = set(_REGISTER.findall(bracket[1]))
        rest = rest[: bracket.start()] + rest[bracket.end() :]
    first, others = _split(rest)
    if name.startswith(_NO_RESULT):
        others = rest
    else:
        made.results = set(_REGISTER.findall(first))
    made.operands = set(_REGISTER.findall(others)) | ({guard} if guard else set())
    return made


def _split(operands: str) -> tuple[str, str]:
    """The first operand, a vector in braces or a pair of predicates perhaps, and the others."""
    match = re.match(r"\s*(\{[^}]*\}|[^,{]+)", operands)
    return (match[1], operands[match.end() :]) if match else ("", operands)
