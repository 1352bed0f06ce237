"""The damped Gram matrix of one layer's inputs, factored."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

_LEAF = 256  # rows factored by LAPACK


class Factored(NamedTuple):
    """`H = Lᵀ L` with `L` lower triangular.

    What others call `U`, the upper triangular root of `inv(H) = Uᵀ U`, is `inv(L)ᵀ`.
    """

    lower: Float[Array, "K K"]
    dead: Bool[Array, " K"]  # inputs that were 0 in every row
    damping: Float[Array, ""]  # as a share of the mean; NaN where none did
    added: Float[Array, ""]  # to the diagonal


def factor(gram: Float[Array, "K K"], damping: float) -> Factored:
    """Factors `gram + damping * mean * I`, with ten times more damping where that fails.

    Inputs that were always 0 get the mean of the others on their diagonal.
    """
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    fill = jnp.where(dead, mean, 0)
    shares = jnp.asarray(escalation(damping))

    def failed(state):
        i, lower = state
        return (i < len(shares)) & ~jnp.isfinite(lower[0, 0])

    def attempt(state):
        i, _ = state
        return i + 1, cholesky(gram + jnp.diag(fill + shares[i] * mean))

    # Of what is not positive definite JAX makes NaN.
    tries, lower = lax.while_loop(failed, attempt, (0, jnp.full_like(gram, jnp.nan)))
    share = jnp.where(jnp.isfinite(lower[0, 0]), shares[tries - 1], jnp.nan)
    return Factored(lower, dead, share, share * mean)


def escalation(damping: float) -> np.ndarray:
    """What to try, in turn: from `damping` on ten times more, up to the whole mean."""
    steps = max(0, math.ceil(-math.log10(damping) - 1e-9))
    shares = [min(damping * 10**i, max(damping, 1)) for i in range(steps + 1)]
    return np.asarray(shares, np.float32)


def cholesky(h: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """The lower triangular `L` with `h = Lᵀ L`; NaN where `h` is not positive definite.

    By halves, so that most of it is products, which are faster than LAPACK's routine.
    """
    size = h.shape[0]
    if size <= _LEAF:
        flipped = lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)
        return flipped[::-1, ::-1].T
    half = size // 2
    corner = cholesky(h[half:, half:])
    side = lax.linalg.triangular_solve(
        corner, h[half:, :half], left_side=True, lower=True, transpose_a=True
    )
    rest = h[:half, :half] - jnp.matmul(side.T, side, precision=lax.Precision.HIGHEST)
    zeros = jnp.zeros_like(side.T)
    return jnp.block([[cholesky(rest), zeros], [side, corner]])
