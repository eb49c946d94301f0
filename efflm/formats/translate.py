"""From a config.json and named tensors to a model, and back: one tensor at a time, by the family's table."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from efflm import trees
from efflm.cli import progress
from efflm.config import InputError, require
from efflm.config.model import BlockConfig, ModelConfig
from efflm.formats import buffers, hf_config, packed_config
from efflm.formats.families import FAMILIES, Family, Place
from efflm.formats.hf_values import MOST
from efflm.formats.packed import Matrix, matrix_of
from efflm.formats.packed_config import Quantized, Scheme
from efflm.formats.tensors import FLOATING, Named, Tensors, place, require_dtype
from efflm.model import LanguageModel, params, placement
from efflm.ops.qarray import QArray
from efflm.ops.storage import FLOATS
from efflm.parallel import meshes

ROWS = 1024  # of two matrices that are compared at a time


def to_model(
    description: dict[str, Any],
    source: Tensors,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    blocks: tuple[BlockConfig, ...] | None = None,
) -> LanguageModel:
    """The model that `description`, what a config.json holds, and the tensors make, laid on the mesh.

    dtype: of all floats; None keeps each as it is stored, and a quantized matrix stands for what the description names.
    Scales stay as they are stored. blocks: the layers, where they differ from each other, which
    no config.json says. Quantized matrices are QArrays with the codes of the file. One tensor is in the process's
    memory at a time, beside the model. Raises InputError, before any weight is placed, for a family or setting that is
    not supported and for tensors that are missing, of another shape, or unknown. An output layer of its own counts,
    whatever the config says of it.
    """
    config, weights = read_weights(description, source, dtype, mesh or meshes.make_mesh(), blocks)
    tree = trees.unflatten(dict(weights))
    named = description.get("torch_dtype") or description.get("dtype") or main_dtype(tree)
    precision = precision_of(dtype or named)
    if dtype is None and description.get("efflm_precision") is not None:
        precision = description["efflm_precision"]
    return LanguageModel(dataclasses.replace(config, precision=precision), tree)


def read_weights(
    description: dict[str, Any],
    source: Tensors,
    dtype: str | None,
    mesh: Mesh,
    blocks: tuple[BlockConfig, ...] | None = None,
) -> tuple[ModelConfig, Iterator[tuple[str, Any]]]:
    """The config, in float32, and each leaf by its path as it is read. See `to_model`."""
    require_dtype(dtype)
    family = _family(description)
    settings = dict(description)
    named = str(description.get("torch_dtype") or description.get("dtype") or "").removeprefix("torch.")
    named = named if named in FLOATS else ""
    quantized = packed_config.read(settings.pop("quantization_config", None))
    config = hf_config.read(family.config, settings, layers_at_most=max(1, len(source.shapes)))
    config = _with_own_head(family, dataclasses.replace(config, blocks=blocks or config.blocks), source)
    wanted = {path: param.shape for path, param in params.table(config).items()}
    names, matrices, beside = _names(family, config, quantized, source.shapes)
    buffers.require_harmless(beside, source, config)

    def laid(path: str, array: np.ndarray, dtype: str | None, name: str) -> jax.Array:
        return place(array, dtype, NamedSharding(mesh, placement.partition_spec(path, array.shape, mesh)), name)

    def one(path: str) -> Any:
        where, head_dim, name = family.place(path), _head_dim(config, path), names[path]
        if path in matrices:
            parts = matrices[path].read(source.read, source.shapes)
            across = dataclasses.replace(where, transpose=False)
            of_each = lambda part, array: array if part == "activation_scale" else taken(array, across, head_dim)
            arrays = {part: laid(f"{path}/{part}", of_each(part, array), None, name) for part, array in parts.items()}
            matrix = matrices[path]
            static = {"bits": matrix.scheme.bits, "group": matrix.group, "activations": matrix.scheme.activations}
            static["dtype"] = dtype or named or str(arrays["scale"].dtype)
            return QArray(**arrays, axis=-2, size=matrix.inputs, **static)
        tensor = source.read(name)
        require(
            tensor.dtype in FLOATING,
            f"{name} is stored as {tensor.dtype}, but only floating-point weights are read without a "
            "quantization_config that speaks of them",
        )
        return laid(path, taken(tensor, where, head_dim), dtype, name)

    size = sum(map(math.prod, wanted.values()))
    paths = progress.shown(wanted, "reading weights", size, lambda path: math.prod(wanted[path]))
    return config, ((path, one(path)) for path in paths)


def main_dtype(weights: Any) -> str:
    """The one dtype that a config.json gives a model's weights: that of most of them, and of float16 and bfloat16
    weights in one model, which neither dtype holds all of, float32."""
    counts: dict[str, int] = {}
    for _, leaf in trees.flatten(weights):
        counts[str(leaf.dtype)] = counts.get(str(leaf.dtype), 0) + math.prod(leaf.shape)
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
            if hf_config.read(family.config, description, MOST) == same:
                return name, description
        except InputError:  # of a setting this family does not have: another one may
            continue
    raise InputError(
        f"none of the families {', '.join(FAMILIES)} has models of this shape (as with layers that differ): export it "
        "as efflm's own safetensors file"
    )


def to_tensors(model: LanguageModel, family: str) -> Iterator[Named]:
    """Every tensor that a model of the family is on disk: floats, and of QArrays what compressed-tensors stores."""
    leaves = dict(trees.flatten(model.params))
    for name, paths in _by_tensor(leaves, family).items():
        first, head_dim = FAMILIES[family].place(paths[0]), _head_dim(model.config, paths[0])
        shape = stored_shape(leaves[paths[0]].shape, first)
        parts = [leaves[path] for path in paths]
        if isinstance(parts[0], QArray):
            across = dataclasses.replace(first, transpose=False)
            matrix = matrix_of(name.removesuffix(".weight"), parts[0], shape[0])
            join = lambda arrays, across=across, head_dim=head_dim: joined(arrays, across, head_dim, arrays[0].dtype)
            yield from matrix.write(parts, join)
            continue
        dtype = np.result_type(*(part.dtype for part in parts))
        yield name, jax.ShapeDtypeStruct(shape, dtype), functools.partial(joined, parts, first, head_dim, dtype)


def schemes(model: LanguageModel, family: str) -> dict[str, Scheme | None]:
    """How compressed-tensors stores each linear layer of a model of the family, by the module's name; None: as floats,
    which an output layer is that is the embedding. Raises InputError where it has no form for one."""
    head = FAMILIES[family].places["unembedding"].name.removesuffix(".weight")
    found: dict[str, Scheme | None] = dict.fromkeys((head, "lm_head"))  # as transformers 5 calls it in every family
    leaves = dict(trees.flatten(model.params))
    for name, paths in _by_tensor(leaves, family).items():
        if not (_is_linear(paths[0]) or params.find(paths[0])[0].role == "router"):
            continue
        each = [matrix_of(name, leaves[path], 0).scheme if isinstance(leaves[path], QArray) else None for path in paths]
        require(
            each.count(each[0]) == len(each),
            f"{', '.join(paths)} are one matrix in this family, but are in formats of their own: quantize them alike",
        )
        require(
            each[0] is None or FAMILIES[family].place(paths[0]).transpose,
            f"{paths[0]} is no Linear in models of the family {family}, and compressed-tensors quantizes no others: "
            'give format="huggingface", which writes floats',
        )
        found[name.removesuffix(".weight")] = each[0]
    return found


def _by_tensor(leaves: Iterable[str], family: str) -> dict[str, list[str]]:
    """{tensor: the leaves that it holds, in their order}."""
    groups: dict[str, list[str]] = {}
    for path in leaves:
        groups.setdefault(FAMILIES[family].place(path).tensor(path), []).append(path)
    return {
        name: sorted(paths, key=lambda path: FAMILIES[family].place(path).part or 0) for name, paths in groups.items()
    }


def _is_linear(path: str) -> bool:
    return params.find(path)[0].role in ("linear", "unembedding")


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


def joined(leaves: list[Any], place: Place, head_dim: int, dtype: np.dtype) -> np.ndarray:
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
    family: Family, config: ModelConfig, quantized: Quantized | None, there: dict[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, Matrix], list[str]]:
    """{leaf: the tensor that holds it, or of a quantized matrix its module}, all there and of the right shape; the
    quantized matrices; and the buffers (see buffers.py), which with these are all the tensors there are. Raises
    InputError."""
    names, matrices, missing, known = {}, {}, [], set()
    for path, param in params.table(config).items():
        where = family.place(path)
        name, expected = where.tensor(path), stored_shape(param.shape, where)
        matrix = _matrix(name.removesuffix(".weight"), path, expected, where, quantized, there)
        if matrix:
            names[path], matrices[path] = matrix.module, matrix
            known.update(matrix.tensors(there))
            continue
        short = name.removeprefix(family.prefix)  # as the part without a head is saved
        names[path] = name if name in there or short not in there else short
        known.add(names[path])
        if names[path] not in there:
            missing.append(name)
        require(
            names[path] not in there or tuple(there[names[path]]) == expected,
            f"{names[path]} has shape {there.get(names[path])}, but the model's config says {expected}",
        )
    hint = (
        ""
        if quantized or not any(name.endswith(".qweight") for name in there)
        else (
            ": its weights are quantized, but its config.json has no quantization_config; copy the content of its "
            "quantize_config.json into it"
        )
    )
    require(not missing, f"{_some(missing)} missing{hint or ': the model is not whole, or not what its config says'}")
    known |= {family.places["unembedding"].name} if config.tied else set()
    biases = {f"{matrix.module}.bias" for matrix in matrices.values()}
    beside = [name for name in there if name not in known and (name in biases or buffers.is_one(name, there[name]))]
    left = [name for name in there if name not in known and name not in set(beside)]
    require(not left, f"{_some(left)} left over: the model has parts that its config does not speak of")
    return names, matrices, beside


def _matrix(
    module: str,
    path: str,
    expected: tuple[int, ...],
    where: Place,
    quantized: Quantized | None,
    there: dict[str, tuple[int, ...]],
) -> Matrix | None:
    """The quantized matrix that a leaf is, or is a part of; None: it is one of floats."""
    scheme = quantized.of(module) if quantized and _is_linear(path) else None
    if scheme is None or (scheme.layout not in ("int", "packed") and f"{module}.qweight" not in there):
        return None
    inputs, outputs = expected[::-1] if where.transpose else expected
    return Matrix(scheme, module, inputs, outputs)


def _some(names: list[str]) -> str:
    """The first few, and how many there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(f'{name:.80}' for name in names[:3])}{more} {'are' if len(names) > 1 else 'is'}"
