"""The constant that pruned weights gave to their outputs, for the bias to take over."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.calibration import Inputs
from jaxprune.posttrain import _given


def bias_correction(
    w_dense: Float[Array, "*stack K N"],
    w: Float[Array, "*stack K N"],
    inputs: Inputs,
) -> Float[Array, "*stack N"]:
    """`E[x] (w_dense - w)`: added to the bias, it makes the mean error of outputs zero.

    Args:
      w_dense: weights before.
      w: weights after, pruned ones at 0.
      inputs: `mean`.

    Returns:
      What to add to the bias, in at least float32. A layer without bias needs one.

    Raises:
      ValueError: if shapes do not fit, or `inputs.mean` is missing.

    Example:
      >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> inputs = jp.calibration.Inputs(1.0, mean=jnp.array([0.5, 1.0]))
      >>> jp.posttrain.bias_correction(w, w.at[1].set(0.0), inputs).tolist()
      [3.0, 4.0]

    References:
      An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models,
      arXiv 2312.11983 (baseline bias compensation), there for whole channels.
    """
    _given.check("bias_correction", jnp.ones(jnp.shape(w), bool), w_dense=w_dense, w=w)
    mean = _given.statistic("bias_correction", inputs, "mean", w_dense)
    change = _given.wide(w_dense) - _given.wide(w)
    return jnp.einsum("...k,...kn->...n", mean, change, precision=lax.Precision.HIGHEST)
