"""Rotations merged into weights, after which no channel is an outlier: QuaRot (Ashkboos 2024, arXiv 2404.00456) and R1
and R2 of SpinQuant (Liu 2024, arXiv 2405.16406), not learned. The model computes the same.

The residual stream x becomes x Q. RMSNorm keeps lengths, so it commutes with Q where its scale is 1: the scales are
folded into the matrices that read the norms first. The values of every head become v H, which the output matrix undoes.
The rotations that these papers apply while the model runs (of queries, of keys, and before the down matrix) are left
out: whatever is here costs no time.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efflm import trees
from efflm.compress import fold
from efflm.compress.step import Context, record
from efflm.config import require
from efflm.model import LanguageModel, layerwise, norms, placement
from efflm.model.params import find
from efflm.ops.qarray import QArray


def conference(q: int, below: int) -> np.ndarray:
    """The matrix of an odd prime q, float64 [q + 1, q + 1]: zeros on its diagonal, 1 in the first row, `below` in the
    first column, and inside whether the difference of row and column is a square modulo q (1) or not (-1)."""
    squares = {i * i % q for i in range(1, q)}
    kinds = np.array([0] + [1 if i in squares else -1 for i in range(1, q)], np.float64)
    inside = kinds[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.full((q, 1), float(below)), inside]])


def paley(order: int) -> np.ndarray | None:
    """A Hadamard matrix of +-1, float64 [order, order], where the order is q + 1 for a prime q = 3 mod 4, or 2 (q + 1)
    for a prime q = 1 mod 4 (Paley 1933); else None."""
    if order % 4 == 0 and _is_prime(order - 1):
        return conference(order - 1, -1) + np.eye(order)
    if order % 8 == 4 and _is_prime(order // 2 - 1):
        apart, own = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(conference(order // 2 - 1, 1), apart) + np.kron(np.eye(order // 2), own)
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, math.isqrt(q) + 1))


def hadamard(size: int) -> np.ndarray | None:
    """A Hadamard matrix of +-1, float64 [size, size]: of half the size, doubled (Sylvester 1867), down to 1 or to an
    order that `paley` has. None where neither leads to `size`."""
    if size == 1:
        return np.ones((1, 1))
    half = None if size % 2 else hadamard(size // 2)
    return paley(size) if half is None else np.kron([[1, 1], [1, -1]], half)


def random_hadamard(size: int, key: jax.Array) -> np.ndarray:
    """A random orthogonal matrix, float32 [size, size]: diag(random signs) Hadamard / sqrt(size), all of whose entries
    have the same magnitude. For a size = 2^k m that `hadamard` has not, m odd, it is that of 2^k kron R_m with a random
    orthogonal [m, m] matrix (QR of a Gaussian)."""
    of_signs, of_gaussian = jax.random.split(key)
    signs = np.asarray(jax.random.rademacher(of_signs, (size, 1)), np.float64)
    flat, power = hadamard(size), size & -size
    if flat is not None:
        return (signs * flat / math.sqrt(size)).astype(np.float32)
    gaussian = jax.random.normal(of_gaussian, (size // power,) * 2)
    rest, triangle = np.linalg.qr(np.asarray(gaussian, np.float64))
    rest = rest * np.sign(np.diag(triangle))  # without it QR's signs would not be random (Mezzadri 2007)
    return (signs * np.kron(hadamard(power) / math.sqrt(power), rest)).astype(np.float32)


def _outputs(w: jax.Array, matrix: np.ndarray) -> jax.Array:
    """w [..., N], every n neighbours of its last axis times a matrix [n, n]."""
    return jnp.matmul(w.reshape(-1, len(matrix)), matrix, precision="highest").reshape(w.shape)


def _inputs(w: jax.Array, matrix: np.ndarray) -> jax.Array:
    """w [K, N], its first axis times the transposed matrix from the left: what reads x reads x times the matrix."""
    return _outputs(w.T, matrix).T


def untied(model: LanguageModel) -> LanguageModel:
    """The same model with an output matrix of its own [D, V]: the final norm's scale cannot be folded into a table that
    tokens are looked up in, too."""
    if not model.config.tied:
        return model
    config = dataclasses.replace(model.config, tied=False)
    return model.replace(config=config, params={**model.params, "unembedding": model.params["embedding"].T})


def rotated(model: LanguageModel, key: jax.Array) -> Any:
    """The weights of an untied model of RMSNorms, rotated. Products are float32, results in the dtype of the weight."""
    flat, blocks = dict(trees.flatten(model.params)), model.config.blocks
    stream = random_hadamard(model.config.width, jax.random.fold_in(key, 0))
    heads = {
        f"block_{i}": random_hadamard(block.head_dim, jax.random.fold_in(key, i + 1)) for i, block in enumerate(blocks)
    }
    read = {"unembedding": "final_norm"}  # {path of a matrix: the norm that it reads}
    for i in range(len(blocks)):
        for place in fold.places(layerwise.block_config(model.config, i)):
            if place.is_norm:
                read |= {f"block_{i}/{reader}": f"block_{i}/{place.maker}" for reader in place.readers}

    def one(path: str, w: jax.Array) -> jax.Array:
        param, new = find(path)[0], w.astype(jnp.float32)
        if param.role == "norm":
            return norms.stored(model.config, jnp.ones_like(w)) if param.axes == ("width",) else w
        if path in read:
            scale = norms.effective(model.config, flat[f"{read[path]}/scale"].astype(jnp.float32))
            new = _inputs(new * scale[:, None], stream)
        elif param.axes[-1] == "width":
            new = _outputs(new, stream)
        layer, _, inside = path.partition("/")
        if inside in ("attention/value/kernel", "attention/value/bias"):
            new = _outputs(new, heads[layer])
        elif inside == "attention/output/kernel":
            new = _inputs(new, heads[layer])
        return new.astype(w.dtype)

    return trees.map_with_path(one, model.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate:
    """Rotate the residual stream and the values by random matrices, which the seed chooses.

    For models of RMSNorms. Tied embeddings become two tables, so that the model is larger by one: predicted_bytes of
    the record counts it.
    """

    def __call__(self, model: LanguageModel, context: Context):
        require(
            model.config.norm == "rms",
            f"norm is {model.config.norm!r}, but must be 'rms': the mean that LayerNorm subtracts does not commute "
            "with a rotation, so use SmoothQuant, AWQ or GPTQ alone",
        )
        require(
            not model.config.post_norm,
            "post_norm is True: norms after the attention and the feed-forward part have scales that cannot be folded "
            "into a matrix and do not commute with a rotation, so use SmoothQuant, AWQ or GPTQ alone",
        )
        require(
            not any(block.experts for block in model.config.blocks),
            "the model is a mixture of experts, which is not rotated: use SmoothQuant, AWQ or GPTQ alone",
        )
        quantized = [path for path, leaf in trees.flatten(model.params) if isinstance(leaf, QArray)]
        require(
            not quantized, f"{', '.join(quantized[:1])} is quantized already: rotate the model before it is rounded"
        )
        require(
            not model.masks,
            "the model is pruned already, and a rotation would fill its zeros: rotate the model before it is pruned",
        )
        apart = untied(model)
        params = rotated(apart, jax.random.key(context.seed))
        after = apart.replace(params=jax.device_put(params, placement.shardings(params, context.mesh)))
        return after, record(self, model, after, context)
