"""Names beside the points of a plot, where they cover no point and no other name."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from efflm.report.colors import MUTED, PAPER


def beside(axis: Any, xs: np.ndarray, ys: np.ndarray, names: Sequence[str]) -> None:
    """A name beside each point, where it covers no point and no other name; a thin line leads to it from afar.

    Points whose name is empty have none.
    """
    renderer = axis.figure.canvas.get_renderer()
    points = axis.transData.transform(np.stack([xs, ys], axis=1))
    inside, taken = axis.get_window_extent(renderer), []
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
            place = box.from_bounds(px + dx, py + dy - height / 2, width, height)
            within = np.all(inside.min < place.min) and np.all(place.max < inside.max)
            if within and not place.count_overlaps(taken) and not place.padded(5, 4).count_contains(points):
                break
        taken.append(place)
        text.set_position(((dx + 2) / scale, dy / scale))


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
