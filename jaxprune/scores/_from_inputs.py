"""Scores of a matrix and of what it is multiplied with: Wanda, RIA and their contrast."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def wanda(
    w: Float[Array, "*stack K N"], square: Float[Array, "*stack K"]
) -> Float[Array, "*stack K N"]:
    """`|w| √E[x²]`, to be compared among the weights of one output, a column.

    Args:
      w: weights, inputs first.
      square: mean squares of the inputs. The authors take sums over a sequence, which
        orders the weights alike.

    Returns:
      Scores in at least float32. Higher is kept.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> w = jnp.array([[1.0, -2.0], [3.0, 1.0]])
      >>> jp.scores.wanda(w, jnp.array([9.0, 1.0])).tolist()
      [[3.0, 6.0], [3.0, 1.0]]

    References:
      Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
      arXiv 2306.11695, Eq. (1).
    """
    _check("wanda", w, square)
    return jnp.abs(_wide(w)) * jnp.sqrt(_wide(square))[..., None]


def ria(
    w: Float[Array, "*stack K N"],
    square: Float[Array, "*stack K"],
    *,
    power: float = 0.5,
) -> Float[Array, "*stack K N"]:
    """Relative importance and activations: `(|w| / Σ_K |w| + |w| / Σ_N |w|) E[x²]^(p/2)`.

    Args:
      w: weights, inputs first.
      square: mean squares of the inputs.
      power: `p`, of the root mean square; 0.5 as the authors.

    Returns:
      Scores in at least float32. Higher is kept; they can be compared within the matrix.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> w = jnp.array([[1.0, 3.0], [1.0, 3.0]])
      >>> jp.scores.ria(w, jnp.array([1.0, 16.0])).tolist()
      [[0.75, 1.25], [1.5, 2.5]]

    References:
      Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large
      Language Models, ICLR 2024.
    """
    _check("ria", w, square)
    size = jnp.abs(_wide(w))
    column, row = (jnp.sum(size, axis=a, keepdims=True) for a in (-2, -1))
    relative = size / jnp.where(column > 0, column, 1) + size / jnp.where(
        row > 0, row, 1
    )
    return relative * _wide(square)[..., None] ** (power / 2)


def contrast(
    target: Float[Array, "..."], reference: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Lowest for the weights that serve the target data most, and more than others.

    `-target` where that is above `reference`, else 0: so that what is pruned first is what
    the target data, such as memorised images or an unwanted concept, need and other data
    need less. `jaxprune.posttrain.contrast_mask` prunes as the authors do.

    Args:
      target: scores on the target data, 0 or more, as `wanda` gives them.
      reference: scores of the same weights on other data.

    Returns:
      Scores; higher is kept.

    Raises:
      ValueError: if shapes differ.

    Example:
      >>> jp.scores.contrast(jnp.array([3.0, 2.0]), jnp.array([1.0, 4.0])).tolist()
      [-3.0, 0.0]

    References:
      Chavhan et al., Memorized Images in Diffusion Models share a Subspace that can be
      Located and Deleted, arXiv 2406.18566.
    """
    if jnp.shape(target) != jnp.shape(reference):
        raise ValueError(
            f"contrast: target has the shape {jnp.shape(target)} and reference "
            f"{jnp.shape(reference)}; expected scores of the same weights."
        )
    return jnp.where(target > reference, -target, jnp.zeros_like(target))


def _check(caller: str, w: Array, square: Array) -> None:
    if jnp.ndim(w) < 2 or jnp.shape(square) != jnp.shape(w)[:-1]:
        raise ValueError(
            f"{caller}: square has the shape {jnp.shape(square)}; expected "
            f"{jnp.shape(w)[:-1]} for weights [*stack, K, N] of {jnp.shape(w)}."
        )


def _wide(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
