"""Which dtype weights are kept in, products are computed in, and results come out in."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Policy:
    """param: dtype of the weights at rest; compute: of the operands of products; output: of logits.

    Products accumulate in float32 whatever the policy; softmax, norm statistics, losses and moments are float32.
    """

    param: str = "float32"
    compute: str = "float32"
    output: str = "float32"


FLOAT32 = Policy()
POLICIES = {"float32": FLOAT32, "bfloat16": Policy(compute="bfloat16")}


def policy_for(params: Any) -> Policy:
    """The policy a stored model runs under: bfloat16 products if any of its arrays is bfloat16, else float32."""
    stored = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    return Policy(param="bfloat16", compute="bfloat16") if stored else FLOAT32


def cast(params: Any, dtype: Any) -> Any:
    """Every floating-point array of the tree in `dtype`; integers are left alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
