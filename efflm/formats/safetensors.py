"""A model as one uncompressed safetensors file, compressed weights in their own form and no float originals.

An int8 matrix is two tensors, <path>/values and <path>/scale. A matrix with enough exact zeros for it to pay is two
tensors as well, <path>/bitmask (a bit for each element, row by row, first element in the highest bit) and
<path>/nonzeros (the values under the set bits, in that order). The config and what is needed to rebuild the tree
stand in the file's metadata.
"""

import json
import math
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
import safetensors.flax
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError

from efflm import trees
from efflm.config import InputError, ModelConfig, require
from efflm.formats import tensors
from efflm.formats.tensors import NAMES, Tensors
from efflm.model import LanguageModel, cost, sharding
from efflm.ops.qarray import Activations, from_flat, to_flat


def save(path: Path, model: LanguageModel, about: dict[str, Any]) -> int:
    """Write the model, whole or not at all, and return the file's size in bytes. `about`: JSON, how it was made."""
    flat, kinds = to_flat(model.params)
    arrays, sparse = {}, {}
    for name, array in flat.items():
        if array.ndim >= 2 and trees.sparse_nbytes(array) < array.size * array.dtype.itemsize:
            values = np.asarray(array)
            arrays[f"{name}/bitmask"] = jnp.asarray(np.packbits(values != 0))
            arrays[f"{name}/nonzeros"] = jnp.asarray(values[values != 0])
            sparse[name] = list(array.shape)
        else:
            arrays[name] = array
    manifest = {"config": model.config.to_dict(), "kinds": kinds, "sparse": sparse, "about": about}
    partial = path.with_suffix(".partial")
    try:
        safetensors.flax.save_file(arrays, partial, metadata={"efflm": json.dumps(manifest)})
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def load(path: Path, mesh: Mesh | None = None) -> tuple[LanguageModel, dict[str, Any]]:
    """The model, bit for bit as `save` got it, laid on the mesh, and its `about`. Raises InputError.

    What the file says of itself is compared with its tensors before any of them is read, and these are read in turn.
    """
    source, mesh = tensors.from_safetensors(path), mesh or sharding.make_mesh()
    written = source.metadata.get("efflm")
    require(
        written is not None,
        f"{path} was not written by efflm: it has no config in its metadata; give a Hugging Face model as its folder",
    )
    try:
        manifest = json.loads(written)
        sparse = {name: tuple(shape) for name, shape in manifest["sparse"].items()}
        config, kinds, about = ModelConfig.from_dict(manifest["config"]), manifest["kinds"], dict(manifest["about"])
        shapes = _shapes(source, sparse)
        _require_shapes(cost.shapes(config), shapes, kinds)
        flat, int8 = {}, {f"{path}/values" for path in kinds}
        for name, shape in shapes.items():
            array = _expanded(source, name, shape) if name in sparse else source.read(name)
            fits = array.dtype == np.int8 if name in int8 else array.dtype in NAMES
            require(fits, f"{name} is stored as {array.dtype}, which is not what such a weight is made of")
            flat[name] = tensors.place(array, None, NamedSharding(mesh, sharding.partition_spec(name, shape, mesh)))
        return LanguageModel(config, from_flat(flat, kinds)), about
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a model ({error}): export it again") from error


def _shapes(source: Tensors, sparse: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what is in the file, sparse matrices as the matrices they are, with as many bits as elements."""
    shapes = dict(source.shapes)
    for name, shape in sparse.items():
        (bits,), size = shapes.pop(f"{name}/bitmask"), math.prod(shape)
        require(len(shapes.pop(f"{name}/nonzeros")) == 1, f"the non-zero values of {name} are not a list")
        require(min(shape) > 0 and bits == -(-size // 8), f"{name} of shape {shape} has a bitmask of {bits} bytes")
        shapes[name] = shape
    return shapes


def _require_shapes(
    wanted: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], kinds: dict[str, dict[str, str]]
) -> None:
    """Raise InputError unless the weights are those of the config, int8 ones with a scale for each row or column."""
    found = dict(shapes)
    for path, kind in kinds.items():
        require(kind["activations"] in get_args(Activations), f"{path} has unknown activations {kind['activations']}")
        rows, columns = found[path] = found.pop(f"{path}/values")
        scale = found.pop(f"{path}/scale")
        require(scale in ((1, columns), (rows, 1)), f"{path} of shape {(rows, columns)} has a scale of shape {scale}")
    differ = [path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)]
    first = min(differ, default="")
    require(
        not differ,
        f"{first} has shape {found.get(first)}, but the config says {wanted.get(first)}, of {len(differ)} such",
    )


def _expanded(source: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix from its bitmask and its non-zero values."""
    kept = np.unpackbits(source.read(f"{name}/bitmask"), count=math.prod(shape)).astype(bool)
    nonzeros = source.read(f"{name}/nonzeros")
    require(len(nonzeros) == np.count_nonzero(kept), f"{name} has {len(nonzeros)} values for another number of bits")
    values = np.zeros(kept.shape, nonzeros.dtype)
    values[kept] = nonzeros
    return values.reshape(shape)
