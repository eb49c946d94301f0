"""What a model costs, as rows of tables: a token by component, memory by kind, time by phase, predicted and measured.

Pure functions of a config, a machine's roofline and what was measured, if anything was. `experiments.analyze` runs it.
"""

import dataclasses
import math

from efflm import ops, trees
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.evaluate import machine
from efflm.evaluate.machine import Roofline
from efflm.evaluate.throughput import Protocol, Rate
from efflm.model import LanguageModel, cost
from efflm.model.cost import Work
from efflm.plan import memory
from efflm.precision import POLICIES, Policy
from efflm.report.table import Column, Columns

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """What one component adds to the cost of a token that sees so many positions."""

    name: str
    note: str
    parameters: int | None
    flops: dict[int, float]  # by positions seen
    share: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """Bytes of one kind, by the closed form and by the compiler."""

    name: str
    note: str
    predicted: float
    compiled: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One run of a compiled program: its work, the least time the roofline allows, and the time it took."""

    name: str
    note: str
    tokens: int
    flops: float
    bytes: float
    bound: str
    predicted_seconds: float
    parts: dict[str, float]  # of them, by component
    measured_seconds: float | None

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


def components(config: ModelConfig, seen: list[int]) -> list[Component]:
    work = {n: cost.token(config, n) for n in seen}
    totals = {n: cost.total(work[n]).flops for n in seen}
    counts = cost.parameters(config)
    counts["output"] = counts["output"] or config.vocabulary * config.width  # tied: the embedding once more
    rows = []
    for name in cost.COMPONENTS:
        flops = {n: work[n][name].flops for n in seen}
        share = {n: flops[n] / totals[n] for n in seen}
        shown = NAMES.get(name, name)
        rows.append(Component(name=shown, note=MEANS[name], parameters=counts.get(name), flops=flops, share=share))
    everything = sum(cost.parameters(config).values())
    whole = dict.fromkeys(seen, 1.0)
    return [*rows, Component(name="all", note=MEANS["all"], parameters=everything, flops=totals, share=whole)]


def _phase(
    name: str, work: dict[str, Work], tokens: int, roofline: Roofline, dtype: str, measured: float | None
) -> Phase:
    """The roofline is applied to each component, since one may be bound by compute and another by memory."""
    seconds = {part: roofline.seconds(each.flops, each.nbytes, dtype) for part, each in work.items()}
    memory_bound = sum(
        took for part, took in seconds.items() if work[part].nbytes / roofline.bandwidth >= took * (1 - 1e-9)
    )
    everything, predicted = cost.total(work), sum(seconds.values())
    shares = ", ".join(f"{NAMES.get(part, part)} {took / predicted:.0%}" for part, took in seconds.items())
    return Phase(
        name=name,
        note=f"of the predicted time {shares}; {memory_bound / predicted:.0%} of it waits for memory",
        tokens=tokens,
        flops=everything.flops,
        bytes=everything.nbytes,
        bound="memory" if memory_bound > predicted / 2 else "compute",
        predicted_seconds=predicted,
        parts={NAMES.get(part, part): took for part, took in seconds.items()},
        measured_seconds=measured,
    )


# --- the rows of the tables ------------------------------------------------------------------------------------------


def holdings(
    config: ModelConfig, train: TrainConfig, inference: Policy, devices: int, measured: Measured | None
) -> tuple[list[Holding], str]:
    """The rows of the memory table, and a sentence on what the temporaries are. devices: that share the batch."""
    policy = POLICIES[train.policy]
    peak = memory.moments(config, train, train.batch // devices, train.length).peak
    largest = sorted((peak.of_weights | peak.of_tokens).items(), key=lambda item: -item[1])[:6]
    weights, state = cost.weight_bytes(config, policy), cost.optimizer_bytes(config, train.optimizer)

    def row(name: str, note: str, predicted: int, compiled: int | None = None) -> Holding:
        return Holding(name=name, note=note, predicted=predicted, compiled=compiled)

    rows = [
        row("weights", f"of {sum(cost.parameters(config).values()):,} parameters, {policy.param}", weights),
        row("optimizer state", f"what {train.optimizer} keeps from step to step", state),
        row(
            "both",
            "what a training run holds between steps, and all a checkpoint needs",
            weights + state,
            measured and measured.state,
        ),
        row(
            "temporaries of a step",
            f"activations, gradients and more at their peak, for {train.batch} x {train.length} tokens on one of "
            f"{devices} device(s)",
            peak.total(),
            measured and measured.temporaries,
        ),
        row(
            "gradients",
            "part of the temporaries: float32, all of them where an update begins",
            cost.gradient_bytes(config),
        ),
        row(
            "KV cache",
            f"of one row of {config.max_length:,} tokens while decoding; it grows with rows and tokens",
            cost.kv_cache_bytes(config, 1, config.max_length, inference),
        ),
    ]
    parts = "; ".join(f"{name} {held / 1e6:.1f}" for name, held in largest if held)
    return rows, f"The temporaries peak {peak.where}. The largest there, in MB: {parts}."


def phases(
    config: ModelConfig,
    train: TrainConfig,
    inference: Policy,
    protocols: tuple[Protocol, Protocol],
    roofline: Roofline,
    measured: Measured | None,
) -> list[Phase]:
    """A training step, prefill, and decode under the two protocols: with a short and with a full cache."""
    policy = POLICIES[train.policy]
    step = cost.train_step(config, train, train.batch, train.length) | {"optimizer": cost.update(config, train)}
    near, far = protocols
    tokens = train.batch * train.length
    took = lambda length: measured and measured.decode[length]
    first = _phase("training step", step, tokens, roofline, policy.compute, measured and measured.step)
    reading = prefill(config, inference, near, roofline, measured and measured.prefill)
    decoding = [
        dataclasses.replace(
            decode(config, inference, each, roofline, took(each.start + each.new)), name=f"decode, {words} cache"
        )
        for each, words in ((near, "short"), (far, "full"))
    ]
    return [first, reading, *decoding]


def prefill(
    config: ModelConfig, policy: Policy, protocol: Protocol, roofline: Roofline, measured: float | None
) -> Phase:
    work = cost.prefill(config, 1, protocol.prompt, policy, protocol.prompt)
    return _phase("prefill", work, protocol.prompt, roofline, policy.compute, measured)


def decode(
    config: ModelConfig, policy: Policy, protocol: Protocol, roofline: Roofline, measured: float | None
) -> Phase:
    """Of one token, where the cache is full."""
    work = cost.decode(config, 1, protocol.start + protocol.new, policy)
    return _phase("decode", work, 1, roofline, policy.compute, measured)


def inference(model: LanguageModel, protocol: Protocol, rates: tuple[Rate, Rate]) -> list[Phase]:
    """Prefill and decode of a model by component, at this machine's speed, which is measured. Empty for a compressed
    model: its weights have no one dtype."""
    leaves = [leaf for _, leaf in trees.flatten(model.params)]
    dtypes = {None if isinstance(leaf, ops.QArray | ops.LowRank) else str(leaf.dtype) for leaf in leaves}
    if len(dtypes) > 1 or None in dtypes:
        return []
    policy = Policy(param=dtypes.pop(), compute=model.config.precision)
    roofline, (reading, writing) = machine.measure((policy.compute,)), rates
    return [
        prefill(model.config, policy, protocol, roofline, protocol.prompt / reading.median),
        decode(model.config, policy, protocol, roofline, 1 / writing.median),
    ]


def crossover(config: ModelConfig) -> str:
    """A sentence on where attention overtakes the feed-forward part."""
    seen = cost.crossover_length(config)
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
        Column("one token", lambda row: row.name),
        Column(
            "parameters",
            lambda row: "" if row.parameters is None else f"{row.parameters / 1e6:,.2f} M",
            lambda row: row.parameters,
        ),
        *(Column(f"MFLOPs, {n:,} seen", lambda row, n=n: shown(row, n), lambda row, n=n: row.flops[n]) for n in seen),
    )


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _compared(row: Holding) -> float | None:
    return row.predicted / row.compiled if row.compiled else None


def _slower(row: Phase) -> float | None:
    return None if row.measured_seconds is None else row.measured_seconds / row.predicted_seconds


def _rate(row: Phase) -> float | None:
    return None if row.measured_seconds is None else row.tokens / row.measured_seconds


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.3f}"


MEMORY_COLUMNS = (
    Column("memory", lambda row: row.name),
    Column("predicted MB", lambda row: f"{row.predicted / 1e6:,.1f}", lambda row: row.predicted),
    Column("compiled MB", lambda row: _optional(row.compiled and row.compiled / 1e6, ",.1f"), lambda row: row.compiled),
    Column("predicted / compiled", lambda row: _optional(_compared(row), ".2f"), _compared),
)
PHASE_COLUMNS = (
    Column("time", lambda row: row.name),
    Column("GFLOPs", lambda row: f"{row.flops / 1e9:,.3f}", lambda row: row.flops),
    Column("MB moved", lambda row: f"{row.bytes / 1e6:,.1f}", lambda row: row.bytes),
    Column("FLOPs a byte", lambda row: f"{row.intensity:,.1f}", lambda row: row.intensity),
    Column("bound by", lambda row: row.bound),
    Column("predicted ms", lambda row: _milliseconds(row.predicted_seconds), lambda row: row.predicted_seconds),
    Column("measured ms", lambda row: _milliseconds(row.measured_seconds), lambda row: row.measured_seconds),
    Column("measured / predicted", lambda row: _optional(_slower(row), ".2f"), _slower),
    Column("measured tokens/s", lambda row: _optional(_rate(row), ",.0f"), _rate),
)
