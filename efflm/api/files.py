"""Models from files and to files."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from efflm.cli import arguments
from efflm.cli.arguments import SOURCE
from efflm.compress import grammar
from efflm.config import AskedPrecision, InputError, at_home, require
from efflm.formats import compressed_tensors, gguf_export, huggingface, saved, sources
from efflm.model import LanguageModel
from efflm.text.tokenizer import Tokenizer


def load(source: SOURCE, *, dtype: str | None = None, precision: str = "") -> tuple[LanguageModel, Tokenizer]:
    """The model at `source` and its tokenizer, on one device.

    source: a name such as "smollm2", a Hugging Face directory, a model of its hub as "hf:org/name" or
    "hf:org/name@revision", a .gguf file, a run of efflm's, or what `save` wrote. dtype: of the weights; None: as
    stored. precision: of the matmuls, "float32" or "bfloat16"; "auto": the faster one here, which is measured for a
    second and told on stderr; "": what the model was saved for.
    """
    require(arguments.is_path(source), f"source is {arguments.shown(source)}, but must be {sources.KINDS}")
    require(
        precision in get_args(AskedPrecision),
        f"precision is {precision!r}: choose float32, bfloat16 or auto, or leave it out",
    )
    return sources.load_model(at_home(os.fspath(source)), dtype=dtype, precision=precision)


def save(
    path: SOURCE,
    model: LanguageModel | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    format: str = "efflm",
    kind: str = "",
    check: bool = True,
) -> Path:
    """Write the model and its tokenizer, all or nothing; `load` and every --model read them back. Returns the path of
    the weights.

    format: "efflm": weights in their own form, compressed or not, and what is known of the model. path: a folder, in
    which model.safetensors is written, or a name that ends in .safetensors, with tokenizer.json beside it; an earlier
    save there is replaced, other things are not. "coded": the same file, entropy-coded, which is smaller on disk and
    the same model when it is loaded; one that was rounded for such files always is. path of all others: a folder that
    holds nothing yet. "huggingface": floats, which transformers and other programs load unchanged; float32 where the
    model is compressed.
    "compressed-tensors": quantized matrices as transformers and vLLM read them. "gguf": a file for llama.cpp, with the
    codes of compressed weights as they are; path: a name that ends in .gguf, not there yet. What such a format cannot
    hold as it is is told on stderr, with its bytes.
    kind: with "gguf", what all matrices are rounded to, such as F16 or Q8_0; "": what holds their numbers, or an error
    where nothing does. check: compare logits with those of llama.cpp or transformers, where it is installed.
    """
    require(
        arguments.is_path(path),
        f"path is {arguments.shown(path)}, but must be where to write: save(path, model, tokenizer)",
    )
    require(format in FORMATS, f"format is {arguments.shown(format)}: choose {' or '.join(FORMATS)}")
    arguments.require_model(model)
    arguments.require_tokenizer(tokenizer, model, "saving needs")
    require(not kind or format == "gguf", f"kind is {arguments.shown(kind)}, but that is for the format gguf")
    file = Path(at_home(os.fspath(path)))
    try:
        return FORMATS[format](file, model, tokenizer, kind=kind, check=check)
    except OSError as error:
        raise InputError(
            f"cannot write {file} ({error.strerror or error}): give another path, or free some space"
        ) from None


def _save_own(file: Path, model: LanguageModel, tokenizer: Tokenizer, coded: bool = False, **_: Any) -> Path:
    if file.suffix != ".safetensors":
        require(not (file / "checkpoint").exists(), f"{file} holds another model (checkpoint): give another path")
        file = file / sources.OWN
    saved.require_free(file.parent, [file.name], tokenizer, "give another path")
    saved.save(file.parent, {file.name: saved.Saved(model, model.about, coded=coded)}, tokenizer)
    return file


def _save_huggingface(folder: Path, model: LanguageModel, tokenizer: Tokenizer, check: bool, **_: Any) -> Path:
    return _told(huggingface.save(folder, model, tokenizer, check), folder / huggingface.WEIGHTS, folder)


def _save_compressed_tensors(folder: Path, model: LanguageModel, tokenizer: Tokenizer, check: bool, **_: Any) -> Path:
    return _told(compressed_tensors.save(folder, model, tokenizer, check), folder / huggingface.WEIGHTS, folder)


def _save_gguf(file: Path, model: LanguageModel, tokenizer: Tokenizer, kind: str, check: bool) -> Path:
    made = grammar.of_lineage(model.about.get("lineage", ()))
    return _told(gguf_export.save(file, model, tokenizer, kind=kind, check=check, made=made), file, file)


def _told(lines: Sequence[str], file: Path, name: Path) -> Path:
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    return file


# Each writes a model and its tokenizer to a path, as `kind` and `check` say, and returns the path of the weights.
FORMATS = {
    "efflm": _save_own,
    "coded": functools.partial(_save_own, coded=True),
    "huggingface": _save_huggingface,
    compressed_tensors.FORMAT: _save_compressed_tensors,
    "gguf": _save_gguf,
}
