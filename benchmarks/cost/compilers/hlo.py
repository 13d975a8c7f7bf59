"""What a compiled program moves, read from the text of its optimized HLO."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# They name or select memory and move nothing.
_NO_KERNELS = {
    *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier"),
    *("parameter", "tuple"),
}
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_ASSIGNED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: of its result.
      result: its type, such as `f32[48,8]{1,0}` or a tuple `(f32[8], s32[])`.
      opcode: such as `fusion`.
      operands: names of what it reads.
      line: all of it.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    line: str


def instructions(text: str) -> Iterator[Instruction]:
    """Yields the instructions of every computation in `text`."""
    for line in text.splitlines():
        assigned = _ASSIGNED.match(line)
        if assigned is None:
            continue
        name, rest = assigned.groups()
        result, rest = _split_type(rest)
        opcode, _, rest = rest.partition("(")
        operands = rest[: _closing(rest)]
        names = re.findall(r"%([\w.\-]+)", operands)
        yield Instruction(name, result, opcode, tuple(names), line)


def entry(text: str) -> list[Instruction]:
    """Returns the instructions of the entry computation: one per kernel, or fewer."""
    lines = iter(text.splitlines())
    body = []
    for line in lines:
        if line.startswith("ENTRY"):
            break
    for line in lines:
        if line.startswith("}"):
            break
        body.append(line)
    return list(instructions("\n".join(body)))


def kernels(text: str) -> list[Instruction]:
    """Returns what runs of the entry computation; an asynchronous pair is its start."""
    return [
        step
        for step in entry(text)
        if step.opcode not in _NO_KERNELS
        and not step.opcode.endswith(("-done", "-update"))
    ]


def traffic(text: str) -> int:
    """Returns the bytes of every kernel's unique operands and of its results.

    Only in main memory: what the TPU compiler keeps on the chip costs nothing there. A
    loop or a call counts as one kernel that reads its operands once, a choice of
    branches as the branch that reads least.
    """
    steps = {step.name: step for step in entry(text)}

    def sizes(names: Iterable[str]) -> int:
        return sum(num_bytes(steps[name].result) for name in names)

    total = 0
    for step in kernels(text):
        read = sizes({_buffer(steps, name) for name in step.operands})
        if step.opcode == "conditional":
            read = min(_branches(steps, step))
        written = num_bytes(step.result)
        if step.opcode.endswith("-start") and step.opcode != "all-reduce-start":
            written -= sizes(step.operands)  # it repeats them before its results
        total += read + written
    return total


def seldom(text: str) -> int:
    """Returns the bytes that only branches read of which another one reads less.

    Norms are summed again where one is out of range, which hardly ever happens.
    """
    steps = {step.name: step for step in entry(text)}
    read = [_branches(steps, s) for s in steps.values() if s.opcode == "conditional"]
    return sum(max(branches) - min(branches) for branches in read)


def _branches(steps: dict[str, Instruction], step: Instruction) -> list[int]:
    """What each branch of a conditional is handed, in bytes."""
    return [num_bytes(steps[name].result) for name in step.operands[1:]]


def collectives(text: str) -> dict[str, int]:
    """Returns how many collectives of each kind there are, without those not there.

    One in the body of a loop counts once.
    """
    found = dict.fromkeys(COLLECTIVES, 0)
    for step in instructions(text):
        kind = step.opcode.removesuffix("-start")
        if kind in found:
            found[kind] += 1
    return {kind: count for kind, count in found.items() if count}


def custom_calls(text: str) -> int:
    """Returns how many calls of code that the compiler did not make there are."""
    return sum(step.opcode == "custom-call" for step in instructions(text))


def cycles(text: str) -> int:
    """Returns the cycles that the TPU compiler expects of the entry's kernels.

    It gives none for copies, and a loop counts as nothing.
    """
    return sum(
        int(found.group(1))
        for step in entry(text)
        if (found := _CYCLES.search(step.line))
    )


def num_bytes(type_text: str) -> int:
    """Returns the size of an array or of all of a tuple in main memory, unpadded."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_text):
        if "S(" in layout:  # another memory space
            continue
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits.group()) if digits else 8)
        elements = math.prod(int(size) for size in shape.split(",") if size)
        total += elements * bits // 8
    return total


def _buffer(steps: dict[str, Instruction], name: str) -> str:
    """The instruction whose memory a bitcast shows."""
    while name in steps and steps[name].opcode == "bitcast":
        name = steps[name].operands[0]
    return name


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        before, _, after = text.partition(" ")
        return before, after
    stop = _closing(text[1:]) + 2
    return text[:stop], text[stop:].lstrip()


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before `text` closes."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)
