"""What a model costs and why: FLOPs, bytes and memory in closed form, compared with this machine.

    bash launch/run.sh experiments.analyze --run_dir=runs/analyze
    bash launch/run.sh experiments.analyze --nomeasure --model.width=2048 --model.layers=24 --model.heads=32 \\
        --model.kv_heads=8 --model.mlp_dim=5632 --model.max_length=32768 --longest=131072

Expect, in about a minute, three tables and a picture for the model that --model.* describes, untrained, since nothing
of it depends on the weights' values: what a token costs by component and where attention overtakes the feed-forward
part; which arrays take the memory, predicted and compiled; and the time of a training step, of prefill and of decode,
predicted from this machine's roofline (its bandwidth and matmul peak are measured first) and measured.
--nomeasure leaves out everything that compiles or runs the model, and so takes any size. In the run directory:
analysis.png and results.json.
"""

import dataclasses
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

from efflm import progress, rundir
from efflm.config import ModelConfig, ModelShape, TrainConfig, flag, require
from efflm.evaluate import machine
from efflm.evaluate.cost import Protocol, rates
from efflm.evaluate.machine import Roofline
from efflm.flags import command_line, launch
from efflm.model import LanguageModel, cost, in_dtype, init_params, sharding
from efflm.precision import POLICIES, Policy
from efflm.report import analysis, plots, table
from efflm.report.analysis import Measured, Phase
from efflm.train.ahead import timed_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    run_dir: str = flag(str(rundir.ROOT / "analyze"), "where analysis.png and results.json are written")
    measure: bool = flag(True, "compile and run the model as well; without it only the machine is measured")
    longest: int = flag(0, "longest sequence in table and picture; 0: four times model.max_length")
    prompt: int = flag(512, "tokens of the prefill that is measured, at most model.max_length")
    steps: int = flag(7, "timed training steps and rounds of prefill and decode, after one to warm up")

    def __post_init__(self):
        require(
            self.longest >= 0,
            f"longest is {self.longest}, but must be positive, or 0 for a multiple of model.max_length",
        )
        for name in ("prompt", "steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")


# --- what is measured ------------------------------------------------------------------------------------------------


def protocols(run: Run, config: ModelConfig) -> tuple[Protocol, Protocol]:
    """Prefill and decode with a nearly empty cache, and decode with one of the model's max_length."""
    near = Protocol(prompt=run.prompt, repeats=run.steps).within(config.max_length)
    new = max(1, min(32, config.max_length // 4))
    return near, Protocol(prompt=1, start=config.max_length - new, new=new, repeats=run.steps)


def measure(run: Run, shape: ModelShape, train: TrainConfig) -> Measured:
    """A compiled training step on random tokens, then prefill and decode of a fresh model."""
    config, policy = shape.config(), POLICIES[train.policy]
    mesh = sharding.data_parallel(train.batch)
    timed = timed_step(config, train, mesh)
    batch = 4 * 4 * train.batch * train.length // mesh.size  # four int32 for a token
    state, temporaries = timed.state_bytes, timed.peak_bytes - timed.state_bytes - batch
    runs = itertools.islice(timed.seconds, 1 + run.steps)
    step = statistics.median(list(progress.shown(runs, "timing the training step", 1 + run.steps, live=False))[1:])
    del timed
    model = in_dtype(LanguageModel(config, init_params(config, 0)), policy.param)
    near, far = protocols(run, config)
    prefill, first = rates({"": model}, near)[""]
    _, last = rates({"": model}, far)[""]
    decode = {near.start + near.new: 1 / first.median, far.start + far.new: 1 / last.median}
    return Measured(state, temporaries, step, near.prompt / prefill.median, decode)


# --- the run ---------------------------------------------------------------------------------------------------------


def main(run: Run, model: ModelShape, train: TrainConfig) -> None:
    config, run_dir, policy = model.config(), Path(run.run_dir), POLICIES[train.policy]
    require(
        train.length <= config.max_length or not run.measure,
        f"train.length {train.length} is longer than model.max_length {config.max_length}: raise model.max_length",
    )
    rundir.require_writable(run_dir, needs=10_000_000)
    inference = POLICIES["bfloat16_pure"] if policy.param == "bfloat16" else POLICIES["float32"]
    began = time.perf_counter()
    with progress.bar("measuring the machine", live=False):
        roofline = machine.measure(tuple(sorted({policy.compute, inference.compute})))
    print(f"[{time.perf_counter() - began:4.0f} s] measured the machine", flush=True)
    measured = measure(run, model, train) if run.measure else None
    if measured:
        print(f"[{time.perf_counter() - began:4.0f} s] compiled and ran the model", flush=True)

    longest = run.longest or 4 * config.max_length
    seen = sorted({max(1, config.max_length // 16), config.max_length, longest})
    tokens = analysis.components(config, seen)
    devices = sharding.data_parallel(train.batch).size
    held, peak_fact = analysis.holdings(config, train, inference, devices, measured)
    timed = analysis.phases(config, train, inference, protocols(run, config), roofline, measured)
    crossover = cost.crossover_length(config)
    per_token = cost.train_flops(config, train.batch, train.length) / (train.batch * train.length)
    peak = roofline.matmul[policy.compute]
    peaks = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {name}" for name, flops in roofline.matmul.items())
    facts = [
        f"A token of training costs {per_token / 1e6:.1f} MFLOPs (forward and backward, sequences of {train.length}), "
        f"a decoded one at most {tokens[-1].flops[config.max_length] / 1e6:.1f} ({config.max_length:,} seen).",
        analysis.crossover(config),
        peak_fact,
        f"This machine: {peaks}; {roofline.bandwidth / 1e9:.1f} GB/s. Work of fewer than "
        f"{peak / roofline.bandwidth:.0f} FLOPs a byte ({policy.compute}) waits for memory.",
        "Predicted times are a lower bound: matmuls at this machine's peak, and each operand and result moved "
        "once. Left out are norms, softmax, activations and copies, and what small or thin matmuls lack to the peak. "
        "Only what fits into the caches can be faster.",
    ]
    if measured:
        mfu = per_token * timed[0].tokens / measured.step / peak
        facts.append(f"Model FLOP utilization of the training step: {mfu:.1%} of the {policy.compute} peak.")
    table.show(tokens, [], analysis.token_columns(seen))
    table.show(held, [], analysis.MEMORY_COLUMNS)
    table.show(timed, facts, analysis.PHASE_COLUMNS)
    draw(run_dir / "analysis.png", config, inference, roofline, policy, timed, longest)
    rundir.write_json(
        run_dir / "results.json",
        {
            "components": [dataclasses.asdict(row) for row in tokens],
            "memory": [dataclasses.asdict(row) for row in held],
            "phases": [dataclasses.asdict(row) for row in timed],
            "crossover_positions": crossover if math.isfinite(crossover) else None,
            "roofline": dataclasses.asdict(roofline),
            "train_flops_per_token": per_token,
            "facts": facts,
            "command": command_line("experiments.analyze", sys.argv),
            "versions": rundir.machine(),
        },
    )
    print(f"[{time.perf_counter() - began:4.0f} s] done: see {run_dir / 'analysis.png'}")


def draw(
    path: Path,
    config: ModelConfig,
    inference: Policy,
    roofline: Roofline,
    policy: Policy,
    timed: list[Phase],
    longest: int,
) -> None:
    lengths = sorted({max(1, round(longest ** (i / 60))) for i in range(61)})
    work = [cost.token(config, n, inference) for n in lengths]
    flops = {analysis.NAMES.get(name, name): [each[name].flops for each in work] for name in cost.COMPONENTS}
    weights = [cost.total(each).nbytes - each["attention"].nbytes for each in work]
    moved = {
        "weights": weights,
        "keys and values": [cost.kv_cache_bytes(config, 1, n, inference) for n in lengths],
    }
    points = {
        row.name: (
            row.intensity,
            row.flops / row.predicted_seconds,
            row.measured_seconds and row.flops / row.measured_seconds,
        )
        for row in timed
    }
    plots.cost_of_a_token(
        lengths,
        flops,
        moved,
        points,
        cost.crossover_length(config),
        (f"{policy.compute} peak", roofline.matmul[policy.compute], roofline.bandwidth),
        path,
    )


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), model=ModelShape(), train=TrainConfig())
