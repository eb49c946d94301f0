"""Temporary memory of a compiled training step, in closed form: what lives between its arguments and its results.

The arguments (weights, optimizer state, batch) are donated and counted in model.cost. What comes on top is greatest
at one of four moments (`Moments`): in the loss, when all layers have run and a chunk of logits is there; in the
backward pass of the last layer's feed-forward part, or of its attention; or in the update, when every gradient is
there twice.

There is a line for each array in the program that XLA's CPU compiler makes of our code, and that is not quite the one
we wrote. Its scheduler runs each operation once its inputs are there: what a backward pass needs and ops.late has not
tied to a gradient (slices of keys and values, the zeros that loops start from) is made in the forward pass, of all
layers that are not scanned. And its loops hold no bfloat16: what scanned layers stack is float32 under every policy.
Not modeled are the holes between arrays, the masks, and what a partitioner adds on several devices. Within 25% of the
compiled program with AdamW under float32 and bfloat16; the other rules' and policies' updates are rough.

x, f, a, k are the bytes of a float32 [B, T, D], [B, T, F], [B, T, N, H] and [B, T, K, H].
"""

import dataclasses
from typing import NamedTuple

from efflm.config.model import BlockConfig, ModelConfig
from efflm.config.train import Optimizer, Remat, TrainConfig
from efflm.model import cost
from efflm.model.cost import FLOAT, ITEMSIZE
from efflm.ops.attention import kernel_for, spans, unrolled
from efflm.ops.output_loss import chunk_count
from efflm.precision import FLOAT32, POLICIES, Policy

FUSED = 4096  # tokens from which elementwise multiplications with vectors are no longer fused into those that read them

Arrays = dict[str, float]  # bytes by name, for a reader: no name is looked up


@dataclasses.dataclass(frozen=True)
class Moment:
    """The arrays alive at one moment. of_weights: as large as weights, and cut along fsdp like them."""

    where: str
    of_weights: Arrays
    of_tokens: Arrays

    def total(self, fsdp: int = 1) -> float:
        """Bytes on one of `fsdp` devices."""
        return sum(self.of_weights.values()) / fsdp + sum(self.of_tokens.values())


class Moments(NamedTuple):
    """The largest is the peak."""

    loss: Moment
    feedforward: Moment
    attention: Moment
    update: Moment

    @property
    def passes(self) -> tuple[Moment, ...]:
        """Those in the forward and backward pass, which read weights."""
        return self[:3]

    @property
    def peak(self) -> Moment:
        return max(self, key=Moment.total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Bytes of what one layer stores, or holds while its backward pass runs."""

    inputs_of_norms: float = 0.0
    outputs_of_norms: float = 0.0  # as operands
    scales_of_norms: float = 0.0  # for each token
    queries: float = 0.0
    keys_and_values: float = 0.0
    slices_of_keys_and_values: float = 0.0
    heads_before_and_after_norms: float = 0.0  # of queries and keys
    attention_outputs: float = 0.0
    attention_outputs_as_operands: float = 0.0
    log_normalizers: float = 0.0
    zeros_of_attention_loops: float = 0.0  # that the gradients of q, k, v start from
    scores_again: float = 0.0
    gate_and_up: float = 0.0
    hidden_as_operand: float = 0.0
    input_tied_to_gradient: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.named().values())

    def named(self) -> Arrays:
        return {name.replace("_", " "): nbytes for name, nbytes in vars(self).items()}


class _Sizes(NamedTuple):
    """Bytes of the arrays that all others are multiples of, and the size of an operand relative to float32."""

    x: float
    f: float
    a: float
    k: float
    normalizers: float
    inner: float  # what the feed-forward part's last matmul is computed from: gate and up, or up
    qk_norms: float
    low: float
    big: bool


def _sizes(config: ModelConfig, block: BlockConfig, rows: int, length: int, policy: Policy) -> _Sizes:
    unit = FLOAT * rows * length
    f, a, k = (unit * n for n in (block.mlp_dim, block.heads * block.head_dim, block.kv_heads * block.head_dim))
    return _Sizes(
        x=unit * config.width,
        f=f,
        a=a,
        k=k,
        normalizers=unit * block.heads,
        inner=2 * f if config.feedforward == "swiglu" else f,
        qk_norms=2 * (a + k) * config.qk_norm,
        low=ITEMSIZE[policy.compute] / FLOAT,
        big=rows * length >= FUSED,
    )


def moments(config: ModelConfig, train: TrainConfig, batch: int, length: int, platform: str = "cpu") -> Moments:
    """What a compiled training step holds on one device that reads `batch` sequences of `length` tokens.

    Written from the CPU's program. Where `platform` has a kernel for attention, its scores never leave the chip.
    """
    rows, policy = batch // train.accumulate, POLICIES[train.policy]
    scanned = train.scan and len(config.blocks) > 1  # a loop of one step is no loop
    # The order of layers does not matter here, and what one layer needs besides is that of the largest.
    *rest, block = sorted(config.blocks, key=lambda block: kept(config, block, rows, length, policy, platform).total)
    size, counts = _sizes(config, block, rows, length, policy), cost.parameters(config)
    of_layers = FLOAT * (counts["projections"] + counts["feedforward"])
    of_output = FLOAT * config.vocabulary * config.width
    gradients = FLOAT * sum(counts.values())

    weights: Arrays = {"gradient of the embedding, zero": of_output * (not config.tied)}
    tokens: Arrays = {}
    if train.accumulate > 1:
        weights["sums of gradients"] = gradients
    if scanned:
        weights["gradients of all layers, stacked"] = of_layers
    elif size.low < 1 and policy.param != policy.compute:
        weights["layers' weights in the compute dtype"] = of_layers * size.low
    loops = not unrolled(length, length) and not has_kernel(block, length, policy, platform)
    if train.remat != "none" and not scanned and loops:
        tokens["zeros that loops of attention start from"] = len(config.blocks) * (2 * size.a + 2 * size.k)

    if scanned or train.remat != "none":
        stored = [saved(config, each, rows, length, train.remat) for each in config.blocks]
        layer, ended = working(config, block, rows, length, policy, train.remat, scanned, platform), Layer()
        if train.remat == "dots" and not scanned:
            stored.pop()  # the last layer's matmul results are read, and freed, where its backward pass begins
    else:
        stored = [kept(config, each, rows, length, policy, platform).total for each in rest]
        layer = ended = kept(config, block, rows, length, policy, platform)
    tokens["stored for the backward pass"] = sum(stored)
    backward_weights = weights | {
        "gradient of the output layer": of_output,
        "gradient of the output layer, before its weight": of_output * (train.accumulate > 1),
    }
    backward = tokens | {"gradients of the residual stream": 3 * size.x}
    freed = dataclasses.replace(layer, gate_and_up=0.0, hidden_as_operand=0.0)
    loss_weights, loss_tokens = loss(config, rows, length, policy, train.accumulate > 1)
    final_norm = {"final norm": (1 + size.big) * size.x}
    copies = {"gradients and clipped gradients": update_copies(policy, train.optimizer) * gradients}
    return Moments(
        Moment("in the loss", weights | loss_weights, tokens | ended.named() | final_norm | loss_tokens),
        Moment(
            "in the backward pass of feed-forward",
            backward_weights,
            backward | layer.named() | feedforward_gradients(config, size),
        ),
        Moment(
            "in the backward pass of attention",
            backward_weights,
            backward | freed.named() | attention_gradients(block, rows, length, policy, platform),
        ),
        Moment("in the update", copies, {}),
    )


def kept(config: ModelConfig, block: BlockConfig, rows: int, length: int, policy: Policy, platform: str) -> Layer:
    """What an unrolled layer stores for its backward pass."""
    size = _sizes(config, block, rows, length, policy)
    layer = Layer(
        inputs_of_norms=2 * size.x,
        outputs_of_norms=2 * size.x * size.low,
        scales_of_norms=2 * size.x * size.big,
        queries=size.a * size.low,
        heads_before_and_after_norms=size.qk_norms,
        attention_outputs=size.a,
        attention_outputs_as_operands=size.a * size.low * (size.low < 1),
        log_normalizers=size.normalizers,
        gate_and_up=size.inner,
        hidden_as_operand=size.f * size.low,
    )
    kv = 2 * size.k
    if has_kernel(block, length, policy, platform):
        return dataclasses.replace(layer, keys_and_values=kv * size.low)
    if not unrolled(length, length):  # loops hold float32, and start from zeros, which are made early
        zeros = size.a + kv
        return dataclasses.replace(layer, queries=size.a, keys_and_values=kv, zeros_of_attention_loops=zeros)
    keys = [end - start for _, _, start, end in spans(length, length, block.window, in_order=True)]
    sliced = sum(n for n in keys if n < length) / length
    whole = kv * any(n == length for n in keys)
    return dataclasses.replace(layer, keys_and_values=whole, slices_of_keys_and_values=kv * size.low * sliced)


def saved(config: ModelConfig, block: BlockConfig, rows: int, length: int, remat: Remat) -> float:
    """Bytes that a scanned or rematerialized layer stores: float32 under every policy."""
    size = _sizes(config, block, rows, length, FLOAT32)
    if remat == "full":
        return size.x  # its input
    matmuls = size.a + 2 * size.k + size.inner  # queries, keys, values, gate and up
    if remat == "dots":
        return matmuls + 2 * size.x  # the layer's input, attention's projection
    norms = 4 * size.x + size.qk_norms  # inputs and outputs
    return matmuls + norms + 2 * size.a + size.normalizers + size.f  # attention's outputs, heads side by side; hidden


def working(
    config: ModelConfig,
    block: BlockConfig,
    rows: int,
    length: int,
    policy: Policy,
    remat: Remat,
    scanned: bool,
    platform: str,
) -> Layer:
    """What one scanned or rematerialized layer holds besides while its backward pass runs."""
    layer, size = kept(config, block, rows, length, policy, platform), _sizes(config, block, rows, length, policy)
    if remat == "none":  # the rest is read where it is stored
        return Layer(
            outputs_of_norms=layer.outputs_of_norms,
            keys_and_values=layer.keys_and_values,
            attention_outputs=layer.attention_outputs,
        )
    if remat == "dots":
        again, inner = scores(block, rows, length, policy, platform), 0.0 if scanned else layer.gate_and_up
        layer = dataclasses.replace(layer, scores_again=again, gate_and_up=inner)
    return layer if scanned else dataclasses.replace(layer, input_tied_to_gradient=2 * size.x)


def has_kernel(block: BlockConfig, length: int, policy: Policy, platform: str) -> bool:
    """Whether attention is a kernel, which stores its arguments and results."""
    return kernel_for(platform, length, length, block.head_dim, policy.compute, block.window) is not None


def scores(block: BlockConfig, rows: int, length: int, policy: Policy, platform: str) -> float:
    """Of all blocks at once, where they are unrolled; in loops those of a block, which are not counted."""
    if has_kernel(block, length, policy, platform):
        return 0.0
    pairs = cost.computed_pairs(length, length, block.window)
    return FLOAT * rows * block.heads * pairs * unrolled(length, length)


def feedforward_gradients(config: ModelConfig, size: _Sizes) -> Arrays:
    """What comes and goes in the backward pass of a feed-forward part."""
    if config.feedforward == "swiglu":
        return {"sigmoid of the gate": size.f, "gradients of hidden, gate and up": 3 * size.low * size.f}
    return {"gradients of hidden and up": 2 * size.f}


def attention_gradients(block: BlockConfig, rows: int, length: int, policy: Policy, platform: str) -> Arrays:
    """What comes and goes in the backward pass of attention."""
    weights, low = scores(block, rows, length, policy, platform), ITEMSIZE[policy.compute] / FLOAT
    return {
        "attention's weights": weights * (1 + low * (low < 1)),
        "gradients of attention's weights, in half precision transposed too": weights,
    }


def loss(config: ModelConfig, rows: int, length: int, policy: Policy, looped: bool) -> tuple[Arrays, Arrays]:
    """ops.cross_entropy at work on a chunk: arrays like weights, and others.

    The gradients of its logits are an operand, in the compute dtype.
    """
    low, chunks = ITEMSIZE[policy.compute] / FLOAT, chunk_count(rows, length)
    x, weight = FLOAT * rows * length * config.width, FLOAT * config.vocabulary * config.width
    logits = FLOAT * config.vocabulary * cost.loss_tokens(rows, length) / chunks
    of_logits = logits * low
    most = max(logits + of_logits * (low < 1), of_logits + weight)  # float32 gradients overwrite the logits
    if config.tied and low == 1 and chunks == 1 and not looped:
        most += max(logits, weight)  # outside of loops a tied weight's gradient is multiplied from transposed copies
    return {"gradient of the output layer, summed over chunks": weight * (chunks > 1)}, {
        "hidden states and their gradients, in chunks": 2 * x * low,
        "weight as an operand": weight * low * (low < 1),
        "logits and their gradients, or these and the chunk's gradient of the weight": most,
    }


def update_copies(policy: Policy, optimizer: Optimizer) -> float:
    """Float32 copies of all parameters at the peak of an update: gradients, clipped gradients and more; measured."""
    copies = {"adamw8bit": 5.8, "muon": 6.7}.get(optimizer, 2.0)  # all leaves' moments, or powers, at once
    return copies + 2.0 * (policy.param != "float32") + 1.5 * (policy.compute == "float16")
