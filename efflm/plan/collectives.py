"""What a compiled program sends over the network: the collectives in its optimized HLO text, as its compiler wrote it.

Bytes are those that one device receives, by the ring algorithms (Thakur 2005, "Optimization of collective communication
operations in MPICH"): RECEIVED. A collective inside a loop counts once for each trip, where the compiler knows how many
there are. The CPU's compiler sends bfloat16 as float32, and writes all-reduce where each device reads only its slice of
the sum. The TPU's fuses the all-reduce with the slice and names the computation all-reduce-scatter: it runs, and counts
here, as a reduce-scatter, which receives half.
"""

import collections
import dataclasses
import math
import re

RECEIVED = {  # by one of g devices, for each byte of its operand
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")
CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
NAME, ARRAY = re.compile(r"[\w.\-]+"), re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    group: how many devices take part together. dtype: of its largest operand. nbytes: received by a device in all its
    `trips`. known: whether the compiler knew the trips of all loops around it; otherwise those unknown count as one.
    """

    kind: str
    group: int
    dtype: str
    nbytes: float
    trips: int = 1
    known: bool = True


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimized HLO module that runs, as often as its computation is called."""
    found, calls, constants = (collections.defaultdict(list) for _ in range(3))  # by computation
    current = entry = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current, shapes = header[2], {}
            entry = current if header[1] else entry
        elif current and (instruction := INSTRUCTION.match(line)):
            name, shapes[name], opcode, arguments, rest = (part or "" for part in instruction.groups())
            kind, loop = opcode.removesuffix("-start"), rest if opcode == "while" else ""
            calls[current] += [(called, loop) for called in NAME.findall(" ".join(CALLED.findall(rest)))]
            if opcode == "constant" and arguments.isdigit():
                constants[current].append(int(arguments))
            if kind in RECEIVED:
                kind = "reduce-scatter" if current.startswith("all-reduce-scatter") else kind
                operands = " ".join(shapes.get(operand, "") for operand in NAME.findall(arguments))
                found[current].append(_collective(kind, ARRAY.findall(operands), rest))
    out = []

    def visit(computation: str, trips: int, known: bool) -> None:
        for each in found[computation]:
            out.append(dataclasses.replace(each, nbytes=each.nbytes * trips, trips=trips, known=known))
        for called, loop in calls[computation]:
            times = _trips(loop, constants) if loop else 1
            visit(called, trips * (times or 1), known and times is not None)

    visit(entry, 1, True)
    return out


def _trips(loop: str, constants: dict[str, list[int]]) -> int | None:
    """How often a loop runs: by the compiler's own note, else (TPU) by the one constant that its condition has."""
    if found := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop):
        return int(found[1])
    limits = constants[re.search(r"condition=%?([\w.\-]+)", loop)[1]]
    return limits[0] if len(limits) == 1 else None


def _collective(kind: str, operands: list[tuple[str, str]], rest: str) -> Collective:
    """In one trip. operands: pairs of a dtype and sides."""
    group = 2 if kind == "collective-permute" else _group(rest)
    received = RECEIVED[kind](group) * sum(map(_nbytes, operands))
    return Collective(kind, group, max(operands, key=_nbytes)[0], received)


def _nbytes(array: tuple[str, str]) -> float:
    """Of a dtype such as bf16 or f8e4m3fn, which names its bits, and sides such as 8,128."""
    dtype, sides = array
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return bits / 8 * math.prod(int(side) for side in sides.split(",") if side)


def _group(rest: str) -> int:
    """The size of a group, from any form HLO writes: lists, [groups,size]<=[dims], or axes of a mesh and their parts,
    as mesh['a'=4,'b'=16] {'a','b':(2)4}, where the second is the part of size 4 that follows one of 2.

    Raises ValueError for another form: a group that is not known has no bytes that could be counted.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", rest):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sides[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    raise ValueError(f"the devices of a collective are written in a form that is not known: {rest[:300]}")
