"""Quantized models as Hugging Face directories of compressed-tensors, which transformers and vLLM read."""

from pathlib import Path
from typing import Any

import numpy as np

from efflm import trees
from efflm.config import require
from efflm.formats import huggingface
from efflm.formats.huggingface import ACTIVATIONS, AsFloats, rounds
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.ops.lowrank import LowRank
from efflm.ops.packing import pack, unpack
from efflm.ops.qarray import QArray, in_full
from efflm.text.tokenizer import Tokenizer

FORMAT = "compressed-tensors"
FLOATS = 'give format="huggingface", which writes floats'


def save(folder: Path, model: LanguageModel, tokens: Tokenizer, check: bool = False) -> list[str]:
    """Write a directory, whole or not at all, in which the codes and scales of the matrices inside the layers are those
    of the model. Embeddings and the output layer are floats there: no engine reads others. Codes of 3 bits become the
    same codes of 4, those of 5, 6 and 7 bits codes of 8. check: see huggingface.save. Returns what this costs. Raises
    InputError for what the format has no form for.
    """
    params = trees.map_with_path(_as_written, model.params)
    pairs = [(path, w, dict(trees.flatten(params))[path]) for path, w in trees.flatten(model.params)]
    require(
        any(isinstance(after, QArray) for _, _, after in pairs),
        f"no matrix inside the layers is quantized, so there is nothing for compressed-tensors to hold: {FLOATS}",
    )
    said = []
    outside = [(path, w, after) for path, w, after in pairs if isinstance(after, AsFloats)]
    if outside:
        more = sum(trees.nbytes({"": after}) - trees.nbytes({"": w}) for _, w, after in outside)
        said.append(f"{', '.join(path for path, _, _ in outside)}: written as float32, {more:,} bytes more")
        said += [f"there {ACTIVATIONS}"] * any(rounds(w) for _, w, _ in outside)
    wider = [(w, after) for _, w, after in pairs if isinstance(after, QArray) and after.bits != w.bits]
    for bits, stored in sorted({(w.bits, after.bits) for w, after in wider}):
        more = sum(trees.nbytes(after) - trees.nbytes(w) for w, after in wider if w.bits == bits)
        said.append(f"codes of {bits} bits: written as the same codes of {stored} bits, {more:,} bytes more")
    if any(isinstance(after, QArray) and after.zeros is not None for _, _, after in pairs):
        said.append("zero points are as llm-compressor writes them, which transformers 5.24 does not load")
    return huggingface.write(folder, model.replace(params=params).with_about(model.about), tokens, FORMAT, said, check)


def _as_written(path: str, w: Any) -> Any:
    require(
        not isinstance(w, LowRank),
        f"{path} has a correction of low rank, which compressed-tensors does not: add the step merge, or {FLOATS}",
    )
    if not isinstance(w, QArray):
        return w
    if not in_layer(path):
        return AsFloats(w)
    require(
        w.group == 0 or w.size % w.group == 0,
        f"{path} has {w.size} inputs in groups of {w.group}, but compressed-tensors has no shorter last group: "
        f"choose a group that divides them, or {FLOATS}",
    )
    w = in_full(w)
    if w.bits in (2, 4, 8):
        return w
    codes, bits = unpack(trees.on_host(w.values), w.bits, w.size, w.axis), 4 if w.bits == 3 else 8
    return w.replace(values=pack(np.asarray(codes), bits, w.axis), bits=bits)
