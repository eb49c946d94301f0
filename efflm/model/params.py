"""One record for each weight of a Transformer: its shape, the name of each axis, its role and its initialization.

Whatever has to know a weight reads it here: modules (shape and initialization), sharding, weight decay, Muon,
quantization, pruning, slicing, costs and the checks of model files.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Literal

import jax
from flax import linen as nn

from efflm.config.model import BlockConfig, ModelConfig

Role = Literal["embedding", "positions", "linear", "router", "unembedding", "norm", "bias", "trained_beside"]
Component = Literal["embedding", "projections", "feedforward", "norms", "output"]
STDDEV = (
    0.02  # of randomly initialized matrices and embeddings, as in GPT-2: what a layer adds stays small beside its input
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Param:
    """One weight.

    axes: a name for each dimension; a matrix of a linear layer is [in, out]. role: how it is used; component: under
    which name its cost is counted. init: "residual" is "normal" scaled by 1 / sqrt(2 layers), for what is added to the
    residual stream (GPT-2, Radford 2019, section 2.3). shape and stddev are known once there is a config.
    """

    axes: tuple[str, ...]
    role: Role
    component: Component
    init: Literal["normal", "residual", "ones", "zeros"] = "normal"
    shape: tuple[int, ...] = ()
    stddev: float = 0.0

    @property
    def contracted(self) -> int:
        """The axis that a matmul or a lookup sums over or returns whole, counted from the end: one scale each."""
        return -1 if self.role in ("embedding", "positions") else -2

    @property
    def is_matrix(self) -> bool:
        return len(self.axes) == 2

    @property
    def in_layer(self) -> bool:
        """Whether it is a matrix of a linear layer in a block: what is pruned, decayed, and orthogonalized by Muon. The
        small one that gives tokens to experts is not: it stays as it is."""
        return self.role == "linear"

    def initialize(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Randomly initialized float32 weights."""
        makers = {"ones": nn.initializers.ones, "zeros": nn.initializers.zeros}
        return makers.get(self.init, nn.initializers.normal(self.stddev))(key, shape)


def _linear(name: str, fan_in: str, fan_out: str, component: Component, init: str = "normal") -> dict[str, Param]:
    return {
        f"block/{name}/kernel": Param(axes=(fan_in, fan_out), role="linear", component=component, init=init),
        f"block/{name}/bias": Param(axes=(fan_out,), role="bias", component=component, init="zeros"),
    }


def _norm(name: str, axis: str = "width") -> dict[str, Param]:
    return {
        f"{name}/scale": Param(axes=(axis,), role="norm", component="norms", init="ones"),
        f"{name}/bias": Param(axes=(axis,), role="norm", component="norms", init="zeros"),
    }


# Every weight of every family; "block" stands for each layer, "expert" for each expert of a layer.
WEIGHTS: dict[str, Param] = {
    "embedding": Param(axes=("vocabulary", "width"), role="embedding", component="embedding"),
    "position_embedding": Param(axes=("positions", "width"), role="positions", component="embedding"),
    "unembedding": Param(axes=("width", "vocabulary"), role="unembedding", component="output"),
    **_linear("attention/query", "width", "heads", "projections"),
    **_linear("attention/key", "width", "kv_heads", "projections"),
    **_linear("attention/value", "width", "kv_heads", "projections"),
    **_linear("attention/output", "heads", "width", "projections", "residual"),
    **_norm("block/attention/query_norm", "head_dim"),
    **_norm("block/attention/key_norm", "head_dim"),
    **_linear("feedforward/gate", "width", "mlp", "feedforward"),
    **_linear("feedforward/up", "width", "mlp", "feedforward"),
    **_linear("feedforward/down", "mlp", "width", "feedforward", "residual"),
    "block/feedforward/router/kernel": Param(axes=("width", "experts"), role="router", component="feedforward"),
    **_linear("feedforward/expert/gate", "width", "mlp", "feedforward"),
    **_linear("feedforward/expert/up", "width", "mlp", "feedforward"),
    **_linear("feedforward/expert/down", "mlp", "width", "feedforward", "residual"),
    **_norm("block/attention_norm"),
    **_norm("block/feedforward_norm"),
    **_norm("block/attention_post_norm"),
    **_norm("block/feedforward_post_norm"),
    **_norm("final_norm"),
}

STACK = "blocks_"  # before the number of the first layer: the name of a stack of equal layers, one after the other

# What is trained beside the weights and is in no model: matrices from a student's hidden states, and from its heads, to
# its teacher's; logarithms of what the scales of weights that are rounded are multiplied by.
HIDDEN_PROJECTION = "hidden_projection"
HEAD_MIXTURE = "head_mixture"
LOG_SCALE = "log_scale"
BESIDE: dict[str, Param] = {
    HIDDEN_PROJECTION: Param(axes=("width", "teacher_width"), role="trained_beside", component="projections"),
    HEAD_MIXTURE: Param(axes=("student_heads", "teacher_heads"), role="trained_beside", component="projections"),
    LOG_SCALE: Param(axes=("groups", "outputs"), role="trained_beside", component="projections"),
}
_RECORDS = WEIGHTS | BESIDE


def _exists(name: str, config: ModelConfig) -> bool:
    """Whether models of this config have the weight."""
    owner, _, leaf = name.rpartition("/")
    if name in ("position_embedding", "unembedding"):
        return config.position == "learned" if name == "position_embedding" else not config.tied
    if owner.endswith(("query_norm", "key_norm")):
        return config.qk_norm and leaf == "scale"
    if owner.endswith("post_norm") and not config.post_norm:
        return False
    if leaf != "bias":
        return config.gated or not owner.endswith("/gate")
    if owner.endswith("_norm"):
        return config.norm == "layer"
    projects = owner in ("block/attention/query", "block/attention/key", "block/attention/value")
    gates = owner.endswith("/gate") and not config.gated
    return not gates and (config.bias or (config.qkv_bias and projects))


def _sizes(config: ModelConfig, block: BlockConfig) -> dict[str, int]:
    """The length of each named axis, in this layer."""
    return {
        "vocabulary": config.vocabulary,
        "width": config.width,
        "positions": config.max_length,
        "heads": block.heads * block.head_dim,
        "kv_heads": block.kv_heads * block.head_dim,
        "head_dim": block.head_dim,
        "mlp": block.mlp_dim,
        "experts": block.experts,
    }


def _names(name: str, block: BlockConfig) -> list[str]:
    """The weights of a layer that a name in WEIGHTS stands for."""
    if name.startswith("block/feedforward/"):
        of_experts = name.startswith(("block/feedforward/expert/", "block/feedforward/router/"))
        if of_experts != bool(block.experts):
            return []
    return [name.replace("/expert/", f"/expert_{e}/") for e in range(block.experts)] if "/expert/" in name else [name]


@functools.cache
def table(config: ModelConfig) -> Mapping[str, Param]:
    """{path: Param} of every weight of a model, its layers unstacked: block_0, block_1, ..."""
    residual = STDDEV / math.sqrt(2 * len(config.blocks))
    out = {}
    for name, param in WEIGHTS.items():
        if not _exists(name, config):
            continue
        in_block = name.startswith("block/")
        for i, block in enumerate(config.blocks if in_block else config.blocks[:1]):
            sizes, axes = _sizes(config, block), param.axes
            if config.qk_norm_whole and axes == ("head_dim",):
                axes = ("heads",) if "query_norm" in name else ("kv_heads",)
            stddev = residual if param.init == "residual" else STDDEV
            init = "zeros" if param.init == "ones" and config.norm_offset else param.init
            shape = tuple(sizes[axis] for axis in axes)
            made = dataclasses.replace(param, axes=axes, shape=shape, stddev=stddev, init=init)
            for own in _names(name, block) if in_block else [name]:
                out[own.replace("block/", f"block_{i}/", 1) if in_block else own] = made
    return types.MappingProxyType(out)


@functools.cache
def find(path: str) -> tuple[Param | None, str]:
    """The record, without sizes, of the weight or of what is trained beside it that a path names or contains, and what
    follows that in the path.

    Paths of optimizer states and of the parts of a compressed weight contain that of the weight; layers may be stacked
    under `blocks_0`. (None, "") where the path contains no weight.
    """
    names = [_kind(unstacked(name)) for name in path.split("/")]
    for start in range(len(names)):
        for end in range(len(names), start, -1):
            param = _RECORDS.get("/".join(names[start:end]))
            if param is not None:
                return param, "/".join(names[end:])
    return None, ""


def _kind(name: str) -> str:
    """The name in WEIGHTS of a layer or of an expert; any other name as it is."""
    return next((kind for kind in ("block", "expert") if _number(name, f"{kind}_") is not None), name)


def is_stacked(path: str) -> bool:
    """Whether the array of this path leads with an axis of stacked layers."""
    return any(_number(name, STACK) is not None for name in path.split("/"))


def unstacked(name: str) -> str:
    """The name of the first layer of a stack (transformer.runs); any other name as it is."""
    first = _number(name, STACK)
    return name if first is None else f"block_{first}"


def _number(name: str, prefix: str) -> int | None:
    """What follows the prefix, where that is a number."""
    rest = name.removeprefix(prefix)
    return int(rest) if rest != name and rest.isdigit() else None


def in_layer(path: str) -> bool:
    """Whether a path is that of a matrix inside the layers."""
    param, rest = find(path)
    return param is not None and param.in_layer and not rest


def is_matrix(path: str) -> bool:
    """Whether a path is that of a matrix: inside a layer, an embedding or the unembedding."""
    param, rest = find(path)
    return param is not None and param.is_matrix and param.role != "router" and not rest
