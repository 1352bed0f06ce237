"""The l1 penalty weighted by missing links: preferential attachment (NeuroPrune)."""

import math
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, ScalarLike

from . import _soft

Reading: TypeAlias = Literal["missing", "inverse", "uniform"]

_READINGS = ("missing", "inverse", "uniform")


def missing_links(
    kernel: Float[Array, "*batch fan_in units"], *, eps: float = 1e-4
) -> Float[Array, "*batch units"]:
    """Share of the incoming links of each unit that are missing.

    A link is missing where `|w| < eps`. A unit's incoming links are a column of a Flax
    kernel, `kernel[..., :, i]`. The paper writes the layers of the MLP as
    `[units, fan_in]`, so its row i is our column i, both for the expanding and for the
    contracting layer.

    The share is a step function of the weights; no gradient flows through it.

    Args:
      kernel: weights, any floating-point dtype. Flatten convolutions to two axes first.
      eps: size below which a weight counts as missing. The default is the paper's.

    Returns:
      Numbers in [0, 1], at least float32. A NaN weight is not missing.

    Raises:
      TypeError: if `kernel` is not floating point.
      ValueError: if `kernel` has fewer than two axes or no rows, or `eps` is not a
        finite number above zero.

    Example:
      >>> missing_links(jnp.array([[0.0, 1.0], [2.0, 3.0]]))
      Array([0.5, 0. ], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (1).
    """
    return _missing_count(kernel, eps) / _wide(kernel).type(kernel.shape[-2])


def degree_weights(
    kernel: Float[Array, "*batch fan_in units"],
    *,
    eps: float = 1e-4,
    reading: Reading = "missing",
) -> Float[Array, "*batch units"]:
    """Weight of the l1 penalty on each unit: the fewer links it has, the larger.

    With `n` missing links (see `missing_links`) out of `d`, the readings are

    - `"missing"`: `n / d`. A unit that has all its links is not penalised at all.
    - `"inverse"`: `d / max(d - n, 1)`, from 1 for a unit with all its links to `d` for
      one with a single link or none; the clamp is ours and keeps the weight finite.
    - `"uniform"`: 1, the plain l1 penalty, as a baseline.

    Equation (1) was reconstructed from the paper's prose, which fits both of the first
    two readings: "inversely proportional to the (fractional) connectivity" in words,
    with an `n` that counts what is missing. Whether the division by `d` stands in the
    equation or in its coefficient is not known either; with it, layers of unequal
    fan-in are penalised alike.

    Args:
      kernel: weights, any floating-point dtype.
      eps: size below which a weight counts as missing.
      reading: how missing links become a weight.

    Returns:
      Weights without gradient, at least float32.

    Raises:
      TypeError: if `kernel` is not floating point.
      ValueError: as `missing_links`, or if `reading` is none of the three.

    Example:
      >>> kernel = jnp.array([[0.0, 1.0], [2.0, 3.0]])
      >>> degree_weights(kernel)
      Array([0.5, 0. ], dtype=float32)
      >>> degree_weights(kernel, reading="inverse")
      Array([2., 1.], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (1).
    """
    if reading not in _READINGS:
        raise ValueError(
            f"reading is {reading!r}; wanted one of {', '.join(map(repr, _READINGS))}. "
            f"Leave it out for the reading nearest to the paper."
        )
    missing = _missing_count(kernel, eps)
    dtype = _wide(kernel)
    fan_in = kernel.shape[-2]
    if reading == "missing":
        return missing / dtype.type(fan_in)
    if reading == "inverse":
        return dtype.type(fan_in) / jnp.maximum(fan_in - missing, 1)
    return jnp.ones_like(missing, dtype)


def degree_l1(
    kernel: Float[Array, "*batch fan_in units"],
    *,
    eps: float = 1e-4,
    reading: Reading = "missing",
) -> Float[Array, "*batch"]:
    r"""The l1 norm of each unit's incoming links, weighted by how many are missing.

    .. math:: R(W) = \sum_i c_i \sum_j |W_{ji}|

    with the weights `c` of `degree_weights`, held constant: the gradient is
    `c * sign(W)`, and 0 where a weight is 0. Added to a loss and minimised by Adam it
    leaves few exact zeros; `prox_degree_l1` makes them.

    Args:
      kernel: weights, any floating-point dtype.
      eps: size below which a weight counts as missing.
      reading: how missing links become a weight; see `degree_weights`.

    Returns:
      One number for each matrix, at least float32.

    Raises:
      TypeError: if `kernel` is not floating point.
      ValueError: as `degree_weights`.

    Example:
      >>> degree_l1(jnp.array([[0.0, 1.0], [2.0, 3.0]]))
      Array(1., dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (1), reconstructed.
    """
    weights = degree_weights(kernel, eps=eps, reading=reading)
    l1 = jnp.sum(_soft.magnitude(kernel), axis=-2)  # [*batch, units]
    return jnp.sum(weights * l1, axis=-1)


def prox_degree_l1(
    kernel: Float[Array, "*batch fan_in units"],
    strength: ScalarLike,
    *,
    weights: Float[Array, "*batch units"],
) -> Float[Array, "*batch fan_in units"]:
    r"""The proximal operator of `strength * degree_l1` for given weights.

    .. math:: \arg\min_X \tfrac12 \|X - W\|^2 + s \sum_i c_i \sum_j |X_{ji}|

    which is a soft threshold of `strength * weights[i]` on column i. The paper adds the
    penalty to the loss; the proximal step is our choice, because it gives exact zeros.

    Args:
      kernel: weights after the optimizer's step, any floating-point dtype.
      strength: coefficient times learning rate, >= 0. At 0 the kernel comes back bit
        for bit. An array may be traced, and counts as 0 unless it is above 0.
      weights: one weight >= 0 for each column, from `degree_weights`, so that they can
        be refreshed less often than once a step.

    Returns:
      The shrunk kernel in its own dtype. Entries within the threshold are exactly 0;
      NaN entries stay NaN.

    Raises:
      TypeError: if `kernel` is not floating point.
      ValueError: if `kernel` has fewer than two axes, `weights` does not have one
        number for each column, or `strength` is no scalar, negative or not finite.

    Example:
      >>> kernel = jnp.array([[0.25, 1.0], [2.0, 3.0]])
      >>> prox_degree_l1(kernel, 1.0, weights=jnp.array([0.5, 0.0]))
      Array([[0. , 1. ],
             [1.5, 3. ]], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (1), reconstructed.
      Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """
    _soft.check_matrix("kernel", kernel)
    _soft.check_strength(strength)
    wanted = kernel.shape[:-2] + kernel.shape[-1:]
    if weights.shape != wanted:
        raise ValueError(
            f"weights has shape {weights.shape} for a kernel of shape {kernel.shape}; "
            f"wanted {wanted}, one number for each column. Take degree_weights(kernel)."
        )
    columns = jnp.expand_dims(weights, -2)  # [*batch, 1, units]
    return _soft.soft_threshold(kernel, jnp.multiply(strength, columns))


def _missing_count(kernel: Array, eps: float) -> Int[Array, "*batch units"]:
    _soft.check_matrix("kernel", kernel)
    if kernel.shape[-2] == 0:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted at least one row, since a unit "
            f"without inputs has no share of missing links. Leave this leaf out."
        )
    if not 0 < eps < math.inf:
        raise ValueError(
            f"eps is {eps}; wanted a finite number above zero, below which a weight "
            f"counts as missing. The paper uses 1e-4."
        )
    # Widened first: eps rounded to bfloat16 would move the threshold.
    values = lax.stop_gradient(kernel).astype(_wide(kernel))
    return jnp.sum(jnp.abs(values) < eps, axis=-2, dtype=jnp.int32)


def _wide(kernel: Array):
    return jnp.promote_types(kernel.dtype, jnp.float32)
