"""The dtypes of weights, of matmuls and of results; loss scaling, rounding."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from efflm.config import InputError
from efflm.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Policy:
    """param: dtype that weights are stored in; compute: of the operands of matmuls; output: of logits.

    Matmuls accumulate in float32 under every policy; softmax, norm statistics, losses and moments are float32.
    """

    param: str = "float32"
    compute: str = "float32"
    output: str = "float32"


class _Policies(dict[str, Policy]):
    def __missing__(self, name: str) -> Policy:
        raise InputError(
            f"train.policy is {name!r}, but what is computed here needs one of {', '.join(self)}"
            + (": autotune.training chooses one, on the machine that trains" if name == "auto" else "")
        )


FLOAT32 = Policy()
POLICIES = _Policies(
    float32=FLOAT32,
    bfloat16=Policy(compute="bfloat16"),
    bfloat16_pure=Policy(param="bfloat16", compute="bfloat16"),
    float16=Policy(compute="float16"),
)


def policy_for(config: ModelConfig) -> Policy:
    """The policy that a model is run with: its config says in which precision its matmuls are."""
    return POLICIES[config.precision]


def cast(params: Any, dtype: Any) -> Any:
    """Every floating-point array of the tree in `dtype`; integers are left alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def stochastic_round(x: jax.Array, dtype: Any, rng: jax.Array) -> jax.Array:
    """float32 -> `dtype`; to bfloat16 up or down at random, so that the expectation is x (Gupta 2015, 1502.02551).

    Weights kept in bfloat16 need it: an update below half their last place would always round away. Of float32,
    bfloat16 keeps the upper 16 bits: adding 16 random bits below them carries with just the right probability.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


@flax.struct.dataclass
class LossScale:
    """Dynamic loss scaling for float16, whose gradients would underflow (Micikevicius 2017, arXiv 1710.03740, 3.2).

    scale multiplies the loss; good_steps counts the finite steps since it last changed.
    """

    scale: jax.Array
    good_steps: jax.Array
    interval: int = flax.struct.field(pytree_node=False, default=200)

    @classmethod
    def start(cls, scale: float = 2.0**15, interval: int = 200) -> "LossScale":
        return cls(jnp.float32(scale), jnp.int32(0), interval)

    def after(self, finite: jax.Array) -> "LossScale":
        """Halved on overflow (not below 1), doubled after `interval` finite steps in a row (not beyond 2^24)."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= self.interval
        scale = jnp.where(finite, jnp.where(grow, self.scale * 2, self.scale), self.scale / 2)
        return self.replace(scale=jnp.clip(scale, 1.0, 2.0**24), good_steps=jnp.where(grow, 0, good))


def loss_scale_for(policy: Policy) -> LossScale | None:
    return LossScale.start() if policy.compute == "float16" else None
