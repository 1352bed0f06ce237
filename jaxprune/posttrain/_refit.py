"""The best weights on a given mask: exact least squares, output by output."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune.calibration import Inputs
from jaxprune.posttrain import _hessian, _solver
from jaxprune.posttrain._solver import Solution

_AT_ONCE = 16  # outputs; each needs a matrix of the Gram matrix's size
_REFINEMENTS = 3


def refit(
    w: Float[Array, "*stack K N"],
    mask: Bool[Array, "*stack K N"],
    inputs: Inputs,
    *,
    damping: float = 1e-6,
) -> Solution:
    """Weights on the mask whose outputs are nearest to those of `w`.

    For each output, `argmin (v - w)ᵀ G (v - w)` over `v` that are 0 off the mask, from
    one Cholesky factor of the rows and columns kept and a few steps of refinement, which
    take back what damping did: as exact as float32 allows.

    Args:
      w: the dense weights.
      mask: True = kept.
      inputs: with `gram`.
      damping: share of the mean of the Gram matrix's diagonal; ten times more, and again,
        where the factor fails. It picks among solutions that are as good.

    Returns:
      The weights and the mask as they are in other solutions. Inputs that were always 0
      get weights of 0. Time grows with `N K³`: this is the yardstick, or the last step for
      layers of a few thousand inputs. One output does not meet another, but they go
      through a loop, so on a mesh shard stacks rather than N.

    Raises:
      ValueError: if there is no Gram matrix, something does not fit or is not finite, or
        no damping helps.
      TypeError: if the mask is not boolean.

    Example:
      >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), gram=gram)
      >>> w, mask = jnp.array([[4.0], [1.0]]), jnp.array([[True], [False]])
      >>> jp.posttrain.refit(w, mask, inputs).w.round(3).tolist()
      [[4.5], [0.0]]
    """
    _solver.check_damping("refit", damping)
    _solver.check_matrix("refit", w, inputs, ("gram",))
    check_mask(mask, w)
    found = _refit(w, mask, inputs.gram, damping)
    _solver.check_solved("refit", found)
    return found


def check_mask(mask: Any, w: Array) -> None:
    """Refuses what is no boolean array of the shape of `w`."""
    shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
    if dtype != jnp.bool_:
        raise TypeError(f"mask: got {dtype}; expected booleans, True = kept.")
    if shape != w.shape:
        raise ValueError(f"mask: got shape {shape}; expected that of w, {w.shape}.")


@jax.jit(static_argnums=3)
def _refit(w, mask, gram, damping: float) -> Solution:
    def one(w, mask, gram):
        wide = w.astype(jnp.float32)
        new, share = on_mask(wide, mask, gram, damping)
        new = new.astype(w.dtype)
        return Solution(new, mask, _solver.layer_error(wide, new, gram), share)

    return _solver.over_stack(one, w.ndim - 2)(w, mask, gram)


def on_mask(
    w: Float[Array, "K N"],
    mask: Bool[Array, "K N"],
    gram: Float[Array, "K K"],
    damping: float,
) -> tuple[Float[Array, "K N"], Float[Array, ""]]:
    """The refitted weights and the damping that it took; NaN where none was enough."""
    live = jnp.diagonal(gram) > 0
    mean = jnp.sum(jnp.diagonal(gram)) / jnp.maximum(jnp.sum(live), 1)
    wanted = jnp.matmul(gram, w, precision=lax.Precision.HIGHEST)
    shares = jnp.asarray(_hessian.escalation(damping))

    def solve(share, column):
        keep, target = column
        both = keep[:, None] & keep
        damped = jnp.where(both, gram, 0)
        damped += jnp.diag(jnp.where(keep, share * mean, mean))
        factor = jax.scipy.linalg.cho_factor(damped, lower=True)

        def refine(_, v):
            product = jnp.matmul(gram, v, precision=lax.Precision.HIGHEST)
            left = jnp.where(keep, target - product, 0)
            return v + jax.scipy.linalg.cho_solve(factor, left)

        return lax.fori_loop(0, 1 + _REFINEMENTS, refine, jnp.zeros_like(target))

    columns = (mask & live[:, None]).T, wanted.T

    def attempt(state):
        i, _ = state
        found = lax.map(lambda c: solve(shares[i], c), columns, batch_size=_AT_ONCE)
        return i + 1, found.T

    def failed(state):
        i, new = state
        return (i < len(shares)) & ~jnp.all(jnp.isfinite(new))

    tries, new = lax.while_loop(failed, attempt, (0, jnp.full_like(w, jnp.nan)))
    share = jnp.where(jnp.all(jnp.isfinite(new)), shares[tries - 1], jnp.nan)
    return jnp.where(mask, new, 0 * new), share
