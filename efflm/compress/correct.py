"""A correction of low rank beside each rounded matrix, in closed form: EoRA (Liu 2024, arXiv 2410.21271)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, obs
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel, placement
from efflm.model.params import is_matrix
from efflm.ops import lowrank
from efflm.precision import cast


@functools.partial(jax.jit, static_argnums=2)
def correction(error: jax.Array, inverse: obs.Inverse, rank: int) -> tuple[jax.Array, jax.Array]:
    """a [K, rank] and b [rank, N], float32: of all such pairs the one that leaves |X (error - a b)| least, for X of the
    Gram matrix H that `inverse` is of, in the order of the inputs.

    |X E| is |R^T E| for any R with R R^T = H, and the best approximation of R^T E is the largest `rank` parts of its
    singular value decomposition (section 3.2; its R is made of eigenvectors, this one is triangular).
    """
    root = jax.lax.linalg.triangular_solve(inverse.upper, error, left_side=True, lower=False, transpose_a=True)
    left, values, right = jnp.linalg.svd(root, full_matrices=False)
    share = jnp.sqrt(values[:rank])
    a = jnp.matmul(inverse.upper.T, left[:, :rank] * share[None], precision="highest")
    return a, share[:, None] * right[:rank]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correct:
    """Beside each rounded matrix inside the layers, that of low rank which is nearest to what rounding took.

    The matrices as they were are the teacher's: those of the model that the chain begins with, if none is given.
    """

    rank: int = flag(16, "rank of each correction")
    damping: float = flag(0.01, "added to the diagonal of X^T X, as a share of its mean")

    at = "rank"
    calibrates = True

    def __post_init__(self):
        require(self.rank > 0, f"rank is {self.rank}, but must be positive")
        require(self.damping > 0, f"damping is {self.damping}, but must be positive: 0.01")

    def __call__(self, model: LanguageModel, context: Context):
        original = _weights_before(model, context)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            inverse = obs.inverses(layer, read, self.damping)

            def matrix(path: str, leaf: Any) -> Any:
                if path not in read:
                    return leaf
                error = ops.in_float32(original[layer.path(path)]) - ops.in_float32(leaf)
                if not jnp.any(error):
                    return leaf
                require(
                    self.rank <= min(leaf.shape),
                    f"rank is {self.rank}, but {layer.path(path)} has the shape {tuple(leaf.shape)}: give at most the "
                    "smaller of the two",
                )
                return ops.LowRank(leaf, *cast(correction(error, inverse(path), self.rank), lowrank.STORED))

            return layer.replace(params=trees.map_with_path(matrix, layer.params)), None

        given = {"mesh": context.mesh, "title": "low-rank correction"}
        after, _ = calibrate.walk(model, context.calibration, one, {"gram": calibrate.GRAM}, **given)
        return after, record(self, model, after, context)


def _weights_before(model: LanguageModel, context: Context) -> dict[str, Any]:
    """The teacher's weights, by their paths. Raises InputError for those that this model's cannot be rounded from."""
    require(context.teacher is not None, "a correction needs the weights before rounding: set context.teacher")
    require(
        not model.masks, "the model is pruned, and a correction beside its weights would fill their zeros: leave it out"
    )
    teacher = context.teacher
    if context.mesh.size > 1:
        teacher = jax.device_put(teacher, placement.shardings(teacher, context.mesh))
    before = dict(trees.flatten(teacher.params))
    for path, leaf in trees.flatten(model.params):
        same = path in before and leaf.shape == before[path].shape
        if same and not is_matrix(path):
            same = trees.equal(leaf, before[path])
        require(
            same,
            f"{path} is not the teacher's: a correction is of the model that was rounded, and nothing may come between "
            "that trains, rotates, scales or removes weights: apply such steps first, and let what they made be the "
            "teacher",
        )
    return before
