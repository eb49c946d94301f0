"""Prefill and decode as programs to compile, for any mesh and with no weights: jitted functions and their arguments, as
shapes and shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm.infer import generate
from efflm.infer.sampling import GREEDY
from efflm.model import LanguageModel, empty_cache, placement
from efflm.parallel import sharding
from efflm.precision import policy_for


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    """An array whose first axis is the sequences of a batch, and whose others are split along `axes` of the mesh."""
    spec = PartitionSpec(sharding.BATCH[0], *axes)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _placed(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The abstract model, float or quantized, with the place that the table of model.placement gives each array."""
    return model.replace(params=placement.placed(model.params, mesh))


def prefill(model: LanguageModel, rows: int, length: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """Reading prompts of `length` tokens into a cache of just that length. Arguments: the model, tokens, lengths."""
    read = lambda model, tokens, lengths: generate.prefill(model, tokens, lengths, cache_length=length)
    tokens, lengths = _rows(mesh, (rows, length), jnp.int32), _rows(mesh, (rows,), jnp.int32)
    return jax.jit(read), (_placed(model, mesh), tokens, lengths)


def decode(model: LanguageModel, rows: int, cache_length: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """Decoding one token for each sequence, with a cache of `cache_length` positions. Arguments: the model, the state
    with the cache, how to sample, and the tokens that stop.

    The cache is split by sequences, and by key-value heads along `tensor` where that divides them.
    """
    config, tensor = model.config, mesh.shape["tensor"]
    dtype = policy_for(model.config).compute
    cache = jax.eval_shape(lambda: empty_cache(config, rows, cache_length, dtype))

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        heads = "tensor" if x.ndim == 4 and x.shape[2] % tensor == 0 else None
        return _rows(mesh, x.shape, x.dtype, *((None, heads) if x.ndim == 4 else ()))

    of_rows = lambda dtype: _rows(mesh, (rows,), dtype)
    keys = of_rows(jax.eval_shape(lambda: jax.random.key(0)).dtype)
    state = generate.State(jax.tree.map(place, cache), of_rows(jnp.int32), of_rows(jnp.bool_), keys)
    whole = NamedSharding(mesh, PartitionSpec())
    how = {name: jax.ShapeDtypeStruct((), x.dtype, sharding=whole) for name, x in GREEDY.arrays().items()}
    stops = jax.ShapeDtypeStruct((generate.LEAST,), jnp.int32, sharding=whole)
    return jax.jit(generate.step, donate_argnames="state"), (_placed(model, mesh), state, how, stops)
