"""Moments of rows, and how moments of two sets of rows become those of both."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.calibration._inputs import Inputs

# Rows of a large Gram matrix that are computed at once, at least, and how many times at
# most: a fifth of the time less for 1536 and for 4096 inputs, on a CPU, than all of it.
_STRIP, _STRIPS = 512, 8

STATISTICS = ("square", "mean", "variance", "gram")


def empty(stack: Sequence[int], k: int, statistics: Sequence[str]) -> Inputs:
    """The moments of no rows: all zeros."""
    shapes = {"gram": (*stack, k, k)}
    arrays = {s: jnp.zeros(shapes.get(s, (*stack, k)), jnp.float32) for s in statistics}
    if "variance" in statistics:  # cannot be merged without the mean
        arrays["mean"] = jnp.zeros((*stack, k), jnp.float32)
    return Inputs(jnp.zeros(tuple(stack), jnp.float32), **arrays)


def merge_inputs(a: Inputs, b: Inputs) -> Inputs:
    """The moments of the rows of both.

    Associative and commutative up to rounding, with moments of no rows as the neutral
    element. Means are moved by a share of their difference, and variances put together
    as Chan et al. do, so that nothing cancels.

    References:
      Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm for computing
      sample variances, 1979, Eq. (2.1).
    """
    count = a.count + b.count
    share = jnp.where(count > 0, b.count / jnp.where(count > 0, count, 1), 0)

    def mean(x, y, axes=1):
        if x is None or y is None:
            return None
        return x + (y - x) * jnp.expand_dims(share, tuple(range(-axes, 0)))

    variance = None
    if a.variance is not None and b.variance is not None:
        apart = jnp.square(_known(b.mean) - _known(a.mean))
        between = apart * (share * (1 - share))[..., None]
        variance = _known(mean(a.variance, b.variance)) + between
    return Inputs(
        count,
        square=mean(a.square, b.square),
        mean=mean(a.mean, b.mean),
        variance=variance,
        gram=mean(a.gram, b.gram, axes=2),
    )


def moments(
    rows: Float[Array, "batch rows K"],
    weights: Float[Array, "#batch rows"] | None,
    statistics: Sequence[str],
) -> Inputs:
    """Moments of rows, each with a weight; float32, products of bfloat16 exactly so."""
    batch, n, _ = rows.shape
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        rows = rows.astype(jnp.float32)
    if weights is None:
        count = jnp.full((batch,), n, jnp.float32)
        weights = jnp.ones((1, n), jnp.float32)
        weighted = rows
    else:
        weights = jnp.broadcast_to(weights.astype(jnp.float32), (batch, n))
        # What does not count may be anything: padding is often NaN.
        rows = jnp.where(weights[..., None] != 0, rows, 0)
        count = jnp.sum(weights, axis=1)
        weighted = rows.astype(jnp.float32) * weights[..., None]
    scale = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)  # [batch]
    wide = rows.astype(jnp.float32)
    found: dict[str, Array] = {}
    if "gram" in statistics:
        gram = _products(weighted, rows.astype(weighted.dtype))
        found["gram"] = gram * scale[:, None, None]
    if "square" in statistics:
        square = jnp.sum(jnp.square(wide) * weights[..., None], axis=1)
        found["square"] = square * scale[:, None]
    if "mean" in statistics or "variance" in statistics:
        mean = jnp.sum(wide * weights[..., None], axis=1) * scale[:, None]
        found["mean"] = mean
        if "variance" in statistics:
            apart = jnp.square(wide - mean[:, None, :]) * weights[..., None]
            found["variance"] = jnp.sum(apart, axis=1) * scale[:, None]
    return Inputs(count, **found)


def _products(
    x: Float[Array, "batch rows K"], y: Float[Array, "batch rows K"]
) -> Float[Array, "batch K K"]:
    """Sums of x_i y_j over rows, which are those of x_j y_i: so half of them are copied."""
    k = x.shape[2]
    height = max(_STRIP, -(-k // _STRIPS))
    # Devices that share K would exchange each strip: there it is one product.
    if k < 2 * _STRIP or jax.typeof(x).sharding.mesh.size > 1:
        height = k
    strips = []
    for start in range(0, k, height):
        stop = min(start + height, k)
        right = lax.dot_general(
            x[..., start:stop], y[..., start:], (((1,), (1,)), ((0,), (0,))),
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip
        above = [s[..., start:stop].mT for s in strips]
        strips.append(jnp.concatenate([*above, right], axis=2))
    return jnp.concatenate(strips, axis=1)


def nbytes(stack: Sequence[int], k: int, statistics: Sequence[str]) -> int:
    """What moments take in memory."""
    found = jax.eval_shape(lambda: empty(stack, k, statistics))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(found))


def _known(x: Array | None) -> Array:
    if x is None:
        raise ValueError("variance: it is merged by means, and there are none")
    return x
