"""What a program multiplies, counted in its jaxpr: an oracle that shares no code with model.cost.

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


def matrix_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all dot_generals that the results of fn(*args) depend on: 2 x rows x columns x contracted x batch.

    The body of a scan counts as often as it runs, that of a loop as often as its condition holds, and of the branches
    of a cond the dearest one. args may be abstract; where a loop's condition depends on them, they are zeros.
    """
    closed = jax.make_jaxpr(fn)(*args)
    alive, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    if not math.isnan(flops := _static(alive)):
        return flops
    count = lambda *inputs: _counted(alive, closed.consts, inputs)
    inputs = [leaf for leaf, kept in zip(jax.tree.leaves(args), used, strict=True) if kept]
    counting = jax.make_jaxpr(count)(*inputs)
    small, used = partial_eval.dce_jaxpr(counting.jaxpr, [True])
    inputs = [jnp.zeros(x.shape, x.dtype) for x, kept in zip(inputs, used, strict=True) if kept]
    return float(core.jaxpr_as_fun(core.ClosedJaxpr(small, counting.consts))(*inputs)[0])


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


def _counted(jaxpr: Any, consts: Any, inputs: Any) -> Any:
    """The count as a traced value, of a jaxpr with its inputs."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    total = jnp.zeros((), jnp.float32)
    for equation in jaxpr.eqns:
        read = [x.val if isinstance(x, core.Literal) else values[x] for x in equation.invars]
        variables = list(dict.fromkeys(x for x in equation.invars if not isinstance(x, core.Literal)))
        alone = core.ClosedJaxpr(
            jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation]), []
        )
        values.update(zip(equation.outvars, core.jaxpr_as_fun(alone)(*(values[x] for x in variables)), strict=True))
        total += _counted_equation(alone.jaxpr, read)
    return total


def _counted_equation(alone: Any, inputs: list[Any]) -> Any:
    """The count of a jaxpr of one equation."""
    if not math.isnan(static := _static(alone)):
        return static
    name, params = alone.eqns[0].primitive.name, alone.eqns[0].params
    if name == "while":
        return _trips(params, inputs) * _static(params["body_jaxpr"].jaxpr)
    if name == "scan":
        return _counted_scan(params, inputs)
    (inner,) = [each for each in params.values() if hasattr(getattr(each, "jaxpr", each), "eqns")]
    return _counted(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)


def _counted_scan(params: dict[str, Any], inputs: list[Any]) -> Any:
    body, consts, carry = params["jaxpr"], params["num_consts"], params["num_carry"]

    def one(state, xs):
        values, total = state
        read = [*inputs[:consts], *values, *xs]
        out = core.jaxpr_as_fun(body)(*read)
        return (out[:carry], total + _counted(body.jaxpr, body.consts, read)), None

    start = (inputs[consts : consts + carry], jnp.zeros((), jnp.float32))
    (_, total), _ = lax.scan(one, start, inputs[consts + carry :], params["length"], params["reverse"])
    return total


def _trips(params: dict[str, Any], inputs: list[Any]) -> Any:
    """How often a loop runs: the loop again, of its state only what its condition depends on, from step to step."""
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    condition, body, start = params["cond_jaxpr"], params["body_jaxpr"], inputs[of_cond + of_body :]
    needed = partial_eval.dce_jaxpr(condition.jaxpr, [True])[1][of_cond:]
    while True:
        small, used = partial_eval.dce_jaxpr(body.jaxpr, needed)
        before, needed = needed, [a or b for a, b in zip(needed, used[of_body:], strict=True)]
        if needed == before:
            break
    state = lambda values: [next(values) if kept else zero for kept, zero in zip(needed, start, strict=True)]

    def goes_on(carry):
        return core.jaxpr_as_fun(condition)(*inputs[:of_cond], *state(iter(carry[1])))[0]

    def one(carry):
        count, values = carry
        read = [*inputs[of_cond : of_cond + of_body], *state(iter(values))]
        picked = [x for x, kept in zip(read, used, strict=True) if kept]
        return count + 1, core.jaxpr_as_fun(core.ClosedJaxpr(small, body.consts))(*picked)

    kept = [x for x, each in zip(start, needed, strict=True) if each]
    return lax.while_loop(goes_on, one, (jnp.zeros((), jnp.int32), kept))[0]


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
