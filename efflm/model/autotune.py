"""Which precision is the fastest for a model on this machine: measured in about a second, kept, and told in a line.

It depends on the processor and on the sizes of the matrices: with some vector instructions bfloat16 is nearly twice as
fast as float32, with others slower. So "auto" runs the matmuls of the model itself in both, in turn. bfloat16 is
picked where it is at least MARGIN times as fast, since float32 is the more exact. Policies that change results more
(float16, weights in bfloat16) are never picked.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from efflm import ops, trees, user_cache
from efflm.cli import progress, run_directory
from efflm.config import InputError, require
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import LanguageModel, params
from efflm.ops.dot import dot, dot_transposed
from efflm.ops.kernels.cpu import build
from efflm.parallel import processes, sharding

AUTO, CANDIDATES = "auto", ("float32", "bfloat16")
MARGIN = 1.05
PROMPT, NEW = 512, 64  # tokens that are read at once, and that are decoded one by one: how the two are weighed
CHUNK = 4  # tokens decoded in one program: a loop, as in infer.generate
FLOPS = {"cpu": 2e9}  # of one run of a part, by platform: a twentieth of a second on a slow processor
MORE_FLOPS = 2e12  # elsewhere: some milliseconds of an accelerator
LEAST_ROWS = 64
MOST_COLUMNS = 1 << 12  # of a matrix in training; a larger one takes proportionally longer
DECODED_BYTES, DECODED_LAYERS = 1 << 26, 4  # of weights that a decoded token is measured with, to exceed caches
SECONDS, LEAST_TURNS, MOST_TURNS = 0.5, 3, 15


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the work. run: does it in a precision; the whole is `times` as much. Parts of one name are added."""

    name: str
    times: float
    run: Callable[[str], Any]


Seconds = dict[str, dict[str, float]]  # {name of a part: {precision: of the whole part}}
Measure = Callable[[list[Part]], Seconds]


def measured(parts: list[Part]) -> Seconds:
    """The medians of turns: every part in float32, then in bfloat16, and again."""
    pairs = [(part, precision) for part in parts for precision in CANDIDATES]
    took: list[list[float]] = [[] for _ in pairs]
    with progress.bar("measuring which precision is the fastest", live=False):
        for part, precision in pairs:
            jax.block_until_ready(part.run(precision))  # compiles
        start = time.perf_counter()
        while len(took[0]) < LEAST_TURNS or (len(took[0]) < MOST_TURNS and time.perf_counter() - start < SECONDS):
            for times, (part, precision) in zip(took, pairs, strict=True):
                began = time.perf_counter()
                jax.block_until_ready(part.run(precision))
                times.append(time.perf_counter() - began)
    out: Seconds = {part.name: dict.fromkeys(CANDIDATES, 0.0) for part in parts}
    for times, (part, precision) in zip(took, pairs, strict=True):
        out[part.name][precision] += part.times * statistics.median(times)
    return out


# --- what is asked ---------------------------------------------------------------------------------------------------


def training(
    config: ModelConfig, train: TrainConfig, say: Callable[[str], Any] = print, measure: Measure | None = None,
    flag: str = "train.policy",
) -> TrainConfig:  # fmt: skip
    """`train`, with its policy chosen if that is "auto". say: is given the line that tells what was picked and why;
    flag: what that line calls it.

    Measured are forward and backward matmuls: with the two matrices of the feed-forward part, which stand for all in
    the layers, and with the output layer; each with as many rows as take a moment. Of several processes the first one
    measures for all.
    """
    if train.policy != AUTO:
        return train
    width, rows = config.width, train.batch * train.length
    inner, columns = (min(size, MOST_COLUMNS) for size in (config.blocks[_usual(config)].mlp_dim, config.vocabulary))
    in_layers = sum(math.prod(param.shape) for param in params.table(config).values() if param.in_layer)

    def parts() -> list[Part]:
        layer, output = [_random((width, inner)), _random((inner, width))], [_random((width, columns))]
        return [
            _part("layers", in_layers / (2 * width * inner), _gradients, layer, rows, flops=6),
            _part("output layer", config.vocabulary / columns, _gradients, output, rows, flops=6),
        ]

    about = {"rows": rows, "in_layers": in_layers, "matrices": [width, inner, config.vocabulary]}
    name = _choice(flag, "a training step", about, parts, say, measure or measured)
    return dataclasses.replace(train, policy=name)


def trained(model: LanguageModel, batch: int, length: int, say: Callable[[str], Any] = print) -> LanguageModel:
    """The model with the precision of its matmuls chosen: the faster one in training with such batches."""
    picked = training(model.config, TrainConfig(batch=batch, length=length, policy=AUTO), say, flag="precision").policy
    return model.replace(config=dataclasses.replace(model.config, precision=picked)).with_about(model.about)


def inference(model: LanguageModel, say: Callable[[str], Any] = print, measure: Measure | None = None) -> LanguageModel:
    """The model with the precision of its matmuls chosen: the faster one for a prompt of PROMPT tokens and NEW more.

    Measured are matmuls with its own weights, laid out by ops.prepare: those of a feed-forward part, which stand for
    all in the layers, with the rows of a prompt; those of several, and the output layer, with one row. Raises
    InputError if its weights are spread over processes.
    """
    config, flat = model.config, dict(trees.flatten(model.params))
    require(
        all(x.is_fully_addressable for x in jax.tree.leaves(model.params)),
        "precision auto measures a model that one process holds, and this one is spread over several: give float32 or "
        "bfloat16",
    )
    usual, output = _usual(config), flat["embedding" if config.tied else "unembedding"]
    table = {path: param for path, param in params.table(config).items() if param.in_layer}
    layer = lambda i: [flat[path] for path in table if path.startswith(f"block_{i}/feedforward/")]
    same = [i for i, block in enumerate(config.blocks) if block == config.blocks[usual]]
    few = max(1, min(DECODED_LAYERS, len(same), DECODED_BYTES // trees.nbytes(layer(usual))))
    layers = sum(math.prod(param.shape) for param in table.values()) / sum(math.prod(w.shape) for w in layer(usual))

    def parts() -> list[Part]:
        place = lambda weights: ops.prepare(sharding.on_one_device(weights), jax.default_backend())
        decoded, last = place([weight for i in same[:few] for weight in layer(i)]), place([output])
        return [
            _part("prompt", layers, _products, decoded[: len(decoded) // few], PROMPT, flops=2),
            _part("new tokens", layers / few * NEW / CHUNK, _tokens, decoded, 1),
            _part("new tokens", NEW / CHUNK, _tokens, last, 1, transposed=config.tied),
        ]

    about = {"layers": layers, "same": few, "matrices": [*map(_format, layer(usual))], "output": _format(output)}
    what = f"a prompt of {PROMPT} tokens and {NEW} new ones"
    name = _choice("precision", what, about, parts, say, measure or measured)
    return model.replace(config=dataclasses.replace(config, precision=name)).with_about(model.about)


def _choice(
    flag: str, what: str, about: dict[str, Any], parts: Callable[[], list[Part]], say: Callable, measure: Measure
) -> str:
    """The faster of CANDIDATES, the same on every process. about: what it depends on beside the machine."""
    picked = 0
    if processes.is_first():
        machine = run_directory.machine()
        on_cpu = jax.default_backend() == "cpu"
        facts = {name: machine[name] for name in ("cpu", "cores", "device", "jax")} | {"jaxlib": jaxlib.__version__}
        facts |= {"kernels": build.form() if on_cpu else "", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
        told = run_directory.to_json([flag, facts, about, PROMPT, NEW], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        seconds, when = _kept().get(key), "measured earlier on this machine"
        if not _sound(seconds):
            seconds, when = measure(parts()), "measured now"
            _keep(key, seconds)
        ratio = _ratio({name: sum(part[name] for part in seconds.values()) for name in CANDIDATES})
        picked = int(ratio >= MARGIN)
        each = ", ".join(f"{name} {_ratio(part):.2f}x" for name, part in seconds.items())
        kept = f"; float32 is kept below {MARGIN}x, being the more exact" if 1 <= ratio < MARGIN else ""
        say(
            f"{flag} auto: {CANDIDATES[picked]}; the matmuls of {what} are {ratio:.2f}x as fast in bfloat16 as in "
            f"float32 ({each}; {machine['cpu' if on_cpu else 'device']}, {when}){kept}"
        )
    return CANDIDATES[processes.agree(picked)]


def _ratio(seconds: dict[str, float]) -> float:
    return seconds["float32"] / seconds["bfloat16"]


# --- what is run -----------------------------------------------------------------------------------------------------


def _usual(config: ModelConfig) -> int:
    """The first of the layers that have the most common shape."""
    return config.blocks.index(statistics.mode(config.blocks))


def _format(weight: Any) -> str:
    """Shapes, dtypes and all else that decides which kernel runs."""
    return f"{jax.tree.structure(weight)} {[f'{x.dtype}{x.shape}' for x in jax.tree.leaves(weight)]}"


def _random(shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Numbers as large as weights are: a processor may be faster with zeros."""
    return jnp.asarray(np.resize(0.02 * np.random.default_rng(0).standard_normal(1 << 16, np.float32), shape), dtype)


def _part(
    name: str, times: float, run: Callable, weights: list, rows: int, *, flops: int = 0, transposed: bool = False
) -> Part:
    """`run` with so many rows. flops: for each row and weight; so that a run is short, it may get fewer rows."""
    taken = rows
    if flops:
        most = FLOPS.get(jax.default_backend(), MORE_FLOPS) / (flops * sum(math.prod(w.shape) for w in weights))
        taken = min(rows, max(LEAST_ROWS, int(most)))
    sizes = {w.shape[1 if transposed else 0] for w in weights}
    of = {precision: {size: 50 * _random((taken, size), precision) for size in sizes} for precision in CANDIDATES}
    return Part(name, times * rows / taken, lambda precision: run(of[precision], weights, transposed))


def _multiplied(inputs: dict[int, jax.Array], weights: list, transposed: bool) -> list[jax.Array]:
    """The rows [M, K] times each weight [K, N], or [N, K] if it is the table of a tied output layer."""
    return [dot_transposed(inputs[w.shape[1]], w) if transposed else dot(inputs[w.shape[0]], w) for w in weights]


_products = jax.jit(_multiplied, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def _gradients(inputs, weights, transposed):
    out, pull = jax.vjp(lambda *operands: _multiplied(*operands, transposed), inputs, weights)
    return pull(out)


@functools.partial(jax.jit, static_argnums=2)
def _tokens(inputs, weights, transposed):
    """A loop, as in decoding: what does not change in it, such as a weight in another dtype, may be made once."""

    def one(i, _):
        return _multiplied(jax.tree.map(lambda x: x + i.astype(x.dtype), inputs), weights, transposed)

    shapes = jax.eval_shape(lambda: one(jnp.int32(0), None))
    return lax.fori_loop(0, CHUNK, one, [jnp.zeros(x.shape, x.dtype) for x in shapes])


# --- what is kept ----------------------------------------------------------------------------------------------------


def _file() -> Path:
    return user_cache.folder() / "autotune.json"


def _kept() -> dict[str, Any]:
    """What was measured before, by key; nothing where the file is missing or damaged."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):  # InputError: there is no cache, or none to be trusted
        return {}
    return found if isinstance(found, dict) else {}


def _sound(seconds: Any) -> bool:
    try:
        values = [part[name] for part in seconds.values() for name in CANDIDATES]
        return bool(values) and all(0 < value < math.inf for value in values)
    except (AttributeError, KeyError, TypeError):
        return False


def _keep(key: str, seconds: Seconds) -> None:
    """Write it down, if that is possible: whole or not at all, beside what other processes write."""
    with contextlib.suppress(OSError, InputError):
        run_directory.write_json(_file(), _kept() | {key: seconds})
