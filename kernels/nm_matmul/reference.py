"""What the kernels must agree with: the dense product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.formats import NMArray, unpack


def nm_matmul(
    x: Float[Array, "... K"], packed: NMArray, *, precision: lax.PrecisionLike = None
) -> Float[Array, "... N"]:
    """`x @ W`, with the zeros of `W` written out."""
    w = packed.layout.to_matrix(unpack(packed))
    dtype = jnp.result_type(x, w)
    y = jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(dtype)
