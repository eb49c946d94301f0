"""Claims 10, 11 and 14: fewer weights, layers and widths, and the order of steps."""

import itertools

import numpy as np

from efflm import ops, trees
from efflm.compress.structured import latency
from experiments.claimed.claim import Claim, Effect
from experiments.claimed.lab import PROTOCOL, Lab, percent
from experiments.claimed.quantization import faster

# --- 10 --------------------------------------------------------------------------------------------------------------


def costs(lab: Lab, seed: int, *chains: str) -> list[float]:
    """The increase of the loss over the dense model in percent, of each chain."""
    dense = lab.dense(seed)
    return [lab.increase(lab.compressed(dense, chain, seed), dense) for chain in chains]


def criterion(lab: Lab, seed: int) -> dict[str, float]:
    names = ("magnitude", "wanda", "sparsegpt")
    half, pairs = (dict(zip(names, costs(lab, seed, *(f"{name}@{how}" for name in names)))) for how in ("0.5", "2:4"))
    gaps = [found["magnitude"] - found["sparsegpt"] for found in (half, pairs)]
    return {
        "50%: Wanda below magnitude by, points": half["magnitude"] - half["wanda"],
        "50%: SparseGPT below magnitude by, points": gaps[0],
        "2:4: the gap to SparseGPT is larger by, points": gaps[1] - gaps[0],
        **{f"2:4, {name}: above 50% by, points": pairs[name] - half[name] for name in names},
    }


# --- 11 --------------------------------------------------------------------------------------------------------------


def structured(lab: Lab, seed: int) -> dict[str, float]:
    dense, layers = lab.dense(seed), len(lab.config.blocks)
    depth = lab.compressed(dense, f"depth[layers={layers - layers // 4}]", seed)
    removed = 1 - trees.count(depth.params) / trees.count(dense.params)
    width = lab.compressed(dense, f"width@{removed:.4f}", seed)
    before, cost = lab.loss(dense), {}
    for name, model in (("depth", depth), ("width", width)):
        cost[name] = percent(lab.loss(model), before)
        for step in ("distill", "finetune"):
            healed = lab.compressed(model, lab.training(step, 1 / 8), seed, dense)
            cost[f"{name}, {step}"] = percent(lab.loss(healed), before)
    fast = faster(latency.runner(depth, "both"), latency.runner(width, "both"))
    return {
        "width: a teacher recovers, % of what pruning cost": 100 * (1 - cost["width, distill"] / cost["width"]),
        "depth: a teacher recovers, % of what pruning cost": 100 * (1 - cost["depth, distill"] / cost["depth"]),
        "width: a teacher below text alone by, points": cost["width, finetune"] - cost["width, distill"],
        "width below depth by, points": cost["depth, distill"] - cost["width, distill"],
        "depth: times as fast as width": fast,
        "parameters removed, %": 100 * removed,
    }


# --- 14 --------------------------------------------------------------------------------------------------------------


def orders(lab: Lab, seed: int) -> dict[str, float]:
    dense = lab.dense(seed)
    parts = {"prune": "width@0.3", "distill": lab.training("distill", 1 / 8), "quantize": "w3a16"}
    cost, size = {}, []
    for order in itertools.permutations(parts):
        model = lab.compressed(dense, ",".join(parts[name] for name in order), seed, dense)
        cost[order] = lab.increase(model, dense)
        size.append(ops.stored_nbytes(model.params, model.masks))
    best = cost.pop(("prune", "distill", "quantize"))
    first = [each for order, each in cost.items() if order[0] == "quantize"]
    return {
        "prune, distill, quantize: loss, %": best,
        "quantizing first: above it by, points": float(np.mean(first)) - best,
        "the best other order: above it by, points": min(cost.values()) - best,
        "prune, quantize, distill: above it by, points": cost["prune", "quantize", "distill"] - best,
        "bytes: largest over smallest, %": percent(max(size), min(size)),
    }


CLAIMS = (
    Claim(
        number=10,
        statement="The criterion of pruning matters, at 2:4 more than at 50%.",
        source="Frantar 2023, arXiv 2301.00774; Sun 2023, arXiv 2306.11695",
        question="How far below magnitude are Wanda and SparseGPT, and is the gap larger at 2:4?",
        protocol=PROTOCOL + "64 rows of calibration text. Points: of percent of increase.",
        effects=(
            Effect("50%: Wanda below magnitude by, points", above=0),
            Effect("50%: SparseGPT below magnitude by, points", above=0),
            Effect("2:4: the gap to SparseGPT is larger by, points", above=0),
            *(Effect(f"2:4, {name}: above 50% by, points") for name in ("magnitude", "wanda", "sparsegpt")),
        ),
        minutes=2,
        measure=criterion,
    ),
    Claim(
        number=11,
        statement="Structured pruning with a teacher recovers; depth is faster, width more accurate.",
        source="Muralidharan 2024, arXiv 2407.14679",
        question="At equal parameters, what do a quarter of the layers and as many widths cost after distillation?",
        protocol=PROTOCOL + "An eighth of the steps for distillation, and for text alone beside it. Speed: prompt and "
        "continuation together, turns A B A B.",
        effects=(
            Effect("width: a teacher recovers, % of what pruning cost", above=50),
            Effect("depth: a teacher recovers, % of what pruning cost", above=50),
            Effect("width: a teacher below text alone by, points", above=0),
            Effect("width below depth by, points", above=0),
            Effect("depth: times as fast as width", above=1),
            Effect("parameters removed, %"),
        ),
        minutes=5,
        measure=structured,
    ),
    Claim(
        number=14,
        statement="At equal bytes the order of steps matters: prune, distill, quantize; quantizing first is worst.",
        source="arXiv 2511.19495",
        question="What do the six orders cost?",
        protocol=PROTOCOL + "width@0.3, distillation for an eighth of the steps, 3 bits to the nearest. "
        "What follows the rounding keeps the format, so distillation then trains on the grid.",
        effects=(
            Effect("prune, distill, quantize: loss, %"),
            Effect("quantizing first: above it by, points", above=0),
            Effect("the best other order: above it by, points", above=0),
            Effect("prune, quantize, distill: above it by, points"),
            Effect("bytes: largest over smallest, %"),
        ),
        minutes=7,
        measure=orders,
    ),
)
