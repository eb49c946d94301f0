"""What one device of a mesh holds, does and hears in a training step, prefill or decode: in closed form.

bytes: of weights, gradients and moments exactly, by the sharding table. Under fsdp=N, a leaf whose width N divides
costs 1/N, any other costs itself (ZeRO stage 3, Rajbhandari 2019, arXiv 1910.02054, section 5). Activations and
temporaries by model.memory, which is written from the CPU's program: a guide, beside which a compiler's figure stands.

time: three bounds, none of which a real step beats: products at the peak, each operand and result moved once through
HBM, and all bytes received at the links' full speed. `seconds` is the largest of the three, as if the others were
hidden behind it; a step that overlaps nothing takes their sum.

traffic: what the partitioner has to move: weights gathered twice (forward and backward) and gradients scattered along
fsdp, the output layer's once for each chunk of the loss; gradients reduced along data; sums of partial products along
tensor; keys and values along sequence.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from efflm import trees
from efflm.config import BlockConfig, ModelConfig, TrainConfig
from efflm.evaluate.collectives import Collective
from efflm.evaluate.hardware import Hardware
from efflm.model import cost, memory, sharding
from efflm.model.cost import FLOAT, ITEMSIZE, Work
from efflm.precision import POLICIES, Policy

# Arrays of model.memory that are as large as weights, and so lie along fsdp like them
LIKE_WEIGHTS = (
    r"gradients? of the (embedding|output layer)|sums of gradients|gradients of all layers|layers' weights|and clipped"
)


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device. activations: all that lives besides, at its peak: activations and other temporaries."""

    weights: float
    gradients: float
    optimizer: float
    batch: float
    activations: float

    @property
    def arguments(self) -> float:
        return self.weights + self.optimizer + self.batch

    @property
    def total(self) -> float:
        return self.arguments + self.gradients + self.activations


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


# A search asks the same of many meshes.
_shapes = functools.cache(cost.shapes)
_parameters = functools.cache(lambda config: sum(cost.parameters(config).values()))
_optimizer_bytes = functools.cache(cost.optimizer_bytes)
_train_step = functools.cache(cost.train_step)
_moments = functools.cache(memory.moments)


def abstract_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh without devices: all that bytes and work depend on."""
    return AbstractMesh((data, fsdp, sequence, tensor), sharding.AXES)


def predict(work: Work, traffic: list[Collective], hardware: Hardware, dtype: str, devices: int) -> Prediction:
    """Of the work and the traffic of one device."""
    network = sum(each.nbytes / hardware.received_a_second(each.group, devices) for each in traffic)
    return Prediction(work.flops / hardware.peak(dtype), work.nbytes / hardware.bandwidth, network)


# --- bytes -----------------------------------------------------------------------------------------------------------


def parts(path: str, shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    """Into how many different parts a leaf is cut; each device holds one."""
    spec = sharding.partition_spec(path, shape, mesh)
    return math.prod(_size(axes, mesh) for axes in spec)


def _size(axes: str | tuple[str, ...] | None, mesh: AbstractMesh) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


@functools.cache
def weight_count(config: ModelConfig, mesh: AbstractMesh) -> int:
    """Weights on one device."""
    return sum(math.prod(shape) // parts(path, shape, mesh) for path, shape in _shapes(config).items())


def tree_bytes(tree: Any, mesh: AbstractMesh) -> int:
    """Bytes of an abstract tree, compressed weights included, on one device."""
    leaves = trees.flatten(tree, inside=True)
    return sum(leaf.size * leaf.dtype.itemsize // parts(path, leaf.shape, mesh) for path, leaf in leaves)


def cache_bytes(config: ModelConfig, rows: int, cache_length: int, policy: Policy, mesh: AbstractMesh) -> float:
    """Keys and values on one device, as infer.ahead spreads them."""
    n, (rows, _) = mesh.shape["tensor"], rows_and_length(rows, cache_length, mesh)
    cut = lambda block: dataclasses.replace(block, kv_heads=block.kv_heads // n) if block.kv_heads % n == 0 else block
    mine = [dataclasses.replace(block, heads=block.kv_heads) for block in config.blocks]
    return cost.kv_cache_bytes(dataclasses.replace(config, blocks=tuple(map(cut, mine))), rows, cache_length, policy)


def rows_and_length(batch: int, length: int, mesh: AbstractMesh) -> tuple[int, int]:
    """What one device reads of a batch."""
    return batch // (mesh.shape["data"] * mesh.shape["fsdp"]), length // mesh.shape["sequence"]


def local(config: ModelConfig, mesh: AbstractMesh) -> ModelConfig:
    """The model that one device computes: its heads, its part of the feed-forward width and of the vocabulary."""
    n = mesh.shape["tensor"]
    cut = lambda size: size // n if size % n == 0 else size
    one = lambda block: dataclasses.replace(
        block, heads=cut(block.heads), kv_heads=_kv_heads(block, n), mlp_dim=cut(block.mlp_dim)
    )
    return dataclasses.replace(
        config, vocabulary=cut(config.vocabulary), blocks=tuple(one(block) for block in config.blocks)
    )


def _kv_heads(block: BlockConfig, n: int) -> int:
    """At least one: where there are fewer than devices, several compute the same."""
    if block.heads % n:
        return block.kv_heads
    return max(1, block.kv_heads // n) if block.kv_heads % n == 0 or n % block.kv_heads == 0 else block.heads // n


def held(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> Held:
    """Bytes of a training step on one device; the moments exactly for rules that keep whole ones (adamw, adam, ...)."""
    policy, count = POLICIES[train.policy], weight_count(config, mesh)
    share = count / _parameters(config)
    gradients = count * FLOAT
    return Held(
        weights=count * ITEMSIZE[policy.param],
        gradients=gradients,
        optimizer=_optimizer_bytes(config, train.optimizer) * share,
        batch=4 * 4 * train.batch * train.length / _size(sharding.BATCH[0], mesh),  # four int32 for each token
        activations=max(0.0, _temporaries(config, train, mesh) - gradients),
    )


def _temporaries(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> float:
    policy = POLICIES[train.policy]
    rows, length = rows_and_length(train.batch, train.length, mesh)
    found = _moments(
        local(config, mesh),
        rows,
        length,
        policy,
        remat=train.remat,
        scanned=train.scan,
        accumulate=train.accumulate,
        optimizer=train.optimizer,
    )
    n = mesh.shape["fsdp"]
    sharded = lambda name: n if re.search(LIKE_WEIGHTS, name) else 1
    gathered = 2 * max(layer_weights(config, mesh)) * ITEMSIZE[policy.compute] * (n > 1)  # one in use, one on its way
    peak = lambda arrays: sum(nbytes / sharded(name) for name, nbytes in arrays.items())
    return max(peak(arrays) + gathered * (moment != "update") for moment, arrays in found.items())


@functools.cache
def layer_weights(config: ModelConfig, mesh: AbstractMesh) -> list[int]:
    """The weights that each layer's products read on one device, gathered along fsdp."""
    counts = [0] * len(config.blocks)
    for path, shape in _shapes(config).items():
        if path.startswith("block_"):
            counts[int(path.split("/")[0].removeprefix("block_"))] += math.prod(shape) // _tensor_parts(
                path, shape, mesh
            )
    return counts


def _tensor_parts(path: str, shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    return mesh.shape["tensor"] if "tensor" in sharding.partition_spec(path, shape, mesh) else 1


def _fsdp_parts(path: str, shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    return mesh.shape["fsdp"] if "fsdp" in sharding.partition_spec(path, shape, mesh) else 1


# --- work ------------------------------------------------------------------------------------------------------------


def train_work(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> Work:
    """The products of one device, padding and rematerialization included, and the bytes they move through its HBM."""
    policy, mine = POLICIES[train.policy], local(config, mesh)
    rows, length = rows_and_length(train.batch, train.length, mesh)
    settings = {"remat": train.remat, "accumulate": train.accumulate, "optimizer": train.optimizer}
    work = _train_step(mine, rows, train.length, policy, **settings)  # queries see keys of the whole row ...
    flops = sum(each.flops for name, each in work.items() if name != "optimizer") / mesh.shape["sequence"]  # of a part
    moved = _train_step(mine, rows, length, policy, **settings)
    share = weight_count(config, mesh) / _parameters(mine)
    update = work["optimizer"] * share
    return Work(flops, sum(each.nbytes for name, each in moved.items() if name != "optimizer")) + update


def infer_work(
    config: ModelConfig,
    phase: str,
    rows: int,
    cache_length: int,
    policy: Policy,
    mesh: AbstractMesh,
    weight_bytes: float = 0,
) -> Work:
    """The products of prefill or of one decoded token for each row.

    weight_bytes: what one device holds of the weights, where that is not the policy's: compressed ones move less.
    """
    mine, (rows, _) = local(config, mesh), rows_and_length(rows, cache_length, mesh)
    work = cost.total(
        cost.prefill(mine, rows, cache_length, policy)
        if phase == "prefill"
        else cost.decode(mine, rows, cache_length, policy)
    )
    plain = weight_count(config, mesh) * ITEMSIZE[policy.param]
    smaller = weight_bytes / plain if weight_bytes else 1.0
    return Work(work.flops, work.nbytes - (1 - smaller) * cost.weight_bytes(mine, policy))


# --- traffic ---------------------------------------------------------------------------------------------------------


def group(axes: tuple[str, ...], mesh: AbstractMesh) -> tuple[int, ...]:
    """The devices that share all coordinates with device 0 but those of `axes`."""
    sides = [mesh.shape[name] for name in sharding.AXES]
    index = tuple(slice(None) if name in axes else 0 for name in sharding.AXES)
    return tuple(np.arange(math.prod(sides)).reshape(sides)[index].ravel().tolist())


@functools.cache
def _sizes(config: ModelConfig, mesh: AbstractMesh) -> tuple[dict[str, float], dict[str, float]]:
    """{path: weights on a device, gathered along fsdp}: of all leaves, and of those that are cut along it."""
    shapes = _shapes(config)
    whole = {path: math.prod(shape) / _tensor_parts(path, shape, mesh) for path, shape in shapes.items()}
    return whole, {path: n for path, n in whole.items() if _fsdp_parts(path, shapes[path], mesh) > 1}


def train_traffic(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> list[Collective]:
    """The collectives that a training step needs, in closed form."""
    policy, (rows, length) = POLICIES[train.policy], rows_and_length(train.batch, train.length, mesh)
    data, fsdp, sequence, tensor = (mesh.shape[name] for name in sharding.AXES)
    whole, cut = _sizes(config, mesh)
    low, share = ITEMSIZE[policy.compute], (fsdp - 1) / fsdp
    out = [
        _collective("all-gather", "weights", ("fsdp",), 2 * train.accumulate * share * low * sum(cut.values()), mesh),
        _collective(
            "reduce-scatter", "gradients", ("fsdp",), train.accumulate * share * FLOAT * sum(cut.values()), mesh
        ),
    ]
    # The loss reads the output layer's weight, and hands on its gradient, for every chunk of tokens.
    output = cut.get("embedding" if config.tied else "unembedding", 0)
    chunks = train.accumulate * cost.loss_chunks(train.batch // train.accumulate, train.length) - train.accumulate
    out.append(_collective("all-gather", "weight of the loss", ("fsdp",), chunks * share * low * output, mesh))
    out.append(_collective("reduce-scatter", "gradient of the loss", ("fsdp",), chunks * share * FLOAT * output, mesh))
    looked_up = 2 * share * FLOAT * rows * length * config.width  # the embedding of all tokens, by parts of its width
    out.append(_collective("all-to-all", "embeddings", ("fsdp",), looked_up, mesh))
    copies = tuple(name for name, size in (("data", data), ("sequence", sequence)) if size > 1)
    of_device = sum(n / (fsdp if path in cut else 1) for path, n in whole.items())
    among = data * sequence
    out.append(_collective("all-reduce", "gradients", copies, 2 * (among - 1) / among * FLOAT * of_device, mesh))
    stream = FLOAT * rows * length * config.width * len(config.blocks)
    sums = 4 + (train.remat == "full")  # two ahead, two back, and attention's output again
    out.append(
        _collective("all-reduce", "partial products", ("tensor",), sums * 2 * (tensor - 1) / tensor * stream, mesh)
    )
    mine = local(config, mesh)
    pairs = sum(2 * block.kv_heads * block.head_dim for block in mine.blocks) * rows * train.length
    passes = 3 + (train.remat != "none")  # ahead, again, and their gradients back in float32, twice as wide
    moved = passes * low * pairs * (sequence - 1) / sequence
    out.append(_collective("all-gather", "keys and values", ("sequence",), moved, mesh))
    return [each for each in out if each.nbytes > 0]


def _collective(kind: str, name: str, axes: tuple[str, ...], nbytes: float, mesh: AbstractMesh) -> Collective:
    return Collective(kind, name, group(axes, mesh), "", nbytes, 1)
