"""The square root of the l1 norm of each row: an l_1^0.5 group penalty (NeuroPrune)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from . import _soft

_PROBES = 16  # thresholds tried to find the best minimum
_NEWTON = 6  # steps to sharpen it


def sqrt_l1(
    parts: Sequence[Float[Array, "*batch rows _"]], *, delta: float = 1e-8
) -> Float[Array, "*batch"]:
    r"""Sum over rows of the square root of the row's l1 norm.

    .. math:: R(A) = \sum_i \Big(\sum_j |A_{ij}| + \delta\Big)^{1/2}

    where row i of `A` runs through row i of every part. For attention the parts are the
    query, key and value kernels `[d, n]`, so a row is all that input feature i feeds,
    across heads. Flax kernels have the paper's orientation here.

    Equation (2) was reconstructed from the paper's prose ("l_1^0.5"). `delta` is ours:
    it bounds the gradient near a row of zeros, and each such row costs `sqrt(delta)`.
    The gradient is `sign(A) / (2 sqrt(l1 + delta))`, and 0 where a weight is 0.

    Args:
      parts: one or more arrays that agree in all axes but the last. They are never
        concatenated, so each keeps its sharding.
      delta: smoothing constant, in the unit of the weights.

    Returns:
      One number for each matrix, at least float32.

    Raises:
      TypeError: if `parts` is a bare array, or a part is not floating point.
      ValueError: if there is no part, a part has fewer than two axes, parts differ
        before the last axis, or `delta` is not above 0.

    Example:
      >>> query, key = jnp.array([[3.0], [0.0]]), jnp.array([[-6.0], [4.0]])
      >>> sqrt_l1([query, key])
      Array(5., dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (2).
      Hu et al., Group sparse optimization via l_{p,q} regularization, JMLR 2017.
    """
    _check_parts(parts)
    if not delta > 0:
        raise ValueError(
            f"delta is {delta}; wanted a number above zero, because the gradient is "
            f"not finite at a row of zeros without it. The default is 1e-8."
        )
    return jnp.sum(jnp.sqrt(_l1(parts) + delta), axis=-1)


def sqrt_l1_slope(
    parts: Sequence[Float[Array, "*batch rows _"]], *, delta: float = 1e-8
) -> Float[Array, "*batch rows"]:
    r"""The slope of `sqrt_l1` in each row's l1 norm, without gradient.

    .. math:: c_i = \frac{1}{2 \sqrt{\|a_i\|_1 + \delta}}

    A soft threshold of `strength * c_i` is the proximal step of the penalty's tangent
    (majorise-minimise). It agrees with `prox_sqrt_l1` to first order in the strength, at
    one pass over the row instead of 25.

    Args:
      parts: as in `sqrt_l1`.
      delta: smoothing constant, in the unit of the weights.

    Returns:
      One number a row, at least float32.

    Raises:
      TypeError, ValueError: as `sqrt_l1`.

    Example:
      >>> sqrt_l1_slope([jnp.array([[1.0, -3.0]])])
      Array([0.25], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (2), reconstructed.
    """
    _check_parts(parts)
    return lax.stop_gradient(0.5 / jnp.sqrt(_l1(parts) + delta))


def prox_sqrt_l1(
    parts: Sequence[Float[Array, "*batch rows _"]], strength: ScalarLike
) -> tuple[Float[Array, "*batch rows _"], ...]:
    r"""The proximal operator of `strength` times the root of each row's l1 norm.

    For every row `a`, which runs through all parts, it gives

    .. math:: \arg\min_x \tfrac12 \|x - a\|^2 + s \, \|x\|_1^{1/2}

    The minimum is either 0 or a soft threshold of `a` by a `t` that satisfies

    .. math:: t = \frac{s}{2 \sqrt{S(t)}}, \qquad S(t) = \sum_j \max(|a_j| - t, 0)

    The penalty is not convex, and there can be several such `t` with a local minimum at
    each (a row of one large and many small entries has one minimum that keeps them all
    and one that keeps the large). So taking the root with the largest `S` is not
    enough: it can cost more than 1 % of the objective. What bounds the
    search is that only `t <= max|a| / 3` can beat 0, which gives
    `s / (2 sqrt(sum|a|)) <= t <= s / (2 sqrt(2/3 max|a|))`. 16 thresholds spread
    geometrically over this range find the best minimum, 6 Newton steps kept inside
    their bracket by bisection sharpen it, and 0 is taken if its objective is no worse.
    Each costs one pass over the row, 25 in all with those before and after.

    Against an exact float64 method that sorts each row, the float32 result is within
    1e-6 of the best objective, relatively, and its entries are within 1e-6 of the row's
    largest. The exception is a strength within 1 % of one at which two minima are
    equally good: there either may come back, within 1e-3 of the best objective.

    The paper adds the penalty to the loss; the proximal step is our choice, because it
    gives rows and entries of exact zeros.

    Args:
      parts: one or more arrays that agree in all axes but the last; see `sqrt_l1`.
      strength: coefficient times learning rate, >= 0. At 0 the parts come back bit for
        bit. An array may be traced, and counts as 0 unless it is above 0.

    Returns:
      The shrunk parts, each in its own dtype. A row that contains NaN or infinity has
      no minimum and comes back unchanged.

    Raises:
      TypeError: if `parts` is a bare array, or a part is not floating point.
      ValueError: if there is no part, a part has fewer than two axes, parts differ
        before the last axis, or `strength` is no scalar, negative or not finite.

    Example:
      >>> (row,) = prox_sqrt_l1([jnp.array([[5.0, 0.5]])], 4.0)
      >>> jnp.round(row, 4)  # t = 4 / (2 sqrt(4)) = 1
      Array([[4., 0.]], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, equation (2), reconstructed.
      Hu et al., Group sparse optimization via l_{p,q} regularization, JMLR 2017.
    """
    _check_parts(parts)
    _soft.check_strength(strength)
    total = _l1(parts)  # [*batch, rows], as are all the arrays below
    peak = _peak(parts)
    half = jnp.asarray(strength, total.dtype) / 2
    usable = (half > 0) & (total > 0) & jnp.isfinite(total)
    # Harmless numbers for the other rows, which stay as they are: no NaN is computed
    # from a row that had none.
    half = jnp.where(usable, half, 1)
    total, peak = jnp.where(usable, total, 1), jnp.where(usable, peak, 1)
    search = _Search(tuple(parts), half, total, peak)
    threshold = _sharpen(search, *_probe(search))
    kept = _better_than_zero(search, threshold)
    # Nothing exceeds the peak, so as a threshold it leaves exact zeros.
    threshold = jnp.where(usable, jnp.where(kept, threshold, peak), 0)
    per_row = jnp.expand_dims(threshold, -1)  # [*batch, rows, 1]
    return tuple(_soft.soft_threshold(part, per_row) for part in parts)


class _Search(NamedTuple):
    """What the passes over the rows read; all but `parts` are [*batch, rows]."""

    parts: tuple[Array, ...]  # each [*batch, rows, n_i]
    half: Array  # strength / 2
    total: Array  # l1 norm of the row
    peak: Array  # largest magnitude of the row


class _Sums(NamedTuple):
    """Sums over a row at a threshold t, with low = min(|a|, t)."""

    kept: Array  # |a| - low: l1 norm after the soft threshold
    lost: Array  # low: what the l1 norm lost
    moved: Array  # low^2: squared distance to a
    energy: Array  # |a|^2 - low^2
    active: Array  # how many exceed t


def _sums(search: _Search, threshold: Array) -> _Sums:
    t = jnp.expand_dims(threshold, -1)

    def sums(part):
        a = jnp.abs(part.astype(t.dtype))
        low = jnp.minimum(a, t)
        exceeds = (a > t).astype(a.dtype)
        terms = (a - low, low, low * low, (a - low) * (a + low), exceeds)
        return [jnp.sum(term, axis=-1) for term in terms]

    columns = zip(*map(sums, search.parts), strict=True)
    return _Sums(*(functools.reduce(jnp.add, column) for column in columns))


def _range(search: _Search) -> tuple[Array, Array]:
    """Smallest and largest threshold that can belong to the best minimum."""
    most = search.peak / 3
    low = jnp.minimum(search.half / jnp.sqrt(search.total), most)
    high = jnp.minimum(search.half / jnp.sqrt(2 * most), most)
    return low, jnp.maximum(low, high)


def _probe(search: _Search) -> tuple[Array, Array, Array]:
    """The best of `_PROBES` thresholds, and the bracket of its two neighbours."""
    low, high = _range(search)
    ratio = jnp.exp((jnp.log(high) - jnp.log(low)) / (_PROBES - 1))

    def body(i, best):
        threshold, value = best
        t = jnp.minimum(low * ratio ** jnp.asarray(i, low.dtype), high)
        sums = _sums(search, t)
        # The objective less its value at t = 0. The difference of the two roots is
        # written without cancellation, or weak penalties would vanish in rounding.
        roots = jnp.sqrt(search.total) + jnp.sqrt(sums.kept)
        new = sums.moved / 2 - 2 * search.half * sums.lost / roots
        better = new < value
        return jnp.where(better, t, threshold), jnp.where(better, new, value)

    start = (low, jnp.full_like(low, jnp.inf))
    best, _ = lax.fori_loop(0, _PROBES, body, start)
    return best, jnp.maximum(best / ratio, low), jnp.minimum(best * ratio, high)


def _sharpen(search: _Search, start: Array, lower: Array, upper: Array) -> Array:
    """Solves t = half / sqrt(S(t)) between `lower` and `upper`, from `start`."""

    def body(_, state):
        t, lower, upper = state
        sums = _sums(search, t)
        target = search.half / jnp.sqrt(sums.kept)  # t <= peak / 3, so kept > 0
        gap = t - target
        lower = jnp.where(gap < 0, t, lower)
        upper = jnp.where(gap < 0, upper, t)
        slope = 1 - target * sums.active / (2 * sums.kept)
        newton = t - gap / jnp.where(slope > 0, slope, 1)
        inside = (slope > 0) & (newton >= lower) & (newton <= upper)
        middle = jnp.sqrt(lower) * jnp.sqrt(upper)
        return jnp.where(inside, newton, middle), lower, upper

    t, _, _ = lax.fori_loop(0, _NEWTON, body, (start, lower, upper))
    return t


def _better_than_zero(search: _Search, threshold: Array) -> Bool[Array, "*batch rows"]:
    sums = _sums(search, threshold)
    return sums.energy / 2 > 2 * search.half * jnp.sqrt(sums.kept)


def _l1(parts: Sequence[Array]) -> Float[Array, "*batch rows"]:
    sums = (jnp.sum(_soft.magnitude(part), axis=-1) for part in parts)
    return functools.reduce(jnp.add, sums)


def _peak(parts: Sequence[Array]) -> Float[Array, "*batch rows"]:
    peaks = (jnp.max(_soft.magnitude(part), axis=-1, initial=0) for part in parts)
    return functools.reduce(jnp.maximum, peaks)


def _check_parts(parts: Sequence[Array]) -> None:
    if isinstance(parts, jax.Array | np.ndarray):
        raise TypeError(
            f"parts is one array of shape {parts.shape}; wanted a sequence of arrays. "
            f"Write [kernel] for a single one."
        )
    if not parts:
        raise ValueError(
            "parts is empty; wanted at least one array, such as [query, key, value]."
        )
    for i, part in enumerate(parts):
        _soft.check_matrix(f"parts[{i}]", part)
        if part.shape[:-1] != parts[0].shape[:-1]:
            raise ValueError(
                f"parts[{i}] has shape {part.shape} beside parts[0] of shape "
                f"{parts[0].shape}; wanted the same axes before the last, since row i "
                f"runs through all parts. Reshape kernels of heads to [d, heads * n]."
            )
