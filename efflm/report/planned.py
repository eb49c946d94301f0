"""The plan of a run on a mesh, as rows of tables: what a device holds, receives and needs in time; candidates."""

from collections.abc import Mapping
from typing import Any

from efflm.plan import device
from efflm.plan.collectives import Collective
from efflm.plan.hardware import Hardware
from efflm.plan.search import Candidate
from efflm.report import numbers
from efflm.report.page import Table
from efflm.report.rows import Row
from efflm.report.table import figure

COUNT = "{:,.0f}".format
COLUMNS = (
    figure("one device, one step", "name", str),
    figure("bytes", "nbytes", numbers.size, none=""),
    figure("times", "count", COUNT, none=""),
    figure("at least", "seconds", numbers.seconds, none=""),
)


def ranked(candidates: list[Candidate]) -> Table:
    """Numbered from 1, the fastest."""
    rows = []
    for index, each in enumerate(candidates, 1):
        figures = {"remat": each.train.remat, "batch": each.train.batch, "rate": each.tokens_a_second} | each.seconds
        note = f"bound by {bound(each.seconds)}" + ("" if each.fits else "; does not fit")
        rows.append(Row(f"{index}. {axes(each.sizes)}", figures | {"nbytes": each.held, "fits": each.fits}, note))
    columns = (
        figure("mesh", "name", str),
        figure("remat", "remat", str),
        figure("batch", "batch", COUNT),
        *(figure(name, name, numbers.seconds) for name in ("compute", "memory", "network")),
        figure("tokens/s", "rate", COUNT),
        figure("bytes a device", "nbytes", numbers.size),
        figure("fits", "fits", lambda fits: "yes" if fits else "no"),
    )
    return Table(caption="The fastest candidates.", columns=columns, rows=rows)


def axes(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one device"


def bound(seconds: dict[str, float]) -> str:
    return max(seconds, key=seconds.get)


def row(name: str, note: str, **figures: Any) -> Row:
    return Row(name, {"nbytes": None, "count": None, "seconds": None} | figures, note)


def holdings(given: dict[str, Any], program: Any) -> list[Row]:
    """Bytes on a device: the arguments by kind, exactly, and what the compiler says; last all that must fit."""
    rows = [row(name, "exact", nbytes=device.part_bytes(tree)) for name, tree in given.items()]
    if not program:
        return rows
    found = program.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    needed = found.argument_size_in_bytes + found.temp_size_in_bytes + results
    return [
        *rows,
        row("arguments", "all above, by the compiler", nbytes=found.argument_size_in_bytes),
        row("temporaries", "known to the compiler only", nbytes=found.temp_size_in_bytes),
        row("results", "beside those that take the place of arguments", nbytes=results),
        row("all", "what must fit", nbytes=needed),
    ]


def sendings(found: list[Collective]) -> list[Row]:
    """The collectives of a program by kind."""
    rows = []
    for kind in sorted({each.kind for each in found}):
        some = [each for each in found if each.kind == kind]
        groups = " or ".join(map(str, sorted({each.group for each in some})))
        note = f"received, as the compiler wrote it, among {groups} devices"
        note += "" if all(each.known for each in some) else "; at least: inside of loops whose trips it does not know"
        nbytes, count = sum(each.nbytes for each in some), sum(each.trips for each in some)
        rows.append(row(kind, note, nbytes=nbytes, count=count))
    return rows


def bounds(seconds: dict[str, float], moved: float, received: float, chip: Hardware, dtype: str) -> list[Row]:
    """The three, with the bytes that are moved through HBM and received."""
    beyond = f" within {chip.node} devices, {chip.network / 1e9:.0f} beyond" if chip.node else ""
    notes = {
        "compute": f"matmuls at {chip.peak(dtype) / 1e12:,.0f} TFLOP/s, {chip.name}'s peak in {dtype}",
        "memory": f"operands and results moved once, at {chip.bandwidth / 1e12:.2f} TB/s",
        "network": f"received for what the sharding needs, at the links' full {chip.link / 1e9:.0f} GB/s{beyond}",
    }
    nbytes = {"compute": None, "memory": moved, "network": received}
    return [row(name, note, nbytes=nbytes[name], seconds=seconds[name]) for name, note in notes.items()]
