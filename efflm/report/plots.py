"""Quality against size and against decode time; training loss against steps and against seconds."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from efflm.report.rows import Row
from efflm.rundir import write_whole


def pareto(rows: list[Row], path: Path) -> None:
    """Two panels: bits per byte against bytes on disk, and against milliseconds a decoded token; lower left wins."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    sizes = [row.bytes / 1e6 for row in rows]
    times = [1e3 / row.decode_tokens_per_second for row in rows]
    for axis, xs, label in ((panels[0], sizes, "MB on disk"), (panels[1], times, "ms a decoded token, batch 1")):
        colors = pyplot.get_cmap("tab10").colors
        for index, (row, x) in enumerate(zip(rows, xs, strict=True)):
            axis.errorbar(
                x,
                row.bits_per_byte,
                yerr=row.bits_per_byte_stderr,
                fmt="os^DvPX*<>"[index % 10],
                color=colors[index % 10],
                markersize=8,
                elinewidth=0.8,
                ecolor="0.8",
                label=row.name,
                zorder=3,
            )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(color="0.92", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("bits per byte of test text (s.e. over documents)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(pyplot, figure, path)


def training_curves(
    curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path, label: str = "training loss, nats a token"
) -> None:
    """Two panels: training loss against steps, and against seconds. curves: name -> (steps, seconds, losses).

    Of the loss the range below what all have reached after a tenth of the steps is shown: there they part.
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for axis, which, words in ((panels[0], 0, "steps"), (panels[1], 1, "seconds after the first step")):
        for index, (name, curve) in enumerate(curves.items()):
            color = pyplot.get_cmap("tab10").colors[index % 10]
            axis.plot(curve[which], curve[2], color=color, linewidth=1.4, label=name, linestyle=("-", "--")[index % 2])
        axis.set_xlabel(words)
        axis.set_xlim(left=0)
        axis.grid(color="0.92", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    low, high = min(loss.min() for *_, loss in curves.values()), max(c[2][len(c[2]) // 10] for c in curves.values())
    if high > low:
        panels[0].set_ylim(low - 0.05 * (high - low), high)
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(pyplot, figure, path)


def cost_of_a_token(
    lengths: list[int],
    flops: dict[str, list[float]],
    moved: dict[str, list[float]],
    points: dict[str, tuple[float, float, float | None]],
    crossover: float,
    roof: tuple[str, float, float],
    path: Path,
) -> None:
    """Three panels: FLOPs of a token against the positions it sees, bytes read to decode it, and the roofline.

    flops, moved: {component: values at `lengths`}. points: {phase: (FLOPs a byte, FLOP/s predicted and measured)}.
    roof: (name, FLOP/s, bytes/s).
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    colors = pyplot.get_cmap("tab10").colors
    for axis, curves, scale in ((panels[0], flops, 1e6), (panels[1], moved, 1e6)):
        for color, (name, values) in zip(colors, curves.items(), strict=False):
            axis.plot(lengths, np.array(values) / scale, color=color, label=name)
        total = np.sum(list(curves.values()), axis=0) / scale
        axis.plot(lengths, total, color="black", linewidth=0.8, linestyle="--", label="all")
        axis.set(xscale="log", yscale="log", xlabel="positions a token sees", xlim=(lengths[0], lengths[-1]))
        axis.set_ylim(bottom=max(total.max() / 1e4, min(map(min, curves.values())) / scale / 2))
        axis.legend(frameon=False)
    panels[0].set(title="compute", ylabel="MFLOPs to decode a token")
    panels[1].set(title="memory traffic", ylabel="MB read to decode a token, batch 1")
    if crossover <= lengths[-1]:
        panels[0].axvline(crossover, color="0.6", linewidth=0.8)
        words, place = f"attention = feed-forward\n{crossover:,.0f} positions ", (crossover, panels[0].get_ylim()[0])
        panels[0].annotate(words, place, xytext=(0, 8), textcoords="offset points", ha="right", color="0.4")
    name, peak, bandwidth = roof
    xs = [x for x, _, _ in points.values()]
    span = np.geomspace(min([*xs, peak / bandwidth]) / 3, max([*xs, peak / bandwidth]) * 3, 200)
    panels[2].plot(span, np.minimum(peak, span * bandwidth) / 1e9, color="black", label=f"roofline, {name}")
    for color, marker, (phase, (x, predicted, measured)) in zip(colors, "os^D", points.items(), strict=False):
        panels[2].plot(x, predicted / 1e9, marker, color=color, markerfacecolor="none", markersize=8)
        panels[2].plot(
            x, (measured or predicted) / 1e9, marker if measured else "", color=color, markersize=8, label=phase
        )
    panels[2].set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s", title="this machine")
    panels[2].legend(frameon=False, title="open: predicted, filled: measured", loc="lower right")
    for axis in panels:
        axis.grid(color="0.92", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    _save(pyplot, figure, path)


def _pyplot() -> Any:
    import matplotlib  # here, for its only use: it is slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    write_whole(path, buffer.getvalue())
