"""Tensors of checkpoints that are no weights: masks and rotary frequencies, which older versions of transformers saved,
and biases of 0 that quantizers add.

They follow from the config. One that does not would change what is computed, so each is compared.
"""

import re

import jax.numpy as jnp
import numpy as np

from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.formats.tensors import Tensors
from efflm.model import rotary

_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_MASKED = re.compile(r"(^|\.)(attn|attention)\.masked_bias$")
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
NEGLIGIBLE = -1e3  # a score at most this has a probability of 0 in float32


def is_one(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer by its name; a bias is one only if it has the shape of a mask, [1, 1, T, T]."""
    return bool(_MASKED.search(name) or _FREQUENCIES.search(name) or (_MASK.search(name) and len(shape) == 4))


def require_harmless(names: list[str], source: Tensors, config: ModelConfig) -> None:
    """Raise InputError for a buffer that says another thing than the config. One is in memory at a time."""
    for name in names:
        found = source.read(name)
        if _FREQUENCIES.search(name):
            good, wanted = _is_rotary(found, config), "the rotary frequencies that the config gives"
        elif _MASKED.search(name):
            good, wanted = found.size == 1 and float(found.reshape(())) <= NEGLIGIBLE, "a number that masks a score"
        elif found.ndim == 1:
            good, wanted = not found.any(), "0, as the biases are that a quantizer adds to layers without"
        else:
            square = found.shape == (1, 1, found.shape[-1], found.shape[-1])
            good, wanted = square and np.array_equal(found[0, 0] != 0, np.tri(len(found[0, 0]), dtype=bool)), "causal"
        require(bool(good), f"{name:.80} is not {wanted}: the model computes what is not supported")


def _is_rotary(found: np.ndarray, config: ModelConfig) -> bool:
    half = int(config.blocks[0].head_dim * config.rotary_fraction) // 2
    expected = config.rope_base ** (-np.arange(half) / half)
    if config.rope_scaling:
        expected = np.asarray(rotary.scaled(jnp.asarray(expected, jnp.float32), config.rope_scaling, config.rope_base))
    if not jnp.issubdtype(found.dtype, jnp.floating):
        return False
    kind = jnp.finfo(found.dtype)
    steps = max(float(kind.eps), 1e-6)  # rounded once to what they are stored in, and made in float32
    return found.shape == expected.shape and np.allclose(
        found.astype(np.float64), expected, rtol=2 * steps, atol=float(kind.tiny)
    )
