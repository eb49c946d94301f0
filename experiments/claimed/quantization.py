"""Claims 8, 9, 15 and 16: fewer bits, when they hurt, when they are faster, and what perplexity does not show."""

import itertools
import statistics
from collections.abc import Callable

import jax

from efflm import ops
from efflm.config.model import ModelShape
from efflm.evaluate import limits, quality, speed
from efflm.evaluate.speed import Shape
from efflm.model import LanguageModel, init_params
from experiments.claimed.claim import Claim, Effect
from experiments.claimed.lab import PROTOCOL, Lab, percent

# --- 8, 15 -----------------------------------------------------------------------------------------------------------


def along(lab: Lab, seed: int, chain: str) -> dict[int, float]:
    """{steps: the increase of the loss in percent} of the models along the training run."""
    models = lab.lengths(seed)
    return {step: lab.increase(lab.compressed(model, chain, seed), model) for step, model in models.items()}


def growth(found: dict[int, float]) -> float:
    """From an eighth of the run to the last model before the learning rate decays."""
    first, *_, last, _ = found.values()
    return last - first


def bits(lab: Lab, seed: int) -> dict[str, float]:
    eight, four = (along(lab, seed, chain) for chain in ("w8a16", "w4a16"))
    return {
        "8 bits: loss, %": list(eight.values())[-1],
        "4 bits: loss, %": list(four.values())[-1],
        "4 bits: grows with training by, points": growth(four),
    }


def longer(lab: Lab, seed: int) -> dict[str, float]:
    nearest, gptq = (along(lab, seed, chain) for chain in ("w3a16", "gptq3"))
    *_, before, after = nearest.values()
    return {
        "3 bits, nearest: grows with training by, points": growth(nearest),
        "3 bits, GPTQ: grows with training by, points": growth(gptq),
        "3 bits, nearest: loss after the run, %": after,
        "3 bits, nearest: the decay of the rate adds, points": after - before,
    }


# --- 9 ---------------------------------------------------------------------------------------------------------------

LARGE = ModelShape(layers=8, width=512, heads=8, kv_heads=4, mlp_dim=1408, vocabulary=8192, tied=False).config()
SHAPES = {
    f"{phase}, batch {batch}": Shape(phase, batch, 128, 32 * (phase == "decode"))
    for phase, batch in itertools.product(("prefill", "decode"), (1, 8))
}
TURNS = 5


def faster(one: Callable[[], float], other: Callable[[], float]) -> float:
    """How many times as fast the first is, by the median of ratios of turns A B A B, after warm-up."""
    one(), other()
    return statistics.median([other() / one() for _ in range(TURNS)])


def int8_latency(lab: Lab, seed: int) -> dict[str, float]:
    whole, out = LanguageModel(LARGE, init_params(LARGE, seed)), {}
    ready = lambda name: ops.prepare(speed.in_precision(whole, name), jax.default_backend())
    dense, small = ready("float32"), {name: ready(name) for name in ("w8a16", "w8a8")}
    for (name, model), (words, shape) in itertools.product(small.items(), SHAPES.items()):
        out[f"{name}, {words}: times as fast"] = faster(speed.runner(model, shape), speed.runner(dense, shape))
    return out


# --- 16 --------------------------------------------------------------------------------------------------------------

SPREAD = ("w8a8", "w4a16", "gptq4", "w3a16", "gptq3", "magnitude@0.3", "wanda@0.5", "sparsegpt@0.5", "wanda@2:4",
          "width@0.1")  # fmt: skip
TIMES = 3  # flips are so many times the change of perplexity, and more


def flips(lab: Lab, seed: int) -> dict[str, float]:
    dense = lab.dense(seed)
    models = {"": dense} | {chain: lab.compressed(dense, chain, seed) for chain in SPREAD}
    found = lab.qualities(models, dense)
    base = quality.perplexity(found.pop(""))[0]
    flipped = {chain: 100 * (1 - quality.agreement(each)[0]) for chain, each in found.items()}
    changed = {chain: abs(percent(quality.perplexity(each)[0], base)) for chain, each in found.items()}
    divergence = {chain: quality.divergence(each)[0] for chain, each in found.items()}
    told = {name: limits.rank_correlation([*each.values()], [*flipped.values()]) or 0.0  # where none flips
            for name, each in (("perplexity", changed), ("KL", divergence))}  # fmt: skip
    return {
        **{f"{chain}: flips above {TIMES} x change of perplexity by, points": flipped[chain] - TIMES * changed[chain]
           for chain in ("w8a8", "gptq4")},
        "ten models: KL ranks flips better than perplexity does by": told["KL"] - told["perplexity"],
        "ten models: rank correlation of flips and change of perplexity": told["perplexity"],
        **{f"{chain}: next tokens flipped, %": flipped[chain] for chain in ("w8a8", "gptq4")},
        **{f"{chain}: change of perplexity, %": changed[chain] for chain in ("w8a8", "gptq4")},
    }  # fmt: skip


CLAIMS = (
    Claim(
        number=8,
        statement="8 bits are near-lossless; 4 bits are not for small models, and the loss grows with training tokens.",
        source="Dettmers 2022, arXiv 2212.09720; Kumar 2024, arXiv 2411.04330",
        question="What do 8 and 4 bits cost a small model, and does that grow as it is trained?",
        protocol=PROTOCOL + "w8a16: a scale for each output; w4a16: one for 32 weights; rounded to the nearest. "
        "Lossless: below 0.1%. Growth: from an eighth of the run to the last model before the rate decays.",
        effects=(
            Effect("8 bits: loss, %", below=0.1),
            Effect("4 bits: loss, %", above=0.1),
            Effect("4 bits: grows with training by, points", above=0),
        ),
        minutes=5,
        measure=bits,
    ),
    Claim(
        number=9,
        statement="int8 cuts latency.",
        source="Dettmers 2022, arXiv 2208.07339; Xiao 2022, arXiv 2211.10438",
        question="In which phase, and at which batch, is int8 faster than float32 on this machine?",
        protocol="8 layers of width 512, vocabulary 8,192, fresh weights; prefill of 128 tokens, decode of 32 after "
        f"128; the median of {TURNS} ratios of turns A B A B, after warm-up. Only on a quiet machine.",
        effects=tuple(
            Effect(f"{name}, {words}: times as fast", above=1)
            for name, words in itertools.product(("w8a16", "w8a8"), SHAPES)
        ),
        minutes=3,
        measure=int8_latency,
    ),
    Claim(
        number=15,
        statement="The longer a model was trained, the more rounding hurts it.",
        source="Kumar 2024, arXiv 2411.04330; Ouyang 2024, arXiv 2411.17691",
        question="Does the increase of the loss at 3 bits grow along one training run?",
        protocol=PROTOCOL + "Five models along the run; growth from an eighth of it to the last model before the rate "
        "decays, so at one learning rate. What the decay adds is told apart from it.",
        effects=(
            Effect("3 bits, nearest: grows with training by, points", above=0),
            Effect("3 bits, GPTQ: grows with training by, points", above=0),
            Effect("3 bits, nearest: loss after the run, %"),
            Effect("3 bits, nearest: the decay of the rate adds, points"),
        ),
        minutes=2,
        measure=longer,
    ),
    Claim(
        number=16,
        statement="Perplexity hides flips.",
        source="Dutta 2024, arXiv 2407.09141",
        question="Are the next tokens that change many times the change of perplexity, and what ranks them better?",
        protocol=PROTOCOL
        + f"A flip: another likeliest next token than the dense model's. Models: {', '.join(SPREAD)}.",
        effects=(
            *(
                Effect(f"{chain}: flips above {TIMES} x change of perplexity by, points", above=0)
                for chain in ("w8a8", "gptq4")
            ),
            Effect("ten models: KL ranks flips better than perplexity does by", above=0),
            Effect("ten models: rank correlation of flips and change of perplexity"),
            *(Effect(f"{chain}: next tokens flipped, %") for chain in ("w8a8", "gptq4")),
            *(Effect(f"{chain}: change of perplexity, %") for chain in ("w8a8", "gptq4")),
        ),
        minutes=3,
        measure=flips,
    ),
)
