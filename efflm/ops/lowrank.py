"""LowRank: a weight and a correction of low rank beside it (LoRA, Hu 2021, arXiv 2106.09685).

    w ~ base + a @ b

The base may be in any format (QLoRA, Dettmers 2023, arXiv 2305.14314): it is multiplied by the kernel of that format,
and in training the floats of one layer's bases are held at a time.
"""

from typing import Any

import flax.struct
import jax

from efflm import trees

STORED = "float16"  # of a and b once they are made: nothing beside the errors that they correct


@flax.struct.dataclass
class LowRank:
    """base: a matrix [K, N] of any format; a: floats [K, R]; b: floats [R, N]."""

    base: Any
    a: jax.Array
    b: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


Pairs = dict[str, tuple[jax.Array, jax.Array]]  # {path of a weight: (a, b)}


def split(params: Any) -> tuple[Any, Pairs]:
    """The tree with only the base of every LowRank weight, and the rest of these."""
    pairs = {path: (leaf.a, leaf.b) for path, leaf in trees.flatten(params) if isinstance(leaf, LowRank)}
    return trees.map_with_path(lambda _, leaf: leaf.base if isinstance(leaf, LowRank) else leaf, params), pairs


def join(params: Any, pairs: Pairs) -> Any:
    """The inverse of `split`."""
    return trees.map_with_path(lambda path, w: LowRank(w, *pairs[path]) if path in pairs else w, params)
