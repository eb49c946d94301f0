"""Claims 2, 3 and 7: optimizers, precision, and learning rates at other widths."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from efflm import trees
from efflm.config import InputError
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import LanguageModel, init_params, params
from efflm.precision import LossScale
from efflm.train import optimizer
from experiments import optimizers
from experiments.claimed.claim import Claim, Effect
from experiments.claimed.lab import SHORT, Lab, percent

# --- 2 ---------------------------------------------------------------------------------------------------------------

RATES = (0.5, 1.0, 2.0)  # of each optimizer's usual rate (experiments.optimizers)
TUNED = 10_000  # the seed that rates are selected with, which no result is measured with
COMPARED = ("sgd", "adamw", "lion", "muon")


@functools.cache
def best_rate(lab: Lab, name: str) -> float:
    rates = [factor * usual(lab, name).learning_rate for factor in RATES]
    found = optimizers.sweep(lambda rate: run_at(lab, name, rate, TUNED), rates, widen=1)
    return min(found, key=lambda one: one.validation).rate


def usual(lab: Lab, name: str) -> TrainConfig:
    steps = lab.steps(SHORT)
    return optimizers.settings(name, dataclasses.replace(lab.train, steps=steps, warmup=steps // 4, log_every=5))


def run_at(lab: Lab, name: str, rate: float, seed: int) -> optimizers.Trained:
    where = lab.folder / "optimizers"
    return optimizers.trained(usual(lab, name), rate, seed, lab.config, lab.data, lab.score, lab.mesh, where)


def adaptive(lab: Lab, seed: int) -> dict[str, float]:
    runs = {name: run_at(lab, name, best_rate(lab, name), seed) for name in COMPARED}
    loss = {name: lab.loss(one.model) if one.model else np.inf for name, one in runs.items()}
    curves = {name: optimizers.smoothed(one.curve[2]) for name, one in runs.items()}
    reached = {name: np.flatnonzero(curve <= curves["sgd"][-1]) for name, curve in curves.items()}
    sooner = {name: len(curves[name]) / (1 + at[0]) if len(at) else 0.0 for name, at in reached.items()}
    return (
        {f"{name}: loss under SGD's, %": -percent(loss[name], loss["sgd"]) for name in COMPARED[1:]}
        | {f"{name}: times as soon at SGD's last training loss": sooner[name] for name in COMPARED[1:]}
        | {"muon: loss under AdamW's, %": -percent(loss["muon"], loss["adamw"])}
    )


# --- 3 ---------------------------------------------------------------------------------------------------------------


def mixed_precision(lab: Lab, seed: int) -> dict[str, float]:
    unscaled = LossScale.start(1.0, interval=1 << 30)
    runs = {"float32": {}, "bfloat16": {}, "float16": {}, "float16, not scaled": {"loss_scale": unscaled}}
    loss = {}
    for name, how in runs.items():
        try:
            loss[name] = lab.loss(lab.fit(seed, SHORT, policy=name.partition(",")[0], **how))
        except InputError:  # it diverged: then it knows what an untrained model knows
            loss[name] = lab.loss(LanguageModel(lab.config, init_params(lab.config, seed)))
    over = {name: percent(value, loss["float32"]) for name, value in loss.items()}
    return {
        "bfloat16: loss, %": over["bfloat16"],
        "float16 with loss scaling: loss, %": over["float16"],
        "float16 without it: loss over that with it, %": percent(loss["float16, not scaled"], loss["float16"]),
    }


# --- 7 ---------------------------------------------------------------------------------------------------------------

WIDTHS = (64, 256)
GRID = tuple(1e-3 * 2.0**i for i in range(6))
FIXED = 5.0  # of a matrix whose norm is fixed: its step as a share of its norm, over the rate of all other weights


def shape_of(lab: Lab, width: int) -> ModelConfig:
    """Heads of 32 dimensions, so that attention scores do not change their scale."""
    shape = dataclasses.replace(lab.shape, layers=2, width=width, heads=width // 32, kv_heads=width // 32)
    return dataclasses.replace(shape, mlp_dim=width * 11 // 4).config()


def multipliers(config: ModelConfig, base: ModelConfig) -> dict[str, float]:
    """Of the learning rate under muP for Adam (Yang 2022, arXiv 2203.03466, table 8): base inputs / inputs for what
    reads the width, 1 for embeddings, norms and biases, from the weights' records."""
    narrow = params.table(base)
    reads = lambda record: record.role in ("linear", "unembedding")
    return {
        path: narrow[path].shape[-2] / record.shape[-2] if reads(record) else 1.0
        for path, record in params.table(config).items()
    }


def mup(config: ModelConfig, base: ModelConfig, train: TrainConfig, rate: float, seed: int) -> dict[str, Any]:
    """What `Lab.fit` is given for muP. Fresh matrices are scaled too: by the root of the multiplier in the layers, by
    the multiplier in the output layer."""
    by = multipliers(config, base)

    def start() -> Any:
        power = lambda path: 1.0 if path == "unembedding" else 0.5
        return trees.map_with_path(lambda path, w: w * by[path] ** power(path), init_params(config, seed))

    scale = optax.stateless(lambda updates, _: trees.map_with_path(lambda path, u: u * by[path], updates))
    return {"start": start, "rule": optax.chain(optimizers.at_rate(train, rate), scale)}


def fixed_norm(train: TrainConfig, peak: Any) -> optax.GradientTransformation:
    """AdamH (Wen 2026, Hyperball, arXiv 2606.16899): for the matrices in the layers W <- R Norm(W - rate R Norm(u)),
    where u is Adam's update, R the norm of the fresh matrix, which so stays its norm, and Norm(x) = x / |x|; for all
    other weights Adam."""

    def matrices(fn: Any) -> optax.GradientTransformation:
        each = lambda path, u, w: fn(u, w) if params.in_layer(path) else u
        return optax.stateless(lambda updates, weights: trees.map_with_path(each, updates, weights))

    norm = lambda x: jnp.maximum(jnp.linalg.norm(x), 1e-12)
    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.scale_by_adam(train.beta1, train.beta2),
        matrices(lambda u, w: FIXED * norm(w) / norm(u) * u),
        optax.scale_by_learning_rate(optimizer.schedule(train, peak)),
        matrices(lambda u, w: (w + u) * norm(w) / norm(w + u) - w),
    )


def loss_at(lab: Lab, seed: int, config: ModelConfig, base: ModelConfig, kind: str, rate: float) -> float:
    """Infinity where it diverges. The rate is an input of the step: one program serves all of them."""
    train = dataclasses.replace(lab.train, steps=lab.steps(SHORT / 2), weight_decay=0.0)
    of_rate = optax.inject_hyperparams(lambda learning_rate: fixed_norm(train, learning_rate))
    how = {"standard": {"rule": optimizers.at_rate(train, rate)}, "fixed": {"rule": of_rate(learning_rate=rate)}}
    given = mup(config, base, train, rate, seed) if kind == "muP" else how[kind]
    try:
        return lab.loss(lab.fit(seed, SHORT / 2, config=config, weight_decay=0.0, **given))
    except InputError:
        return np.inf


def best(rates: Any, loss: list[float]) -> float:
    """log2 of the best rate: the vertex of the parabola through the best of the grid and its neighbours; at an edge of
    the grid that edge."""
    x, at = np.log2(rates), int(np.argmin(loss))
    if not 0 < at < len(x) - 1 or not np.all(np.isfinite(loss[at - 1 : at + 2])):
        return float(x[at])
    a, b, _ = np.polyfit(x[at - 1 : at + 2], loss[at - 1 : at + 2], 2)
    return float(-b / (2 * a)) if a > 0 else float(x[at])


def width_transfer(lab: Lab, seed: int) -> dict[str, float]:
    narrow, wide = (shape_of(lab, width) for width in WIDTHS)
    of = lambda config, kind: best(GRID, [loss_at(lab, seed, config, narrow, kind, rate) for rate in GRID])
    first = {kind: of(narrow, kind) for kind in ("standard", "fixed")}
    first["muP"] = first["standard"]  # at the narrow width both are the same
    moved = {kind: first[kind] - of(wide, kind) for kind in first}
    return {
        "standard: best rate falls by, octaves": moved["standard"],
        "muP: moves less by, octaves": abs(moved["standard"]) - abs(moved["muP"]),
        "fixed norms: moves less by, octaves": abs(moved["standard"]) - abs(moved["fixed"]),
        "muP: best rate falls by, octaves": moved["muP"],
        "fixed norms: best rate falls by, octaves": moved["fixed"],
    }


CLAIMS = (
    Claim(
        number=2,
        statement="Adaptive optimizers reach a loss sooner than SGD with momentum.",
        source="Zhao 2024, arXiv 2407.07972; Wen 2025, arXiv 2509.02046",
        question="How much lower is the loss after as many steps, each optimizer at its own best learning rate?",
        protocol="Rates selected on validation text with a seed of their own, from a grid of three that is widened at "
        "an edge (experiments.optimizers). A fifth of the steps, a quarter of them warm-up; same weights and batches.",
        effects=(
            *(Effect(f"{name}: loss under SGD's, %", above=0) for name in COMPARED[1:]),
            *(Effect(f"{name}: times as soon at SGD's last training loss") for name in COMPARED[1:]),
            Effect("muon: loss under AdamW's, %"),
        ),
        minutes=9,
        measure=adaptive,
    ),
    Claim(
        number=3,
        statement="Mixed precision costs no quality; float16 only with loss scaling.",
        source="Micikevicius 2017, arXiv 1710.03740; Kalamkar 2019, arXiv 1905.12322",
        question="What does the loss pay for matmuls in 16 bits, and for float16 gradients that are not scaled?",
        protocol="float32 weights and moments, a fifth of the steps, same weights and batches; not scaled is a fixed "
        "loss scale of 1. A run that diverges has the loss of its fresh weights.",
        effects=(
            Effect("bfloat16: loss, %", below=1),
            Effect("float16 with loss scaling: loss, %", below=1),
            Effect("float16 without it: loss over that with it, %", above=0),
        ),
        minutes=5,
        measure=mixed_precision,
    ),
    Claim(
        number=7,
        statement="The best learning rate moves with the width, less under muP or with fixed norms of weights.",
        source="Yang 2022, arXiv 2203.03466; Wen 2026, arXiv 2606.16899",
        question="By how many octaves is the best rate lower at four times the width?",
        protocol=f"AdamW without decay, 2 layers of width {WIDTHS[0]} and {WIDTHS[1]} with heads of 32, a tenth of the "
        f"steps, rates {GRID[0]:g} to {GRID[-1]:g} by factors of 2; the best by a parabola through the lowest loss and "
        "its neighbours. muP: multipliers from the weights' records. Fixed norms: AdamH.",
        effects=(
            Effect("standard: best rate falls by, octaves", above=0),
            Effect("muP: moves less by, octaves", above=0),
            Effect("fixed norms: moves less by, octaves", above=0),
            Effect("muP: best rate falls by, octaves"),
            Effect("fixed norms: best rate falls by, octaves"),
        ),
        minutes=10,
        measure=width_transfer,
    ),
)
