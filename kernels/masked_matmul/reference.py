"""What the kernels must agree with: the product with the masked matrix, written out."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import masks


def masked_matmul(
    x: Float[Array, "... K"],
    w: Float[Array, "... K N"],
    mask: Bool[Array, "... K N"] | masks.PackedMask,
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "... N"]:
    """`x @ where(mask, w, 0)`."""
    w = jnp.where(masks.as_bool(mask), w, jnp.zeros_like(w))
    return jnp.matmul(
        x, w, precision=precision, preferred_element_type=jnp.float32
    ).astype(jnp.result_type(x, w))
