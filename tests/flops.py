"""What a program multiplies, counted in its jaxpr: an oracle that shares no code with model.cost.

XLA's own cost analysis sees the body of a scan once, and knows no trip count of a loop with bounds from data.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval


def matrix_flops(fn: Callable[..., Any], *args: Any, trips: float = math.nan) -> float:
    """FLOPs of all dot_generals that the results of fn(*args) depend on: 2 x rows x columns x contracted x batch.

    args may be abstract. The body of a scan counts as often as it runs, the branches of a cond as their dearest one,
    and the body of a loop whose bounds are data `trips` times on average; without it, such a loop makes the sum NaN.
    """
    closed = jax.make_jaxpr(fn)(*args)
    alive, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _flops(alive, trips)


def _flops(jaxpr: Any, trips: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parts = equation.primitive.name, [_flops(inner, trips) for inner in _inner(equation.params)]
        if name == "dot_general":
            total += _dot_general(equation)
        elif name == "scan":
            total += equation.params["length"] * sum(parts)
        elif name == "while":
            total += trips * sum(parts) if sum(parts) else 0.0
        elif name == "cond":
            total += max(parts)
        else:
            total += sum(parts)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Every jaxpr among the parameters of an equation: of jit, scan, while, cond, checkpoint, custom_vjp, ..."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _dot_general(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, (out,) = equation.invars[0].aval, equation.outvars
    return 2.0 * math.prod(out.aval.shape) * math.prod(left.shape[axis] for axis in contracted)
