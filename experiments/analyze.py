"""What a model costs and why: FLOPs, bytes and memory, compared with this machine.

    bash launch/run.sh experiments.analyze --run_dir=runs/analyze
    bash launch/run.sh experiments.analyze --nomeasure --model.width=2048 --model.layers=24 --model.heads=32 \\
        --model.kv_heads=8 --model.mlp_dim=5632 --model.max_length=32768 --longest=131072

Expect, in about a minute, three tables for the model that --model.* describes, untrained, since nothing
of it depends on the weights' values: what a token costs by component and where attention overtakes the feed-forward
part; which arrays take the memory, predicted and compiled; and the time of a training step, of prefill and of decode,
predicted from this machine's roofline (its bandwidth and matmul peak are measured first) and measured.
--nomeasure leaves out everything that compiles or runs the model, and so takes any size. In the run directory:
report.html and results.json.
"""

import dataclasses
import itertools
import math
import statistics
import sys
from pathlib import Path

from efflm.cli import progress, run_directory
from efflm.cli.flags import command_line, launch
from efflm.config import flag, require, require_positive
from efflm.config.model import ModelConfig, ModelShape
from efflm.config.train import TrainConfig
from efflm.evaluate import machine
from efflm.evaluate.machine import Roofline
from efflm.evaluate.throughput import Protocol, rates
from efflm.model import LanguageModel, autotune, in_dtype, init_params
from efflm.parallel import meshes
from efflm.plan import work
from efflm.precision import POLICIES, Policy
from efflm.report import analysis, page, plots, table
from efflm.report.analysis import Measured
from efflm.report.journal import Journal
from efflm.report.page import Section, Table
from efflm.report.plots import Chart
from efflm.report.rows import Row
from efflm.train.aot import timed_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    run_dir: str = flag(str(run_directory.ROOT / "analyze"), "where everything is written", path=True)
    measure: bool = flag(True, "compile and run the model as well; without it only the machine is measured")
    longest: int = flag(0, "longest sequence in tables and plots; 0: four times model.max_length")
    prompt: int = flag(512, "tokens of the prefill that is measured, at most model.max_length")
    steps: int = flag(7, "timed training steps and rounds of prefill and decode, after one to warm up")

    def __post_init__(self):
        require(
            self.longest >= 0,
            f"longest is {self.longest}, but must be positive, or 0 for a multiple of model.max_length",
        )
        require_positive(self, "prompt", "steps")


def protocols(run: Run, config: ModelConfig) -> tuple[Protocol, Protocol]:
    """Prefill and decode with a nearly empty cache, and decode with one of the model's max_length."""
    near = Protocol(prompt=run.prompt, repeats=run.steps).within(config.max_length)
    new = max(1, min(32, config.max_length // 4))
    return near, Protocol(prompt=1, start=config.max_length - new, new=new, repeats=run.steps)


def measure(run: Run, shape: ModelShape, train: TrainConfig) -> Measured:
    """A compiled training step on random tokens, then prefill and decode of a randomly initialized model."""
    config, policy = shape.config(), POLICIES[train.policy]
    mesh = meshes.data_parallel(train.batch, train.accumulate)
    timed = timed_step(config, train, mesh)
    batch = 4 * 4 * train.batch * train.length // mesh.size  # four int32 for a token
    state, temporaries = timed.state_bytes, timed.peak_bytes - timed.state_bytes - batch
    runs = itertools.islice(timed.seconds, 1 + run.steps)
    step = statistics.median(list(progress.shown(runs, "timing the training step", 1 + run.steps, live=False))[1:])
    del timed
    model = in_dtype(LanguageModel(config, init_params(config, 0)), policy.param)
    near, far = protocols(run, config)
    (prefill, first), (_, last) = (rates({"": model}, each)[0][""] for each in (near, far))
    decode = {near.start + near.new: 1 / first.median, far.start + far.new: 1 / last.median}
    return Measured(state, temporaries, step, near.prompt / prefill.median, decode)


@run_directory.locked
def main(run: Run, model: ModelShape, train: TrainConfig) -> None:
    config = model.config()
    if run.measure:
        train.require_within(config.max_length)
    run_directory.require_writable(Path(run.run_dir), needs=run_directory.SMALL_FILES)
    train = autotune.training(config, train)
    policy = POLICIES[train.policy]
    inference = POLICIES["bfloat16_pure"] if policy.param == "bfloat16" else POLICIES["float32"]
    log = Journal(run.run_dir, command_line("experiments.analyze", sys.argv))
    with progress.bar("measuring the machine", live=False):
        roofline = machine.measure(tuple(sorted({policy.compute, inference.compute})))
    log.say("measured the machine")
    measured = measure(run, model, train) if run.measure else None
    if measured:
        log.say("compiled and ran the model")

    longest = run.longest or 4 * config.max_length
    seen = sorted({max(1, config.max_length // 16), config.max_length, longest})
    tokens = analysis.components(config, seen)
    devices = meshes.data_parallel(train.batch, train.accumulate).size
    held = analysis.holdings(config, train, inference, devices, measured)
    timed = analysis.phases(config, train, inference, protocols(run, config), roofline, measured)
    crossover = work.crossover_length(config)
    per_token = work.train_flops(config, train.batch, train.length) / (train.batch * train.length)
    peak = roofline.matmul[policy.compute]
    peaks = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {name}" for name, flops in roofline.matmul.items())
    facts = [
        f"A token of training costs {per_token / 1e6:.1f} MFLOPs (forward and backward, sequences of {train.length}), "
        f"a decoded one at most {tokens[-1].flops[config.max_length] / 1e6:.1f} ({config.max_length:,} seen).",
        analysis.crossover(config),
        f"This machine: {peaks}; {roofline.bandwidth / 1e9:.1f} GB/s. Work of fewer than "
        f"{peak / roofline.bandwidth:.0f} FLOPs a byte ({policy.compute}) waits for memory.",
        "Predicted times are a lower bound: matmuls at this machine's peak, and each operand and result moved "
        "once. Left out are norms, softmax, activations and copies, and what small or thin matmuls lack to the peak. "
        "Only what fits into the caches can be faster.",
    ]
    if measured:
        mfu = per_token * timed[0].tokens / measured.step / peak
        facts.append(f"Model FLOP utilization of the training step: {mfu:.1%} of the {policy.compute} peak.")
    figures = {"crossover_positions": crossover, "roofline": roofline, "train_flops_per_token": per_token}
    log.results(facts, components=tokens, memory=held, phases=timed, **figures)
    table.show(tokens, [], analysis.token_columns(seen))
    table.show(held, [], analysis.MEMORY_COLUMNS)
    table.show(timed, facts, analysis.PHASE_COLUMNS)
    tables = [
        Table(caption="Compute of one token by component.", columns=analysis.token_columns(seen), rows=tokens),
        Table(caption="Memory, predicted and as compiled.", columns=analysis.MEMORY_COLUMNS, rows=held),
        Table(caption="Time, by this machine's roofline and as measured.", columns=analysis.PHASE_COLUMNS, rows=timed),
    ]
    values = {row.name: row.parts for row in timed}
    split = page.bars("Predicted time of each phase by component.", values, "ms", 1e-3, each_whole=True)
    log.report(
        facts,
        title=f"What a {model.family} model of {tokens[-1].parameters / 1e6:.1f} M parameters costs, and why",
        sections=[
            Section("The costs", tables),
            Section("Where they come from", [split, *charts(config, inference, roofline, policy, timed, longest)]),
        ],
    )


def charts(
    config: ModelConfig, inference: Policy, roofline: Roofline, policy: Policy, timed: list[Row], longest: int
) -> list[Chart]:
    """FLOPs and bytes of a token against the positions it sees, and the roofline."""
    lengths = sorted({max(1, round(longest ** (i / 60))) for i in range(61)})
    found = [work.token(config, n, inference) for n in lengths]
    named = {analysis.NAMES.get(name, name): name for name in work.COMPONENTS}
    flops = {shown: [each[name].flops / 1e6 for each in found] for shown, name in named.items()}
    moved = {
        "weights": [(work.total(each).nbytes - each["attention"].nbytes) / 1e6 for each in found],
        "keys and values": [work.kv_cache_bytes(config, 1, n, inference) / 1e6 for n in lengths],
    }
    crossing = work.crossover_length(config)
    mark = (crossing, f"attention = feed-forward\n{crossing:,.0f} positions") if math.isfinite(crossing) else None
    points = {
        row.name: (
            row.intensity,
            row.flops / row.predicted_seconds,
            row.measured_seconds and row.flops / row.measured_seconds,
        )
        for row in timed
    }
    peak = (f"{policy.compute} peak", roofline.matmul[policy.compute], roofline.bandwidth)
    bound = "; ".join(f"{row.name} is bound by {row.bound}" for row in timed)
    return [
        plots.chart(
            plots.components(lengths, flops, "MFLOPs to decode a token", mark),
            f"FLOPs of a token by component. {analysis.crossover(config)}",
            "Compute of a token by component; dashed: all.",
        ),
        plots.chart(
            plots.components(lengths, moved, "MB read to decode a token, batch 1"),
            "Bytes read to decode a token: weights are constant, keys and values grow with the positions it sees.",
            "Memory traffic of a decoded token; dashed: all.",
        ),
        plots.chart(
            plots.roofline(points, peak),
            f"FLOP/s against FLOPs a byte under this machine's roofline: {bound}.",
            "This machine's roofline: its matmul peak and its bandwidth.",
        ),
    ]


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), model=ModelShape(), train=TrainConfig())
