"""Depth pruning: a student with some layers of its teacher (DistilBERT, Sanh 2019, arXiv 1910.01108) or fresh ones.

The layers are evenly spaced, or those that change the residual stream most (ShortGPT, Men 2024, arXiv 2403.03853).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efflm import progress
from efflm.compress import calibrate
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel, by_block, init_params, sharding


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """Indices of `keep` of `layers` layers, the first and the last among them when keep > 1."""
    return [0] if keep == 1 else [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


def block_influence(model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh) -> np.ndarray:
    """Of each layer, 1 - the mean over tokens of the cosine between its input and its output, both of the residual
    stream: ShortGPT, section 3. Padding does not count; one layer's inputs are held at a time. Raises InputError."""
    require(rows is not None, "block influence needs calibration text: give a corpus")
    if mesh.size > 1:
        model = jax.device_put(model, sharding.shardings(model, mesh))
    chunks, found = calibrate.inputs(model, rows, mesh), []
    count = len(model.config.blocks)
    for index in progress.shown(range(count), "block influence: layers", count):
        single, sums = by_block.block_config(model.config, index), np.zeros(2)
        for i, (x, positions, segments) in enumerate(chunks):
            after = calibrate.run(single, model.params[f"block_{index}"], x, positions, segments)
            sums += np.asarray(jax.block_until_ready(_distances(x, after, segments)), np.float64)
            chunks[i] = after, positions, segments
        require(sums[1] > 0, "the calibration text holds no tokens, only padding: give another corpus")
        found.append(sums[0] / sums[1])
    return np.array(found)


@jax.jit
def _distances(x_BTD: jax.Array, y_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens of 1 - cos(x, y), and their number. A zero vector has cosine 0 with all others."""
    counted_BT = segments_BT > 0
    dot_BT, xx_BT, yy_BT = (jnp.sum(a * b, axis=-1) for a, b in ((x_BTD, y_BTD), (x_BTD, x_BTD), (y_BTD, y_BTD)))
    lengths_BT = jnp.sqrt(xx_BT) * jnp.sqrt(yy_BT)
    cosine_BT = dot_BT / jnp.where(lengths_BT > 0, lengths_BT, 1)
    return jnp.sum(jnp.where(counted_BT, 1 - cosine_BT, 0.0)), jnp.sum(counted_BT)


def keep_layers(model: LanguageModel, indices: list[int]) -> LanguageModel:
    """The model of the given layers, renumbered from 0; embeddings and norms stay."""
    blocks = {f"block_{new}": model.params[f"block_{old}"] for new, old in enumerate(indices)}
    rest = {name: leaf for name, leaf in model.params.items() if not name.startswith("block_")}
    kept = tuple(model.config.blocks[i] for i in indices)
    masks = model.masks and {path: mask for path, mask in model.masks.items() if not path.startswith("block_")}
    for new, old in enumerate(indices if model.masks else ()):
        inside = f"block_{old}/"
        masks |= {f"block_{new}/{p.removeprefix(inside)}": m for p, m in model.masks.items() if p.startswith(inside)}
    return LanguageModel(dataclasses.replace(model.config, blocks=kept), rest | blocks, masks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink:
    """Fewer layers: evenly spaced over the model's, or those of the largest block influence, found in one pass."""

    layers: int = flag(0, "layers to keep; 0 keeps half")
    importance: Literal["spaced", "block_influence"] = flag(
        "spaced", "evenly spaced, or the layers whose output differs most in direction from their input"
    )
    init: Literal["teacher", "random"] = flag("teacher", "start from the kept layers' weights, or from fresh ones")

    def __post_init__(self):
        require(
            not self.calibrates or self.init == "teacher",
            "importance is block_influence, but with init=random no layer's weights are kept: choose spaced",
        )

    @property
    def calibrates(self) -> bool:
        return self.importance == "block_influence"

    def __call__(self, model: LanguageModel, context: Context):
        have = len(model.config.blocks)
        keep = self.layers or max(1, have // 2)
        require(0 < keep <= have, f"shrink.layers is {keep}, but the model has {have} layers: keep 1 to {have}")
        indices = evenly_spaced(have, keep)
        if self.calibrates:
            influence = block_influence(model, context.calibration, context.mesh)
            indices = sorted(np.argsort(-influence, kind="stable")[:keep].tolist())
        after = keep_layers(model, indices)
        if self.init == "random":
            after = LanguageModel(after.config, init_params(after.config, context.seed))  # without masks
        return after, record(self, model, after, context, uses_text=self.calibrates)
