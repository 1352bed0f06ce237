"""Floats as unsigned integers in the same order, and back.

The lowest integer that is used is below the bits of -inf and stands for NaN, the highest
lies above those of +inf.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt


def ordered(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of `x`, NaN before everything and -0.0 as 0.0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), _unsigned(x.dtype))
    sign = _sign(bits.dtype)
    return jnp.where(x != x, 0, jnp.where(bits & sign != 0, ~bits, bits | sign))


def compare_dtype(dtypes: Sequence[jax.typing.DTypeLike]) -> jnp.dtype:
    """In which scores of several dtypes are compared, of at least two bytes."""
    dtype = jnp.result_type(*dtypes)
    return dtype if jnp.finfo(dtype).bits >= 16 else jnp.dtype(jnp.bfloat16)


def dtype_of(bits: Array, half: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The float that `bits` orders; of two bytes there are two, `half` says which."""
    width = jnp.iinfo(bits.dtype).bits
    if width == 16:
        return half if jnp.finfo(half).bits == 16 else jnp.bfloat16
    return jnp.float32 if width == 32 else jnp.float64


def bounds(dtype) -> tuple[np.unsignedinteger, np.unsignedinteger]:
    """The integers below and above those of all numbers."""
    unsigned = _unsigned(dtype)
    infinity = np.asarray(np.inf, dtype).view(unsigned)[()] | _sign(unsigned)
    return ~infinity - unsigned.type(1), infinity + unsigned.type(1)


def unordered(bits: Array, dtype) -> Array:
    """Undoes `ordered`."""
    sign = _sign(bits.dtype)
    return lax.bitcast_convert_type(
        jnp.where(bits & sign != 0, bits & ~sign, ~bits), dtype
    )


def _unsigned(dtype) -> np.dtype:
    return np.dtype(f"uint{jnp.finfo(dtype).bits}")


def _sign(unsigned: np.dtype) -> np.unsignedinteger:
    return unsigned.type(1 << (8 * unsigned.itemsize - 1))
