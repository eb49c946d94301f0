"""What a compiled program says over the network: the collectives in its HLO text, with their bytes and repetitions.

Bytes are those that one device receives, by the ring algorithms, of a group of g devices (Thakur 2005, "Optimization
of collective communication operations in MPICH"):

    all-gather           (g - 1) / g of the result
    reduce-scatter       (g - 1) / g of the operand
    all-reduce           both of these: 2 (g - 1) / g
    all-to-all           (g - 1) / g of the operand
    collective-permute   the result

A collective inside a loop counts once for each trip, where the compiler knows how many there are.

Compilers write all-reduce for other things, too, and what counts here is the least that has to move:

    an all-reduce of which a device reads only its own slice is a reduce-scatter. The CPU's compiler always writes it
    so, and the TPU's on a large 3D torus.
    an all-reduce of zeros into which each device has written its own slice is an all-gather: the TPU's again.
    what was bfloat16 and is float32 only on its way counts as bfloat16: the CPU's compiler sends nothing in less.

A combined operation is counted once for each kind in it.
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
    its elements. disguised: it is written as an all-reduce. known: whether the compiler knew the trips of all loops
    around it; otherwise those unknown count as one.
    """

    kind: str
    name: str
    group: tuple[int, ...]
    dtype: str
    nbytes: float
    trips: int
    disguised: bool = False
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
            if instruction.opcode.removesuffix("-start") in KINDS:
                out += _collectives(instruction, programs, name, trips, known)
    return out


def _collectives(instruction, programs, computation: str, trips: int, known: bool) -> list[Collective]:
    """The operation, once for each kind of what it does to its operands."""
    written = instruction.opcode.removesuffix("-start")
    group = _group(instruction.rest, written)
    bytes_of: dict[str, float] = {}
    dtypes: dict[str, str] = {}
    for index, name in enumerate(instruction.operands):
        arrays = _ARRAY.findall(programs[computation][name].shape)
        given = sum(map(_nbytes, arrays))
        back = _back(programs, computation, name)
        kind, dtype = written, max(arrays, key=_nbytes)[0] if arrays else ""
        if dtype == "f32" and any(each.shape.startswith("bf16") for each, _ in back):
            given, dtype = given / 2, "bf16"
        if written == "all-reduce":
            part = index if len(instruction.operands) > 1 else None
            if _only_sliced(programs, computation, instruction.name, part):
                kind = "reduce-scatter"
            elif _own_part(programs, back):
                kind, given = "all-gather", given / len(group)
        bytes_of[kind], dtypes[kind] = bytes_of.get(kind, 0) + given * _received(kind, len(group)), dtype
    return [
        Collective(kind, instruction.name, group, dtypes[kind], nbytes * trips, trips, kind != written, known)
        for kind, nbytes in bytes_of.items()
    ]


def _received(kind: str, size: int) -> float:
    """Bytes that a device receives for each byte of its operand."""
    share = (size - 1) / size
    return {
        "all-gather": size - 1,
        "reduce-scatter": share,
        "all-reduce": 2 * share,
        "all-to-all": share,
        "collective-permute": 1,
    }[kind]


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
    """The first group, from any form HLO writes: lists, [groups,size]<=[dims]T(order), or axes of a mesh."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{[\d,]+\})", rest)
        return tuple(int(number) for number in re.findall(r"\d+", pairs[1])) if pairs else (0, 1)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        return _group_of_mesh(found[1], found[2])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, size = int(found[1]), int(found[2])
        devices = np.arange(groups * size).reshape([int(side) for side in found[3].split(",")])
        if found[4]:
            devices = devices.transpose([int(axis) for axis in found[4].split(",")])
        return tuple(devices.reshape(groups, size)[0].tolist())
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return tuple(int(number) for number in found[1].split(",")) if found else (0,)


def _group_of_mesh(mesh: str, axes: str) -> tuple[int, ...]:
    """From the form mesh['a'=4,'b'=16] {'a','b':(2)4}: whole axes, or the part of size 4 that follows one of 2."""
    sides, talk = [], []
    parts = dict.fromkeys(re.findall(r"'(\w+)'", axes))
    parts |= {name: (int(before), int(size)) for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", axes)}
    for name, side in re.findall(r"'(\w+)'=(\d+)", mesh):
        before, size = parts.get(name) or (1, int(side))
        sides += [before, size, int(side) // before // size]
        talk += [False, name in parts, False]
    devices = np.arange(math.prod(sides)).reshape(sides)
    return tuple(devices[tuple(slice(None) if part else 0 for part in talk)].ravel().tolist())


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


# --- what becomes of a value, and where it comes from ------------------------------------------------------------


def _called_by(instruction: _Instruction) -> str:
    return re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest)[1]


def _only_sliced(programs, computation: str, name: str, index: int | None = None) -> bool:
    """Whether all that reads a value (its part `index`, where it is a tuple) is, in the end, slices of it."""
    program = programs[computation]
    users = [
        each for each in program.values() if name in each.operands and each.opcode not in ("parameter", "constant")
    ]
    if index is not None:
        users = [each for each in users if f"index={index}" in re.split(r"[,\s]+", each.rest)]
    if not users or program[name].root:
        return False
    return all(_slices(programs, computation, user, name) for user in users)


def _slices(programs, computation: str, user: _Instruction, name: str) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode in PASSING:
        return _only_sliced(programs, computation, user.name)
    if user.opcode in ("fusion", "call"):
        called = _called_by(user)
        numbers = [str(index) for index, operand in enumerate(user.operands) if operand == name]
        inside = [i.name for i in programs[called].values() if i.opcode == "parameter" and i.operands[0] in numbers]
        return all(_only_sliced(programs, called, each) for each in inside)
    return False


def _back(programs, computation: str, name: str, callers: tuple = ()) -> list[tuple[_Instruction, tuple]]:
    """The instructions that a value has passed through unchanged, the last first, into fusions and out of them.

    Each comes with its place: the computation it is in, and the calls that lead there.
    """
    out, part = [], 0
    while found := programs[computation].get(name):
        out.append((found, (computation, callers)))
        if found.opcode in PASSING and found.operands:
            name = found.operands[0]
            if index := re.search(r"index=(\d+)", found.rest):
                part = int(index[1])
        elif found.opcode == "fusion":
            callers, computation = (*callers, (computation, found)), _called_by(found)
            name = next(each.name for each in programs[computation].values() if each.root)
        elif found.opcode == "tuple":
            name = found.operands[part]
        elif found.opcode == "parameter" and callers:
            (computation, call), callers = callers[-1], callers[:-1]
            name = call.operands[int(found.operands[0])]
        else:
            break
    return out


def _own_part(programs, back: list[tuple[_Instruction, tuple]]) -> bool:
    """Whether the value is zeros into which a slice was written."""
    last, (computation, callers) = back[-1]
    if last.opcode != "dynamic-update-slice":
        return False
    below, _ = _back(programs, computation, last.operands[0], callers)[-1]
    return below.opcode in ("broadcast", "constant")
