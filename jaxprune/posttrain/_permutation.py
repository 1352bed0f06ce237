"""Which inputs to put together before N:M pruning, so that more of the scores stays.

Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models, ICLR 2024, Section 4.2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.optimize import linear_sum_assignment

from jaxprune import scores as scores_of
from jaxprune.calibration import Inputs
from jaxprune.posttrain import _selection, _solver
from jaxprune.structures import NM


def channel_permutation(
    w: Float[Array, "K N"], inputs: Inputs, structure: NM, *, power: float = 0.5
) -> np.ndarray:
    """An order of the inputs in which N:M groups keep more of RIA's scores.

    Inputs, from the least to the most important, are dealt to the groups in turn, forth
    and back. Then, for each place of a group, the inputs at that place are assigned to
    groups anew so that the scores kept are as large as they can be with the other places
    as they are (linear sum assignment).

    A layer whose inputs are permuted wants the outputs of the layer before permuted
    alike, or its inputs gathered: neither is done here. Prune `w[p]` with inputs whose
    axes K are permuted too; the mask in the old order, `mask[np.argsort(p)]`, is no N:M
    pattern of the old order. Runs on the host, not under `jit`: the assignment is SciPy's,
    and takes time that grows with `(K / m)³`.

    Args:
      w: one matrix.
      inputs: with `square`.
      structure: an `NM`.
      power: of the norm of an input; see `ria`.

    Returns:
      `p`, integers `[K]`; as they are where no better order is found. The authors can
      divide large layers into parts to save time, and judge inputs in other ways: left
      out.

    Raises:
      TypeError: for another structure.
      ValueError: as from a solver; and for stacks, which have one order each.

    Example:
      >>> w = jnp.array([[4.0], [3.0], [2.0], [1.0]])
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), square=jnp.ones(4))
      >>> p = jp.posttrain.channel_permutation(w, inputs, jp.NM(1, 2))
      >>> sorted(w[p].reshape(2, 2).max(1).tolist())
      [3.0, 4.0]

    References:
      Zhang et al., ICLR 2024 (openreview Tr0lPx9woF), Section 4.2.
    """
    if not isinstance(structure, NM):
        raise TypeError(
            f"structure: got {structure!r}; expected NM(n, m): only groups along K gain "
            "from another order."
        )
    _solver.check("channel_permutation", w, inputs, ("square",), None, structure)
    if w.ndim != 2:
        raise ValueError(
            f"w: got shape {w.shape}; expected one matrix [K, N]. Call it for each matrix "
            "of a stack."
        )
    n, m = structure.n, structure.m
    scores = scores_of.ria(w, jnp.asarray(inputs.square), power=power)
    rows = np.argsort(np.asarray(jnp.sum(scores, axis=1)), kind="stable")
    parts = rows.reshape(m, -1)
    groups = np.stack([p[::-1] if i % 2 else p for i, p in enumerate(parts)], axis=1)
    for place in range(m):
        rest = np.delete(groups, place, axis=1)
        gain = _gains(scores[rest], scores[groups[:, place]], n)
        groups[:, place] = groups[linear_sum_assignment(gain, maximize=True)[1], place]

    order = _selection.group_order(structure, w.shape[0])
    natural = np.arange(w.shape[0]) if order is None else order
    if _kept(scores[groups], n) <= _kept(scores[natural.reshape(-1, m)], n):
        return np.arange(w.shape[0])
    found = np.empty_like(natural)
    found[natural] = groups.reshape(-1)
    return found


@jax.jit(static_argnums=2)
def _gains(
    rest: Float[Array, "groups others N"], candidates: Float[Array, "groups N"], n: int
) -> Float[Array, "groups groups"]:
    """What group i would keep with candidate j, but for what does not depend on j."""
    # A candidate stays where it beats the n-th of the others, and then that one goes.
    bar = jnp.sort(rest, axis=1, descending=True)[:, n - 1]
    return lax.map(lambda b: jnp.sum(jnp.maximum(candidates, b), axis=1), bar)


@jax.jit(static_argnums=1)
def _kept(grouped: Float[Array, "groups m N"], n: int) -> Float[Array, ""]:
    return jnp.sum(jnp.sort(grouped, axis=1, descending=True)[:, :n])
