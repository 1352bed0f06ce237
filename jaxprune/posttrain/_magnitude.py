"""Magnitude pruning of one matrix: the baseline that needs no data.

Han et al., Learning both Weights and Connections, arXiv 1506.02626.
"""

import jax.numpy as jnp

from jaxprune.posttrain import _selection, _solver
from jaxprune.posttrain._solver import Group, Solver
from jaxprune.structures import Structure


def magnitude(*, group: Group = "layer") -> Solver:
    """`|w|`; kept weights stay as they are.

    Args:
      group: `"layer"` compares all weights of the matrix, as the code of Wanda does for
        its baseline; `"output"` those of one output.

    Returns:
      A `Solver`. It keeps exact counts, where that code prunes one weight more.

    Raises:
      ValueError: for another group.

    Example:
      >>> w = jnp.array([[3.0, -1.0], [0.5, 2.0]])
      >>> solver = jp.posttrain.magnitude()
      >>> inputs = jp.calibration.Inputs(count=jnp.float32(1))
      >>> solver.solve(w, inputs, 0.5, jp.Unstructured()).w.tolist()
      [[3.0, 0.0], [0.0, 2.0]]

    References:
      Han et al., arXiv 1506.02626, Section 3.1.
    """
    _solver.check_group("magnitude", group, ("layer", "output"))
    return _solver.solver("magnitude", (), _magnitude, group=group)


def _magnitude(w, inputs, kept, *, structure: Structure, group):
    del inputs
    mask = _selection.best(jnp.abs(w), kept, structure, group)
    return jnp.where(mask, w, 0), mask, None, None
