"""N:M products out of XLA's own operations, for any device: unpacked, then multiplied."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.formats import NMArray


def matmul(
    x: Float[Array, "M K"], packed: NMArray, *, precision: lax.PrecisionLike = None
) -> Float[Array, "M N"]:
    """`x @ W`, in float32."""
    return jnp.matmul(
        x, packed.dense().astype(x.dtype),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def matmul_transposed(
    dy: Float[Array, "M N"], packed: NMArray, *, precision: lax.PrecisionLike = None
) -> Float[Array, "M K"]:
    """`dy @ Wᵀ`."""
    dx = lax.dot_general(
        dy, packed.dense().astype(dy.dtype), (((1,), (1,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return dx.astype(dy.dtype)


def products(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    packed: NMArray,
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "kept N"]:
    """`xᵀ dy`, of which only what is kept stays."""
    dense = lax.dot_general(
        x, dy, (((0,), (0,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return packed.pick(dense)
