"""The plan of a run on a mesh, as rows of tables: bytes on a device, what goes over the network, times, candidates."""

import dataclasses
from typing import Any

from efflm.plan.collectives import Collective
from efflm.plan.hardware import Hardware
from efflm.plan.prediction import Held, Prediction, Served
from efflm.plan.search import Candidate
from efflm.report.table import Column, Columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of one kind on one device: by the closed form, and by the compiler, which tells only some kinds apart."""

    name: str
    note: str
    predicted: float | None
    compiled: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of one kind in one step: how many run, and the bytes that a device receives."""

    name: str
    note: str
    count: int
    nbytes: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """One of the bounds, in seconds."""

    name: str
    note: str
    seconds: float
    bound: bool


def size(nbytes: float | None) -> str:
    """Bytes in decimal units."""
    if nbytes is None:
        return "–"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def on_device(found: Any) -> float:
    """Bytes that a program needs on a device, from its memory_analysis(): arguments, temporaries, and results that are
    no argument's."""
    return (
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )


def holdings(held: Held | Served, found: Any) -> list[Bytes]:
    """What is held, by the closed form and by the program's memory_analysis(), where it compiled."""

    def row(name: str, note: str, predicted: int, compiled: int | None = None) -> Bytes:
        return Bytes(name=name, note=note, predicted=predicted, compiled=compiled)

    arguments, temporaries = found and found.argument_size_in_bytes, found and found.temp_size_in_bytes
    weights = row("weights", "exact, by the sharding table", held.weights)
    everything = row("all", "what must fit", held.total, found and on_device(found))
    if isinstance(held, Served):
        return [
            weights,
            row("keys and values", "by rows, and by heads along tensor where it divides them", held.cache),
            row("arguments", "the weights; decoding, the cache too", held.arguments, arguments),
            row("results", "prefilling, the cache", held.cache, found and found.output_size_in_bytes),
            row("temporaries", "", None, temporaries),
            everything,
        ]
    return [
        weights,
        row("optimizer state", "exact for rules with whole moments", held.optimizer),
        row("batch", "tokens, targets, segments, positions", held.batch),
        row("arguments", "the three above", held.arguments, arguments),
        row("gradients", "float32, exact, by the sharding table", held.gradients),
        row("activations", "and other temporaries, modelled on the CPU's program", held.activations),
        row("temporaries", "the two above, at their peak", held.temporaries, temporaries),
        everything,
    ]


def fit(needed: float, chip: Hardware) -> str:
    """A sentence on whether so many bytes fit."""
    share = f"{size(needed)} of the {size(chip.memory)} of a {chip.name} ({needed / chip.memory:.0%})"
    return f"It fits: {share}." if needed <= chip.memory else f"It does NOT fit: {share}."


def traffic(found: list[Collective], hardware: Hardware, devices: int) -> list[Traffic]:
    """The collectives by kind, those that are written as another kind listed separately."""
    out = []
    for kind, disguised in sorted({(each.kind, each.disguised) for each in found}):
        some = [each for each in found if (each.kind, each.disguised) == (kind, disguised)]
        groups = sorted({len(each.group) for each in some})
        note = f"among {' or '.join(map(str, groups))} devices"
        if disguised:
            note += (
                f"; the compiler wrote all-reduce, counted as the {kind} it amounts to: twice as much if run as written"
            )
        if not all(each.known for each in some):
            note += "; at least: inside of loops whose trips the compiler does not know"
        out.append(
            Traffic(
                name=f"{kind} (as all-reduce)" if disguised else kind,
                note=note,
                count=sum(each.trips for each in some),
                nbytes=sum(each.nbytes for each in some),
                seconds=sum(each.nbytes / hardware.received_a_second(each.group, devices) for each in some),
            )
        )
    return out


def times(prediction: Prediction, hardware: Hardware, dtype: str) -> list[Time]:
    """The three bounds."""
    network = "every byte received at the full speed of the links its group has"
    notes = {
        "compute": f"matmuls at {hardware.peak(dtype) / 1e12:,.0f} TFLOP/s, {hardware.name}'s peak in {dtype}",
        "memory": f"operands and results moved once, at {hardware.bandwidth / 1e12:.2f} TB/s",
        "network": f"{network}: {hardware.link / 1e9:.0f} GB/s"
        + (f" within {hardware.node} devices, {hardware.network / 1e9:.0f} beyond" if hardware.node else ""),
    }
    return [
        Time(name=name, note=note, seconds=getattr(prediction, name), bound=name == prediction.bound)
        for name, note in notes.items()
    ]


BYTES_COLUMNS: Columns = (
    Column("on a device", lambda row: row.name),
    Column("predicted", lambda row: size(row.predicted), lambda row: row.predicted),
    Column("compiled", lambda row: size(row.compiled), lambda row: row.compiled),
)
TRAFFIC_COLUMNS: Columns = (
    Column("over the network", lambda row: row.name),
    Column("a step", lambda row: f"{row.count:,}", lambda row: row.count),
    Column("received", lambda row: size(row.nbytes), lambda row: row.nbytes),
    Column("at least", lambda row: seconds(row.seconds), lambda row: row.seconds),
)
TIME_COLUMNS: Columns = (
    Column("bound", lambda row: row.name),
    Column("at least", lambda row: seconds(row.seconds), lambda row: row.seconds),
    Column("the largest", lambda row: "<--" if row.bound else ""),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """A candidate of the search, in words."""

    name: str
    note: str
    candidate: Candidate


def ranked(candidates: list[Candidate]) -> list[Ranked]:
    """Numbered from 1, the fastest."""
    out = []
    for index, each in enumerate(candidates):
        axes = " ".join(f"{name}={size}" for name, size in each.sizes.items() if size > 1) or "one device"
        note = f"bound by {each.prediction.bound}" + ("" if each.fits else "; does not fit")
        out.append(Ranked(name=f"{index + 1}. {axes}", note=note, candidate=each))
    return out


def _bound(name: str) -> Column:
    value = lambda row: getattr(row.candidate.prediction, name)
    return Column(name, lambda row: seconds(value(row)), value)


SEARCH_COLUMNS: Columns = (
    Column("mesh", lambda row: row.name),
    Column("remat", lambda row: row.candidate.train.remat),
    Column("batch", lambda row: f"{row.candidate.train.batch:,}", lambda row: row.candidate.train.batch),
    *map(_bound, ("compute", "memory", "network")),
    Column("tokens/s", lambda row: f"{row.candidate.tokens_a_second:,.0f}", lambda row: row.candidate.tokens_a_second),
    Column("bytes a device", lambda row: size(row.candidate.held.total), lambda row: row.candidate.held.total),
    Column("fits", lambda row: "yes" if row.candidate.fits else "no"),
)
