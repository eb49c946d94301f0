"""The Fisher information of a model: what errors of its weights do to all that it says.

A model whose weights have the errors e diverges from itself by e^T F e / 2 nats a token, to second order: F is the mean
over tokens of g g^T, g the gradient of the cross-entropy of a target that is drawn from the model's own distribution
(Tseng 2025, arXiv 2505.22988, section 3). The targets of a row are drawn apart, so that the gradient of their sum has
the sum of these squares for its expected square: one backward pass reads a whole row. Errors of rounding to the nearest
are as good as independent, so that of F its diagonal is enough.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm import ops
from efflm.compress import calibrate
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, Transformer, placement
from efflm.model.params import is_matrix
from efflm.parallel import sharding
from efflm.precision import FLOAT32


def diagonal(model: LanguageModel, rows: Mapping[str, Any], mesh: Mesh, seed: int = 0) -> dict[str, jax.Array]:
    """{path: float32 in the shape of the weight} of all matrices: errors e of one make the outputs diverge by
    sum(diagonal * e^2) / 2 nats a token, where they are small and independent.

    It costs a forward and a backward pass over the rows (data.packing), and beside the model's weights in float32 as
    much memory twice.
    """
    read, statistics = drawn(model, rows, mesh, seed), {"squares": calibrate.FISHER}
    found = calibrate.gradients(model, read, statistics, mesh, is_matrix, "Fisher information")
    tokens = np.sum(np.asarray(rows["segments"]) > 0)
    return {path: states["squares"] / tokens for path, states in found.items()}


def drawn(model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh, seed: int = 0) -> dict[str, Any]:
    """The rows with other targets: each drawn from what the model expects there. Raises InputError."""
    require(rows is not None, "the Fisher information needs calibration text: give a corpus")
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(model.params, placement.shardings(model.params, mesh))
    fields = {name: np.asarray(rows[name], np.int32) for name in ("inputs", "positions", "segments")}
    keys = jax.random.split(jax.random.key(seed), len(fields["inputs"]))
    found = []
    for index, key in enumerate(keys):
        row = jax.device_put({name: field[index : index + 1] for name, field in fields.items()}, whole)
        found.append(np.asarray(_drawn(model.config, params, key, row)))
    return {**rows, "targets": np.concatenate(found)}


@functools.partial(jax.jit, static_argnums=0)
def _drawn(config: ModelConfig, params: Any, key: jax.Array, row: dict[str, jax.Array]) -> jax.Array:
    inputs = {name: row[name] for name in ("positions", "segments")}
    with sharding.mesh_of(row):
        logits_BTV, _ = Transformer(config, FLOAT32).apply({"params": params}, row["inputs"], **inputs)
        return jax.random.categorical(key, ops.possible(logits_BTV, config.unused))
