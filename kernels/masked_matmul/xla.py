"""Masked products out of XLA's own operations, for any device."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "K N"],
    mask: Bool[Array, "K N"],
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """`x` times the masked `w`, or times its transpose, by default in the type of `x`."""
    w = jnp.where(mask, w, jnp.zeros_like(w))
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    product = lax.dot_general(
        x, w, dims, precision=precision, preferred_element_type=jnp.float32
    )
    return product.astype(dtype or x.dtype)


def products(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    mask: Bool[Array, "K N"],
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "K N"]:
    """`xᵀ dy`, where weights are kept."""
    product = lax.dot_general(
        x, dy, (((0,), (0,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jnp.where(mask, product, 0).astype(x.dtype)
