"""Whether a GGUF file that was written is the model: read back here, and run by llama.cpp."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efflm import trees
from efflm.config import InputError, require
from efflm.config.model import ModelConfig
from efflm.formats import gguf_file, gguf_model, gguf_tokenizer, hf_config
from efflm.formats.families import FAMILIES
from efflm.model import LanguageModel, Transformer
from efflm.ops import QArray, dequantize
from efflm.parallel import sharding
from efflm.text.tokenizer import Tokenizer

# How far a number may be from the model's, as a share of the largest of its row and beside that: float16 has 11 bits,
# and below 6e-5 steps of 2^-24.
NEAR, LEAST = 2.0**-9, 2.0**-17
# The root of the mean squared difference of logits, less what shifts all of a position alike, as a share of their
# standard deviation, at most. Measured were 1e-6 to 1e-5 where llama.cpp computes in float32, 2% to 3% where it rounds
# activations; 58% with rows in the wrong order, 10% with the norms of queries and keys exchanged.
SAME, ALIKE = 1e-4, 0.05
TOKENS = 256  # that llama.cpp reads, at most
TEXT = """The quick brown fox, it's said, jumped over 13 lazy dogs in 1998; nobody saw how.
def f(x):
\treturn x ** 2  # naïve: 3.14159
Überraschung! 日本語 и 😀. So they'd gone home, and the night was as quiet as it had been before the storm."""


def read_back(path: Path, model: LanguageModel, config: ModelConfig, tokens: Tokenizer, rounded: list[str]) -> str:
    """How far the file's numbers are from the model's, in words. config: that of the file. rounded: the paths of
    weights that may be anywhere. Raises InputError where something is not as in the model."""
    header = gguf_file.read_header(path)
    description, names = gguf_model.config_of(header), gguf_model.names_of(header)
    family = FAMILIES[description["model_type"]]
    made = hf_config.read(family.config, description, len(config.blocks))
    made = dataclasses.replace(made, blocks=gguf_model.blocks_of(header, description) or made.blocks)
    require(made == config, f"the file says of the model {made}, not {config}")
    begin = begins(model, tokens)
    _require_same_text(gguf_tokenizer.from_metadata(header.metadata, path), tokens, begin, config.vocabulary)
    most = 0.0
    for weight_path, weight in trees.flatten(model.params):
        place = family.place(weight_path)
        found = gguf_model.read(header, names, description, place.tensor(weight_path))
        wanted = trees.on_host(dequantize(weight)).astype(np.float32)
        wanted = wanted.T if place.transpose else wanted
        largest = np.abs(wanted).max(axis=-1, keepdims=True)
        differ = np.abs(found - wanted)
        allowed = NEAR * largest + LEAST if isinstance(weight, QArray) else 0
        good = weight_path in rounded or bool((differ <= allowed).all())
        require(good, f"{weight_path} is not in the file as in the model: it differs by {differ.max():.3g}")
        most = max(most, float((differ / np.where(largest > 0, largest, 1)).max()))
    if most == 0:
        return "every number of the file is that of the model"
    why = "rounded again" if rounded else "scales are float16 in GGUF files, codes as they were"
    return f"numbers of the file differ from the model's by at most {most:.2%} of the largest of their row ({why})"


def begins(model: LanguageModel, tokens: Tokenizer) -> tuple[int, ...]:
    """The ids that the model expects before a text. One that was trained here has read a separator there."""
    return (tokens.separator,) if model.about.get("source") else tokens.before


def _require_same_text(found: Tokenizer, tokens: Tokenizer, begin: tuple[int, ...], size: int) -> None:
    within = lambda each: {token: index for token, index in each.core.get_vocab().items() if index < size}
    told = lambda each: (within(each), each.encode(TEXT), each.eos, each.after, each.template)
    same = told(found) == told(tokens) and found.before == begin
    require(same, f"{tokens.where}: what the file holds of it gives a text other tokens")


def in_llama_cpp(
    path: Path, model: LanguageModel, config: ModelConfig, tokens: Tokenizer, begin: tuple[int, ...]
) -> str:
    """How far the logits that llama.cpp computes of TEXT are from the model's, in words. config: that of the file.

    Raises InputError where it reads other tokens, or the logits are further off than its own arithmetic takes them:
    with floats of 32 bits they are nearly the same; of what it multiplies by others it rounds the activations too, most
    of them to 8 bits.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama.cpp did not try the file: there is no llama_cpp (pip install llama-cpp-python)"
    wanted = [*begin, *tokens.encode(TEXT)][: min(TOKENS, config.max_length)]
    ids, found_TV = run_llama_cpp(path, len(wanted))
    at = next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), 0)
    require(
        ids == wanted,
        f"llama.cpp reads the tokens {ids[at : at + 3]} where {tokens.where} gives {wanted[at : at + 3]}",
    )
    logits_TV = np.asarray(logits(model, np.array([ids], np.int32)))[0]
    differ = found_TV - logits_TV
    differ -= differ.mean(axis=-1, keepdims=True)
    share, same = differ.std() / logits_TV.std(), (found_TV.argmax(-1) == logits_TV.argmax(-1)).mean()
    kinds = {tensor.kind for tensor in gguf_file.read_header(path).tensors.values()}
    allowed = SAME if kinds == {"F32"} else ALIKE
    require(
        bool(share <= allowed),
        f"llama.cpp's logits differ from the model's by {share:.2%} of their standard deviation, more than the "
        f"{allowed:.2%} that its own rounding explains; with check set to false they are not compared",
    )
    return (
        f"llama.cpp's logits after {len(ids)} tokens differ by {share:.2g} of their standard deviation, at most by "
        f"{np.abs(differ).max():.2g}; the likeliest token is the same for {same:.0%}"
    )


def run_llama_cpp(path: Path, length: int) -> tuple[list[int], np.ndarray]:
    """The ids of TEXT, at most `length`, and the logits [T, V] after each, float32, with keys and values of float32.

    Raises InputError if it does not load the file."""
    import llama_cpp

    how = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "logits_all": True, "verbose": False}
    try:
        engine = llama_cpp.Llama(str(path), **how, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    except ValueError as error:
        raise InputError(f"llama.cpp does not load the file that was written ({error}), and says why above") from None
    try:
        ids = engine.tokenize(TEXT.encode(), add_bos=True, special=True)[:length]
        engine.eval(ids)
        return ids, np.array(engine.scores[: len(ids)], np.float32)
    finally:
        engine.close()


def logits(model: LanguageModel, tokens_BT: np.ndarray) -> jax.Array:
    """Of the model [B, T, V], computed in float32, with activations that are not rounded."""
    config = dataclasses.replace(model.config, precision="float32")
    as_floats = lambda w: w.replace(activations="float", activation_scale=None) if isinstance(w, QArray) else w
    params = jax.tree.map(as_floats, model.params, is_leaf=trees.is_leaf)
    with sharding.mesh_of(params):
        return jax.jit(Transformer(config).apply)({"params": params}, jnp.asarray(tokens_BT))[0]
