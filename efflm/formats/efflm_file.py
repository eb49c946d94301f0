"""A model as one uncompressed safetensors file, compressed weights in their own form and no float originals.

A quantized matrix is stored in its parts, <path>/values, <path>/scale and so on. A weight with enough zeros for it to
pay is stored as <path>/bitmask and <path>/nonzeros, and a pruned one has its mask either there or as <path>/mask (see
ops.storage). An entropy-coded tensor is uint8 [n], see ops.huffman. The config, the formats of the weights and the
lineage of the model stand in the file's metadata, with the dtypes and shapes of such tensors.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from efflm import ops
from efflm.cli import run_directory
from efflm.config import InputError, require
from efflm.config.model import ModelConfig
from efflm.formats import tensors
from efflm.formats.tensors import Tensors
from efflm.model import LanguageModel, params, placement
from efflm.ops import huffman, lowrank, storage
from efflm.ops.packing import pack, unit
from efflm.parallel import meshes

DTYPES = {str(dtype): dtype for dtype in tensors.NAMES}  # of tensors before they were entropy-coded


def save(
    path: Path, model: LanguageModel, about: Mapping[str, Any], records: Sequence[Any] = (), coded: bool = False
) -> int:
    """Write the model, whole or not at all, and return the file's size in bytes. coded: its tensors entropy-coded, as
    they always are where the format of a weight asks for it.

    about: JSON, how it was made; its "lineage" is continued by `records`, those of the steps that made this model of
    the one that `about` speaks of, and the last step gets the bytes of the tensors as they were first written.
    """
    arrays = [*storage.stored(model.params, model.masks, coded or None)]
    bases, pairs = lowrank.split(model.params)
    lineage = [*map(dict, about.get("lineage", ())), *map(dataclasses.asdict, records)]
    if lineage:
        lineage[-1].setdefault("actual_bytes", sum(each.nbytes for each in arrays))
    manifest = {
        "config": model.config.to_dict(),
        "formats": storage.to_flat(bases)[1],
        "ranks": {name: a.shape[1] for name, (a, _) in pairs.items()},
        "sparse": [each.name.removesuffix("/bitmask") for each in arrays if each.name.endswith("/bitmask")],
        "masks": sorted(model.masks or {}),
        "coded": {each.name: [str(each.coded.dtype), each.coded.shape, each.packed] for each in arrays if each.coded},
        "about": {**about, "lineage": lineage},
    }
    with run_directory.whole(path) as partial:
        named = ((each.name, each.kind, each.give) for each in arrays)
        tensors.write_safetensors(partial, named, {"efflm": run_directory.to_json(manifest)})
    return path.stat().st_size


def load(file: Path, mesh: Mesh | None = None) -> tuple[LanguageModel, dict[str, Any]]:
    """The model, bit for bit as `save` got it, laid on the mesh, and its `about`. Raises InputError.

    What the file says of itself is compared with its tensors before any of them is read, and these are read in turn.
    """
    source, mesh = tensors.from_safetensors(file), mesh or meshes.make_mesh()
    written = source.metadata.get("efflm")
    require(
        written is not None,
        f"{file} was not written by efflm: it has no config in its metadata; give a Hugging Face model as its folder",
    )
    try:
        manifest = json.loads(written)
        config, formats, about = ModelConfig.from_dict(manifest["config"]), manifest["formats"], dict(manifest["about"])
        table, sparse = params.table(config), set(manifest["sparse"])
        ranks, source = dict(manifest.get("ranks", {})), _decoded(source, manifest.get("coded", {}))
        _require_whole(source.shapes, table, formats, sparse, manifest["masks"], ranks)

        def laid(name: str, array: np.ndarray) -> jax.Array:
            where = NamedSharding(mesh, placement.partition_spec(name, array.shape, mesh))
            return tensors.place(array, None, where, name)

        flat = {}
        for path, param in table.items():
            flat |= _weight(source, path, param.shape, formats.get(path), path in sparse, laid)
        masks = {}
        for path in manifest["masks"]:
            bits = source.read(f"{path}/{'bitmask' if path in sparse else 'mask'}")
            shape = table[path].shape
            masks[path] = laid(path, np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape))
        weights = ops.apply_masks(storage.from_flat(flat, formats), masks)
        names = {path: [f"{path}/{part}" for part in storage.PAIR] for path in ranks}
        pairs = {path: tuple(laid(name, source.read(name)) for name in pair) for path, pair in names.items()}
        return LanguageModel(config, lowrank.join(weights, pairs), masks or None), about
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as a model ({str(error)[:300]}): export it again") from error


def _decoded(source: Tensors, coded: Mapping[str, tuple[str, Sequence[int], Sequence[int] | None]]) -> Tensors:
    """The tensors as they were before some were entropy-coded. coded: {name: dtype, shape, packed}, see ops.huffman."""
    kinds = {}
    for name, (dtype, shape, packed) in coded.items():
        good = name in source.shapes and dtype in DTYPES and all(type(size) is int and size >= 0 for size in shape)
        if good and packed is not None:
            axis, bits = packed
            good = axis in (-1, -2)[: len(shape)] and bits in (3, 5, 6, 7) and shape[axis] % unit(bits)[1] == 0
        require(good, f"{name:.80} is said to be {dtype!s:.40} of shape {shape!s:.80}, packed as {packed!s:.40}")
        kinds[name] = DTYPES[dtype], tuple(shape), packed

    def read(name: str) -> np.ndarray:
        try:
            return huffman.decode(source.read(name), *kinds[name]) if name in kinds else source.read(name)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    return Tensors(source.shapes | {name: shape for name, (_, shape, _) in kinds.items()}, read, source.metadata)


def _require_whole(
    there: dict[str, tuple[int, ...]],
    table: Mapping[str, params.Param],
    formats: dict[str, dict[str, Any]],
    sparse: set[str],
    masks: list[str],
    ranks: dict[str, int],
) -> None:
    """Raise InputError unless the file has just the tensors, of the right shapes, that it says it has."""
    unknown = sorted((formats.keys() | sparse | set(masks) | ranks.keys()) - table.keys())
    require(not unknown, f"{(unknown or [''])[0]:.80} is no weight of the config")
    wanted: dict[str, tuple[int, ...] | None] = {}
    for path, param in table.items():
        bitmask = (-(-math.prod(param.shape) // 8),)
        parts: dict[str, Any] = storage.array_shapes(path, param.shape, formats.get(path), there)
        if path in sparse:
            parts.pop(f"{path}/values", None) or parts.pop(path)
            parts |= {f"{path}/bitmask": bitmask, f"{path}/nonzeros": None}
        elif path in masks:
            parts[f"{path}/mask"] = bitmask
        if path in ranks:
            K, N = param.shape
            names = (f"{path}/{part}" for part in storage.PAIR)
            parts |= dict(zip(names, ((K, ranks[path]), (ranks[path], N)), strict=True))
        wanted |= parts
    free = {path for path, shape in wanted.items() if shape is None and len(there.get(path, ())) == 1}
    differ = sorted(path for path in (wanted.keys() | there.keys()) - free if wanted.get(path) != there.get(path))
    first = (differ or [""])[0]
    require(
        not differ,
        f"{first:.80} has shape {there.get(first)}, but the config says {wanted.get(first)}, of {len(differ)} such",
    )


def _weight(
    source: Tensors,
    path: str,
    shape: tuple[int, ...],
    format_: dict[str, Any] | None,
    sparse: bool,
    laid: Callable[[str, np.ndarray], jax.Array],
) -> dict[str, jax.Array]:
    """The arrays of one weight by their paths, each laid on the mesh as it is read. Raises InputError."""
    bits = format_["bits"] if format_ else 0
    values = "values" if format_ else ""
    out = {}
    for part in (values, *(storage.PARTS[1:] if format_ else ())):
        name = f"{path}/{part}".rstrip("/")
        if sparse and part == values:
            numbers = (source.read(f"{path}/bitmask"), source.read(f"{path}/nonzeros"))
            array = storage.expanded(shape, bits or 8, *numbers)
            array = pack(array, bits, format_["axis"]) if 0 < bits < 8 else array
        elif name in source.shapes:
            array = source.read(name)
        else:
            continue
        fits = storage.is_dtype_of(array.dtype, part, format_)
        require(fits, f"{name} is stored as {array.dtype}, which is not what such a weight is made of")
        out[name] = laid(name, array)
    return out
