"""Ranking the ways to train a model on so many devices by what is exact: FLOPs, bytes of state and of collectives.

Nothing is compiled. What activations take is what the forward pass stores, so whether a way fits is an estimate, and
the compiler has the last word.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from efflm.cli import progress
from efflm.config.model import ModelConfig
from efflm.config.train import REMAT, TrainConfig
from efflm.parallel import meshes
from efflm.plan import device, prediction
from efflm.plan.device import Held
from efflm.plan.hardware import Hardware
from efflm.plan.prediction import Prediction
from efflm.precision import POLICIES

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


def possible(config: ModelConfig, train: TrainConfig, sizes: dict[str, int]) -> bool:
    """Whether the mesh divides all that it splits: sequences, tokens, key-value heads, widths."""
    tensor, sequence, rows = sizes["tensor"], sizes["sequence"], train.accumulate * sizes["data"] * sizes["fsdp"]
    blocks = all(block.kv_heads % tensor == 0 and block.mlp_dim % tensor == 0 for block in set(config.blocks))
    long = train.length % sequence == 0 and (sequence == 1 or train.length // sequence >= SHORTEST)
    return blocks and long and train.batch % rows == 0 and config.width % sizes["fsdp"] == 0


def search(config: ModelConfig, train: TrainConfig, hardware: Hardware, devices: int) -> list[Candidate]:
    """Meshes, remat policies, and batches of a quarter to four times the config's: the fastest first.

    Those that fit come before those that do not; of equals the one that holds less.
    """
    parts = train.accumulate
    batches = {int(train.batch * times) for times in (0.25, 0.5, 1, 2, 4) if train.batch * times % parts == 0} - {0}
    ways = itertools.product(mesh_sizes(devices), sorted(batches), REMAT)
    tried = [(sizes, dataclasses.replace(train, batch=batch, remat=remat)) for sizes, batch, remat in ways]
    tried, out = [(sizes, each) for sizes, each in tried if possible(config, each, sizes)], []
    for sizes, each in progress.shown(tried, "ranking", len(tried)):
        mesh, dtype = device.abstract_mesh(**sizes), POLICIES[train.policy].compute
        held, work = device.held(config, each, mesh), prediction.train_work(config, each, mesh)
        predicted = prediction.predict(work, prediction.train_traffic(config, each, mesh), hardware, dtype, devices)
        out.append(Candidate(sizes, each, held, predicted, held.total <= hardware.memory))
    return sorted(out, key=lambda each: (not each.fits, -each.tokens_a_second, each.held.total))
