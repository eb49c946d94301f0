"""A model as one uncompressed safetensors file, compressed weights in their own form and no float originals.

An int8 matrix is two tensors, <path>/values and <path>/scale. A matrix with enough exact zeros for it to pay is two
tensors as well, <path>/bitmask (a bit for each element, row by row, first element in the highest bit) and
<path>/nonzeros (the values under the set bits, in that order). The config and what is needed to rebuild the tree
stand in the file's metadata.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.flax
from safetensors import SafetensorError, safe_open

from efflm import trees
from efflm.config import InputError, ModelConfig, require
from efflm.model import LanguageModel
from efflm.ops.qarray import from_flat, to_flat


def save(path: Path, model: LanguageModel, about: dict[str, Any]) -> int:
    """Write the model, whole or not at all, and return the file's size in bytes. `about`: JSON, how it was made."""
    flat, kinds = to_flat(model.params)
    tensors, sparse = {}, {}
    for name, array in flat.items():
        if array.ndim >= 2 and trees.sparse_nbytes(array) < array.size * array.dtype.itemsize:
            values = np.asarray(array)
            tensors[f"{name}/bitmask"] = jnp.asarray(np.packbits(values != 0))
            tensors[f"{name}/nonzeros"] = jnp.asarray(values[values != 0])
            sparse[name] = list(array.shape)
        else:
            tensors[name] = array
    manifest = {"config": model.config.to_dict(), "kinds": kinds, "sparse": sparse, "about": about}
    partial = path.with_suffix(".partial")
    try:
        safetensors.flax.save_file(tensors, partial, metadata={"efflm": json.dumps(manifest)})
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def load(path: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The model, bit for bit as `save` got it, and its `about`. Raises InputError."""
    require(path.is_file(), f"no model file at {path}")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = (file.metadata() or {}).get("efflm")
            require(metadata is not None, f"{path} was not written by efflm: it has no config in its metadata")
            manifest = json.loads(metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, shape in manifest["sparse"].items():
            kept = np.unpackbits(np.asarray(tensors.pop(f"{name}/bitmask")), count=int(np.prod(shape))).astype(bool)
            nonzeros = np.asarray(tensors.pop(f"{name}/nonzeros"))
            values = np.zeros(kept.shape, nonzeros.dtype)
            values[kept] = nonzeros
            tensors[name] = jnp.asarray(values.reshape(shape))
        model = LanguageModel(ModelConfig.from_dict(manifest["config"]), from_flat(tensors, manifest["kinds"]))
        return model, manifest["about"]
    except InputError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a model ({error}): export it again") from error
