"""Models of efflm's own format in a folder, with the one tokenizer that all of them need."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from efflm.cli.run_directory import write_together
from efflm.config import InputError, require
from efflm.formats import efflm_file
from efflm.model import LanguageModel
from efflm.text import fitted, tokenizer
from efflm.text.tokenizer import FILE, Tokenizer


class Saved(NamedTuple):
    """What a file is to hold: see efflm_file.save."""

    model: LanguageModel
    about: Mapping[str, Any]
    records: Sequence[Any] = ()
    coded: bool = False


def save(folder: Path, models: Mapping[str, Saved], tokens: Tokenizer) -> dict[str, int]:
    """Write each model under its file's name, and their tokenizer: all of it or, on any error, nothing. Each file says
    which tokenizer it needs. Returns the bytes of each file. Raises OSError."""
    sizes = {}

    def write(path: Path, name: str, saved: Saved) -> None:
        about = {**saved.about, "tokenizer": tokens.digest}
        sizes[name] = efflm_file.save(path, saved.model, about, saved.records, saved.coded)

    writers = {name: functools.partial(write, name=name, saved=saved) for name, saved in models.items()}
    write_together(folder, writers | tokens.files())
    return sizes


def once(file: Path, tokens: Tokenizer, mesh: Mesh, make: Callable[[], Saved]) -> LanguageModel:
    """The model in the file, which is made, and written with its tokenizer, where it is not there."""
    if file.exists():
        return fitted.told(efflm_file.load(file, mesh)[0], tokens)
    made = make()
    save(file.parent, {file.name: made}, tokens)
    return made.model


def require_free(folder: Path, names: Sequence[str], tokens: Tokenizer, remedy: str) -> None:
    """Raise InputError, with what the caller can do about it, if a model in the folder that is not among the files of
    these names needs the tokenizer that would be replaced."""
    require(not (folder / "config.json").exists(), f"{folder} holds another model (config.json): {remedy}")
    models = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in names)
    models += ["checkpoint"] * (folder / "checkpoint").exists()
    if models and (folder / FILE).exists():
        require(
            tokenizer.load(folder / FILE).same(tokens),
            f"{folder} holds {models[0]}, whose tokenizer is another one: {remedy}",
        )


def require_own(tokens: Tokenizer, about: Mapping[str, Any], path: Path) -> None:
    """Raise InputError if the model at `path`, which says this of itself, was saved with another tokenizer."""
    wanted = about.get("tokenizer", tokens.digest)
    if wanted != tokens.digest:
        raise InputError(
            f"{path} was saved with another tokenizer than {tokens.where}, which would misread its tokens (digest "
            f"{wanted!s:.40}, not {tokens.digest}): put back the {FILE} that was saved with it"
        )
