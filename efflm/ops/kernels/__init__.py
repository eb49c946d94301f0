"""Kernels of single platforms behind ops. Each is one device's: XLA does not partition it (see model.attention)."""

from typing import NamedTuple

from jax.typing import DTypeLike


class Attention(NamedTuple):
    """A call of ops.attention, as far as a kernel has to know it to say whether it `takes` it.

    in_order: whether the queries are the last of the keys (no slots); own_segments: whether the segments of the keys
    are the queries'. cap: of the scores, a soft one, which no kernel has.
    """

    queries: int
    keys: int
    head_dim: int
    dtype: DTypeLike
    window: int = 0
    in_order: bool = True
    own_segments: bool = True
    cap: float = 0.0
