"""What the kernels must agree with: the dense product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.formats import BitmapArray, unpack


def bitmap_matmul(
    x: Float[Array, "... K"],
    packed: BitmapArray,
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "... N"]:
    """`x @ W`, with the zeros of `W` written out."""
    w = packed.layout.to_matrix(unpack(packed))
    return jnp.matmul(
        x, w, precision=precision, preferred_element_type=jnp.float32
    ).astype(jnp.result_type(x, w))
