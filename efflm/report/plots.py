"""Plots as SVG that follows the page's colors, or as PNG files: loss against what a model costs, training curves, and
what a token costs. The only place that imports matplotlib."""

import contextlib
import dataclasses
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efflm.cli.run_directory import write_whole
from efflm.report import labels
from efflm.report.colors import ACCENT, INK, LINE, MUTED, SERIES, VARIABLES

LINEAR = 1e-3  # bits per byte; smaller differences are drawn to a linear scale
LARGEST = 1e100  # what is beyond has no place on an axis
MOST_NAMES = 16  # beside points: more would cover the plot
MOST_TICKS = 12  # at settings of their own
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "efflm", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5, "axes.axisbelow": True,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.labelcolor": INK,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chart:
    """A plot on the page. alt: what it shows and the main finding, in words."""

    svg: str
    alt: str
    caption: str


class Point(NamedTuple):
    """A model in a plot of loss against a cost. error: of the loss; span: what the cost may be; tip: what pointing at
    it shows."""

    name: str
    cost: float
    loss: float
    error: float | None
    tip: str
    span: tuple[float, float] | None = None


def tradeoff(models: Sequence[Point], label: str) -> tuple[Any, list[Point]]:
    """Loss over the first model against a cost: a figure, and the Pareto front.

    Lower left is better; the line joins the models that no other one beats in both. Vertical bars are standard errors,
    horizontal ones the spans of the cost, where all have one. The vertical axis is linear up to LINEAR and logarithmic
    beyond. Models whose points coincide share a label. Of more than MOST_NAMES models only the first and the front are
    named. A model whose loss or cost is not finite, or beyond LARGEST, has no point.
    """
    first, models = models[0].name, [each for each in models if np.all(_drawn((each.cost, each.loss)))]
    with _panel(3.9, layout="constrained") as axis:
        if not models:
            return axis.figure, []
        column = lambda name: np.array([getattr(each, name) for each in models], np.float64)
        xs, ys, error = column("cost"), column("loss"), column("error")
        error[~_drawn(error)] = 0.0
        ends = np.abs(column("span") - xs[:, None]).T if all(each.span for each in models) else None
        axis.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
        axis.axhline(0, color=LINE, linewidth=1, zorder=0)
        front = _front(xs, ys)
        axis.plot(xs[front], ys[front], color=ACCENT, linewidth=1.4, alpha=0.6, zorder=1)
        axis.errorbar(xs, ys, yerr=error, xerr=ends, fmt="none", ecolor=MUTED, elinewidth=0.8, zorder=2)
        for index, (x, y) in enumerate(zip(xs, ys)):
            axis.plot(
                x, y, "o", color=ACCENT if index in front else MUTED, markersize=5.5, zorder=3 + (index in front) / 2
            )
        axis.set_xlim(0, 1.12 * (xs if ends is None else xs + ends[1]).max())
        low, high = (ys - error).min(), (ys + error).max()
        axis.set_ylim(min(-2 * LINEAR, 1.6 * low), max(2 * LINEAR, 2.2 * high))
        axis.set_xlabel(label)
        axis.set_ylabel(f"increase in bits per byte over {first}", parse_math=False)
        for x, y, each in zip(xs, ys, models):  # what reacts to the pointer: larger than what is seen
            axis.plot(x, y, "o", markersize=17, color=ACCENT, alpha=0, zorder=5, gid=_gid(each.tip, each.name))
        axis.figure.canvas.draw()
        axis.figure.set_layout_engine("none")  # as it was laid out without the labels, which are placed in its pixels
        named = {0, *front} if len(models) > MOST_NAMES else range(len(models))
        labels.beside(axis, xs, ys, [each.name if index in named else "" for index, each in enumerate(models)])
        return axis.figure, [models[index] for index in front]


def _front(xs: np.ndarray, ys: np.ndarray) -> list[int]:
    """The points for which no other is at least as good in both and better in one, by ascending x; least is best."""
    order = np.lexsort((ys, xs))
    best = np.minimum.accumulate(np.concatenate([[np.inf], ys[order][:-1]]))
    return [int(i) for i, least in zip(order, best, strict=True) if ys[i] < least]


def curves(
    found: dict[str, tuple[np.ndarray, np.ndarray]], across: str, label: str = "training loss, nats a token"
) -> Any:
    """A figure of losses, each named at its end. found: name -> (steps or seconds, losses).

    Of the loss the range below what all have reached after a tenth of their length is shown: there they part. Losses
    that are not finite, or beyond LARGEST, are left out.
    """
    found = _drawable(found)
    with _panel() as axis:
        for index, (name, (xs, losses)) in enumerate(found.items()):
            tip = f"{name}: {losses[-1]:.3f} after {xs[-1]:,.0f} {across.split()[0]}"
            axis.plot(xs, losses, color=SERIES[index % len(SERIES)], linewidth=1.3)
            axis.plot(xs, losses, color=ACCENT, alpha=0, linewidth=9, gid=_gid(tip, name), zorder=5)
        axis.set(xlabel=across, ylabel=label)
        axis.set_xlim(left=0)
        low = min((y.min() for _, y in found.values()), default=0.0)
        high = max((y[len(y) // 10] for _, y in found.values()), default=0.0)
        if high > low:
            axis.set_ylim(low - 0.05 * (high - low), high)
        _name_ends(axis, found)
        return axis.figure


def sweeps(found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], across: str, label: str, least: float) -> Any:
    """A figure of what each method reaches at each setting. found: name -> (settings, values, errors).

    least: the value of the model before, drawn as a line; 0: none. The vertical axis is logarithmic; values that are
    not finite, or beyond LARGEST, are left out.
    """
    found = _drawable(found)
    with _panel() as axis:
        axis.set_yscale("log")
        if least > 0 and _drawn(least):
            axis.axhline(least, color=MUTED, linewidth=1, linestyle=":")
        for index, (name, (xs, values, errors)) in enumerate(found.items()):
            color = SERIES[index % len(SERIES)]
            axis.errorbar(xs, values, yerr=errors, color=color, linewidth=1.3, marker="o", markersize=4)
            for x, value in zip(xs, values):
                tip = _gid(f"{name} at {x:g}: {value:.4g}", f"{name} {x:g}")
                axis.plot(x, value, "o", color=ACCENT, alpha=0, markersize=15, gid=tip, zorder=5)
        axis.set(xlabel=across, ylabel=label)
        bottom, top = axis.get_ylim()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if top < 10 * bottom else "")
        settings = sorted({float(x) for xs, _, _ in found.values() for x in xs})
        if len(settings) <= MOST_TICKS:
            axis.set_xticks(settings)
        _name_ends(axis, {name: (xs, values) for name, (xs, values, _) in found.items()})
        return axis.figure


def _drawn(values: Any) -> np.ndarray:
    """Which values can be drawn; of a NaN no comparison is true."""
    return np.abs(values) < LARGEST


def _drawable(found: dict[str, tuple[np.ndarray, ...]]) -> dict[str, tuple[np.ndarray, ...]]:
    """Each curve without the points whose second value, which is drawn, cannot be; none without any point."""
    kept = {name: _drawn(each[1]) for name, each in found.items()}
    return {name: tuple(values[kept[name]] for values in each) for name, each in found.items() if kept[name].any()}


def _name_ends(axis: Any, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The name of each curve to the right of the panel, at the height where the curve ends if no other is there."""
    axis.figure.canvas.draw()
    bottom, top = (axis.transData.transform((0, y))[1] for y in axis.get_ylim())
    right, step = axis.get_xlim()[1], 12 * axis.figure.dpi / 72
    ends = [
        (axis.transData.transform((0, losses[-1]))[1], i, name) for i, (name, (_, losses)) in enumerate(found.items())
    ]
    least = bottom
    for height, index, name in sorted(ends):
        at = max(min(height, top), least)
        least, y = at + step, axis.transData.inverted().transform((0, at))[1]
        axis.annotate(
            name, (right, y), xytext=(5, 0), textcoords="offset points", va="center", annotation_clip=False,
            parse_math=False, fontsize=8, color=SERIES[index % len(SERIES)],
        )  # fmt: skip


def components(
    lengths: list[int], parts: dict[str, list[float]], label: str, mark: tuple[float, str] | None = None
) -> Any:
    """A figure of what each component adds, against the positions a token sees; mark: a position, and its words."""
    with _panel() as axis:
        for index, (name, values) in enumerate(parts.items()):
            axis.plot(
                lengths, values, color=SERIES[index], gid=_gid(f"{name}: {values[-1]:,.1f} at {lengths[-1]:,}", name)
            )
        total = np.sum(list(parts.values()), axis=0)
        axis.plot(lengths, total, color=INK, linewidth=0.9, linestyle="--")
        axis.set(
            xscale="log", yscale="log", xlabel="positions a token sees", ylabel=label, xlim=(lengths[0], lengths[-1])
        )
        axis.set_ylim(bottom=max(total.max() / 1e4, min(map(min, parts.values())) / 2), top=total.max() * 1.5)
        if mark and mark[0] <= lengths[-1]:
            axis.axvline(mark[0], color=MUTED, linewidth=0.8)
            place = (mark[0], axis.get_ylim()[0])
            axis.annotate(
                mark[1], place, xytext=(-4, 8), textcoords="offset points", ha="right", color=MUTED, fontsize=8
            )
        _name_ends(axis, {name: (np.array(lengths), np.array(values)) for name, values in parts.items()})
        return axis.figure


def roofline(points: dict[str, tuple[float, float, float | None]], roof: tuple[str, float, float]) -> Any:
    """A figure of FLOP/s against FLOPs a byte. points: {phase: (FLOPs a byte, FLOP/s predicted and measured)}; roof:
    (name, FLOP/s, bytes/s)."""
    with _panel() as axis:
        name, peak, bandwidth = roof
        xs = [x for x, _, _ in points.values()]
        span = np.geomspace(min([*xs, peak / bandwidth]) / 3, max([*xs, peak / bandwidth]) * 3, 200)
        axis.plot(span, np.minimum(peak, span * bandwidth) / 1e9, color=INK, label=f"roofline, {name}")
        for color, marker, (phase, (x, predicted, measured)) in zip(SERIES, "os^D", points.items(), strict=False):
            axis.plot(x, predicted / 1e9, marker, color=color, markerfacecolor="none", markersize=7)
            shown = measured or predicted
            tip = _gid(f"{phase}: {shown / 1e9:.3g} GFLOP/s at {x:.3g} FLOPs a byte", phase)
            axis.plot(x, shown / 1e9, marker if measured else "", color=color, markersize=7, label=phase, gid=tip)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
        axis.legend(frameon=False, title="open: predicted, filled: measured", loc="lower right", fontsize=8)
        return axis.figure


def beside(blocks: Sequence[tuple[str, str, str]], figure: Any, about: str) -> Any:
    """A figure of 12 x 6 inches at 100 pixels each: on the left (heading, name, words) from the top down, as many
    as have room, on the right the other figure as `save` writes it; about: a line at the bottom."""
    from matplotlib import image, patches

    with _panel(6, 12, dpi=100) as axis:
        whole, pixels = axis.figure, image.imread(io.BytesIO(_written(figure, "png")))
        axis.set_axis_off()
        right = 1190 - pixels.shape[1]
        whole.figimage(pixels, right, 300 - pixels.shape[0] // 2)
        write = lambda x, y, text, **how: whole.text(x / 1200, y / 600, text, va="top", parse_math=False, **how)
        y = 575
        for heading, name, words in blocks:
            above, below = textwrap.wrap(heading, (right - 50) // 7), textwrap.wrap(words, (right - 50) // 8)
            height = 44 + 17 * len(above) + 19 * len(below)
            if y - height < 45:
                break
            at = (20 / 1200, (y - height + 12) / 600)
            whole.add_artist(patches.Rectangle(at, 4 / 1200, (height - 10) / 600, color=ACCENT))
            for line, text in enumerate(above):
                write(36, y - 17 * line, text, fontsize=10, color=MUTED)
            under = y - 17 * len(above)
            write(36, under - 1, name, fontsize=14, fontweight="bold")
            for line, text in enumerate(below):
                write(36, under - 28 - 19 * line, text, fontsize=10.5)
            y -= height + 12
        write(36, 30, about, fontsize=8.5, color=MUTED)
        return whole


# --- from figures to files and pages ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _panel(height: float = 3.7, width: float = 4.7, **how: Any) -> Iterator[Any]:
    """The axes of a new figure, while what is drawn has STYLE."""
    import matplotlib  # here, for its only use: it is slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield FigureCanvasAgg(Figure(figsize=(width, height), **how)).figure.subplots()


def _gid(tip: str, name: str) -> str:
    """What names an element in the SVG until `svg` makes attributes of it."""
    return f"tip:{tip}\t{name}"


def save(figure: Any, path: Path, **how: Any) -> None:
    """The figure as a PNG file. how: what differs from the way that plots of the page are saved."""
    write_whole(path, _written(figure, "png", **how))


def chart(figure: Any, alt: str, caption: str) -> Chart:
    """The figure as a part of the page."""
    return Chart(svg(figure), alt, caption)


def svg(figure: Any) -> str:
    """The figure as an <svg> element that takes its colors from the page and tells what is pointed at."""
    text = _written(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<g id=(['\"])tip:(.*?)\t(.*?)\1>", _mark, text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    text = re.sub(r'(<(?:g|path)) id="(?!m[0-9a-f]{10})[^"]*"', r"\1", text)  # of no use, and not unique on a page
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _mark(found: re.Match) -> str:
    tip, name = (each.replace('"', "&quot;") for each in found.groups()[1:])
    return f'<g class="mark" tabindex="0" role="img" aria-label="{tip}" data-tip="{tip}" data-row="{name}">'


def _written(figure: Any, kind: str, **how: Any) -> bytes:
    import matplotlib

    buffer, none = io.BytesIO(), {"png": {"Software": None}, "svg": {"Date": None}}[kind]
    how = {"metadata": none, "dpi": 130, "bbox_inches": "tight", "pad_inches": 0.05, "transparent": kind == "svg"} | how
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, **how)
    return buffer.getvalue()
