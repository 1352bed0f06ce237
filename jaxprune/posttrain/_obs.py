"""Optimal Brain Surgeon on one matrix: one weight at a time, the cheapest first.

Hassibi & Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon,
NeurIPS 1992; for layers, Frantar et al., Optimal Brain Compression, arXiv 2208.11580.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.calibration import Inputs
from jaxprune.posttrain import _hessian, _selection, _solver
from jaxprune.posttrain._solver import Solution, Sparsity
from jaxprune.structures import NM, Structure, Unstructured

_AT_ONCE = 8  # outputs; each keeps an inverse of its own
_HIGHEST = lax.Precision.HIGHEST


def obs(
    w: jax.Array,
    inputs: Inputs,
    sparsity: Sparsity = None,
    structure: Structure = Unstructured(),
    *,
    damping: float = 0.01,
) -> Solution:
    """Prunes each output weight by weight, and sets the others anew each time.

    Of the weights left, the one with the smallest `w_i² / inv(H)_ii` goes; the others
    change by `-inv(H)_:i w_i / inv(H)_ii`, and row and column `i` leave `inv(H)`.

    Args:
      w: `[*stack, K, N]`.
      inputs: with `gram`.
      sparsity: share to prune of every output, or `None` with `NM`.
      structure: `Unstructured()`, or `NM`, where a group of which enough is pruned
        loses nothing more.
      damping: of the Gram matrix, as a share of the mean of its diagonal; ten times more
        where its factor fails.

    Returns:
      A `Solution`. Time grows with `N K³`, and every output needs a `K x K` matrix: this
      is the method that SparseGPT makes fast, for layers of some hundred inputs.

    Raises:
      ValueError: as from a solver.
      TypeError: for blocks, which go as one.

    Example:
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), gram=jnp.eye(2))
      >>> jp.posttrain.obs(jnp.array([[1.0], [2.0]]), inputs, 0.5).w.tolist()
      [[0.0], [2.0]]

    References:
      Hassibi & Stork, NeurIPS 1992, Eq. (5); Frantar et al., arXiv 2208.11580,
      Algorithm 1.
    """
    _solver.check_damping("obs", damping)
    if not isinstance(structure, Unstructured | NM):
        raise TypeError(
            f"structure: got {structure!r}; expected Unstructured() or NM(n, m): obs "
            "prunes weight by weight. For blocks use sparsegpt()."
        )
    one = _solver.solver("obs", ("gram",), _obs, group="output", damping=damping)
    return one.solve(w, inputs, sparsity, structure)


def _obs(w, inputs, kept, *, structure: Structure, group: str, damping: float):
    del group
    rows = w.shape[0]
    hessian = _hessian.factor(inputs.gram, damping)
    w = jnp.where(hessian.dead[:, None], 0, w)
    eye = jnp.eye(rows, dtype=hessian.lower.dtype)
    root = jax.scipy.linalg.solve_triangular(hessian.lower, eye, lower=True)
    inverse = jnp.matmul(root, root.T, precision=_HIGHEST)
    pruned = jnp.int32(rows) - kept.lo[0].astype(jnp.int32)
    is_nm = isinstance(structure, NM)
    order = _selection.group_order(structure, rows)
    members = np.arange(rows) if order is None else order
    size = structure.m if is_nm else rows
    place = jnp.asarray(np.argsort(members) // size)  # of each row, its group
    groups = rows // size
    most = structure.m - structure.n if is_nm else pruned

    def prune(column):
        def step(_, state):
            v, inverse, keep, gone = state
            free = keep & (gone < most)[place]
            diagonal = jnp.diagonal(inverse)
            cost = jnp.where(free, v**2 / diagonal, jnp.inf)
            i = jnp.argmin(cost)
            column = inverse[:, i]
            v = v - column * (v[i] / diagonal[i])
            keep = keep.at[i].set(False)
            # Its row and column would be 0; a diagonal of 1 keeps them out of the rest.
            inverse = inverse - jnp.outer(column, column) / diagonal[i]
            inverse = jnp.where(keep[:, None] & keep, inverse, eye)
            return jnp.where(keep, v, 0), inverse, keep, gone.at[place[i]].add(1)

        start = column, inverse, jnp.ones(rows, bool), jnp.zeros(groups, jnp.int32)
        v, _, keep, _ = lax.fori_loop(0, pruned, step, start)
        return v, keep

    new, mask = lax.map(prune, w.T, batch_size=_AT_ONCE)
    new = jnp.where(jnp.isnan(hessian.damping), jnp.nan, new)
    return new.T, mask.T, None, hessian.damping
