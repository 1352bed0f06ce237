"""Weights that some data need more than other data, taken out."""

import math
from fractions import Fraction

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import allocation, scores
from jaxprune.calibration import Inputs
from jaxprune.posttrain import _given


def contrast_mask(
    w: Float[Array, "*stack K N"],
    target: Inputs,
    reference: Inputs,
    *,
    share: float | Fraction = 0.01,
) -> Bool[Array, "*stack K N"]:
    """Prunes what the target data need most, and more than the reference data do.

    Of each column, the `floor(share * K)` weights with the highest Wanda score on the
    target data go, but only those that score higher there than on the reference data.
    For several sets of target data, or several steps of a diffusion model, take a mask for
    each and combine them with `&`: what any of them prunes goes.

    Args:
      w: weights, inputs first; of feed-forward layers in the papers.
      target: `square` of the inputs on what the model shall forget.
      reference: `square` of the inputs on what it shall keep.
      share: of a column that goes at most; 0.01 is the default of the code for the second
        paper. How the first chooses it was not checked.

    Returns:
      True = keep. The count depends on the data.

    Raises:
      ValueError: if shapes do not fit, `square` is missing or `share` outside [0, 1).

    Example:
      >>> w = jnp.ones((4, 1))
      >>> target = jp.calibration.Inputs(1.0, square=jnp.array([9.0, 4.0, 1.0, 0.0]))
      >>> reference = jp.calibration.Inputs(1.0, square=jnp.array([16.0, 1.0, 0.0, 0.0]))
      >>> jp.posttrain.contrast_mask(w, target, reference, share=0.5).ravel().tolist()
      [True, False, True, True]

    References:
      Chavhan et al., Memorized Images in Diffusion Models share a Subspace that can be
      Located and Deleted, arXiv 2406.18566; Chavhan et al., ConceptPrune: Concept Editing
      in Diffusion Models via Skilled Neuron Pruning, arXiv 2405.19237, and its code.
    """
    name = "contrast_mask"
    _given.check(name, jnp.ones(jnp.shape(w), bool), w=w)
    count = math.floor(allocation.exact(share, "share") * w.shape[-2])
    on_target, elsewhere = (
        scores.wanda(w, _given.statistic(name, x, "square", w))
        for x in (target, reference)
    )
    if not count:
        return jnp.ones(w.shape, bool)
    # [*stack, N, count]; ties go to the lower index.
    _, rows = lax.top_k(jnp.swapaxes(on_target, -1, -2), count)
    first = jnp.put_along_axis(
        jnp.zeros(w.shape, bool),
        jnp.swapaxes(rows, -1, -2),
        True,
        axis=-2,
        inplace=False,
    )
    return ~(first & (on_target > elsewhere))
