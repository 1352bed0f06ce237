"""The damped Gram matrix of one layer's inputs, factored."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

_LEAF = 256  # rows factored by LAPACK
_HALVED = 4096  # rows up to which this goes by halves: a longer program, a faster one
_LENGTHS = 8  # of products with the rows below that are compiled, whatever the size


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

    Panel by panel from the bottom, in a loop, so that the program is as small for a large
    `h`; nearly all of it is products, which are faster than LAPACK's routine.
    """
    size = h.shape[0]
    if size <= _HALVED:
        return _by_halves(h)
    panels = -(-size // _LEAF)
    more = panels * _LEAF - size
    # Rows that fill up the last panel, at the top, of no weight.
    h = jnp.pad(h, ((more, 0), (more, 0)))
    h = h if more == 0 else h + jnp.diag(jnp.arange(size + more) < more).astype(h.dtype)
    at_once = -(-panels // _LENGTHS)
    products = [
        _product(size + more, _LEAF * i, _LEAF * min(i + at_once - 1, panels - 1))
        for i in range(0, panels, at_once)
    ]

    def add_panel(lower, i):
        at = size + more - (i + 1) * _LEAF
        rows = lax.dynamic_slice_in_dim(h, at, _LEAF)
        rows -= lax.switch(i // at_once, products, lower, at)
        corner = _by_halves(lax.dynamic_slice_in_dim(rows, at, _LEAF, axis=1))
        panel = lax.linalg.triangular_solve(
            corner, rows, left_side=True, lower=True, transpose_a=True
        )
        on, column = lax.iota(jnp.int32, _LEAF)[:, None], lax.iota(jnp.int32, len(h))
        panel = jnp.where(column <= at + on, panel, 0)
        return lax.dynamic_update_slice_in_dim(lower, panel, at, 0), None

    lower, _ = lax.scan(add_panel, jnp.zeros_like(h), np.arange(panels))
    return lower[more:, more:]


def _by_halves(h: Float[Array, "K K"]) -> Float[Array, "K K"]:
    size = h.shape[0]
    if size <= _LEAF:
        flipped = lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)
        return flipped[::-1, ::-1].T
    half = size // 2
    corner = _by_halves(h[half:, half:])
    side = lax.linalg.triangular_solve(
        corner, h[half:, :half], left_side=True, lower=True, transpose_a=True
    )
    rest = h[:half, :half] - jnp.matmul(side.T, side, precision=lax.Precision.HIGHEST)
    zeros = jnp.zeros_like(side.T)
    return jnp.block([[_by_halves(rest), zeros], [side, corner]])


def _product(size: int, least: int, most: int) -> Callable[[Array, Array], Array]:
    """Of what stands below a panel, at least `least` and at most `most` rows.

    Rows below that are not there yet are 0, and so are columns to the right of the panel.
    """

    def product(lower, at):
        below = lower[size - most :, : size - least]
        links = lax.dynamic_slice_in_dim(below, at, _LEAF, axis=1)
        found = jnp.matmul(links.T, below, precision=lax.Precision.HIGHEST)
        return jnp.pad(found, ((0, 0), (0, least)))

    return product
