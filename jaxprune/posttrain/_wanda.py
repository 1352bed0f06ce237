"""Wanda: prune by the weight times the norm of the input it meets.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
arXiv 2306.11695.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import scores
from jaxprune.posttrain import _selection, _solver
from jaxprune.posttrain._solver import Group, Solver
from jaxprune.structures import Structure, Unstructured


def wanda(*, group: Group = "output", alpha: bool = False) -> Solver:
    """`|w_kn| sqrt(E x_k²)`; kept weights stay as they are.

    Args:
      group: `"output"` compares the weights of one output, as the paper does; `"layer"`
        all of the matrix.
      alpha: the variant in which outputs share no count but a bound: each loses its
        lowest scores up to a share alpha of their sum, and alpha is such that the layer
        meets its sparsity. For single weights only; `group` is then the layer.

    Returns:
      A `Solver` that needs `square`. Counts are exact, rounded half down, where the
      authors' code rounds down what it prunes; alpha, too, meets its count exactly, where
      their bisection stops a thousandth away. They take the mean over sequences of the
      sum of squares, which is the same order.

    Raises:
      ValueError: for another group, and from `solve` for `alpha` with a structure.

    Example:
      >>> w = jnp.array([[3.0], [1.0]])
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), square=jnp.array([0.01, 4.0]))
      >>> jp.posttrain.wanda().solve(w, inputs, 0.5, jp.Unstructured()).w.tolist()
      [[0.0], [1.0]]

    References:
      Sun et al., arXiv 2306.11695, Eq. (1) and Algorithm 1; the variant is in the
      authors' code only, as `use_variant`.
    """
    _solver.check_group("wanda", group, ("output", "layer"))
    group = "layer" if alpha else group
    return _solver.solver("wanda", ("square",), _wanda, group=group, alpha=alpha)


def _wanda(w, inputs, kept, *, structure: Structure, group, alpha):
    found = scores.wanda(w, inputs.square)
    if alpha:
        if not isinstance(structure, Unstructured):
            raise ValueError(
                f"wanda: alpha=True with {structure}; expected Unstructured(), since it "
                "bounds what an output loses. Leave alpha out."
            )
        found = _share_of_sum(found)
    mask = _selection.best(found, kept, structure, group)
    return jnp.where(mask, w, 0), mask, None, None


def _share_of_sum(scores: Float[Array, "K N"]) -> Float[Array, "K N"]:
    """What share of its output's sum all scores up to each one make up."""
    order = jnp.argsort(scores, axis=0, descending=True, stable=True)[::-1]
    sums = jnp.cumsum(jnp.take_along_axis(scores, order, axis=0), axis=0)
    total = jnp.maximum(sums[-1], jnp.finfo(sums.dtype).tiny)
    return jnp.take_along_axis(sums / total, jnp.argsort(order, axis=0), axis=0)
