"""What a device of a mesh receives from the others in a training step, in closed form.

It is what the partitioner has to move: weights gathered twice (forward and backward) and gradients scattered along
fsdp, the output layer's once for each chunk of the loss; gradients reduced along data; partial sums along tensor; keys
and values along sequence.
"""

from jax.sharding import AbstractMesh

from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model.cost import FLOAT, ITEMSIZE
from efflm.ops.output_loss import chunk_count
from efflm.parallel import meshes
from efflm.plan import device
from efflm.plan.collectives import Collective
from efflm.precision import POLICIES


def train_traffic(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> list[Collective]:
    """The collectives that a training step needs, with the bytes that one device receives."""
    low, layers, parts = ITEMSIZE[POLICIES[train.policy].compute], len(config.blocks), train.accumulate
    rows, length = device.rows_and_length(train.batch, train.length, mesh)
    data, fsdp, sequence, tensor = (mesh.shape[name] for name in meshes.AXES)
    share = lambda n: (n - 1) / n
    # Along fsdp
    cut = device.gathered_along_fsdp(config, mesh)
    passes = parts * share(fsdp) * sum(cut.values())
    # The loss reads the output layer's weight, and passes on its gradient, for every chunk of tokens.
    chunks = parts * chunk_count(train.batch // parts, train.length) - parts
    output = chunks * share(fsdp) * cut.get("embedding" if config.tied else "unembedding", 0)
    embedded = 2 * share(fsdp) * FLOAT * rows * length * config.width  # of all tokens, by parts of its width
    # Along the others
    copies = tuple(name for name, size in (("data", data), ("sequence", sequence)) if size > 1)
    gradients = 2 * share(data * sequence) * FLOAT * device.weight_count(config, mesh)
    sums = 4 + (train.remat == "full")  # two ahead, two back, and attention's output again
    partial = sums * 2 * share(tensor) * FLOAT * rows * length * config.width * layers
    pairs = sum(2 * block.kv_heads * block.head_dim for block in device.local(config, mesh).blocks)
    rounds = 3 + (train.remat != "none")  # ahead, again, and their gradients back in float32, twice as wide
    keys = rounds * low * pairs * rows * train.length * share(sequence)
    found = (
        ("all-gather", "weights", ("fsdp",), 2 * low * passes),
        ("reduce-scatter", "gradients", ("fsdp",), FLOAT * passes),
        ("all-gather", "weight of the loss", ("fsdp",), low * output),
        ("reduce-scatter", "gradient of the loss", ("fsdp",), FLOAT * output),
        ("all-to-all", "embeddings", ("fsdp",), embedded),
        ("all-reduce", "gradients", copies, gradients),
        ("all-reduce", "partial sums", ("tensor",), partial),
        ("all-gather", "keys and values", ("sequence",), keys),
    )
    return [
        Collective(kind, name, device.group(axes, mesh), "", nbytes, 1)
        for kind, name, axes, nbytes in found
        if nbytes > 0
    ]
