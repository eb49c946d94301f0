"""The plan of a run on a mesh, as rows of tables: bytes on a device, what goes over the network, times, candidates."""

from typing import Any

from efflm.plan.collectives import Collective
from efflm.plan.device import Held
from efflm.plan.hardware import Hardware
from efflm.plan.prediction import Prediction
from efflm.plan.search import Candidate
from efflm.report import numbers
from efflm.report.rows import Row
from efflm.report.table import Columns, figure

NOTES = {
    "gradients": "float32",
    "stored activations": "what the forward pass hands to the backward pass, by jax.vjp; a compiler may keep fewer",
    "keys and values": "by rows, and by heads along tensor where it divides them",
}


def on_device(found: Any) -> float:
    """Bytes that a program needs on a device, from its memory_analysis(): arguments, temporaries, and results that are
    no argument's."""
    return (
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )


def holdings(held: Held, found: Any) -> list[Row]:
    """What is held, by the sharding table and by the program's memory_analysis(), where it compiled."""
    row = lambda name, note, predicted, compiled=None: Row(name, {"predicted": predicted, "compiled": compiled}, note)
    arguments = sum(held.arguments.values())
    return [
        *(row(name, NOTES.get(name, "exact"), nbytes) for name, nbytes in held.arguments.items()),
        row("arguments", "all above", arguments, found and found.argument_size_in_bytes),
        *(row(name, NOTES[name], nbytes) for name, nbytes in held.besides.items()),
        row("temporaries", "known to the compiler only", None, found and found.temp_size_in_bytes),
        row(
            "all",
            "what must fit: by the compiler, or else arguments and the larger of gradients and stored activations",
            held.total,
            found and on_device(found),
        ),
    ]


def fits(needed: float, chip: Hardware) -> str:
    """A sentence on whether so many bytes fit."""
    share = f"{numbers.size(needed)} of the {numbers.size(chip.memory)} of a {chip.name} ({needed / chip.memory:.0%})"
    return f"It fits: {share}." if needed <= chip.memory else f"It does NOT fit: {share}."


def traffic(found: list[Collective], hardware: Hardware, devices: int) -> list[Row]:
    """The collectives by kind, those that are written as another kind listed separately."""
    out = []
    for kind, disguised in sorted({(each.kind, each.disguised) for each in found}):
        some = [each for each in found if (each.kind, each.disguised) == (kind, disguised)]
        note = f"among {' or '.join(map(str, sorted({len(each.group) for each in some})))} devices"
        if disguised:
            note += f"; the compiler wrote all-reduce, counted as the {kind} it amounts to: twice as much if run so"
        if not all(each.known for each in some):
            note += "; at least: inside of loops whose trips the compiler does not know"
        name, seconds = f"{kind} (as all-reduce)" if disguised else kind, hardware.seconds(some, devices)
        figures = {"count": sum(each.trips for each in some), "nbytes": sum(each.nbytes for each in some)}
        out.append(Row(name, figures | {"seconds": seconds}, note))
    return out


def times(prediction: Prediction, hardware: Hardware, dtype: str) -> list[Row]:
    """The three bounds."""
    beyond = f" within {hardware.node} devices, {hardware.network / 1e9:.0f} beyond" if hardware.node else ""
    notes = {
        "compute": f"matmuls at {hardware.peak(dtype) / 1e12:,.0f} TFLOP/s, {hardware.name}'s peak in {dtype}",
        "memory": f"operands and results moved once, at {hardware.bandwidth / 1e12:.2f} TB/s",
        "network": "every byte received at the full speed of the links its group has: "
        f"{hardware.link / 1e9:.0f} GB/s{beyond}",
    }
    bound = lambda name: {"seconds": getattr(prediction, name), "bound": name == prediction.bound}
    return [Row(name, bound(name), note) for name, note in notes.items()]


def ranked(candidates: list[Candidate]) -> list[Row]:
    """Numbered from 1, the fastest."""
    out = []
    for index, each in enumerate(candidates):
        axes = " ".join(f"{name}={size}" for name, size in each.sizes.items() if size > 1) or "one device"
        note = f"bound by {each.prediction.bound}" + ("" if each.fits else "; does not fit")
        figures = {name: getattr(each.prediction, name) for name in ("compute", "memory", "network")}
        figures |= {"remat": each.train.remat, "batch": each.train.batch, "held": each.held.total, "fits": each.fits}
        out.append(Row(f"{index + 1}. {axes}", figures | {"tokens_a_second": each.tokens_a_second}, note))
    return out


COUNT = "{:,.0f}".format
BYTES_COLUMNS: Columns = (
    figure("on a device", "name", str),
    figure("predicted", "predicted", numbers.size),
    figure("compiled", "compiled", numbers.size),
)
TRAFFIC_COLUMNS: Columns = (
    figure("over the network", "name", str),
    figure("a step", "count", COUNT),
    figure("received", "nbytes", numbers.size),
    figure("at least", "seconds", numbers.seconds),
)
TIME_COLUMNS: Columns = (
    figure("bound", "name", str),
    figure("at least", "seconds", numbers.seconds),
    figure("the largest", "bound", lambda largest: "<--" if largest else ""),
)
SEARCH_COLUMNS: Columns = (
    figure("mesh", "name", str),
    figure("remat", "remat", str),
    figure("batch", "batch", COUNT),
    *(figure(name, name, numbers.seconds) for name in ("compute", "memory", "network")),
    figure("tokens/s", "tokens_a_second", COUNT),
    figure("bytes a device", "held", numbers.size),
    figure("fits", "fits", lambda fits: "yes" if fits else "no"),
)
