"""A model as a GGUF file, which llama.cpp runs: codes as they are, only their scales become float16.

Written are the architectures llama (Llama, Mistral), qwen2 and qwen3, and deci, which is llama with layers of different
sizes. What no type of GGUF holds (see gguf_blocks.kind_of) is refused, unless a type is asked for to round it to.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from efflm import trees
from efflm.cli import run_directory
from efflm.config import require
from efflm.config.model import LinearScaling, ModelConfig, RopeScaling
from efflm.formats import card, gguf_blocks, gguf_check, gguf_file, gguf_model, gguf_vocabulary
from efflm.formats.families import FAMILIES
from efflm.formats.gguf_file import New
from efflm.formats.translate import describe
from efflm.model import LanguageModel
from efflm.ops import QArray
from efflm.text.tokenizer import Tokenizer

# What general.file_type calls a file by the type of most of its weights.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
FILE_TYPES |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "BF16": 32}
WRITTEN = ("llama", "qwen2", "qwen3")  # mistral, within its window, is llama
REMEDY = "set kind to F16, which writes floats, or to another such as Q8_0, to which matrices are rounded again"


def save(
    path: Path, model: LanguageModel, tokens: Tokenizer, *, kind: str = "", check: bool = True, made: str = ""
) -> list[str]:
    """Write the file, and beside it a model card, both or neither; return what there is to say of it, in lines.

    kind: what every matrix is rounded to, of gguf_blocks.ROUNDED_TO; "": each keeps its numbers. made: how the model
    was made, for the file's description. The file is read back and compared with the model; with `check` llama.cpp
    computes with it too, where it is installed. Raises InputError for what cannot be written, and for a file that is
    not as the model, which is then not left behind. Raises OSError.
    """
    require(path.suffix == ".gguf", f"{path} must be a name that ends in .gguf")
    for each in (path, path.with_name(f"{path.name}.md")):
        require(not each.exists(), f"{each} exists already: give another name, or remove it")
    known = ", ".join(gguf_blocks.ROUNDED_TO)
    require(kind in ("", *gguf_blocks.ROUNDED_TO), f"kind is {kind!r:.60}, but must be one of {known}")
    config = within_window(model.config)
    family, architecture = _family(config)
    tensors, rounded = _tensors(model, config, family, architecture, kind)
    begin = gguf_check.begins(model, tokens)
    metadata = _sizes(config, architecture) | gguf_vocabulary.to_metadata(tokens, config.vocabulary, begin)
    metadata |= {"general.name": path.stem, "general.file_type": _file_type(tensors)}
    notes = _notes(model, config, tokens, rounded, kind)
    metadata |= {"general.description": "; ".join(["written by efflm", *filter(None, [made]), *notes])}
    found: list[str] = []

    def write(partial: Path) -> None:
        gguf_file.write(partial, metadata, tensors)
        found.append(gguf_check.read_back(partial, model, config, tokens, rounded))
        if check:
            written = gguf_model.load(partial)[0] if rounded else model
            found.append(gguf_check.in_llama_cpp(partial, written, config, tokens, begin))
        size, own = partial.stat().st_size, gguf_file.nbytes(tensors)
        found.append(f"{size:,} bytes: {own:,} of tensors, {size - own:,} of tokenizer and metadata")

    def describe_it(partial: Path) -> None:
        partial.write_text(card.text(model, path.stem, "gguf", [*notes, *found]), encoding="utf-8")

    run_directory.write_together(path.parent, {path.name: write, f"{path.name}.md": describe_it})
    return [*notes, *found]


def within_window(config: ModelConfig) -> ModelConfig:
    """The config without windows, which llama.cpp's architectures here have not, and of the length up to which they
    change nothing."""
    windows = [block.window for block in config.blocks if block.window]
    blocks = tuple(dataclasses.replace(block, window=0) for block in config.blocks)
    length = min([config.max_length, *windows])
    return dataclasses.replace(config, blocks=blocks, max_length=length, precision="float32", unused=())


def _family(config: ModelConfig) -> tuple[str, str]:
    """The family whose tensors such a model has, and llama.cpp's architecture. Raises InputError."""
    first = config.blocks[0]
    family, _ = describe(dataclasses.replace(config, blocks=(first,) * len(config.blocks)))
    require(
        family in WRITTEN,
        f"the model is of the family {family}, but GGUF files are written of {', '.join(WRITTEN)}",
    )
    alike = len(set(config.blocks)) == 1
    require(
        alike or family == "llama",
        f"the model is of the family {family} and its layers differ in size, which llama.cpp has for llama only",
    )
    require(
        len({block.head_dim for block in config.blocks}) == 1,
        "the layers have heads of different sizes, which llama.cpp does not know",
    )
    require(
        family != "qwen2" or first.heads * first.head_dim == config.width,
        f"the {first.heads} heads of {first.head_dim} are not the width {config.width}, as llama.cpp has it for qwen2",
    )
    scaling, known = config.rope_scaling, gguf_model.LLAMA3_SCALING.values()
    if isinstance(scaling, RopeScaling):
        same = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_length) == tuple(known)
        good = family == "llama" and same
    else:
        good = scaling is None or isinstance(scaling, LinearScaling)
    require(
        good, f"GGUF files of {family} are not written with {scaling}: no scaling or linear, and Llama 3.1's of llama"
    )
    return family, family if alike else "deci"


def _sizes(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The config as metadata: lists for what differs from layer to layer."""
    first, values = config.blocks[0], {}
    for key, (ours, _) in gguf_model.BY_LAYER.items():
        each = [getattr(block, ours) for block in config.blocks]
        values[key] = each if architecture == "deci" else each[0]
    values |= {
        "vocab_size": config.vocabulary,
        "context_length": config.max_length,
        "embedding_length": config.width,
        "block_count": len(config.blocks),
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "rope.dimension_count": first.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_base,
    }
    if isinstance(config.rope_scaling, LinearScaling):
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    general = {"general.architecture": architecture, "general.quantization_version": 2}
    return general | {f"{architecture}.{key}": value for key, value in values.items()}


def _tensors(
    model: LanguageModel, config: ModelConfig, family: str, architecture: str, kind: str
) -> tuple[list[New], list[str]]:
    """The tensors, and the paths of those whose numbers become others. Raises InputError for one without a type."""
    tensors, rounded, masks = [], [], model.masks or {}
    for path, weight in trees.flatten(model.params):
        place = FAMILIES[family].place(path)
        own = gguf_blocks.kind_of(weight, place.transpose, path in masks)
        chosen = kind if kind and len(weight.shape) > 1 else own
        require(chosen is not None, f"{path} ({_described(weight)}) is of no type that GGUF files have: {REMEDY}")
        shape = tuple(weight.shape)[::-1] if place.transpose else tuple(weight.shape)
        elements, _ = gguf_file.SIZES[chosen]
        require(
            shape[-1] % elements == 0,
            f"{path} has rows of {shape[-1]}, but {chosen} has blocks of {elements}: set kind to F16",
        )
        rounded += [path] if chosen != own else []
        blocks = functools.partial(
            gguf_blocks.blocks_of, path, weight, chosen, transposed=place.transpose, exact=chosen == own
        )
        if architecture in gguf_model.PAIRED and path.endswith(("query/kernel", "key/kernel")):
            block = config.blocks[int(path.split("/")[0].removeprefix("block_"))]
            blocks = functools.partial(_in_pairs, blocks, block.heads if "query" in path else block.kv_heads)
        tensors.append(New(stored_name(place.tensor(path)), shape, chosen, blocks))
    if isinstance(config.rope_scaling, RopeScaling):
        size = config.blocks[0].head_dim
        divisors = gguf_model.llama3_divisors(size, config.rope_base, config.rope_scaling.factor).astype(np.float32)
        tensors.append(New(gguf_model.ROPE_FACTORS, (size // 2,), "F32", lambda: divisors.view(np.uint8)))
    return tensors, rounded


def _in_pairs(blocks: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    return paired(blocks(), heads)


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of gguf_model.halved, of rows or of their blocks."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored_name(name: str) -> str:
    """The inverse of gguf_model.names_of: the name in the file of a tensor of a Hugging Face checkpoint."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
    if layer:
        inner = next(ours for ours, theirs in gguf_model.INNER.items() if theirs == layer[2])
        return f"blk.{layer[1]}.{inner}.{layer[3]}"
    outer, _, kind = name.rpartition(".")
    return f"{next(ours for ours, theirs in gguf_model.OUTER.items() if theirs == outer)}.{kind}"


def _described(weight: Any) -> str:
    if not isinstance(weight, QArray):
        return type(weight).__name__
    points = "" if weight.zeros is None else ", with zero points"
    return f"{weight.format}{points}, {weight.size} inputs"


def _file_type(tensors: list[New]) -> int:
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
    return FILE_TYPES[max(counts, key=counts.__getitem__)]


def _notes(model: LanguageModel, config: ModelConfig, tokens: Tokenizer, rounded: list[str], kind: str) -> list[str]:
    """What the file has not of the model."""
    notes, leaves = [], [weight for _, weight in trees.flatten(model.params)]
    if rounded:
        notes.append(f"{len(rounded)} matrices are written as {kind}, which is not what they were")
    if any(isinstance(weight, QArray) and weight.activations != "float" for weight in leaves):
        notes.append("activations of 8 bits are not in GGUF files: how it rounds them is llama.cpp's own choice")
    if model.masks:
        notes.append("pruned weights are stored as zeros, which llama.cpp multiplies like any others")
    if config.max_length < model.config.max_length:
        notes.append(
            f"the context ends at {config.max_length} tokens, the window of the model's attention: llama.cpp has no "
            "windows in this architecture"
        )
    if "NFC" in str(tokens.core.normalizer):
        notes.append("text that is not in Unicode's form NFC gets other tokens: llama.cpp does not normalize it")
    return notes
