"""How sparse weights are before any of them is zero: the PQ Index."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune._tree import PyTree


def pq_index(
    w: PyTree,
    mask: PyTree | None = None,
    *,
    p: float = 0.5,
    q: float = 1.0,
) -> Float[Array, ""]:
    """`1 - d**(1/q - 1/p) ||w||_p / ||w||_q`, over the `d` weights that are kept.

    0 where all are of the same size; `1 - d**(1/q - 1/p)` where only one is not 0. It
    changes neither with the scale of the weights nor when all are repeated.

    Args:
      w: weights: an array, or a tree of arrays that are measured together.
      mask: which of them count, booleans in the same tree; all by default.
      p: the smaller norm, 0 < p < q.
      q: the larger norm.

    Returns:
      A number in [0, 1), float32; 0 where there is nothing to measure, NaN where a weight
      is not finite.

    Raises:
      ValueError: unless 0 < p < q, and for masks of other shapes.

    Example:
      >>> float(jp.analysis.pq_index(jnp.array([2.0, -2.0])))
      0.0
      >>> float(jp.analysis.pq_index(jnp.array([2.0, 0.0])))
      0.5

    References:
      Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective,
      arXiv 2302.05601, Eq. (1).
    """
    if not 0 < p < q:
        raise ValueError(f"p, q: got {p}, {q}; expected 0 < p < q, such as 0.5 and 1.")
    leaves = [jnp.abs(x).astype(jnp.float32) for x in jax.tree.leaves(w)]
    count = jnp.float32(sum(x.size for x in leaves))
    if mask is not None:
        masks = jax.tree.leaves(mask)
        shapes = [[x.shape for x in xs] for xs in (leaves, masks)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"mask: got leaves of the shapes {shapes[1]}; expected {shapes[0]}, those "
                "of w. Leave out of both what is not to be measured."
            )
        leaves = [jnp.where(m, x, 0) for x, m in zip(leaves, masks, strict=True)]
        count = sum((jnp.sum(m, dtype=jnp.float32) for m in masks), jnp.float32(0))
    largest = jnp.stack([jnp.max(x, initial=0) for x in (*leaves, jnp.zeros(0))]).max()
    scale = jnp.where(largest == 0, 1, largest)
    # Means in place of sums take the power of d with them, and overflow nowhere.
    count = jnp.maximum(count, 1)

    def mean(power: float) -> Array:
        total = sum((jnp.sum((x / scale) ** power) for x in leaves), jnp.float32(0))
        return (total / count) ** (1 / power)

    index = 1 - mean(p) / jnp.where(largest == 0, 1, mean(q))
    return jnp.where(largest == 0, 0, jnp.maximum(index, 0))
