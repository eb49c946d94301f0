"""What one device of a mesh holds, and the least time it needs, in a training step, prefill or decode: closed form.

bytes: of weights, gradients and moments exactly, by the sharding table. Under fsdp=N, a leaf whose width N divides
costs 1/N, any other costs itself (ZeRO stage 3, Rajbhandari 2019, arXiv 1910.02054, section 5). Activations and
temporaries by plan.memory, which is written from the CPU's program: an estimate, to be shown beside the compiler's.

time: three bounds, none of which a real step beats: matmuls at the peak, each operand and result moved once through
HBM, and all bytes received at the links' full speed. `seconds` is the largest of the three, as if the others were
hidden behind it; a step that overlaps nothing takes their sum.
"""

import dataclasses
import functools
from typing import Any

from jax.sharding import AbstractMesh

from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import cost
from efflm.model.cost import FLOAT, ITEMSIZE, Work
from efflm.plan import device, memory
from efflm.plan.collectives import Collective
from efflm.plan.hardware import Hardware
from efflm.precision import POLICIES, Policy

# A search asks the same of many meshes.
_parameters = functools.cache(lambda config: sum(cost.parameters(config).values()))
_optimizer_bytes = functools.cache(cost.optimizer_bytes)
_train_step = functools.cache(cost.train_step)
_update = functools.cache(cost.update)
_moments = functools.cache(memory.moments)


# --- bytes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device in a training step. activations: and all other temporaries, at the peak."""

    weights: float
    gradients: float
    optimizer: float
    batch: float
    activations: float

    @property
    def arguments(self) -> float:
        return self.weights + self.optimizer + self.batch

    @property
    def temporaries(self) -> float:
        return self.gradients + self.activations

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Served:
    """Bytes on one device in prefill, which returns the cache, or decode, which is given it; without temporaries."""

    weights: float
    cache: float
    decoding: bool

    @property
    def arguments(self) -> float:
        return self.weights + self.cache * self.decoding

    @property
    def total(self) -> float:
        return self.weights + self.cache


def held(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh, platform: str = "cpu") -> Held:
    """Bytes of a training step on one device; the moments exactly for rules that keep whole ones (adamw, adam, ...).

    platform: as in plan.memory.moments.
    """
    count = device.weight_count(config, mesh)
    gradients, rows = count * FLOAT, train.batch / (mesh.shape["data"] * mesh.shape["fsdp"])
    return Held(
        weights=count * ITEMSIZE[POLICIES[train.policy].param],
        gradients=gradients,
        optimizer=_optimizer_bytes(config, train.optimizer) * (count / _parameters(config)),
        batch=4 * 4 * rows * train.length,  # four int32 for each token
        activations=max(0.0, _temporaries(config, train, mesh, platform) - gradients),
    )


def _temporaries(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh, platform: str) -> float:
    n, low = mesh.shape["fsdp"], ITEMSIZE[POLICIES[train.policy].compute]
    rows, length = device.rows_and_length(train.batch, train.length, mesh)
    found = _moments(device.local(config, mesh), train, rows, length, platform)
    layers = 2 * device.largest_layer(config, mesh) * low * (n > 1)  # gathered: one in use, one on its way
    return max(found.update.total(n), *(layers + moment.total(n) for moment in found.passes))


def served(
    params: Any, config: ModelConfig, phase: str, rows: int, length: int, policy: Policy, mesh: AbstractMesh
) -> Served:
    """Bytes of prefill or decode on one device, with the abstract weights `params`, which may be compressed."""
    cache = cache_bytes(config, rows, length, policy, mesh)
    return Served(device.tree_bytes(params, mesh), cache, phase == "decode")


def cache_bytes(config: ModelConfig, rows: int, cache_length: int, policy: Policy, mesh: AbstractMesh) -> float:
    """Keys and values on one device, as infer.ahead spreads them."""
    n, (rows, _) = mesh.shape["tensor"], device.rows_and_length(rows, cache_length, mesh)
    heads = lambda block: block.kv_heads // n if block.kv_heads % n == 0 else block.kv_heads
    blocks = tuple(dataclasses.replace(block, kv_heads=heads(block)) for block in config.blocks)
    return cost.kv_cache_bytes(dataclasses.replace(config, blocks=blocks), rows, cache_length, policy)


# --- work ------------------------------------------------------------------------------------------------------------


def train_work(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> Work:
    """The matmuls of one device, padding and rematerialization included, and the bytes they move through its HBM."""
    mine, (rows, length) = device.local(config, mesh), device.rows_and_length(train.batch, train.length, mesh)
    whole = cost.total(_train_step(mine, train, rows, train.length))  # queries see keys of the whole sequence ...
    flops = whole.flops / mesh.shape["sequence"]  # ... but are those of a part
    update = _update(mine, train) * (device.weight_count(config, mesh) / _parameters(mine))
    return Work(flops, cost.total(_train_step(mine, train, rows, length)).nbytes) + update


def infer_work(
    config: ModelConfig,
    phase: str,
    rows: int,
    cache_length: int,
    policy: Policy,
    mesh: AbstractMesh,
    weight_bytes: float = 0,
) -> Work:
    """The matmuls of prefill or of one decoded token for each sequence.

    weight_bytes: what one device holds of the weights, where that is not the policy's: compressed ones move less.
    """
    mine, (rows, _) = device.local(config, mesh), device.rows_and_length(rows, cache_length, mesh)
    work = cost.total({"prefill": cost.prefill, "decode": cost.decode}[phase](mine, rows, cache_length, policy))
    plain = device.weight_count(config, mesh) * ITEMSIZE[policy.param]
    smaller = weight_bytes / plain if weight_bytes else 1.0
    return Work(work.flops, work.nbytes - (1 - smaller) * cost.weight_bytes(mine, policy))


# --- time ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The least seconds that each of the three takes."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def unhidden(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def predict(work: Work, traffic: list[Collective], hardware: Hardware, dtype: str, devices: int) -> Prediction:
    """Of the work and the traffic of one device."""
    network = sum(each.nbytes / hardware.received_a_second(each.group, devices) for each in traffic)
    return Prediction(work.flops / hardware.peak(dtype), work.nbytes / hardware.bandwidth, network)
