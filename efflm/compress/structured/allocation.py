"""How many slices every layer keeps along each axis, for a model without a share of its parameters, bytes or time."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from efflm.compress.structured import slicing
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model.params import table

MULTIPLE = 16  # channels are kept in multiples of it, which kernels are fast at, where there are many
Scores = Mapping[tuple[int, str], np.ndarray]  # {(layer, axis of slicing.IN_LAYER): of each slice}
Counts = list[dict[str, int]]  # of each layer, {axis of slicing.IN_LAYER: how many slices stay}


def step(axis: str, size: int) -> int:
    """How many slices go or stay together."""
    return MULTIPLE if axis != "groups" and size >= MULTIPLE**2 else 1


def parameters(config: ModelConfig) -> int:
    return sum(math.prod(param.shape) for param in table(config).values())


def per_slice(config: ModelConfig, layer: int, axis: str) -> int:
    """How many parameters a slice of a layer has."""
    names = {"groups": {"heads", "kv_heads"}, "mlp": {"mlp"}}[axis]
    own = (p for path, p in table(config).items() if path.startswith(f"block_{layer}/") and names & set(p.axes))
    return sum(math.prod(p.shape) for p in own) // slicing.sizes(config.blocks[layer])[axis]


def of_width(config: ModelConfig, width: int) -> ModelConfig:
    return dataclasses.replace(config, width=width)


def sizes(config: ModelConfig, axes: Sequence[str]) -> Counts:
    """Of each layer, the slices along those of the axes that are inside layers."""
    return [{a: slicing.sizes(block)[a] for a in axes if a in slicing.IN_LAYER} for block in config.blocks]


def gone(config: ModelConfig, width: int, keep: Counts) -> float:
    """The share of the parameters that is gone with these widths."""
    small, have = of_width(config, width), sizes(config, slicing.IN_LAYER)
    cut = sum(per_slice(small, i, a) * (have[i][a] - n) for i, own in enumerate(keep) for a, n in own.items())
    return 1 - (parameters(small) - cut) / parameters(config)


def most(config: ModelConfig, axes: Sequence[str]) -> float:
    """The largest share that can go: with one group and one step of channels left in each layer."""
    keep = [{axis: step(axis, size) for axis, size in own.items()} for own in sizes(config, axes)]
    return gone(config, step(slicing.WIDTH, config.width) if slicing.WIDTH in axes else config.width, keep)


def require_possible(config: ModelConfig, share: float, axes: Sequence[str]) -> None:
    """Raise InputError for a share of the parameters that is more than `most`."""
    largest = most(config, axes)
    require(
        share <= largest,
        f"parameters is {share}, but with the fewest {' and '.join(axes)} in each layer the model has {largest:.1%} "
        "fewer: ask for less",
    )


def counts(config: ModelConfig, share: float, axes: Sequence[str], scores: Scores | None = None) -> tuple[int, Counts]:
    """`sizes_within`. Raises InputError for a share that cannot be reached, but for half a step in all layers."""
    require_possible(config, share, axes)
    names = " and ".join(axes)
    width, keep = sizes_within(config, share, axes, scores)
    found, last = gone(config, width, keep), axes[-1]
    one_less = [{last: n - step(last, n)} for n in (own.get(last, 0) for own in sizes(config, axes))]
    coarse = (
        gone(config, config.width - step(last, config.width), [])
        if last == slicing.WIDTH
        else gone(config, width, one_less) - gone(config, width, [])
    )
    require(
        found > 0 and found >= share - coarse / 2,
        f"parameters is {share}, but whole {names} make it {found:.1%}: ask for another share",
    )
    return width, keep


def sizes_within(config: ModelConfig, share: float, axes: Sequence[str], scores: Scores | None) -> tuple[int, Counts]:
    """The width of the model and the slices that each layer keeps, for a model without that share of its parameters, as
    near as whole slices allow. scores: by which the slices of all layers compete; without, layers give the same."""
    width = _width(config, share, axes) if slicing.WIDTH in axes else config.width
    small = of_width(config, width)
    target = share * parameters(config) - (parameters(config) - parameters(small))
    return width, _counts(small, target, axes, scores)


def _width(config: ModelConfig, share: float, axes: Sequence[str]) -> int:
    """In whole steps. Axes inside the layers lose the same share of their slices, so what has both loses it twice."""
    total, each, D = parameters(config), step(slicing.WIDTH, config.width), config.width
    column = (total - parameters(of_width(config, each))) / max(D - each, 1)
    twice = sum(per_slice(config, i, axis) * n for i, own in enumerate(sizes(config, axes)) for axis, n in own.items())
    left = lambda width: total - column * (D - width) - twice * (1 - width / D) * width / D
    return min(range(each, D + 1, each), key=lambda width: abs(left(width) - (1 - share) * total))


def _counts(config: ModelConfig, target: float, axes: Sequence[str], scores: Scores | None) -> Counts:
    """All axes inside the layers give the same share, groups first; the channels make up for the rest.

    Without scores all layers give that share too. With them, of each axis the slices go that have the least score for
    each parameter in all layers, channels a step at a time; each layer keeps a group and a step of channels. target:
    parameters.
    """
    kept, removed = sizes(config, axes), 0
    inside = tuple(kept[0])
    each = {(i, axis): per_slice(config, i, axis) for i, own in enumerate(kept) for axis in own}
    whole = {axis: sum(each[i, axis] * own[axis] for i, own in enumerate(kept)) for axis in inside}
    for index, axis in enumerate(inside):
        rest = sum(whole[a] for a in inside[index:])
        if scores is None:
            share = (target - removed) / rest
            for layer, own in enumerate(kept):
                size, unit = own[axis], step(axis, own[axis])
                own[axis] = min(max(round(size * (1 - share) / unit) * unit, unit), size)
                removed += each[layer, axis] * (size - own[axis])
            continue
        goal, units = removed + (target - removed) * whole[axis] / rest, []
        for layer, own in enumerate(kept):
            size, unit, start = own[axis], step(axis, own[axis]), 0
            rising = np.sort(scores[layer, axis])
            for stay in range((size - 1) // unit * unit, 0, -unit):  # where the size is no multiple, fewer go at first
                slices = size - stay - start
                count = each[layer, axis] * slices
                units.append((rising[start : start + slices].sum() / count, count, layer, slices))
                start += slices
        for _, count, layer, slices in sorted(units):
            if removed + count / 2 <= goal:
                removed += count
                kept[layer][axis] -= slices
    return kept


def search(
    removed: Callable[[float], float], target: float, largest: float, name: str, tolerance: float, candidates: int
) -> tuple[float, float]:
    """(share of parameters, removed(share)) by bisection: the nearest to `target` of at most so many candidates.

    removed: of a share of parameters, the share of something else, rising with it. largest: the share of parameters
    that can go. It ends early within the tolerance. Raises InputError where the smallest model does not reach it.
    """
    found = {largest: removed(largest)}
    require(
        found[largest] >= target - tolerance,
        f"{name} is {target}, but the smallest model that can be made saves {found[largest]:.1%}: ask for less",
    )
    low, high = 0.0, largest
    nearest = lambda: min(found, key=lambda share: abs(found[share] - target))
    while len(found) < candidates and abs(found[nearest()] - target) > tolerance:
        share = (low + high) / 2
        found[share] = removed(share)
        low, high = (share, high) if found[share] < target else (low, share)
    return nearest(), found[nearest()]
