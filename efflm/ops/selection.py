"""Exactly so many of the smallest elements of an array, also under ties."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.jit
def smallest(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """True for exactly `count` elements of a flat float32 array that is not negative: the smallest.

    The bits of a float that is not negative, read as an integer, are in the order of the floats: so 31 counts find
    the count-th smallest, which a sort of a large matrix takes far longer for.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the count-th smallest is in (low, high]
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, threshold = lax.fori_loop(0, 32, halve, (jnp.int32(-1), jnp.int32(0x7F800000)))  # up to infinity
    below, equal = bits < threshold, bits == threshold
    return below | (equal & (jnp.cumsum(equal) <= count - jnp.sum(below)))
