"""How sparse weights are before any of them is zero: the PQ Index."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def pq_index(
    w: Float[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    p: float = 0.5,
    q: float = 1.0,
) -> Float[Array, ""]:
    """`1 - d**(1/q - 1/p) ||w||_p / ||w||_q`, over the `d` weights that are kept.

    0 where all are of the same size; `1 - d**(1/q - 1/p)` where only one is not 0. It
    changes neither with the scale of the weights nor when all are repeated.

    Args:
      w: weights.
      mask: which of them count; all by default.
      p: the smaller norm, 0 < p < q.
      q: the larger norm.

    Returns:
      A number in [0, 1), float32; 0 where there is nothing to measure, NaN where a weight
      is not finite.

    Raises:
      ValueError: unless 0 < p < q.

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
    sizes = jnp.abs(w).astype(jnp.float32)
    count = jnp.float32(w.size)
    if mask is not None:
        sizes = jnp.where(mask, sizes, 0)
        count = jnp.sum(mask, dtype=jnp.float32)
    largest = jnp.max(sizes, initial=0)
    sizes = sizes / jnp.where(largest == 0, 1, largest)
    # Means in place of sums take the power of d with them, and overflow nowhere.
    count = jnp.maximum(count, 1)
    small, large = ((jnp.sum(sizes**x) / count) ** (1 / x) for x in (p, q))
    index = 1 - small / jnp.where(largest == 0, 1, large)
    return jnp.where(largest == 0, 0, jnp.maximum(index, 0))
