"""The damped Gram matrix of one layer's inputs, factored."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_TRIES = 10  # ten times more each


class Factored(NamedTuple):
    """`H = R Rᵀ` with `R` upper triangular, so that `inv(H) = Uᵀ U` with `U = inv(R)`."""

    upper: Float[Array, "K K"]
    diagonal: Float[Array, " K"]
    dead: Bool[Array, " K"]  # inputs that were 0 in every row
    damping: Float[Array, ""]  # as a share of the mean; NaN where none did
    added: Float[Array, ""]  # to the diagonal


def factor(gram, damping: float) -> Factored:
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    flipped = gram[::-1, ::-1]
    fill = jnp.where(dead, mean, 0)[::-1]

    def attempt(share):
        h = flipped + jnp.diag(fill + share * mean)
        return lax.linalg.cholesky(h, symmetrize_input=False)

    def failed(state):
        i, share, lower = state
        return (i < _TRIES) & ~jnp.isfinite(lower[-1, -1])

    def again(state):
        i, share, _ = state
        return i + 1, share * 10, attempt(share * 10)

    start = jnp.float32(damping)
    _, share, lower = lax.while_loop(failed, again, (1, start, attempt(start)))
    fine = jnp.isfinite(lower[-1, -1])
    share = jnp.where(fine, share, jnp.nan)
    upper = lower[::-1, ::-1]
    return Factored(upper, jnp.diagonal(upper), dead, share, share * mean)
