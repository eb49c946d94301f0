"""What a compiled program sends over the network: the collectives in its HLO text, with their bytes and repetitions.

Bytes are those that one device receives, by the ring algorithms (Thakur 2005, "Optimization of collective communication
operations in MPICH"): RECEIVED. A collective inside a loop counts once for each trip, where the compiler knows how many
there are. Compilers write all-reduce for other things, too, and what counts here is the least that has to move:

    an all-reduce of which a device reads only its own slice is a reduce-scatter. The CPU's compiler always writes it
    so, and the TPU's on a large 3D torus.
    an all-reduce of zeros into which each device has written its own slice is an all-gather: the TPU's again.
    what was bfloat16 and is float32 only on its way counts as bfloat16: the CPU's compiler sends nothing in less.

A combined operation is counted once for each kind in it.
"""

import collections
import dataclasses
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

RECEIVED = {  # by one of g devices, for each byte of its operand
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64,
}  # fmt: skip
PASSING = {  # opcodes that pass a value on unchanged, or changed element by element
    "get-tuple-element", "bitcast", "copy", "convert", "reshape", "transpose", "multiply", "copy-start", "copy-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    group: the device numbers of one of the groups. nbytes: received by a device in all its `trips`. dtype: of
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
    """A line `name = shape opcode(arguments), rest`. operands: names; a name is preceded by its computation's."""

    name: str
    shape: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    rest: str
    root: bool


_Computations = dict[str, list[_Instruction]]
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimized HLO module that runs, in the order of the text."""
    computations, entry = _parse(text)
    graph, out = _graph(computations), []
    for name, (trips, known) in _repetitions(computations, entry).items():
        for instruction in computations[name]:
            if instruction.opcode.removesuffix("-start") in RECEIVED:
                out += _collectives(graph.nodes[instruction.name], graph, trips, known)
    return out


def _collectives(instruction: _Instruction, graph: "_Graph", trips: int, known: bool) -> list[Collective]:
    """The operation, once for each kind of what it does to its operands."""
    written = instruction.opcode.removesuffix("-start")
    group = _group(instruction.rest, written)
    bytes_of: dict[str, float] = {}
    dtypes: dict[str, str] = {}
    for index, name in enumerate(instruction.operands):
        arrays = _ARRAY.findall(graph.nodes[name].shape)
        given = sum(map(_nbytes, arrays))
        kind, dtype = written, max(arrays, key=_nbytes)[0] if arrays else ""
        if dtype == "f32" and any(each.shape.startswith("bf16") for each in _origins(graph, name)):
            given, dtype = given / 2, "bf16"
        if written == "all-reduce":
            part = index if len(instruction.operands) > 1 else None
            if _only_sliced(graph, instruction, part):
                kind = "reduce-scatter"
            elif _own_part(graph, name):
                kind, given = "all-gather", given / len(group)
        bytes_of[kind], dtypes[kind] = bytes_of.get(kind, 0) + given * RECEIVED[kind](len(group)), dtype
    name = instruction.name.partition("/")[2]
    return [
        Collective(kind, name, group, dtypes[kind], nbytes * trips, trips, kind != written, known)
        for kind, nbytes in bytes_of.items()
    ]


def _nbytes(array: tuple[str, str]) -> float:
    dtype, sides = array
    return BITS.get(dtype, 32) / 8 * math.prod(int(side) for side in sides.split(",") if side)


def _parse(text: str) -> tuple[_Computations, str]:
    """{computation: its instructions}, and the name of the one that is run."""
    computations, entry, current = {}, "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (found := _LINE.match(line)):
            root, name, shape, opcode, rest = found.groups()
            arguments, rest = _split_arguments(rest)
            names = re.findall(r"%([\w.\-]+)", arguments) or re.findall(r"[\w.\-]+", arguments)
            operands = tuple(f"{current}/{each}" for each in names if opcode not in ("parameter", "constant"))
            instruction = _Instruction(f"{current}/{name}", shape, opcode, arguments, operands, rest, bool(root))
            computations[current].append(instruction)
    return computations, entry


def _split_arguments(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and what follows it."""
    depths = itertools.accumulate((letter == "(") - (letter == ")") for letter in text)
    end = next((index for index, depth in enumerate(depths) if depth < 0), len(text))
    return text[:end], text[end + 1 :]


def _group(rest: str, kind: str) -> tuple[int, ...]:
    """The first group, from any form HLO writes: lists, [groups,size]<=[dims]T(order), or axes of a mesh.

    Raises ValueError for another form: a group that is not known has no bytes that could be counted.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{[\d,]+\})", rest)
        return tuple(int(number) for number in re.findall(r"\d+", pairs[1])) if pairs else (0, 1)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", rest):
        return _group_of_mesh(found[1], found[2], found[3])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, size = int(found[1]), int(found[2])
        return tuple(_devices(found[3], found[4]).reshape(groups, size)[0].tolist())
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, found[1].split(",")))
    raise ValueError(f"the devices of a collective are written in a form that is not known: {rest[:300]}")


def _devices(sides: str, order: str | None) -> np.ndarray:
    """From the form [sides]T(order): device numbers in row-major order of the sides, whose axes are then permuted."""
    sizes = [int(side) for side in sides.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(axis) for axis in order.split(",")]) if order else devices


def _group_of_mesh(mesh: str, numbers: str | None, axes: str) -> tuple[int, ...]:
    """From the form mesh['a'=4,'b'=16] {'a','b':(2)4}: whole axes, or the part of size 4 that follows one of 2.

    numbers: of the devices of the mesh, as [4,16]T(1,0) or as a list; None: in order.
    """
    sides, talk = [], []
    parts = dict.fromkeys(re.findall(r"'(\w+)'", axes))
    parts |= {name: (int(before), int(size)) for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", axes)}
    for name, side in re.findall(r"'(\w+)'=(\d+)", mesh):
        before, size = parts.get(name) or (1, int(side))
        sides += [before, size, int(side) // before // size]
        talk += [False, name in parts, False]
    devices = np.arange(math.prod(sides))
    if permuted := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", numbers or ""):
        devices = _devices(*permuted.groups())
    elif numbers:
        devices = np.array([int(number) for number in numbers.split(",")])
    devices = devices.reshape(sides)
    return tuple(devices[tuple(slice(None) if part else 0 for part in talk)].ravel().tolist())


def _repetitions(computations: _Computations, entry: str) -> dict[str, tuple[int, bool]]:
    """{computation that runs: (how often, whether that is known)}."""
    out: dict[str, tuple[int, bool]] = {}

    def visit(name: str, trips: int, known: bool) -> None:
        before, sure = out.get(name, (0, True))
        out[name] = (before + trips, sure and known)
        for instruction in computations[name]:
            count = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                if called in computations:
                    visit(called, trips * (count or 1), known and count is not None)

    visit(entry, 1, True)
    return out


def _called(instruction: _Instruction) -> list[str]:
    return [name for found in _CALLED.findall(instruction.rest) for name in re.findall(r"[\w.\-]+", found)]


def _trips(loop: _Instruction, computations: _Computations) -> int | None:
    """How often a loop runs: by the compiler's own note, else by the one constant that its condition compares with."""
    if found := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest):
        return int(found[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
    constants = [each.arguments for each in condition if each.opcode == "constant" and each.arguments.isdigit()]
    return int(constants[0]) if len(constants) == 1 else None


# --- what becomes of a value, and where it comes from ----------------------------------------------------------------


class _Graph(NamedTuple):
    """Instructions by name, and those that read each. What fusions and calls compute stands in their place."""

    nodes: dict[str, _Instruction]
    users: dict[str, list[_Instruction]]


def _graph(computations: _Computations) -> _Graph:
    instructions = [each for some in computations.values() for each in some]
    calls = [(each, called) for each in instructions for called in _called(each)]
    times = collections.Counter(called for _, called in calls)
    same: dict[str, str] = {}  # a fusion -> its root; a parameter of it -> the operand
    for call, called in calls:
        if call.opcode in ("fusion", "call") and times[called] == 1:
            for each in computations[called]:
                if each.root:
                    same[call.name] = each.name
                if each.opcode == "parameter":
                    same[each.name] = call.operands[int(each.arguments)]

    def real(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    graph, inside = _Graph({}, collections.defaultdict(list)), set(same.values())
    for each in instructions:
        if each.name not in same:
            operands, root = tuple(map(real, each.operands)), each.root and each.name not in inside
            graph.nodes[each.name] = each = dataclasses.replace(each, operands=operands, root=root)
            for name in set(operands):
                graph.users[name].append(each)
    return graph


def _only_sliced(graph: _Graph, value: _Instruction, part: int | None = None) -> bool:
    """Whether all that reads a value (its part, where it is a tuple) is, in the end, slices of it."""
    users = graph.users[value.name]
    if part is not None:
        users = [user for user in users if f"index={part}" in re.split(r"[,\s]+", user.rest)]

    def slices(user: _Instruction) -> bool:
        first = user.opcode == "dynamic-slice" and user.operands[0] == value.name
        return first or (user.opcode in PASSING and _only_sliced(graph, user))

    return bool(users) and not value.root and all(map(slices, users))


def _origins(graph: _Graph, name: str) -> list[_Instruction]:
    """The instructions that a value has passed through unchanged, the last first."""
    out, part = [graph.nodes[name]], 0
    while (found := out[-1]).opcode in PASSING or found.opcode == "tuple":
        if index := re.search(r"index=(\d+)", found.rest):
            part = int(index[1])
        out.append(graph.nodes[found.operands[part if found.opcode == "tuple" else 0]])
    return out


def _own_part(graph: _Graph, name: str) -> bool:
    """Whether the value is zeros into which a slice was written."""
    last = _origins(graph, name)[-1]
    below = last.opcode == "dynamic-update-slice" and _origins(graph, last.operands[0])[-1]
    return bool(below) and below.opcode in ("broadcast", "constant")
