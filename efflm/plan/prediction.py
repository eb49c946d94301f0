"""The least time that one device of a mesh needs for a training step, prefill or decode: three bounds, none of which a
real step beats. Matmuls at the peak, each operand and result moved once through HBM, and all bytes received at the
links' full speed. `seconds` is the largest, as if the others were hidden behind it; a step that overlaps nothing takes
their sum.
"""

import dataclasses
import functools

from jax.sharding import AbstractMesh

from efflm import trees
from efflm.config.model import ModelConfig
from efflm.config.train import REMAT, TrainConfig
from efflm.ops.output_loss import chunk_count
from efflm.parallel import meshes
from efflm.plan import device, work
from efflm.plan.collectives import Collective
from efflm.plan.hardware import Hardware
from efflm.plan.work import FLOAT, ITEMSIZE, Work
from efflm.precision import POLICIES, Policy

_train_step = functools.cache(work.train_step)  # a search asks the same of many meshes


def train_work(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> Work:
    """The matmuls of one device, padding and rematerialization included, and the bytes they move through its HBM."""
    mine, (rows, length) = device.local(config, mesh), device.rows_and_length(train.batch, train.length, mesh)
    whole = work.total(_train_step(mine, train, rows, train.length))  # queries see keys of the whole sequence ...
    flops = whole.flops / mesh.shape["sequence"]  # ... but are those of a part
    state = device.state(config, train)
    share = device.tree_bytes(state.trainable, mesh) / trees.nbytes(state.trainable)
    update = work.update(config, train, trees.nbytes(state.optimizer)) * share
    return Work(flops, work.total(_train_step(mine, train, rows, length)).nbytes) + update


def infer_work(
    config: ModelConfig, phase: str, rows: int, cache_length: int, policy: Policy, mesh: AbstractMesh, weights: float
) -> Work:
    """The matmuls of prefill or of one decoded token for each sequence. weights: bytes that one device holds of them,
    which are read once."""
    mine, (rows, _) = device.local(config, mesh), device.rows_and_length(rows, cache_length, mesh)
    found = work.total({"prefill": work.prefill, "decode": work.decode}[phase](mine, rows, cache_length, policy))
    return Work(found.flops, found.nbytes - work.weight_bytes(mine, policy) + weights)


def train_traffic(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> list[Collective]:
    """The collectives that a training step needs by the sharding table, with the bytes that one device receives.

    Weights are gathered twice (forward and backward) and gradients scattered along fsdp, the output layer's once for
    each chunk of the loss; gradients are reduced along data; partial sums along tensor; keys and values are gathered
    along sequence.
    """
    low, layers, again = ITEMSIZE[POLICIES[train.policy].compute], len(config.blocks), REMAT[train.remat]
    rows, length = device.rows_and_length(train.batch, train.length, mesh)
    data, fsdp, sequence, tensor = (mesh.shape[name] for name in meshes.AXES)
    share = lambda n: (n - 1) / n
    cut = device.gathered(config, mesh)
    passes = train.accumulate * share(fsdp) * sum(cut.values())
    chunks = train.accumulate * (chunk_count(train.batch // train.accumulate, train.length) - 1)
    output = chunks * share(fsdp) * cut.get("embedding" if config.tied else "unembedding", 0)
    of_tokens = FLOAT * rows * length * config.width
    copies = tuple(name for name, size in (("data", data), ("sequence", sequence)) if size > 1)
    gradients = device.gradient_bytes(config, train, mesh)
    sums = 4 + again.projections  # two ahead, two back, and attention's output again
    pairs = sum(2 * block.kv_heads * block.head_dim for block in device.local(config, mesh).blocks)
    rounds = 3 + again.attention  # ahead, again, and their gradients back in float32, twice as wide
    found = (
        ("all-gather", "weights", ("fsdp",), 2 * low * passes),
        ("reduce-scatter", "gradients", ("fsdp",), FLOAT * passes),
        ("all-gather", "weight of the loss", ("fsdp",), low * output),
        ("reduce-scatter", "gradient of the loss", ("fsdp",), FLOAT * output),
        ("all-to-all", "embeddings", ("fsdp",), 2 * share(fsdp) * of_tokens),  # of all tokens, by parts of its width
        ("all-reduce", "gradients", copies, 2 * share(data * sequence) * gradients),
        ("all-reduce", "partial sums", ("tensor",), sums * 2 * share(tensor) * of_tokens * layers),
        ("all-gather", "keys and values", ("sequence",), rounds * low * pairs * rows * train.length * share(sequence)),
    )
    return [
        Collective(kind, name, device.group(axes, mesh), "", nbytes, 1)
        for kind, name, axes, nbytes in found
        if nbytes > 0
    ]


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


def predict(mine: Work, traffic: list[Collective], hardware: Hardware, dtype: str, devices: int) -> Prediction:
    """Of the work and the traffic of one device."""
    compute, memory = mine.flops / hardware.peak(dtype), mine.nbytes / hardware.bandwidth
    return Prediction(compute, memory, hardware.seconds(traffic, devices))
