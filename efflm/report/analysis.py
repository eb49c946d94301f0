"""What a model costs, as rows of tables: a token by component, memory by kind, time by phase, predicted and measured.

Pure functions of a config, a machine's roofline and what was measured, if anything was. `experiments.analyze` runs it.
"""

import dataclasses
import math

from efflm.config import ModelConfig, TrainConfig
from efflm.evaluate.cost import Protocol
from efflm.evaluate.machine import Roofline
from efflm.model import cost
from efflm.model.cost import Work
from efflm.plan import memory
from efflm.precision import POLICIES, Policy
from efflm.report.table import Columns

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
    reading = cost.prefill(config, 1, near.prompt, inference, near.prompt)
    tokens = train.batch * train.length
    rows = [
        _phase("training step", step, tokens, roofline, policy.compute, measured and measured.step),
        _phase("prefill", reading, near.prompt, roofline, inference.compute, measured and measured.prefill),
    ]
    for name, protocol in (("decode, short cache", near), ("decode, full cache", far)):
        cache_length = protocol.start + protocol.new
        work = cost.decode(config, 1, cache_length, inference)
        rows.append(_phase(name, work, 1, roofline, inference.compute, measured and measured.decode[cache_length]))
    return rows


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


def _ratio(row: Phase) -> str:
    return "" if row.measured_seconds is None else f"{row.measured_seconds / row.predicted_seconds:.2f}"


def token_columns(seen: list[int]) -> Columns:
    """The columns of `components`."""
    return (
        ("one token", lambda row: row.name),
        ("parameters", lambda row: "" if row.parameters is None else f"{row.parameters / 1e6:.2f} M"),
        *((f"MFLOPs, {n:,} seen", lambda row, n=n: f"{row.flops[n] / 1e6:.2f} ({row.share[n]:.0%})") for n in seen),
    )


MEMORY_COLUMNS = (
    ("memory", lambda row: row.name),
    ("predicted MB", lambda row: f"{row.predicted / 1e6:.1f}"),
    ("compiled MB", lambda row: "" if row.compiled is None else f"{row.compiled / 1e6:.1f}"),
    ("predicted / compiled", lambda row: "" if row.compiled is None else f"{row.predicted / row.compiled:.2f}"),
)
PHASE_COLUMNS = (
    ("time", lambda row: row.name),
    ("GFLOPs", lambda row: f"{row.flops / 1e9:.3f}"),
    ("MB moved", lambda row: f"{row.bytes / 1e6:.1f}"),
    ("FLOPs a byte", lambda row: f"{row.intensity:.1f}"),
    ("bound by", lambda row: row.bound),
    ("predicted ms", lambda row: f"{1e3 * row.predicted_seconds:.3f}"),
    ("measured ms", lambda row: "" if row.measured_seconds is None else f"{1e3 * row.measured_seconds:.3f}"),
    ("measured / predicted", _ratio),
    (
        "measured tokens/s",
        lambda row: "" if row.measured_seconds is None else f"{row.tokens / row.measured_seconds:,.0f}",
    ),
)
