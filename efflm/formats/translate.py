"""From a config.json and named tensors to a model, and back: one tensor at a time, by the family's table."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from efflm import trees
from efflm.cli import progress
from efflm.config import InputError, require
from efflm.config.model import ModelConfig
from efflm.formats import buffers, hf_config
from efflm.formats.families import FAMILIES, Family, Place
from efflm.formats.tensors import FLOATING, Tensors, place, require_dtype
from efflm.model import LanguageModel, params, placement
from efflm.parallel import meshes

ROWS = 1024  # of two matrices that are compared at a time


def to_model(
    description: dict[str, Any], source: Tensors, *, dtype: str | None = None, mesh: Mesh | None = None
) -> LanguageModel:
    """The model that `description`, what a config.json holds, and the tensors make, laid on the mesh.

    dtype: of all weights; None keeps each as it is stored. One tensor is in the process's memory at a time, beside the
    model. Raises InputError, before any weight is placed, for a family or setting that is not supported and for tensors
    that are missing, of another shape, or unknown. An output layer of its own counts, whatever the config says of it.
    """
    require_dtype(dtype)
    family = _family(description)
    config = hf_config.read(family.config, description, layers_at_most=max(1, len(source.shapes)))
    config = _with_own_head(family, config, source)
    wanted = {path: param.shape for path, param in params.table(config).items()}
    names, beside = _names(family, config, wanted, source.shapes)
    buffers.require_harmless(beside, source, config)
    mesh = mesh or meshes.make_mesh()
    flat = {}
    size = sum(map(math.prod, wanted.values()))
    for path in progress.shown(wanted, "reading weights", size, lambda path: math.prod(wanted[path])):
        tensor = source.read(names[path])
        require(
            tensor.dtype in FLOATING,
            f"{names[path]} is stored as {tensor.dtype}, but only floating-point weights are read",
        )
        array = taken(tensor, family.place(path), _head_dim(config, path))
        where = NamedSharding(mesh, placement.partition_spec(path, wanted[path], mesh))
        flat[path] = place(array, dtype, where, names[path])
    weights = trees.unflatten(flat)
    named = description.get("torch_dtype") or description.get("dtype") or main_dtype(weights)
    precision = precision_of(dtype or named)
    if dtype is None and description.get("efflm_precision") is not None:
        precision = description["efflm_precision"]
    return LanguageModel(dataclasses.replace(config, precision=precision), weights)


def main_dtype(weights: Any) -> str:
    """The one dtype that a config.json gives a model's weights: that of most of its numbers, and of float16 and
    bfloat16 weights in one model, which neither dtype holds all of, float32."""
    counts: dict[str, int] = {}
    for _, leaf in trees.flatten(weights):
        counts[leaf.dtype.name] = counts.get(leaf.dtype.name, 0) + leaf.size
    return "float32" if {"float16", "bfloat16"} <= counts.keys() else max(counts, key=counts.__getitem__)


def precision_of(dtype: Any) -> str:
    """What the matmuls of a model are computed in whose weights a config.json says to be of this dtype."""
    return "bfloat16" if str(dtype).removeprefix("torch.") == "bfloat16" else "float32"


def describe(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The family that can say all of the config, and what its config.json says. Raises InputError if none can."""
    for name, family in FAMILIES.items():
        shared = family.config.fixed.items()
        if any(getattr(config, field) != value for field, value in shared):
            continue
        description = {"architectures": [family.architecture], "model_type": name}
        description |= hf_config.write(family.config, config)
        try:
            same = dataclasses.replace(config, precision="float32", unused=())  # its torch_dtype says the precision
            if hf_config.read(family.config, description, len(config.blocks)) == same:
                return name, description
        except InputError:  # of a setting this family does not have: another one may
            continue
    raise InputError(
        f"none of the families {', '.join(FAMILIES)} has models of this shape (as with layers that differ): export it "
        "as efflm's own safetensors file"
    )


def to_tensors(
    model: LanguageModel, family: str
) -> Iterator[tuple[str, jax.ShapeDtypeStruct, Callable[[], np.ndarray]]]:
    """(name, shape and dtype, what gives the array) of every tensor that a model of the family is on disk."""
    leaves = dict(trees.flatten(model.params))
    groups: dict[str, list[str]] = {}
    for path in leaves:
        groups.setdefault(FAMILIES[family].place(path).tensor(path), []).append(path)
    for name, paths in groups.items():
        where = {path: FAMILIES[family].place(path) for path in paths}
        paths = sorted(paths, key=lambda path: where[path].part or 0)
        first, head_dim = where[paths[0]], _head_dim(model.config, paths[0])
        dtype = np.result_type(*(leaves[path].dtype for path in paths))
        shape = stored_shape(leaves[paths[0]].shape, first)
        parts = [leaves[path] for path in paths]
        yield name, jax.ShapeDtypeStruct(shape, dtype), functools.partial(joined, parts, first, head_dim, dtype)


# --- layouts ---------------------------------------------------------------------------------------------------------


def stored_shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape of the tensor that holds a leaf of this shape."""
    if place.part is not None:
        shape = (*shape[:-1], 3 * shape[-1])
    return shape[::-1] if place.transpose else shape


def taken(tensor: np.ndarray, place: Place, head_dim: int) -> np.ndarray:
    """The leaf in a tensor as it is stored; a view where that is possible."""
    array = tensor.T if place.transpose else tensor
    if place.part is None:
        return array
    lead = array.shape[:-1]
    if not place.by_head:
        return array.reshape(*lead, 3, -1)[..., place.part, :]
    return array.reshape(*lead, -1, 3, head_dim)[..., place.part, :].reshape(*lead, -1)


def joined(leaves: list[jax.Array], place: Place, head_dim: int, dtype: np.dtype) -> np.ndarray:
    """The tensor that holds one leaf, or queries, keys and values: the inverse of `taken`."""
    leaves = [trees.on_host(leaf).astype(dtype, copy=False) for leaf in leaves]
    array = leaves[0]
    if place.part is not None:
        lead = array.shape[:-1]
        split = [leaf.reshape(*lead, -1, head_dim) for leaf in leaves] if place.by_head else leaves
        array = np.stack(split, axis=-2).reshape(*lead, -1)
    return array.T if place.transpose else array


def _head_dim(config: ModelConfig, path: str) -> int:
    layer = path.split("/")[0].removeprefix("block_")
    return config.blocks[int(layer)].head_dim if layer.isdigit() else 0


# --- names -----------------------------------------------------------------------------------------------------------


def _family(description: dict[str, Any]) -> Family:
    name = description.get("model_type")
    require(
        isinstance(name, str) and name in FAMILIES,
        f"model_type is {name!r:.60}, but only {', '.join(FAMILIES)} are supported",
    )
    return FAMILIES[name]


def _with_own_head(family: Family, config: ModelConfig, source: Tensors) -> ModelConfig:
    """The config, untied where it says that the output layer is the embedding but the tensors hold another one."""
    head, path = family.places["unembedding"].name, "embedding"
    if not config.tied or head not in source.shapes:
        return config
    name = family.place(path).tensor(path)
    name = name if name in source.shapes else name.removeprefix(family.prefix)
    if name not in source.shapes:
        return config
    shape, one, other = source.shapes[name], source.read(name), source.read(head)
    same = (
        shape == source.shapes[head]
        and all(  # a part at a time: both are mapped, not held
            np.array_equal(one[at : at + ROWS], other[at : at + ROWS], equal_nan=True)
            for at in range(0, shape[0] if shape else 0, ROWS)
        )
    )
    return config if same else dataclasses.replace(config, tied=False)


def _names(
    family: Family, config: ModelConfig, wanted: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]
) -> tuple[dict[str, str], list[str]]:
    """{leaf: the tensor that holds it}, all there and of the right shape, and the buffers (see buffers.py), which with
    these are all the tensors there are. Raises InputError."""
    names, missing = {}, []
    for path in wanted:
        name = family.place(path).tensor(path)
        short = name.removeprefix(family.prefix)  # as the part without a head is saved
        names[path] = name if name in there or short not in there else short
        if names[path] not in there:
            missing.append(name)
    require(not missing, f"{_some(missing)} missing: the model is not whole, or not what its config says")
    for path, shape in wanted.items():
        name, expected = names[path], stored_shape(shape, family.place(path))
        require(
            tuple(there[name]) == expected,
            f"{name} has shape {tuple(there[name])}, but the model's config says {expected}",
        )
    known = {*names.values()} | ({family.places["unembedding"].name} if config.tied else set())
    beside = [name for name in there if name not in known and buffers.is_one(name, there[name])]
    left = [name for name in there if name not in known and name not in set(beside)]
    require(not left, f"{_some(left)} left over: the model has parts that its config does not speak of")
    return names, beside


def _some(names: list[str]) -> str:
    """The first few, and how many there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(f'{name:.80}' for name in names[:3])}{more} {'are' if len(names) > 1 else 'is'}"
