"""Ranking the ways to train a model on so many devices by FLOPs and by bytes of state and of traffic.

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
from efflm.plan import device
from efflm.plan.hardware import Hardware
from efflm.plan.work import FLOAT, ITEMSIZE
from efflm.precision import POLICIES

SHORTEST = 1024  # tokens of a sequence that are worth a device of their own


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train: sizes of the mesh axes, the training config, the bytes of state and of the larger of gradients
    and stored activations on a device, whether they fit, and the bounds of a step (see device.seconds)."""

    sizes: dict[str, int]
    train: TrainConfig
    held: float
    fits: bool
    seconds: dict[str, float]

    @property
    def tokens_a_second(self) -> float:
        return self.train.batch * self.train.length / max(self.seconds.values())


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


def search(config: ModelConfig, train: TrainConfig, chip: Hardware, devices: int) -> list[Candidate]:
    """Meshes, remat policies, and batches of a quarter to four times the config's: the fastest first.

    Those that fit come before those that do not; of equals the one that holds less.
    """
    parts, policy, state = train.accumulate, POLICIES[train.policy], device.state(config, train)
    batches = {int(train.batch * times) for times in (0.25, 0.5, 1, 2, 4) if train.batch * times % parts == 0} - {0}
    ways = itertools.product(mesh_sizes(devices), sorted(batches), REMAT)
    tried = [(sizes, dataclasses.replace(train, batch=batch, remat=remat)) for sizes, batch, remat in ways]
    tried, out = [(sizes, each) for sizes, each in tried if possible(config, each, sizes)], []
    for sizes, each in progress.shown(tried, "ranking", len(tried)):
        mesh = device.abstract_mesh(**sizes)
        rows = each.batch / parts * sizes["tensor"] / devices  # at a time; of a sequence that is split, its part
        stored = device.stored_bytes(device.local(config, mesh), each.length, each.policy, each.scan, each.remat)
        gradients = device.held_bytes(state.trainable, mesh) * FLOAT / ITEMSIZE[policy.param]
        held = device.held_bytes(state, mesh) + max(gradients, rows * stored)
        work = device.train_work(config, each, mesh, state)
        traffic = device.train_traffic(config, each, mesh, state.trainable)
        seconds = device.seconds(work, traffic, chip, policy.compute, mesh)
        out.append(Candidate(sizes, each, held, held <= chip.memory, seconds))
    return sorted(out, key=lambda each: (not each.fits, -each.tokens_a_second, each.held))
