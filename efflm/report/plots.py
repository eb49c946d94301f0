"""Quality against size and against decode time; training loss against steps and against seconds."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from efflm.report.rows import Row
from efflm.rundir import write_whole

LINEAR = 1e-3  # bits per byte; smaller differences are drawn to a linear scale


def pareto(rows: list[Row], path: Path) -> list[Any]:
    """Two panels: bits per byte over the first row against bytes on disk, and against milliseconds a decoded token.

    Lower left is better; the line joins the rows that no other row beats in both. Vertical bars are standard errors of
    that difference, which is paired over documents, horizontal ones the quartiles of the time. The vertical axis is
    linear up to LINEAR and logarithmic beyond. Returns the labels, which do not overlap.
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    over = np.array([row.bits_per_byte_over_dense for row in rows])
    error = np.array([row.bits_per_byte_over_dense_stderr or 0.0 for row in rows])
    sizes = np.array([row.bytes / 1e6 for row in rows])
    times = np.array([1e3 / row.decode_tokens_per_second for row in rows])
    spread = np.array([[1e3 / bound for bound in reversed(row.decode_spread)] for row in rows])
    bars = np.abs(spread - times[:, None]).T
    panels[0].set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    for axis, xs, ends, label in (
        (panels[0], sizes, None, "MB on disk"),
        (panels[1], times, bars, "ms a decoded token, batch 1"),
    ):
        front = _front(xs, over)
        axis.plot(xs[front], over[front], color="0.75", linewidth=1.6, zorder=1)
        axis.errorbar(xs, over, yerr=error, xerr=ends, fmt="none", ecolor="0.72", elinewidth=0.9, zorder=2)
        colors = ["tab:blue" if i in front else "0.45" for i in range(len(rows))]
        axis.scatter(xs, over, c=colors, s=34, zorder=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.12 * (xs.max() if ends is None else (xs + ends[1]).max()))
        axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        axis.grid(color="0.94", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    low, high = (over - error).min(), (over + error).max()
    panels[0].set_ylim(min(-2 * LINEAR, 1.6 * low), max(2 * LINEAR, 2.2 * high))
    panels[0].set_ylabel(f"bits per byte over {rows[0].name} (paired, s.e. over documents)")
    figure.canvas.draw()
    figure.set_layout_engine("none")  # as it was laid out without the labels, which are placed in its pixels
    labels = []
    for axis, xs in zip(panels, (sizes, times), strict=True):
        labels += _label(axis, xs, over, [row.name for row in rows])
    _save(pyplot, figure, path)
    return labels


def _front(xs: np.ndarray, ys: np.ndarray) -> list[int]:
    """The points for which no other is at least as good in both and better in one, by ascending x; least is best."""
    order = np.lexsort((ys, xs))
    best = np.minimum.accumulate(np.concatenate([[np.inf], ys[order][:-1]]))
    return [int(i) for i, least in zip(order, best, strict=True) if ys[i] < least]


def _label(axis: Any, xs: np.ndarray, ys: np.ndarray, names: list[str]) -> list[Any]:
    """A name beside each point, where it covers no point and no other name; a thin line leads to it from afar."""
    renderer = axis.figure.canvas.get_renderer()
    points = axis.transData.transform(np.stack([xs, ys], axis=1))
    inside, taken, labels = axis.get_window_extent(renderer), [], []
    scale = axis.figure.dpi / 72
    for name, x, y, (px, py) in zip(names, xs, ys, points, strict=True):
        text = axis.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, va="center", zorder=4,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        width, height = box.width + 4, box.height + 2
        for dx, dy in _offsets(width, height):
            left, bottom = px + dx, py + dy - height / 2
            edges = (left, bottom, left + width, bottom + height)
            free = not any(_overlap(edges, other) for other in taken)
            clear = not np.any(
                (points[:, 0] > edges[0] - 5) & (points[:, 0] < edges[2] + 5)
                & (points[:, 1] > edges[1] - 4) & (points[:, 1] < edges[3] + 4)
            )  # fmt: skip
            within = edges[0] > inside.x0 and edges[2] < inside.x1 and edges[1] > inside.y0 and edges[3] < inside.y1
            if free and clear and within:
                break
        taken.append(edges)
        text.set_position(((dx + 2) / scale, dy / scale))
        labels.append(text)
    return labels


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Where a name may begin, in pixels from its point: right, left, above and below, then ever further away."""
    found = []
    for ring in range(40):
        rise = ring * height * 0.6
        aside = 9 + 4 * ring
        for dy in dict.fromkeys((rise, -rise)):
            found += [(aside, dy), (-width - aside, dy), (-width / 2, dy + np.sign(dy) * 6)]
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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
