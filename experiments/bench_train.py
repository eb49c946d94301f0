"""Training speed by precision policy, beside a peer's: tokens/s, model FLOP utilization, compile time, memory.

    bash launch/run.sh experiments.bench_train
    bash launch/run.sh experiments.bench_train --peer="PYTHON torch_train.py"

Expect one JSON line a policy: name, tokens_per_second (median of the rounds), mfu (of the devices' own measured
matrix-product peak in the policy's compute dtype), compile_seconds, peak_bytes (arguments and temporaries of the
compiled step). With a peer, a command that prints JSON lines with `dtype` and `tokens_per_second`, the two run in
turn, one after the other and never at once, and each line has the ratio of medians to the peer's best (float32 is
compared with its float32, everything else against all of it) and the least and greatest ratio of a round.
"""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from efflm.config import HostsConfig, InputError, MeshConfig, ModelShape, TrainConfig, flag, require
from efflm.evaluate import machine
from efflm.flags import launch
from efflm.model import cost, init_params, sharding, stack_blocks
from efflm.precision import POLICIES, cast, loss_scale_for
from efflm.train import losses, optimizer
from efflm.train.step import init_state, make_step, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    policies: str = flag(",".join(POLICIES), "policies to measure, joined by commas")
    rounds: int = flag(3, "times everything is measured, in turn")
    steps: int = flag(7, "timed steps of a policy in a round, after one to warm up")
    peer: str = flag("", "command of a peer to run in turn; it prints JSON lines")

    def __post_init__(self):
        for name in self.policies.split(","):
            require(name in POLICIES, f"policies holds {name!r}: choose among {', '.join(POLICIES)}")
        for name in ("rounds", "steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")


class Trainer:
    """A compiled training step of one policy on random tokens, ready to be timed."""

    def __init__(self, shape: ModelShape, train: TrainConfig, policy_name: str, mesh: Mesh):
        config, policy = shape.config(), POLICIES[policy_name]
        params = init_params(config, 0, mesh)
        params = cast(stack_blocks(params, config) if train.scan else params, policy.param)
        tx = optimizer.make(train)
        state = init_state(params, tx, mesh, loss_scale_for(policy))
        loss = losses.language_model_loss(config, policy, scanned=train.scan, remat=train.remat, z_loss=train.z_loss)
        step = make_step(loss, tx, 0, state, train.accumulate)
        batch = place(random_rows(train.batch, train.length, config.vocabulary), mesh)
        start = time.perf_counter()
        compiled = step.lower(state, {}, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        self.peak_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.tokens = train.batch * train.length
        self.dtype = policy.compute
        self.run = lambda state: compiled(state, {}, batch)
        self.state, _ = jax.block_until_ready(self.run(state))

    def seconds(self, steps: int) -> list[float]:
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            self.state, _ = jax.block_until_ready(self.run(self.state))
            times.append(time.perf_counter() - start)
        return times[1:]


def random_rows(batch: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """A batch as data.packing makes it: one document a row."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((batch, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
    }


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
    names, devices = run.policies.split(","), sharding.mesh_for(mesh, train.batch, train.length)
    trainers = {name: Trainer(model, train, name, devices) for name in names}
    # Fake devices of a CPU share its cores.
    peak_devices = 1 if jax.default_backend() == "cpu" else devices.size
    peaks = {dtype: machine.matmul_peak(dtype, 2048) for dtype in {t.dtype for t in trainers.values()}}
    flops = cost.train_flops(model.config(), batch=train.batch, length=train.length)
    seconds = {name: [] for name in names}  # a list a round
    theirs = []
    for _ in range(run.rounds):
        for name, trainer in trainers.items():
            seconds[name].append(trainer.seconds(run.steps))
        if run.peer:
            theirs.append(run_peer(run.peer))
    for name, trainer in trainers.items():
        rates = [trainer.tokens / statistics.median(times) for times in seconds[name]]
        rate = statistics.median(rates)
        line = {
            "name": f"train_{name}",
            "tokens_per_second": round(rate, 1),
            "mfu": round(flops / trainer.tokens * rate / (peak_devices * peaks[trainer.dtype]), 4),
            "compile_seconds": round(trainer.compile_seconds, 2),
            "peak_bytes": trainer.peak_bytes,
        }
        if theirs:
            peers = [peer_rate(lines, name) for lines in theirs]
            ratios = [ours / peer for ours, peer in zip(rates, peers)]
            line |= {
                "ratio": round(rate / statistics.median(peers), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "peer_tokens_per_second": round(statistics.median(peers), 1),
            }
        print(json.dumps(line), flush=True)


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
