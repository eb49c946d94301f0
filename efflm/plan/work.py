"""What a Transformer costs: parameters, and the FLOPs and bytes of its phases by component.

FLOPs are those of matmuls (elementwise work is left out, as MFU does), a multiplication and an addition being two:

    model      what the mathematics asks for: a query is multiplied with the keys it sees and no others, so causal
               attention counts half of its square, and the backward pass is twice the forward (Chowdhery 2022, arXiv
               2204.02311, appendix B, but for that half). `forward`, `token`, `train_flops`.
    executed   what our program multiplies: attention in blocks (ops.attention), scores made again in the backward
               pass, padding, rematerialization, the optimizer. `train_step`, `update`, `prefill`, `decode`.

Bytes are the least that can move between memory and processor: each operand of a matmul is read once and each result
written once, attention's scores stay inside. Nothing is traced or allocated. Each document is taken to fill its
sequence, and weights to be plain arrays. Kernels of attention skip masked blocks, and execute less.
"""

import dataclasses
import math
import typing
from collections.abc import Callable

import numpy as np

from efflm.config.model import BlockConfig, ModelConfig
from efflm.config.train import REMAT, TrainConfig
from efflm.model import params
from efflm.ops.attention_blocks import BLOCK, spans, unrolled
from efflm.ops.output_loss import chunk_count
from efflm.precision import FLOAT32, POLICIES, Policy

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT = 4  # bytes of a float32, which all results of matmuls and gradients are
COMPONENTS = ("projections", "attention", "feedforward", "output")  # of a forward pass


@dataclasses.dataclass(frozen=True)
class Work:
    """flops: of matmuls. nbytes: the least that must move to and from memory."""

    flops: float
    nbytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.nbytes * factor)


def total(work: dict[str, Work]) -> Work:
    return sum(work.values(), Work(0, 0))


def parameters(config: ModelConfig) -> dict[str, int]:
    """Counts by component: embedding (with positions, and with the output layer where it is tied), projections (of
    attention), feedforward, norms, and output (0 where it is tied)."""
    counts = dict.fromkeys(typing.get_args(params.Component), 0)
    for param in params.table(config).values():
        counts[param.component] += math.prod(param.shape)
    return counts


def weight_bytes(config: ModelConfig, policy: Policy = FLOAT32) -> int:
    return sum(parameters(config).values()) * ITEMSIZE[policy.param]


def kv_cache_bytes(config: ModelConfig, batch: int, length: int, policy: Policy = FLOAT32) -> int:
    """Keys and values of `length` positions in every layer; a window does not shrink our cache."""
    entries = sum(2 * block.kv_heads * block.head_dim for block in config.blocks)
    return batch * length * entries * ITEMSIZE[policy.compute]


# --- the model's work ------------------------------------------------------------------------------------------------


def seen_pairs(length: int, window: int = 0) -> float:
    """(query, key) pairs in a causal sequence: each of `length` queries sees keys up to its own, at most `window`."""
    reach = min(window or length, length)
    return reach * (reach + 1) / 2 + (length - reach) * reach


def forward(config: ModelConfig, batch: int, length: int, policy: Policy = FLOAT32) -> dict[str, Work]:
    """One forward pass over `batch` sequences of `length` tokens with all their logits, by component."""

    pairs = lambda block: batch * seen_pairs(length, block.window)
    return _forward(config, policy, batch * length, pairs, batch * length, batch * length, _given)


def token(config: ModelConfig, seen: float, policy: Policy = FLOAT32) -> dict[str, Work]:
    """One token that sees `seen` positions, itself included, and its logits: what decoding needs at batch 1."""
    return _forward(config, policy, 1, lambda block: min(seen, block.window or seen), seen, 1, _given)


def _given(block: BlockConfig) -> float:
    """The share of a layer's experts that compute a token."""
    return block.experts_per_token / block.experts


def train_flops(config: ModelConfig, batch: int, length: int) -> float:
    """The model FLOPs of a training step, which MFU is defined on: forward and backward, without rematerialization."""
    return 3 * total(forward(config, batch, length)).flops


def crossover_length(config: ModelConfig) -> float:
    """How many positions a token must see for its attention (scores and values) to cost what its feed-forward costs.

    A causal query sees half of its sequence on average: so sequences of about twice this length, without a window.
    Infinity where windows are too short for it.
    """
    of = lambda seen, name: token(config, seen)[name].flops
    ends = [0, *sorted({block.window for block in config.blocks if block.window})]  # straight between these, and beyond
    reached, wanted = [of(seen, "attention") for seen in ends], of(1, "feedforward")
    if wanted <= reached[-1]:
        return float(np.interp(wanted, reached, ends))
    slope = of(ends[-1] + 1, "attention") - reached[-1]
    return ends[-1] + (wanted - reached[-1]) / slope if slope else math.inf


def _forward(
    config: ModelConfig,
    policy: Policy,
    tokens: float,
    pairs: Callable[[BlockConfig], float],
    keys: float,
    logits: float,
    experts: Callable[[BlockConfig], float] = lambda block: 1.0,
) -> dict[str, Work]:
    """The work of `tokens` new tokens, whose queries meet pairs(block) keys of the `keys` that are there. experts: the
    share of a layer's experts that compute a token; in our programs, as a rule, all do (model.experts)."""
    work = dict.fromkeys(COMPONENTS, Work(0, 0))
    for path, param in params.table(config).items():
        if param.role in ("linear", "router"):
            name = "projections" if "/attention/" in path else "feedforward"
            block = config.blocks[int(path.split("/")[0].removeprefix("block_"))]
            share = experts(block) if "/expert_" in path else 1.0
            work[name] += _product(tokens * share, param.shape, policy)
    for block in config.blocks:
        entries = tokens * block.heads + 2 * keys * block.kv_heads  # queries, keys, values
        moved = block.head_dim * (entries * ITEMSIZE[policy.compute] + tokens * block.heads * FLOAT)
        work["attention"] += Work(4 * block.heads * block.head_dim * pairs(block), moved)
    work["output"] = _product(logits, (config.width, config.vocabulary), policy)
    return work


def _product(rows: float, shape: tuple[int, ...], policy: Policy) -> Work:
    """[rows, in] @ [in, out]. Its two matmuls in the backward pass have the same three matrices, so the same work."""
    (n, m), weight = shape, math.prod(shape) * ITEMSIZE[policy.param]
    return Work(2 * rows * n * m, rows * n * ITEMSIZE[policy.compute] + weight + rows * m * FLOAT)


# --- the work our programs do ----------------------------------------------------------------------------------------


def computed_pairs(queries: int, keys: int, window: int = 0, in_order: bool = True) -> float:
    """(query, key) pairs that ops.attention multiplies in a sequence, seen or masked. in_order: query t is at slot t
    and there is no cache; otherwise the queries are the first of a cache of `keys` positions."""
    if unrolled(queries, keys):
        blocks = spans(queries, keys, window, in_order)
        return sum((q_end - q_start) * (k_end - k_start) for q_start, q_end, k_start, k_end in blocks)
    first = lambda start: max(start - window + 1, 0) // BLOCK if window else 0
    last = lambda start: (min(start + BLOCK, queries) - 1) // BLOCK
    return sum(BLOCK**2 * (last(start) - first(start) + 1) for start in range(0, queries, BLOCK))


def train_step(config: ModelConfig, train: TrainConfig, batch: float, length: int) -> dict[str, Work]:
    """Forward and backward passes of one step over `batch` sequences of `length` tokens, by component; no `update`.
    They may be a device's part of the config's batch."""
    policy, rows, again = POLICIES[train.policy], batch / train.accumulate, REMAT[train.remat]
    pairs = lambda block: rows * computed_pairs(length, length, block.window)
    chunks = chunk_count(train.batch // train.accumulate, length)  # to a whole number of them sequences are padded
    ahead = _forward(config, policy, rows * length, pairs, rows * length, rows * chunks * math.ceil(length / chunks))
    matmuls = 3 if config.gated else 2
    passes = {  # of the forward's work: forward, backward, computed again
        "projections": 1 + 2 + again.projections,
        "attention": 1 + 2.5 + again.attention,  # backward: five matmuls to the forward's two, with the scores
        "feedforward": 1 + 2 + again.feedforward * (matmuls - 1) / matmuls,  # the last one's result is not needed
        "output": 1 + 2,
    }
    return {name: ahead[name] * (passes[name] * train.accumulate) for name in COMPONENTS}


def update(config: ModelConfig, train: TrainConfig, optimizer_bytes: int) -> Work:
    """Gradients and weights read, weights written, state read and written, gradients summed; and Muon's matmuls."""
    gradients, weights = weight_bytes(config), weight_bytes(config, POLICIES[train.policy])
    moved = gradients + 2 * weights + 2 * optimizer_bytes
    moved += 3 * gradients * train.accumulate * (train.accumulate > 1)
    flops = 0
    if train.optimizer == "muon":
        for path, param in params.table(config).items():
            m, n = sorted(param.shape) if params.in_layer(path) else (0, 0)
            flops += 5 * (4 * m * m * n + 2 * m**3)  # a step of Newton-Schulz: x x^T, its square, and times x
    return Work(flops, moved)


def prefill(
    config: ModelConfig, batch: int, length: int, policy: Policy = FLOAT32, cache_length: int = 0
) -> dict[str, Work]:
    """Reading prompts of `length` tokens into a cache of `cache_length` positions (default: as many); one logit vector
    for each prompt."""
    cache_length = cache_length or length
    pairs = lambda block: batch * computed_pairs(length, cache_length, block.window, in_order=False)
    return _forward(config, policy, batch * length, pairs, batch * cache_length, batch)


def decode(config: ModelConfig, batch: int, cache_length: int, policy: Policy = FLOAT32) -> dict[str, Work]:
    """One token for each sequence against a cache of `cache_length` positions: it meets every slot, filled or not."""
    pairs = lambda block: batch * computed_pairs(1, cache_length, block.window, in_order=False)
    return _forward(config, policy, batch, pairs, batch * cache_length, batch)
