"""Hugging Face directories: config.json, safetensors in one file or many, tokenizer.json. In, and back out.

A directory is a stranger's: nothing is unpickled, no file outside of it is opened, and sizes are checked before
anything is allocated.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from efflm import trees
from efflm.cli.run_directory import whole, write_json
from efflm.config import InputError, require
from efflm.formats import card, packed_config, tensors, transformers_check
from efflm.formats.tensors import Tensors
from efflm.formats.translate import describe, main_dtype, precision_of, read_weights, schemes, to_model, to_tensors
from efflm.model import LanguageModel
from efflm.model_files import inside, read_object
from efflm.ops.lowrank import LowRank
from efflm.ops.qarray import QArray, dequantize, in_dtype
from efflm.parallel import meshes
from efflm.text import tokenizer
from efflm.text.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load(folder: Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> tuple[LanguageModel, Tokenizer]:
    """The model and its tokenizer, see `translate.to_model`. Raises InputError."""
    require(
        (folder / "tokenizer.json").exists(),
        f"{folder} has no tokenizer.json: fetch it again, or where the model brings another kind of tokenizer, write "
        "one with transformers (AutoTokenizer.from_pretrained, then save_pretrained)",
    )
    tokens = tokenizer.load(folder)
    return load_weights(folder, dtype=dtype, mesh=mesh), tokens


def load_weights(folder: Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> LanguageModel:
    """The model without its tokenizer, see `translate.to_model`. Raises InputError."""
    try:
        return to_model(read_object(folder, "config.json"), _tensors(folder), dtype=dtype, mesh=mesh)
    except InputError as error:
        named = str(folder) in str(error)
        raise InputError(str(error) if named else f"{folder}: {error}") from None


@dataclasses.dataclass(frozen=True)
class AsFloats:
    """A weight as the float32 array that it stands for, which is made when numpy asks for it."""

    weight: Any
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return trees.on_host(dequantize(in_dtype(self.weight, "float32")))


ACTIVATIONS = "the model rounds what its int8 matmuls read, but matrices of floats multiply it as it is"


def rounds(weight: Any) -> bool:
    """Whether what the weight multiplies is rounded first."""
    return getattr(getattr(weight, "base", weight), "activations", "float") != "float"


def save(folder: Path, model: LanguageModel, tokens: Tokenizer, check: bool = False) -> list[str]:
    """Write a directory of floats that transformers loads, whole or not at all; one tensor is held in memory at a time.
    Of a model with compressed weights all weights are float32, those that its own are said to stand for exactly.

    For the qwen2 family, transformers 5 reads the vocabulary but splits text as Qwen does, with any tokenizer.

    check: transformers computes with it, where it is installed. Returns what is to be said of it. Raises InputError if
    the folder holds something already, no family has such a model, or what was written is not the model.
    """
    compressed = [path for path, leaf in trees.flatten(model.params) if isinstance(leaf, QArray | LowRank)]
    said = [f"{len(compressed)} compressed weights are written as float32"] if compressed else []
    said += [ACTIVATIONS] * any(map(rounds, (leaf for _, leaf in trees.flatten(model.params))))
    params = trees.map_with_path(lambda _, leaf: AsFloats(leaf), model.params) if compressed else model.params
    return write(folder, model.replace(params=params).with_about(model.about), tokens, "huggingface", said, check)


def write(
    folder: Path, model: LanguageModel, tokens: Tokenizer, format: str, said: list[str], check: bool
) -> list[str]:
    """Write a model of floats and of QArrays as compressed-tensors has them, and read it back. Returns what is said and
    what else there is to say. See `save`."""
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} exists already: give a folder that does not, or remove it",
    )
    family, description = describe(model.config)
    dtype = main_dtype(model.params)
    described: dict[str, Any] = {"torch_dtype": dtype}
    if model.config.precision != precision_of(dtype):
        described["efflm_precision"] = model.config.precision
    found = schemes(model, family)
    if any(found.values()):
        described["quantization_config"] = packed_config.write(found)
    if model.masks:
        said = [*said, "pruned weights are zeros in dense matrices: no engine multiplies these faster"]
    ends = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": None}
    with whole(folder) as partial:
        partial.mkdir()
        write_json(partial / "config.json", description | ends | described)
        tokens.save(partial / "tokenizer.json")
        write_json(partial / "generation_config.json", ends | {"eos_token_id": tokens.ends or None})
        tensors.write_safetensors(partial / WEIGHTS, to_tensors(model, family))
        _require_as_written(partial, model)
        if check:
            said = [*said, transformers_check.in_transformers(partial, load_weights(partial), tokens)]
        (partial / card.FILE).write_text(card.text(model, folder.name, format, said), encoding="utf-8")
    return said


def _require_as_written(folder: Path, model: LanguageModel) -> None:
    """Raise InputError unless each weight is read back as it is in the model, and multiplied as there."""
    wanted = dict(trees.flatten(model.params))
    _, found = read_weights(read_object(folder, "config.json"), _tensors(folder), None, meshes.make_mesh())
    for path, leaf in found:
        one, other = (np.asarray(AsFloats(w) if isinstance(w, QArray) else w) for w in (leaf, wanted[path]))
        rounding = [(rounds(w), getattr(w, "activation_scale", None)) for w in (leaf, wanted[path])]
        same = np.array_equal(one, other, equal_nan=True) and rounding[0] == rounding[1]
        require(same, f"{path} is not read back as it was written, so nothing is left of it: try another disk")


# --- reading what may be damaged -------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """The files of weights that `load` reads, whatever else lies there. Raises InputError."""
    if (folder / WEIGHTS).exists():
        return [inside(folder, WEIGHTS)]
    return [inside(folder, file) for file in sorted(set(_weight_map(folder).values()))]


def _tensors(folder: Path) -> Tensors:
    """All tensors of the folder, however many files they are in."""
    require(
        not (folder / "adapter_config.json").exists(),
        "it has an adapter_config.json: adapters are not added to a model; have them merged into its weights (peft's "
        "merge_and_unload), or remove the file",
    )
    if (folder / WEIGHTS).exists():
        return tensors.from_safetensors(inside(folder, WEIGHTS))
    if (folder / INDEX).exists():
        return _sharded(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    require(
        not pickles,
        f"it has {', '.join(pickles[:3])} but no {WEIGHTS}: pickled weights can run any code when they are read, so "
        "they never are; have them converted to safetensors",
    )
    raise InputError(f"it has neither {WEIGHTS} nor {INDEX}: fetch the model again")


def _weight_map(folder: Path) -> dict[str, str]:
    """{tensor: the file that holds it}, as the index says."""
    where = read_object(folder, INDEX).get("weight_map")
    require(
        isinstance(where, dict) and all(isinstance(file, str) for file in where.values()) and len(where) > 0,
        f"{INDEX} has no weight_map from tensors to files",
    )
    return where


def _sharded(folder: Path) -> Tensors:
    where, shapes = _weight_map(folder), {}
    parts = {path.name: tensors.from_safetensors(path) for path in files(folder)}
    for file, part in parts.items():
        for name, shape in part.shapes.items():
            require(where.setdefault(name, file) == file, f"{name:.80} is in {file}, but {INDEX} says {where[name]}")
            shapes[name] = shape
    missing = [name for name in where if name not in shapes]
    require(not missing, f"{(missing or [''])[0]:.80} is in none of the files, against what {INDEX} says")
    return Tensors(shapes, lambda name: parts[where[name]].read(name))
