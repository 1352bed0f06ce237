"""What the kernels must agree with: the dense product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.formats import NMArray, unpack


def nm_matmul(
    x: Float[Array, "... K"], packed: NMArray, *, precision: lax.PrecisionLike = None
) -> Float[Array, "... N"]:
    """`x @ W`, with the zeros of `W` written out."""
    w = dense(packed)
    y = jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(jnp.result_type(x, w))


def dense(packed: NMArray) -> Float[Array, "... K N"]:
    """The matrix, with its zeros."""
    return packed.layout.to_matrix(unpack(packed))
