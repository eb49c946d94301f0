"""What a compiled program says over the network: the collectives in its HLO text, with their bytes and repetitions.

Bytes are those that one device receives, by the ring algorithms, of a group of g devices (Thakur 2005, "Optimization
of collective communication operations in MPICH"):

    all-gather           (g - 1) / g of the result
    reduce-scatter       (g - 1) / g of the operand
    all-reduce           both of these: 2 (g - 1) / g
    all-to-all           (g - 1) / g of the operand
    collective-permute   the result

A collective inside a loop counts once for each trip, where the compiler knows how many there are.

XLA's CPU compiler does not write reduce-scatter. It reduces everything everywhere, and each device then cuts out its
part. An all-reduce of which nothing but a slice is read is therefore counted as the reduce-scatter that it becomes on
a TPU or GPU, and marked so.
"""

import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64,
}  # fmt: skip
# What hands a value on unchanged, or changed element by element, on its way to a slice
PASSING = (
    "get-tuple-element",
    "bitcast",
    "copy",
    "convert",
    "reshape",
    "transpose",
    "multiply",
    "copy-start",
    "copy-done",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    group: the device numbers of one of the groups that talk. nbytes: received by a device in all its `trips`. dtype: of
    its elements. sliced: it is written as an all-reduce of which each device reads only its part. known: whether the
    compiler knew the trips of all loops around it; otherwise those unknown count as one.
    """

    kind: str
    name: str
    group: tuple[int, ...]
    dtype: str
    nbytes: float
    trips: int
    sliced: bool = False
    known: bool = True


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimized HLO module that runs, in the order of the text."""
    programs, entry = _parse(text)
    out = []
    for name, (trips, known) in _repetitions(programs, entry).items():
        for instruction in programs[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                out.append(_collective(kind, instruction, programs, name, trips, known))
    return out


def _collective(kind, instruction, programs, computation, trips, known) -> Collective:
    program = programs[computation]
    operands = [array for name in instruction.operands for array in _ARRAY.findall(program[name].shape)]
    group = _group(instruction.rest, kind)
    size, share = len(group), (len(group) - 1) / len(group)
    given = sum(map(_nbytes, operands))
    sliced = kind == "all-reduce" and _only_sliced(programs, computation, instruction.name)
    kind = "reduce-scatter" if sliced else kind
    moved = {
        "all-gather": given * (size - 1),
        "reduce-scatter": given * share,
        "all-reduce": given * share * 2,
        "all-to-all": given * share,
        "collective-permute": given,
    }[kind]
    dtype = max(operands, key=_nbytes)[0] if operands else ""
    return Collective(kind, instruction.name, group, dtype, moved * trips, trips, sliced, known)


def _nbytes(array: tuple[str, str]) -> float:
    dtype, sides = array
    return BITS.get(dtype, 32) / 8 * math.prod(int(side) for side in sides.split(",") if side)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """{computation: {name: instruction}}, and the name of the one that is run."""
    programs: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            entry = header[2] if header[1] else entry
            current = programs.setdefault(header[2], {})
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            shape, rest = _split_shape(found[3])
            opcode, _, rest = rest.partition("(")
            arguments, rest = _split_arguments(rest)
            names = tuple(re.findall(r"%([\w.\-]+)", arguments) or re.findall(r"[\w.\-]+", arguments))
            names = (arguments,) if opcode in ("parameter", "constant") else names
            current[found[2]] = _Instruction(found[2], shape, opcode.strip(), names, rest, bool(found[1]))
    return programs, entry


def _split_shape(text: str) -> tuple[str, str]:
    """The shape, which may be a tuple, and what follows it."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    shape, rest = _split_arguments(text[1:])
    return shape, rest.strip()


def _split_arguments(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and what follows it."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _group(rest: str, kind: str) -> tuple[int, ...]:
    """The first group, from either of the forms HLO writes: a list of lists, or [groups,size]<=[dims]T(order)."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{[\d,]+\})", rest)
        return tuple(int(number) for number in re.findall(r"\d+", pairs[1])) if pairs else (0, 1)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, size = int(found[1]), int(found[2])
        devices = np.arange(groups * size).reshape([int(side) for side in found[3].split(",")])
        if found[4]:
            devices = devices.transpose([int(axis) for axis in found[4].split(",")])
        return tuple(devices.reshape(groups, size)[0].tolist())
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return tuple(int(number) for number in found[1].split(",")) if found else (0,)


def _repetitions(programs, entry: str) -> dict[str, tuple[int, bool]]:
    """{computation that runs: (how often, whether that is known)}."""
    out: dict[str, tuple[int, bool]] = {}

    def visit(name: str, trips: int, known: bool) -> None:
        before, sure = out.get(name, (0, True))
        out[name] = (before + trips, sure and known)
        for instruction in programs[name].values():
            called = [part for found in _CALLED.findall(instruction.rest) for part in re.findall(r"[\w.\-]+", found)]
            count = _trips(instruction, programs) if instruction.opcode == "while" else 1
            for part in called:
                if part in programs:
                    visit(part, trips * (count or 1), known and count is not None)

    visit(entry, 1, True)
    return out


def _trips(loop: _Instruction, programs) -> int | None:
    """How often a loop runs: by the compiler's own note, else by the one constant that its condition compares with."""
    if found := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest):
        return int(found[1])
    condition = programs.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], {})
    constants = [i.operands[0] for i in condition.values() if i.opcode == "constant" and i.operands[0].isdigit()]
    return int(constants[0]) if len(constants) == 1 else None


def _only_sliced(programs, computation: str, name: str) -> bool:
    """Whether all that reads a value, in the end, is slices of it at a place that depends on the device."""
    program = programs[computation]
    users = [i for i in program.values() if name in i.operands and i.opcode not in ("parameter", "constant")]
    if not users or program[name].root:
        return False
    return all(_slices(programs, computation, user, name) for user in users)


def _slices(programs, computation: str, user: _Instruction, name: str) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode in PASSING:
        return _only_sliced(programs, computation, user.name)
    if user.opcode in ("fusion", "call"):
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", user.rest)[1]
        numbers = [str(index) for index, operand in enumerate(user.operands) if operand == name]
        inside = [i.name for i in programs[called].values() if i.opcode == "parameter" and i.operands[0] in numbers]
        return all(_only_sliced(programs, called, each) for each in inside)
    return False
