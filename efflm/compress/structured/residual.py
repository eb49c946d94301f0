"""A model with a narrower residual stream: the channels that norms give least of go, and the norms are corrected."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efflm import trees
from efflm.compress import calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.structured import slicing
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, layerwise, norms
from efflm.parallel import sharding

OfNorm = Callable[[jax.Array, Any, jax.Array], jax.Array]  # output [n, D], weights, channels -> [n, ...]


def channels(model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh) -> np.ndarray:
    """Of each channel of the residual stream, the mean over tokens of |output of a norm|, summed over all norms.

    Minitron (Muralidharan 2024, arXiv 2407.14679, section 2.2).
    """
    require(
        not model.config.post_norm,
        "axes has width, but the norms after the attention and the feed-forward part of this model (post_norm) are not "
        "corrected for channels that are gone: leave width out",
    )
    found = _over_norms(model, rows, mesh, _magnitudes, jnp.zeros(0, jnp.int32), "channels: importance")
    return np.sum(list(found.values()), axis=0)


def narrowed(model: LanguageModel, kept: np.ndarray, rows: Mapping[str, Any] | None, mesh: Mesh) -> LanguageModel:
    """The model with these channels of the residual stream, its norms' scales multiplied by what corrects them.

    A norm divides by the root mean square (LayerNorm: by the standard deviation) over the width, which over the
    channels that stay is another. The scale is multiplied by the mean over tokens of the ratio of the one over those
    channels to the one over all; biases stay. What LayerNorm subtracts is the mean over the channels that stay.
    """
    ratios = _over_norms(model, rows, mesh, _ratio, jnp.asarray(kept), "channels: norms")
    small = slicing.slice_params(model, {(None, slicing.WIDTH): kept.tolist()})
    by = {f"{norm}/scale": ratio for norm, ratio in ratios.items()}

    def corrected(path: str, leaf: jax.Array) -> jax.Array:
        if path not in by:
            return leaf
        scale = norms.effective(model.config, leaf) * by[path]
        return norms.stored(model.config, scale).astype(leaf.dtype)

    return small.replace(params=trees.map_with_path(corrected, small.params))


def _magnitudes(y: jax.Array, norm: Any, kept: jax.Array) -> jax.Array:
    return jnp.abs(y)


def _ratio(y: jax.Array, norm: Any, kept: jax.Array) -> jax.Array:
    """The root mean square over the channels that stay, or the standard deviation, to that over all, [n, 1]."""
    scale, bias = (norm[name].astype(jnp.float32)[kept][None] if name in norm else None for name in ("scale", "bias"))
    shifted = y[:, kept] if bias is None else y[:, kept] - bias
    normed = jnp.where(scale == 0, 0.0, shifted / jnp.where(scale == 0, 1.0, scale))  # over all it is 1
    if bias is not None:
        normed = normed - jnp.mean(normed, axis=1, keepdims=True)
    return jnp.sqrt(jnp.mean(jnp.square(normed), axis=1, keepdims=True))


def _over_norms(
    model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh, fn: OfNorm, kept: jax.Array, title: str
) -> dict[str, np.ndarray]:
    """{path of a norm: the mean over tokens of fn(its output, its weights, kept)}; padding does not count."""
    last, final = len(model.config.blocks) - 1, {"final_norm": model.params["final_norm"]}

    def one(layer: Layer, _: calibrate.States) -> tuple[Layer, dict[str, np.ndarray]]:
        sums: dict[str, Any] = {}
        for row, x in zip(layer.rows, layer.wanted, strict=True):
            found = _of_layer(layer.config, fn, layer.params, kept, *row)
            named = {layer.path(name): total for name, total in found.items()}
            if layer.index == last:
                named["final_norm"] = _of_last(model.config, fn, final, kept, x, row[-1])
            for name, total in jax.block_until_ready(named).items():
                sums[name] = sums.get(name, 0.0) + np.asarray(total, np.float64)
        return layer, sums

    _, found = calibrate.walk(model, rows, one, mesh=mesh, title=title, reference=True)
    tokens = np.sum(np.asarray(rows["segments"]) > 0)
    require(tokens > 0, "the calibration text holds no tokens, only padding: give another corpus")
    return {name: total / tokens for sums in found for name, total in sums.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_layer(config: ModelConfig, fn: OfNorm, params: Any, kept: jax.Array, *row: jax.Array) -> dict[str, jax.Array]:
    with sharding.mesh_of(row):
        read = layerwise.reads(config, params, *row)
    total = lambda at: _total(config, fn, read[at.readers[0]], params[at.maker], kept, row[-1])
    return {place.maker: total(place) for place in fold.places(config) if place.is_norm}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_last(config: ModelConfig, fn: OfNorm, params: Any, kept: jax.Array, x: jax.Array, segments: jax.Array):
    with sharding.mesh_of(x):
        return _total(config, fn, layerwise.final_states(config, params, x), params["final_norm"], kept, segments)


def _total(
    config: ModelConfig, fn: OfNorm, y_BTD: jax.Array, norm: Any, kept: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    norm = norm | {"scale": norms.effective(config, norm["scale"])}
    each = fn(y_BTD.reshape(-1, y_BTD.shape[-1]).astype(jnp.float32), norm, kept)
    return jnp.sum(jnp.where((segments_BT > 0).reshape(-1, 1), each, 0.0), axis=0)
