"""A pair of factors of low rank beside weights that stay as they are."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Two factors of a matrix as large as the weights `[*stack, K, N]`.

    Attributes:
      a: float32 `[*stack, K, rank]`.
      b: float32 `[*stack, rank, N]`.
      scale: what `a b` is multiplied with before it is added to the weights; `None` for
        ScaleLoRA, where the weights are multiplied with `a b`.
      axes: axes of the weights that are the stack, K and N; `None` where they are in this
        order, the last two being K and N.
    """

    a: Float[Array, "*stack K rank"]
    b: Float[Array, "*stack rank N"]
    scale: float | None = dataclasses.field(metadata={"static": True})
    axes: Axes | None = dataclasses.field(default=None, metadata={"static": True})

    def merge(self, w: Array, mask: Array | None = None) -> Array:
        """The weights with the factors in them, in their dtype; 0 where pruned."""
        product = jnp.matmul(self.a, self.b, precision=lax.Precision.HIGHEST)
        product = from_matrices(product, self.axes, w.shape)
        old = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        new = old * product if self.scale is None else old + self.scale * product
        return (new if mask is None else jnp.where(mask, new, 0)).astype(w.dtype)


def to_matrices(leaf: Array, axes: Axes | None) -> Array:
    """A leaf as `[*stack, K, N]`."""
    if axes is None:
        return leaf
    stack, k, n = ([leaf.shape[i] for i in part] for part in axes)
    order = [i for part in axes for i in part]
    return leaf.transpose(order).reshape(*stack, math.prod(k), math.prod(n))


def from_matrices(matrices: Array, axes: Axes | None, shape: Sequence[int]) -> Array:
    """The leaf of this shape: the inverse of `to_matrices`."""
    if axes is None:
        return matrices
    order = [i for part in axes for i in part]
    found = matrices.reshape([shape[i] for i in order])
    return found.transpose([order.index(i) for i in range(len(order))])
