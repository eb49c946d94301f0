"""What a program multiplies, counted in its jaxpr: an oracle that shares no code with plan.work.

XLA's own cost analysis sees the body of a scan once, and knows no trip count of a loop with bounds from data. Here such
loops are run, without their matrices: only what decides whether they go on.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval

from efflm.ops.kernels.cpu import build


def matrix_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all dot_generals that the results of fn(*args) depend on: 2 x rows x columns x contracted x batch.

    The body of a scan counts as often as it runs, that of a loop as often as its condition holds, and of the branches
    of a cond the dearest one. args may be abstract; where a loop's condition depends on them, they are zeros.
    """
    with build.chosen("off"):  # a native kernel's matmuls are not in the jaxpr
        closed = jax.make_jaxpr(fn)(*args)
    alive, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    if not math.isnan(flops := _static(alive)):
        return flops
    count = lambda *inputs: _counted(alive, closed.consts, inputs)
    inputs = [leaf for leaf, kept in zip(jax.tree.leaves(args), used, strict=True) if kept]
    counting = jax.make_jaxpr(count)(*inputs)
    small, used = partial_eval.dce_jaxpr(counting.jaxpr, [True])
    inputs = [jnp.zeros(x.shape, x.dtype) for x, kept in zip(inputs, used, strict=True) if kept]
    return float(_run(small, counting.consts, inputs)[0])


def _static(jaxpr: Any) -> float:
    """The count, or NaN where there are matmuls in a loop whose trips are data."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parts = equation.primitive.name, [_static(inner) for inner in _inner(equation.params)]
        if name == "dot_general":
            total += _dot_general(equation)
        elif name == "scan":
            total += equation.params["length"] * sum(parts)
        elif name == "while":
            total += math.nan if sum(parts) else 0.0
        elif name == "cond":
            total += max(parts)
        else:
            total += sum(parts)
    return total


def _run(jaxpr: Any, consts: Any, inputs: Any) -> list[Any]:
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*inputs)


def _open(jaxpr: Any) -> tuple[Any, Any]:
    """A jaxpr and its constants, which some versions of JAX keep apart."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _counted(jaxpr: Any, consts: Any, inputs: Any) -> Any:
    """The count as a traced value, of a jaxpr with its inputs."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    total = jnp.zeros((), jnp.float32)
    for equation in jaxpr.eqns:
        variables = list(dict.fromkeys(x for x in equation.invars if not isinstance(x, core.Literal)))
        alone = jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
        values.update(zip(equation.outvars, _run(alone, [], [values[x] for x in variables]), strict=True))
        if math.isnan(flops := _static(alone)):
            inputs = [x.val if isinstance(x, core.Literal) else values[x] for x in equation.invars]
            flops = _of_loops(equation, inputs)
        total += flops
    return total


def _of_loops(equation: Any, inputs: list[Any]) -> Any:
    """The count of an equation in which there are matmuls in a loop whose trips are data."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return _trips(params, inputs) * _static(_open(params["body_jaxpr"])[0])
    if name == "scan":
        return _of_scan(equation, inputs)
    (inner,) = (each for each in params.values() if hasattr(_open(each)[0], "eqns"))
    return _counted(*_open(inner), inputs)


def _of_scan(equation: Any, inputs: list[Any]) -> Any:
    params, (body, constants) = equation.params, _open(equation.params["jaxpr"])
    whole = lambda outer, inner: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))
    carried = whole(equation.outvars, body.outvars)  # the other results are stacked, and the other inputs sliced
    read_whole = whole(equation.invars, body.invars)
    same, start, xs = inputs[: read_whole - carried], inputs[read_whole - carried : read_whole], inputs[read_whole:]

    def one(state, xs):
        values, total = state
        read = [*same, *values, *xs]
        return (_run(body, constants, read)[:carried], total + _counted(body, constants, read)), None

    state = (start, jnp.zeros((), jnp.float32))
    return lax.scan(one, state, xs, params["length"], params["reverse"])[0][1]


def _trips(params: dict[str, Any], inputs: list[Any]) -> Any:
    """How often a loop runs: the loop again, of its state only what its condition depends on, from step to step."""
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    condition, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    start = inputs[of_cond + of_body :]
    before, needed = None, partial_eval.dce_jaxpr(condition[0], [True])[1][of_cond:]
    while needed != before:
        small, used = partial_eval.dce_jaxpr(body[0], needed)
        before, needed = needed, [a or b for a, b in zip(needed, used[of_body:], strict=True)]
    pick = lambda values, kept: [x for x, each in zip(values, kept, strict=True) if each]

    def whole(values):
        """The state, where what is not needed stays as it was."""
        values = iter(values)
        return [next(values) if each else x for each, x in zip(needed, start, strict=True)]

    def goes_on(carry):
        return _run(*condition, [*inputs[:of_cond], *whole(carry[1])])[0]

    def one(carry):
        count, values = carry
        read = [*inputs[of_cond : of_cond + of_body], *whole(values)]
        return count + 1, _run(small, body[1], pick(read, used))

    return lax.while_loop(goes_on, one, (jnp.zeros((), jnp.int32), pick(start, needed)))[0]


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
