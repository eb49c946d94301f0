"""What a model costs, as rows of tables: a token by component, memory by kind, time by phase, predicted and measured.

Pure functions of a config, a machine's roofline and what was measured, if anything was. `experiments.analyze` runs it.
"""

import dataclasses
import math

from efflm import ops, trees
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.evaluate.machine import Roofline
from efflm.evaluate.throughput import Protocol, Rate
from efflm.model import LanguageModel
from efflm.plan import device, work
from efflm.plan.work import Work
from efflm.precision import POLICIES, Policy
from efflm.report import numbers
from efflm.report.rows import Row
from efflm.report.table import Column, Columns, figure

MEANS = {
    "projections": "queries, keys, values and the output of attention: a constant for each token",
    "attention": "scores and values: grows with the positions a token sees (a sliding window bounds it)",
    "feedforward": "the largest matrices: a constant for each token",
    "output": "the matmul with the whole vocabulary: a constant for each token whose logits are wanted",
    "all": "a training step costs three times this for each token, backward pass included",
}
NAMES = {"feedforward": "feed-forward", "output": "output layer"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of the training state and of the compiled step's temporaries, and seconds of each phase."""

    state: float
    temporaries: float
    step: float
    prefill: float
    decode: dict[int, float]  # by the length of the cache: of one token


def components(config: ModelConfig, seen: list[int]) -> list[Row]:
    """What each component adds to the cost of a token: parameters, flops and their share by positions seen."""
    found = {n: work.token(config, n) for n in seen}
    totals, counts = {n: work.total(each).flops for n, each in found.items()}, work.parameters(config)
    everything = sum(counts.values())
    counts["output"] = counts["output"] or config.vocabulary * config.width  # tied: the embedding once more
    flops = {name: {n: found[n][name].flops for n in seen} for name in work.COMPONENTS} | {"all": totals}
    counts = counts | {"all": everything}
    return [
        Row(
            NAMES.get(name, name),
            {"parameters": counts.get(name), "flops": each, "share": {n: each[n] / totals[n] for n in seen}},
            MEANS[name],
        )
        for name, each in flops.items()
    ]


def holdings(
    config: ModelConfig, train: TrainConfig, inference: Policy, devices: int, measured: Measured | None
) -> list[Row]:
    """The memory of training and inference. devices: that share the batch."""
    policy, state = POLICIES[train.policy], device.state(config, train)
    weights, kept = work.weight_bytes(config, policy), trees.nbytes(state.optimizer)
    scan = len(set(config.blocks)) == 1  # stores the same, and is traced sooner
    rows = train.batch // devices // train.accumulate
    stored = rows * device.stored_bytes(config, train.length, train.policy, scan, train.remat)
    batch = f"for {train.batch} x {train.length} tokens on one of {devices} device(s)"
    row = lambda name, note, predicted, compiled=None: Row(name, {"predicted": predicted, "compiled": compiled}, note)
    between = "what a training run holds between steps, and all a checkpoint needs"
    return [
        row("weights", f"of {sum(work.parameters(config).values()):,} parameters, {policy.param}", weights),
        row("optimizer state", f"what {train.optimizer} keeps from step to step", kept),
        row("both", between, weights + kept, measured and measured.state),
        row("gradients", "float32, all of them where an update begins", work.weight_bytes(config)),
        row("stored activations", f"what the forward pass hands to the backward pass, {batch}", stored),
        row(
            "temporaries of a step", f"gradients, activations and more at their peak, {batch}: known to the compiler "
            "only", None, measured and measured.temporaries,
        ),
        row(
            "KV cache", f"of one row of {config.max_length:,} tokens while decoding; it grows with rows and tokens",
            work.kv_cache_bytes(config, 1, config.max_length, inference),
        ),
    ]  # fmt: skip


# --- time ------------------------------------------------------------------------------------------------------------


def _phase(
    name: str, parts: dict[str, Work], tokens: int, roofline: Roofline, dtype: str, measured: float | None
) -> Row:
    """One run of a compiled program: its work, the least time the roofline allows, and the time it took.

    The roofline is applied to each component, since one may be bound by compute and another by memory.
    """
    seconds = {part: roofline.seconds(each.flops, each.nbytes, dtype) for part, each in parts.items()}
    memory_bound = sum(
        took for part, took in seconds.items() if parts[part].nbytes / roofline.bandwidth >= took * (1 - 1e-9)
    )
    everything, predicted = work.total(parts), sum(seconds.values())
    seconds = {NAMES.get(part, part): took for part, took in seconds.items()}
    shares = ", ".join(f"{part} {took / predicted:.0%}" for part, took in seconds.items())
    figures = {
        "tokens": tokens,
        "flops": everything.flops,
        "bytes": everything.nbytes,
        "intensity": everything.flops / everything.nbytes,
        "bound": "memory" if memory_bound > predicted / 2 else "compute",
        "predicted_seconds": predicted,
        "parts": seconds,
        "measured_seconds": measured,
        "over_predicted": measured and measured / predicted,
        "rate": measured and tokens / measured,
    }
    return Row(name, figures, f"of the predicted time {shares}; {memory_bound / predicted:.0%} of it waits for memory")


def phases(
    config: ModelConfig,
    train: TrainConfig,
    inference: Policy,
    protocols: tuple[Protocol, Protocol],
    roofline: Roofline,
    measured: Measured | None,
) -> list[Row]:
    """A training step, prefill, and decode under the two protocols: with a short and with a full cache."""
    update = work.update(config, train, trees.nbytes(device.state(config, train).optimizer))
    step = work.train_step(config, train, train.batch, train.length) | {"optimizer": update}
    tokens, compute = train.batch * train.length, POLICIES[train.policy].compute
    took = lambda each: measured and measured.decode[each.start + each.new]
    return [
        _phase("training step", step, tokens, roofline, compute, measured and measured.step),
        prefill(config, inference, protocols[0], roofline, measured and measured.prefill),
        *(
            dataclasses.replace(decode(config, inference, each, roofline, took(each)), name=f"decode, {words} cache")
            for each, words in zip(protocols, ("short", "full"), strict=True)
        ),
    ]


def prefill(config: ModelConfig, policy: Policy, protocol: Protocol, roofline: Roofline, measured: float | None) -> Row:
    found = work.prefill(config, 1, protocol.prompt, policy, protocol.prompt)
    return _phase("prefill", found, protocol.prompt, roofline, policy.compute, measured)


def decode(config: ModelConfig, policy: Policy, protocol: Protocol, roofline: Roofline, measured: float | None) -> Row:
    """Of one token, where the cache is full."""
    found = work.decode(config, 1, protocol.start + protocol.new, policy)
    return _phase("decode", found, 1, roofline, policy.compute, measured)


def inference(model: LanguageModel, protocol: Protocol, rates: tuple[Rate, Rate], roofline: Roofline) -> list[Row]:
    """Prefill and decode of a model by component. Empty for a compressed model: its weights have no one dtype."""
    leaves = [leaf for _, leaf in trees.flatten(model.params)]
    dtypes = {None if isinstance(leaf, ops.QArray | ops.LowRank) else str(leaf.dtype) for leaf in leaves}
    if len(dtypes) > 1 or None in dtypes:
        return []
    policy, (reading, writing) = Policy(param=dtypes.pop(), compute=model.config.precision), rates
    return [
        prefill(model.config, policy, protocol, roofline, protocol.prompt / reading.median),
        decode(model.config, policy, protocol, roofline, 1 / writing.median),
    ]


# --- words and columns -----------------------------------------------------------------------------------------------


def crossover(config: ModelConfig) -> str:
    """A sentence on where attention overtakes the feed-forward part."""
    seen = work.crossover_length(config)
    if math.isinf(seen):
        return "Attention never overtakes the feed-forward part: the windows are too short."
    within = "within" if seen <= config.max_length else "beyond"
    return (
        f"Attention overtakes the feed-forward part where a token sees {seen:,.0f} positions, {within} this model's "
        f"max_length of {config.max_length:,}. In training and prefill, where it sees half its row on average, this "
        f"takes rows of {2 * seen:,.0f} tokens."
    )


def token_columns(seen: list[int]) -> Columns:
    """The columns of `components`."""
    shown = lambda row, n: (f"{row.flops[n] / 1e6:,.2f}", f"({row.share[n]:.0%})")
    return (
        figure("one token", "name", str),
        figure("parameters", "parameters", numbers.millions),
        *(Column(f"MFLOPs, {n:,} seen", lambda row, n=n: shown(row, n), lambda row, n=n: row.flops[n]) for n in seen),
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"


MEMORY_COLUMNS = (
    figure("memory", "name", str),
    figure("predicted", "predicted", numbers.size),
    figure("compiled", "compiled", numbers.size),
)
PHASE_COLUMNS = (
    figure("time", "name", str),
    figure("GFLOPs", "flops", lambda flops: f"{flops / 1e9:,.3f}"),
    figure("MB moved", "bytes", lambda nbytes: f"{nbytes / 1e6:,.1f}"),
    figure("FLOPs a byte", "intensity", "{:,.1f}".format),
    figure("bound by", "bound", str),
    figure("predicted ms", "predicted_seconds", _milliseconds),
    figure("measured ms", "measured_seconds", _milliseconds),
    figure("measured / predicted", "over_predicted", "{:.2f}".format),
    figure("measured tokens/s", "rate", "{:,.0f}".format),
)
