"""Names beside the points of a plot, where they cover no point and no other name."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from efflm.report.colors import MUTED, PAPER


def beside(axis: Any, xs: np.ndarray, ys: np.ndarray, names: Sequence[str]) -> list[Any]:
    """A name beside each point, where it covers no point and no other name; a thin line leads to it from afar.

    Points whose name is empty have none.
    """
    renderer = axis.figure.canvas.get_renderer()
    points = axis.transData.transform(np.stack([xs, ys], axis=1))
    inside, taken, labels = axis.get_window_extent(renderer), [], []
    scale = axis.figure.dpi / 72
    for name, (px, py) in _grouped(names, points, near=3 * scale):
        text = axis.annotate(
            name, axis.transData.inverted().transform((px, py)), xytext=(0, 0), textcoords="offset points", va="center",
            parse_math=False, fontsize=8, zorder=4,
            bbox={"facecolor": PAPER, "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
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


def _grouped(names: Sequence[str], points: np.ndarray, near: float) -> list[tuple[str, np.ndarray]]:
    """The points with their names, on a line each where several lie within `near` pixels of each other."""
    groups: list[tuple[list[str], np.ndarray]] = []
    for name, point in zip(names, points):
        if not name:
            continue
        found = next((group for group, at in groups if np.abs(at - point).max() < near), None)
        if found is None:
            groups.append(([name], point))
        else:
            found.append(name)
    return [("\n".join(group), at) for group, at in groups]


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Where a name may begin, in pixels from its point: right, left, above and below, then ever further away."""
    found = []
    for ring in range(48):
        rise = ring * 7.0
        aside = 9 + 4 * ring
        for dy in dict.fromkeys((rise, -rise)):
            found += [(aside, dy), (-width - aside, dy), (-width / 2, dy + np.sign(dy) * (height / 2 + 3))]
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
