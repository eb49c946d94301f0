"""What one device of a mesh holds, computes and receives, by the sharding table: the mesh needs no devices, nothing is
compiled, and arrays exist as shapes only.

The seconds of a step are at least those of each of three bounds: matmuls at the peak, operands and results moved once
through HBM, and bytes received at the links' full speed. A step that overlaps nothing takes their sum.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from efflm import trees
from efflm.config.model import BlockConfig, ModelConfig
from efflm.config.train import REMAT, TrainConfig
from efflm.model import placement
from efflm.ops.output_loss import chunk_count
from efflm.parallel import meshes
from efflm.plan import work
from efflm.plan.hardware import Hardware
from efflm.plan.work import FLOAT, ITEMSIZE, Work
from efflm.precision import POLICIES, Policy
from efflm.train import aot, trainer
from efflm.train.step import TrainState

Traffic = dict[tuple[str, ...], float]  # {axes of the mesh: bytes that a device receives from the others along them}


def abstract_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, sequence, tensor), meshes.AXES)


def group(axes: tuple[str, ...], mesh: Mesh) -> tuple[int, ...]:
    """The devices that share all coordinates with device 0 but those of `axes`."""
    sides = [mesh.shape[name] for name in meshes.AXES]
    index = tuple(slice(None) if name in axes else 0 for name in meshes.AXES)
    return tuple(np.arange(math.prod(sides)).reshape(sides)[index].ravel().tolist())


# --- held ------------------------------------------------------------------------------------------------------------


def state(config: ModelConfig, train: TrainConfig) -> TrainState:
    """What training holds between steps, as shapes."""
    return trainer.prepared(aot.random_task(config, train), abstract_mesh())[0]


def held_bytes(tree: Any, mesh: Mesh) -> int:
    """Bytes on one device of weights, compressed ones too, or of a training state: under fsdp=N, a matrix whose width N
    divides costs 1/N, any other array itself (ZeRO stage 3, Rajbhandari 2019, arXiv 1910.02054, section 5)."""
    return part_bytes(placement.placed(tree, mesh))


def part_bytes(tree: Any) -> int:
    """Bytes on one device of arrays by their shardings; they may be abstract."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def missing_bytes(weights: Any, mesh: Mesh) -> int:
    """Bytes of the weights that the matmuls of a device read, cut along tensor alone, and that it does not hold."""
    return held_bytes(weights, abstract_mesh(**{**mesh.shape, "fsdp": 1})) - held_bytes(weights, mesh)


@functools.cache  # a search asks the same of many meshes
def stored_bytes(config: ModelConfig, length: int, policy: str, scan: bool, remat: str) -> int:
    """What the forward pass of a sequence hands to the backward pass: the arrays that jax.vjp keeps, without those that
    do not grow with the sequences, such as weights. A compiler may keep fewer, or one twice."""
    train = TrainConfig(policy=policy, scan=scan, remat=remat)
    loss_fn, weights = aot.random_task(config, train).loss_fn, state(config, train).trainable
    pull = lambda weights, batch, key: jax.vjp(lambda w: loss_fn(w, {}, batch, key)[0], weights)[1]

    def kept(rows: int) -> int:
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        batch = dict.fromkeys(aot.random_rows(1, 1, config.vocabulary), tokens)
        return trees.nbytes(jax.tree.leaves(jax.eval_shape(pull, weights, batch, jax.random.key(0))))

    return kept(2) - kept(1)


# --- computed --------------------------------------------------------------------------------------------------------


def local(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model that one device computes: its heads, its part of the feed-forward width and of the vocabulary."""
    n = mesh.shape["tensor"]
    cut = lambda size: size // n if size % n == 0 else size

    def part(block: BlockConfig) -> BlockConfig:
        heads, kv_heads = cut(block.heads), block.kv_heads
        if heads < block.heads:  # at least one: where there are fewer than devices, several compute the same
            kv_heads = math.gcd(heads, max(1, kv_heads // n))
        return dataclasses.replace(block, heads=heads, kv_heads=kv_heads, mlp_dim=cut(block.mlp_dim))

    return dataclasses.replace(config, vocabulary=cut(config.vocabulary), blocks=tuple(map(part, config.blocks)))


def train_work(config: ModelConfig, train: TrainConfig, mesh: Mesh, state: TrainState) -> Work:
    """The matmuls of a training step, padding and rematerialization included, and the bytes that they and the update
    move through HBM."""
    share = held_bytes(state.trainable, mesh) / trees.nbytes(state.trainable)
    update = work.update(config, train, trees.nbytes(state.optimizer)) * share
    rows = train.batch * mesh.shape["tensor"] / mesh.size  # of a sequence that is split, its part
    return work.total(work.train_step(local(config, mesh), train, rows, train.length)) + update


def infer_work(
    config: ModelConfig, phase: str, rows: int, length: int, policy: Policy, mesh: Mesh, weights: int
) -> Work:
    """The matmuls of prefill, or of one decoded token for each sequence. weights: bytes of those that a device reads,
    each once."""
    mine, rows = local(config, mesh), rows / (mesh.shape["data"] * mesh.shape["fsdp"])
    found = work.total({"prefill": work.prefill, "decode": work.decode}[phase](mine, rows, length, policy))
    return Work(found.flops, found.nbytes - work.weight_bytes(mine, policy) + weights)


# --- received --------------------------------------------------------------------------------------------------------


def train_traffic(config: ModelConfig, train: TrainConfig, mesh: Mesh, weights: Any) -> Traffic:
    """Of a training step: weights are gathered along fsdp for the forward and for the backward pass and gradients
    scattered, those of the output layer once for each chunk of the loss; gradients are all-reduced along data and
    sequence, partial sums along tensor; keys and values are gathered along sequence. Left out is what embeddings and
    norms exchange, and what a compiler gathers again."""
    policy, again, layers = POLICIES[train.policy], REMAT[train.remat], len(config.blocks)
    stored, low = ITEMSIZE[policy.param], ITEMSIZE[policy.compute]
    sequence, copies = mesh.shape["sequence"], mesh.shape["data"] * mesh.shape["sequence"]
    rows = train.batch * mesh.shape["tensor"] * sequence / mesh.size
    missing = missing_bytes(weights, mesh) / stored
    chunks = train.accumulate * (chunk_count(train.batch // train.accumulate, train.length) - 1)
    name = "embedding" if config.tied else "unembedding"
    output = chunks * missing_bytes({name: weights[name]}, mesh) / stored
    gradients = FLOAT * held_bytes(weights, mesh) / stored
    pairs = sum(2 * block.kv_heads * block.head_dim for block in local(config, mesh).blocks)
    rounds = 3 + again.attention  # ahead, again, and their gradients back in float32, twice as wide
    return {
        ("fsdp",): train.accumulate * (2 * low + FLOAT) * missing + FLOAT * output,
        ("data", "sequence"): 2 * (copies - 1) / copies * gradients,
        ("tensor",): (4 + again.projections) * layers * partial_sum(config, rows * train.length / sequence, mesh),
        ("sequence",): (sequence - 1) / sequence * rounds * low * pairs * rows * train.length,
    }


def infer_traffic(config: ModelConfig, tokens: int, mesh: Mesh, weights: Any) -> Traffic:
    """Of prefill or decode: weights are gathered along fsdp, and partial sums of a layer's two sub-layers all-reduced
    along tensor. tokens: read by all devices together."""
    mine = tokens / (mesh.shape["data"] * mesh.shape["fsdp"])
    sums = 2 * len(config.blocks) * partial_sum(config, mine, mesh)
    return {("fsdp",): missing_bytes(weights, mesh), ("tensor",): sums}


def partial_sum(config: ModelConfig, tokens: float, mesh: Mesh) -> float:
    """Bytes received to all-reduce a sub-layer's results for so many tokens, in float32, along tensor."""
    return 2 * (mesh.shape["tensor"] - 1) / mesh.shape["tensor"] * tokens * config.width * FLOAT


def seconds(mine: Work, traffic: Traffic, chip: Hardware, dtype: str, mesh: Mesh) -> dict[str, float]:
    """{compute, memory, network: the least time it takes}."""
    received = (each / chip.received_a_second(group(axes, mesh), mesh.size) for axes, each in traffic.items())
    return {"compute": mine.flops / chip.peak(dtype), "memory": mine.nbytes / chip.bandwidth, "network": sum(received)}
