"""Ranking the ways to train a model on so many devices, by the closed form: nothing is compiled."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from efflm.cli import progress
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.parallel import meshes
from efflm.plan import prediction
from efflm.plan.device import abstract_mesh
from efflm.plan.hardware import Hardware
from efflm.plan.prediction import Held, Prediction
from efflm.plan.traffic import train_traffic
from efflm.precision import POLICIES

REMATS = ("none", "dots", "full")
SHORTEST = 1024  # tokens of a sequence that are worth a device of their own


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train: sizes of the mesh axes, the training config, and what is predicted of it."""

    sizes: dict[str, int]
    train: TrainConfig
    held: Held
    prediction: Prediction
    fits: bool

    @property
    def tokens_a_second(self) -> float:
        return self.train.batch * self.train.length / self.prediction.seconds


def mesh_sizes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to write the number of devices as a product of the mesh axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(meshes.AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(meshes.AXES, sizes))


def possible(config: ModelConfig, batch: int, length: int, sizes: dict[str, int]) -> bool:
    """Whether the mesh divides all that it splits: sequences, tokens, key-value heads, widths."""
    tensor = sizes["tensor"]
    blocks = all(block.kv_heads % tensor == 0 and block.mlp_dim % tensor == 0 for block in set(config.blocks))
    rows = batch % (sizes["data"] * sizes["fsdp"]) == 0 and length % sizes["sequence"] == 0
    rows = rows and (sizes["sequence"] == 1 or length // sizes["sequence"] >= SHORTEST)
    return blocks and rows and config.width % sizes["fsdp"] == 0


def search(config: ModelConfig, train: TrainConfig, hardware: Hardware, devices: int) -> list[Candidate]:
    """Meshes, remat policies, and batches of a quarter to four times the config's: the fastest first.

    Those that fit come before those that do not; of equals the one that holds less.
    """
    out = []
    batches = [batch for batch in (train.batch // 4, train.batch // 2, *(train.batch * n for n in (1, 2, 4))) if batch]
    ways = list(itertools.product(mesh_sizes(devices), batches, REMATS))
    for sizes, batch, remat in progress.shown(ways, "ranking", len(ways)):
        if not possible(config, batch, train.length, sizes) or batch % train.accumulate:
            continue
        tried, mesh = dataclasses.replace(train, batch=batch, remat=remat), abstract_mesh(**sizes)
        held, work = prediction.held(config, tried, mesh, hardware.platform), prediction.train_work(config, tried, mesh)
        traffic, dtype = train_traffic(config, tried, mesh), POLICIES[train.policy].compute
        predicted = prediction.predict(work, traffic, hardware, dtype, devices)
        out.append(Candidate(sizes, tried, held, predicted, held.total <= hardware.memory))
    return sorted(out, key=lambda each: (not each.fits, -each.tokens_a_second, each.held.total))
