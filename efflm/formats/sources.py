"""Load a model from any source: one name for directories, files, the hub and what efflm wrote itself."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from efflm import trees
from efflm.config import require
from efflm.config.model import MOST
from efflm.formats import checkpoint, efflm_file, gguf_model, hub, huggingface, saved, wheels
from efflm.formats.tensors import require_dtype
from efflm.model import LanguageModel, autotune, in_dtype
from efflm.parallel import meshes, processes
from efflm.text import fitted, tokenizer
from efflm.text.tokenizer import Tokenizer

KINDS = (
    f"a name ({', '.join(wheels.WHEELS)}), a Hugging Face directory, hf:org/name or hf:org/name@revision of its hub, a "
    ".gguf file, the directory of a training run, or efflm's .safetensors file or its folder"
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """about: how efflm made the model; of models from elsewhere at most "dequantized", the type that most weights were
    quantized to (see gguf_model.quantization); model.about also says which token each id is (token_ids). nbytes: of the
    files that the weights were read from, and no others."""

    model: LanguageModel
    tokenizer: Tokenizer
    about: dict[str, Any]
    nbytes: int


def load_model(
    source: str | Path, *, dtype: str | None = None, precision: str = "", mesh: Mesh | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """The model at `source` and its tokenizer, in `dtype` (default: as stored) and laid on the mesh. See `load`."""
    loaded = load(source, dtype=dtype, precision=precision, mesh=mesh)
    return loaded.model, loaded.tokenizer


def load(source: str | Path, *, dtype: str | None = None, precision: str = "", mesh: Mesh | None = None) -> Loaded:
    """What is at `source`: one of KINDS. The hub is asked for what begins with hf: and for nothing else, since org/name
    could be a path: ./hf:name is a path too. Raises InputError.

    dtype: of the weights; None: as they are stored. precision: of the matmuls, float32 or bfloat16; "auto": the faster
    one here, which is measured (see autotune); "": what the model was saved for. Weights that are not finite are
    warned of, and what "auto" picked is told, on stderr.
    """
    loaded = _load(source, dtype, mesh)
    model, vocabulary = loaded.model, loaded.model.config.vocabulary
    tokens = fitted.to_vocabulary(loaded.tokenizer, vocabulary, source)
    config = dataclasses.replace(model.config, unused=fitted.unused(tokens, vocabulary))
    if precision and precision != autotune.AUTO:
        config = dataclasses.replace(config, precision=precision)
    model = model.replace(config=config).with_about(loaded.about | {"token_ids": tokens.ids_digest})
    problem = trees.not_finite(model.params)
    if problem and processes.is_first():
        print(f"warning: {source}: {problem}, so what it writes is of no use: fetch or train it again", file=sys.stderr)
    if precision == autotune.AUTO:
        model = autotune.inference(model, lambda line: print(line, file=sys.stderr))
    return dataclasses.replace(loaded, model=model, tokenizer=tokens)


def _load(source: str | Path, dtype: str | None, mesh: Mesh | None) -> Loaded:
    require_dtype(dtype)
    path, mesh, name = Path(source), mesh or meshes.make_mesh(), str(source)
    if name.startswith(hub.PREFIX):
        return _directory(hub.fetch(name), dtype, mesh)
    if path.is_dir():
        return _directory(path, dtype, mesh)
    if path.exists():
        return _file(path, dtype, mesh)
    hint = f"; the model of that name on the Hugging Face hub is {hub.PREFIX}{name}" if hub.could_be(name) else ""
    require(name in wheels.WHEELS, f"no model at {name}: give {KINDS}{hint}")
    return _file(wheels.fetch(wheels.WHEELS[name]), dtype, mesh)


OWN = "model.safetensors"  # efflm's own file in a folder of its own: Hugging Face's has a config.json beside it


def _directory(path: Path, dtype: str | None, mesh: Mesh) -> Loaded:
    if (path / "config.json").exists():
        model, tokens = huggingface.load(path, dtype=dtype, mesh=mesh)
        return Loaded(model, tokens, {}, _size(huggingface.files(path)))
    if not (path / "checkpoint").exists() and (path / OWN).exists():
        return _file(path / OWN, dtype, mesh)
    run, folder = (path, path / "checkpoint") if (path / "checkpoint").is_dir() else (path.parent, path)
    require(
        folder != path or checkpoint.exists(path),
        f"{path} has neither a config.json, as Hugging Face directories do, nor a checkpoint of efflm's: give {KINDS}",
    )
    step = checkpoint.newest(folder)
    return _own(*checkpoint.read(step, mesh), run / "tokenizer.json", folder, dtype, _size(step.rglob("*")))


def _file(path: Path, dtype: str | None, mesh: Mesh) -> Loaded:
    require(
        path.suffix not in huggingface.PICKLES,
        f"{path} is pickled: reading it could run any code that whoever made it put in, so it is never read; have it "
        "converted to safetensors",
    )
    if path.suffix == ".gguf":
        model, tokens = gguf_model.load(path, dtype=dtype, mesh=mesh)
        kind = gguf_model.quantization(path)
        return Loaded(model, tokens, {"dequantized": kind} if kind else {}, path.stat().st_size)
    require(path.suffix == ".safetensors", f"{path} is not a kind of file that is read: give {KINDS}")
    return _own(*efflm_file.load(path, mesh), path.parent / "tokenizer.json", path, dtype, path.stat().st_size)


def _own(
    model: LanguageModel, about: dict[str, Any], tokenizer_file: Path, path: Path, dtype: str | None, nbytes: int
) -> Loaded:
    """What efflm wrote. Raises InputError for another tokenizer than it was saved with, and for what is said of how it
    was made if that is not what efflm writes."""
    tokens = tokenizer.load(tokenizer_file)
    saved.require_own(tokens, about, path)
    for name, kind in {"source": str, "dequantized": str, "train.length": int, "lineage": list}.items():
        value = about.get(name, kind())
        good = type(value) is kind and (kind is not int or 0 <= value <= MOST)
        good = good and (kind is not list or all(isinstance(step, dict) for step in value))
        require(good, f"{path} cannot be read as a model ({name} is {value!r:.60}): export it again")
    return Loaded(in_dtype(model, dtype) if dtype else model, tokens, about, nbytes)


def _size(files: Any) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
