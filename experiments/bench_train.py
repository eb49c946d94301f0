"""Training speed by precision policy, compared with another program's: tokens/s, MFU, compile time, memory.

    bash launch/run.sh experiments.bench_train --policies=float32,bfloat16 --rounds=5
    bash launch/run.sh experiments.bench_train --peer="PYTHON torch_train.py"

Expect after each round one JSON line a policy, of the rounds so far, so that the last lines count and an interrupt
loses one round: name, policy (the one that auto stands for), rounds, tokens_per_second (median of the rounds), mfu (of
the devices' own measured matmul peak in the policy's compute dtype), compile_seconds, peak_bytes (arguments and
temporaries of the compiled step). On stderr are what auto picked and why, and a bar that says how long it still takes.
With a peer, a command that prints JSON lines with `dtype` and `tokens_per_second`, the two run in turn, one after the
other and never at once, and each line has the ratio of medians to the peer's best (float32 is compared with its
float32, everything else, auto too, against all of it) and the least and greatest ratio of a round. With --busy=N the
steps are also timed beside N processes that each keep a core busy, in turn with those without (A B A B):
busy_tokens_per_second, and busy_ratio, the median of the rounds' ratios of that to the speed without.
"""

import dataclasses
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from typing import Any

import jax

from efflm.cli import progress, run_directory
from efflm.cli.flags import launch
from efflm.config import InputError, flag, require
from efflm.config.model import ModelShape
from efflm.config.parallel import HostsConfig, MeshConfig
from efflm.config.train import TrainConfig
from efflm.evaluate import machine
from efflm.model import autotune, cost
from efflm.parallel import meshes
from efflm.precision import POLICIES
from efflm.train.aot import timed_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    policies: str = flag(
        ",".join(POLICIES), "policies to measure, joined by commas; auto: also as --train.policy=auto chooses it"
    )
    rounds: int = flag(3, "times everything is measured, in turn")
    steps: int = flag(7, "timed steps of a policy in a round, after one to warm up")
    busy: int = flag(0, "processes that each keep a core busy, beside which steps are timed too; 0: none")
    peer: str = flag("", "command of a peer to run in turn; it prints JSON lines")

    def __post_init__(self):
        for name in self.policies.split(","):
            known = (*POLICIES, autotune.AUTO)
            require(name in known, f"policies holds {name!r}: choose among {', '.join(known)}")
        for name in ("rounds", "steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        require(self.busy >= 0, f"busy is {self.busy}, but must be 0 or more processes")


def run_peer(command: str) -> list[dict[str, Any]]:
    """The JSON lines a peer prints, in an environment without our own settings. Raises InputError."""
    bare = {
        name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XLA_FLAGS", "PYTHONPATH")
    }
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, env=bare)
    except OSError as error:
        raise InputError(f"the peer {command!r} cannot be run ({error.strerror}): check the command") from None
    require(done.returncode == 0, f"the peer {command!r} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    require(bool(lines), f"the peer {command!r} printed no JSON lines")
    return lines


def peer_rate(lines: list[dict[str, Any]], policy: str) -> float:
    """The peer's best among what a policy is compared with."""
    return max(line["tokens_per_second"] for line in lines if policy != "float32" or line["dtype"] == "float32")


def main(run: Run, model: ModelShape, train: TrainConfig, mesh: MeshConfig) -> None:
    require(not run.peer or jax.process_count() == 1, "a peer is measured on one host only: leave --peer out")
    names = run.policies.split(",")
    devices = meshes.mesh_for(mesh, train.batch, train.length, train.accumulate)
    config, tokens = model.config(), train.batch * train.length
    say = lambda line: print(line, file=sys.stderr)
    chosen = {name: autotune.training(config, dataclasses.replace(train, policy=name), say) for name in names}
    steps = {name: timed_step(config, each, devices) for name, each in chosen.items()}
    dtypes = {name: POLICIES[each.policy].compute for name, each in chosen.items()}
    with progress.bar("measuring the machine", live=False):
        peaks = {dtype: machine.matmul_peak(dtype, 2048) for dtype in set(dtypes.values())}
    # Fake devices of a CPU share its cores.
    peak_devices = 1 if jax.default_backend() == "cpu" else devices.size
    flops = cost.train_flops(config, batch=train.batch, length=train.length)
    seconds = {name: [] for name in names}  # a list a round
    crowded = {name: [] for name in names}  # likewise, beside busy processes
    theirs = []
    runs = 1 + run.steps
    ticks = itertools.count(1)
    turns = {False: seconds} | ({True: crowded} if run.busy else {})
    total = run.rounds * (len(names) * runs * len(turns) + bool(run.peer))
    with machine.rivals(run.busy) as beside_rivals, progress.bar("measuring", total, live=False) as update:
        for round_ in range(run.rounds):
            for name, step in steps.items():
                for busy, kept in turns.items():
                    beside_rivals(busy)
                    times = []
                    for took in itertools.islice(step.seconds, runs):
                        times.append(took)
                        update(next(ticks))
                    kept[name].append(times[1:])
                beside_rivals(False)
            if run.peer:
                theirs.append(run_peer(run.peer))
                update(next(ticks))
            for name, step in steps.items():
                rates, slowed = (
                    [tokens / statistics.median(times) for times in each[name]] for each in (seconds, crowded)
                )
                line = {
                    "name": f"train_{name}",
                    "policy": chosen[name].policy,
                    "rounds": round_ + 1,
                    "tokens_per_second": round(statistics.median(rates), 1),
                    "mfu": round(flops / tokens * statistics.median(rates) / (peak_devices * peaks[dtypes[name]]), 4),
                    "compile_seconds": round(step.compile_seconds, 2),
                    "peak_bytes": step.peak_bytes,
                }
                print(
                    run_directory.to_json(line | beside_busy(rates, slowed) | beside(theirs, name, rates)), flush=True
                )


def beside_busy(rates: list[float], slowed: list[float]) -> dict[str, float]:
    """The rates beside busy processes, and the median of each round's ratio to that without; nothing without them."""
    if not slowed:
        return {}
    ratios = [busy / quiet for busy, quiet in zip(slowed, rates, strict=True)]
    return {
        "busy_tokens_per_second": round(statistics.median(slowed), 1),
        "busy_ratio": round(statistics.median(ratios), 3),
        "busy_low": round(min(ratios), 3),
        "busy_high": round(max(ratios), 3),
    }


def beside(theirs: list[list[dict[str, Any]]], policy: str, rates: list[float]) -> dict[str, float]:
    """The rates of all rounds compared with the peer's; nothing without a peer."""
    if not theirs:
        return {}
    peers = [peer_rate(lines, policy) for lines in theirs]
    ratios = [ours / peer for ours, peer in zip(rates, peers)]
    return {
        "ratio": round(statistics.median(rates) / statistics.median(peers), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "peer_tokens_per_second": round(statistics.median(peers), 1),
    }


PEER_SHAPE = ModelShape(family="gpt2", layers=6, width=384, heads=6, kv_heads=6, mlp_dim=1536, max_length=256)

if __name__ == "__main__":
    launch(
        main,
        __doc__,
        run=Run(),
        model=PEER_SHAPE,
        train=TrainConfig(batch=16, length=256),
        mesh=MeshConfig(),
        hosts=HostsConfig(),
    )
