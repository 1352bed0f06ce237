"""RIA: relative importance of a weight among those of its input and of its output.

Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models, ICLR 2024.
"""

import jax.numpy as jnp

from jaxprune import scores
from jaxprune.posttrain import _selection, _solver
from jaxprune.posttrain._solver import Group, Solver
from jaxprune.structures import Structure


def ria(*, group: Group = "layer", power: float = 0.5) -> Solver:
    """`(|w_kn| / sum_n |w_kn| + |w_kn| / sum_k |w_kn|) (E x_k²)^(power / 2)`.

    Args:
      group: `"layer"` compares all weights, as the authors' code does unless told
        otherwise; `"output"` those of one output.
      power: of the norm of the input; the paper's `a`, 0.5 there.

    Returns:
      A `Solver` that needs `square`. Counts are exact, where the authors' code prunes
      one weight more. Before N:M pruning the authors permute the inputs; that is
      `channel_permutation`, and not done here.

    Raises:
      ValueError: for another group or a negative power.

    Example:
      >>> w = jnp.array([[3.0, 1.0], [1.5, 1.0]])
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), square=jnp.ones(2))
      >>> jp.posttrain.ria().solve(w, inputs, 0.25, jp.Unstructured()).w.tolist()
      [[3.0, 0.0], [1.5, 1.0]]

    References:
      Zhang et al., ICLR 2024 (openreview Tr0lPx9woF), Eq. (2) and (3).
    """
    _solver.check_group("ria", group, ("layer", "output"))
    if not 0 <= power < float("inf"):
        raise ValueError(f"ria: got power={power!r}; expected at least 0, such as 0.5.")
    return _solver.solver("ria", ("square",), _ria, group=group, power=power)


def _ria(w, inputs, kept, *, structure: Structure, group, power):
    mask = _selection.best(
        scores.ria(w, inputs.square, power=power), kept, structure, group
    )
    return jnp.where(mask, w, 0), mask, None, None
