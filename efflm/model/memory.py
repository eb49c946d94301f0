"""Temporary memory of a compiled training step, in closed form: what lives between its arguments and its results.

The arguments (weights, optimizer state, batch) are donated and counted in model.cost. What comes on top is greatest
at one of four moments, each a table of arrays by name (`moments`): in the loss, when all layers have run and a chunk
of logits is there; in the backward pass of the last layer's feed-forward part, or of its attention; or in the update,
when every gradient is there twice.

The tables have a line for each array in the program that XLA's CPU compiler makes of our code, and that is not quite
the one we wrote. Its scheduler runs whatever has its inputs: what a backward pass needs and ops.late has not tied to a
gradient (slices of keys and values, the zeros that loops start from) is made in the forward pass, of all layers that
are not scanned. And its loops hold no bfloat16: what scanned layers stack is float32 under every policy. Not modeled
are the holes between arrays, the masks, and what a partitioner adds on several devices. Within 25% of the compiled
program with AdamW under float32 and bfloat16; the other rules' and policies' updates are rough.

x, f, a, k are the bytes of a float32 [B, T, D], [B, T, F], [B, T, N, H] and [B, T, K, H].
"""

from typing import NamedTuple

from efflm.config import BlockConfig, ModelConfig, Optimizer, Remat
from efflm.model import cost
from efflm.precision import FLOAT32, Policy

FLOAT = cost.FLOAT
FUSED = 4096  # tokens from which products with vectors are no longer fused into those that read them

Arrays = dict[str, float]  # name -> bytes
OF_FEEDFORWARD = ("gate and up", "hidden, as an operand")


class _Sizes(NamedTuple):
    """Bytes of the arrays that all others are multiples of, and the size of an operand relative to float32."""

    x: float
    f: float
    a: float
    k: float
    low: float
    big: bool
    swiglu: bool


def _sizes(config: ModelConfig, block: BlockConfig, rows: int, length: int, policy: Policy) -> _Sizes:
    unit = FLOAT * rows * length
    return _Sizes(
        x=unit * config.width,
        f=unit * block.mlp_dim,
        a=unit * block.heads * block.head_dim,
        k=unit * block.kv_heads * block.head_dim,
        low=cost.ITEMSIZE[policy.compute] / FLOAT,
        big=rows * length >= FUSED,
        swiglu=config.feedforward == "swiglu",
    )


def activation_bytes(
    config: ModelConfig,
    batch: int,
    length: int,
    policy: Policy = FLOAT32,
    *,
    remat: Remat = "none",
    scanned: bool = False,
    accumulate: int = 1,
    optimizer: Optimizer = "adamw",
) -> float:
    """Temporaries of a compiled training step at their peak, on one CPU device."""
    found = moments(
        config, batch, length, policy, remat=remat, scanned=scanned, accumulate=accumulate, optimizer=optimizer
    )
    return max(sum(arrays.values()) for arrays in found.values())


def moments(
    config: ModelConfig,
    batch: int,
    length: int,
    policy: Policy = FLOAT32,
    *,
    remat: Remat = "none",
    scanned: bool = False,
    accumulate: int = 1,
    optimizer: Optimizer = "adamw",
) -> dict[str, Arrays]:
    """{"loss", "feed-forward", "attention", "update": the arrays alive at that moment}. The largest is the peak."""
    B, T, L = batch // accumulate, length, len(config.blocks)
    scanned = scanned and L > 1  # a loop of one step is no loop
    # The order of layers does not matter here, and what one layer needs besides is that of the largest.
    *rest, block = sorted(config.blocks, key=lambda block: sum(kept(config, block, B, T, policy).values()))
    size, counts = _sizes(config, block, B, T, policy), cost.parameters(config)
    of_layers = FLOAT * (counts["projections"] + counts["feedforward"])
    of_output = FLOAT * config.vocabulary * config.width
    gradients = FLOAT * sum(counts.values())

    always: Arrays = {"gradient of the embedding, zero": of_output * (not config.tied)}
    if accumulate > 1:
        always["sums of gradients"] = gradients
    if scanned:
        always["gradients of all layers, stacked"] = of_layers
    elif size.low < 1 and policy.param != policy.compute:
        always["layers' weights in the compute dtype"] = of_layers * size.low
    if remat != "none" and not scanned and not cost.unrolled(T, T):
        always["zeros that loops of attention start from"] = L * (2 * size.a + 2 * size.k)

    if scanned or remat != "none":
        stored = [saved(config, each, B, T, remat) for each in config.blocks]
        layer, ended = working(config, block, B, T, policy, remat, scanned), {}
        if remat == "dots" and not scanned:
            stored.pop()  # the last layer's products are read, and freed, where its backward pass begins
    else:
        stored = [kept(config, each, B, T, policy) for each in rest]
        layer = ended = kept(config, block, B, T, policy)
    always["stored for the backward pass"] = sum(sum(arrays.values()) for arrays in stored)
    backward = always | {
        "gradient of the output layer": of_output,
        "gradient of the output layer, before its weight": of_output * (accumulate > 1),
        "gradients of the residual stream": 3 * size.x,
    }
    freed = {name: held for name, held in layer.items() if name not in OF_FEEDFORWARD}
    return {
        "loss": always | ended | {"final norm": (1 + size.big) * size.x} | loss(config, B, T, policy, accumulate > 1),
        "feed-forward": backward | layer | feedforward_gradients(size),
        "attention": backward | freed | attention_gradients(block, B, T, size.low),
        "update": {"gradients and clipped gradients": update_copies(policy, optimizer) * gradients},
    }


def kept(config: ModelConfig, block: BlockConfig, rows: int, length: int, policy: Policy) -> Arrays:
    """What an unrolled layer stores for its backward pass."""
    size = _sizes(config, block, rows, length, policy)
    x, f, a, k, low = size[:5]
    arrays = {
        "inputs of norms": 2 * x,
        "outputs of norms, as operands": 2 * x * low,
        "scales of norms, for each token": 2 * x * size.big,
        "queries": a * low,
        "queries and keys before and after their norms": 2 * (a + k) * config.qk_norm,
        "attention's outputs": a,
        "attention's outputs as operands": a * low * (low < 1),
        "log-normalizers": FLOAT * rows * length * block.heads,
        "gate and up": 2 * f if size.swiglu else f,
        "hidden, as an operand": f * low,
    }
    if not cost.unrolled(length, length):  # loops hold float32, and start from zeros, which are made early
        return arrays | {
            "queries": a,
            "keys and values": 2 * k,
            "zeros that gradients of q, k, v start from": a + 2 * k,
        }
    spans = cost.spans(length, block.window)
    return arrays | {
        "keys and values": 2 * k * any(keys == length for _, keys in spans),
        "slices of keys and values": 2 * k * low * sum(keys for _, keys in spans if keys < length) / length,
    }


def saved(config: ModelConfig, block: BlockConfig, rows: int, length: int, remat: Remat) -> Arrays:
    """What a scanned or rematerialized layer stores, float32 whatever the policy."""
    x, f, a, k, _, _, swiglu = _sizes(config, block, rows, length, FLOAT32)
    if remat == "full":
        return {"input": x}
    products = {"queries": a, "keys and values": 2 * k, "gate and up": 2 * f if swiglu else f}
    if remat == "dots":
        return products | {"input": x, "attention's projection": x}
    return products | {
        "inputs of norms": 2 * x,
        "outputs of norms": 2 * x,
        "queries and keys before and after their norms": 2 * (a + k) * config.qk_norm,
        "attention's outputs": a,
        "attention's outputs, heads side by side": a,
        "log-normalizers": FLOAT * rows * length * block.heads,
        "hidden": f,
    }


def working(
    config: ModelConfig, block: BlockConfig, rows: int, length: int, policy: Policy, remat: Remat, scanned: bool
) -> Arrays:
    """What one scanned or rematerialized layer holds besides while its backward pass runs."""
    arrays, size = kept(config, block, rows, length, policy), _sizes(config, block, rows, length, policy)
    if remat == "none":  # the rest is read where it is stored
        return {
            name: arrays[name] for name in ("attention's outputs", "keys and values", "outputs of norms, as operands")
        }
    if remat == "dots":
        arrays["attention's scores again"] = scores(block, rows, length)
        if scanned:
            del arrays["gate and up"]
    if not scanned:
        arrays["input, tied to the gradient"] = 2 * size.x
    return arrays


def scores(block: BlockConfig, rows: int, length: int) -> float:
    """Of all blocks at once, where they are unrolled; in loops those of a block, which are not counted."""
    pairs = cost.computed_pairs(length, length, block.window)
    return FLOAT * rows * block.heads * pairs * cost.unrolled(length, length)


def feedforward_gradients(size: _Sizes) -> Arrays:
    """What comes and goes in the backward pass of a feed-forward part."""
    if size.swiglu:
        return {"sigmoid of the gate": size.f, "gradients of hidden, gate and up": 3 * size.low * size.f}
    return {"gradients of hidden and up": 2 * size.f}


def attention_gradients(block: BlockConfig, rows: int, length: int, low: float) -> Arrays:
    """What comes and goes in the backward pass of attention."""
    weights = scores(block, rows, length)
    return {
        "attention's weights": weights * (1 + low * (low < 1)),
        "gradients of attention's weights, in half precision transposed too": weights,
    }


def loss(config: ModelConfig, rows: int, length: int, policy: Policy, looped: bool = False) -> Arrays:
    """ops.cross_entropy at work on a chunk. The gradients of its logits are an operand, in the compute dtype."""
    low, chunks = cost.ITEMSIZE[policy.compute] / FLOAT, cost.loss_chunks(rows, length)
    x, weight = FLOAT * rows * length * config.width, FLOAT * config.vocabulary * config.width
    logits = FLOAT * config.vocabulary * cost.loss_tokens(rows, length) / chunks
    of_logits = logits * low
    most = max(logits + of_logits * (low < 1), of_logits + weight)  # float32 gradients overwrite the logits
    if config.tied and low == 1 and chunks == 1 and not looped:
        most += max(logits, weight)  # outside of loops a tied weight's gradient is multiplied from transposed copies
    return {
        "hidden states and their gradients, in chunks": 2 * x * low,
        "weight as an operand": weight * low * (low < 1),
        "gradient of the output layer, summed over chunks": weight * (chunks > 1),
        "logits and their gradients, or these and the chunk's gradient of the weight": most,
    }


def update_copies(policy: Policy, optimizer: Optimizer) -> float:
    """Float32 copies of all parameters at the peak of an update: gradients, clipped gradients and more; measured."""
    copies = {"adamw8bit": 5.8, "muon": 6.7}.get(optimizer, 2.0)  # all leaves' moments, or powers, at once
    return copies + 2.0 * (policy.param != "float32") + 1.5 * (policy.compute == "float16")
