"""DSnoT: a mask refined by swaps that cancel the mean error, without new weights."""

import functools

import jax.numpy as jnp
from jax import core, lax
from jaxtyping import Array, Bool, Float

from jaxprune.calibration import Inputs
from jaxprune.posttrain import _given, _solver
from jaxprune.posttrain._given import Refined
from jaxprune.structures import NM, Structure, Unstructured

_SEQUENCE = 2048  # over which the authors sum what we average


def dsnot(
    w: Float[Array, "*stack K N"],
    mask: Bool[Array, "*stack K N"],
    inputs: Inputs,
    *,
    structure: Structure = Unstructured(),
    cycles: int = 50,
    threshold: float = 0.1 / _SEQUENCE,
    variance_power: float = 1.0,
) -> Refined:
    """Dynamic Sparse no Training: prunes and regrows by pairs, to cancel the mean error.

    A column of pruned weights changes its output by `e = Σ w E[x]` on average. In each
    cycle the pruned weight with the largest `w E[x] / Var[x]^p` of the sign of `e` comes
    back, and the kept weight with the smallest `|w| √E[x²]` among those whose `w E[x]` has
    the other sign goes; with N:M, the smallest in the group of the one that came back.
    A column is done when a swap would turn the sign of `e`.

    A swap is made only if it brings `e` nearer to 0, so that the error of a column never
    rises. The authors do not test this; with N:M, where the weight that goes may have any
    sign, they let it rise, and we pass over such a pair.

    Args:
      w: dense weights.
      mask: True = keep, from any method; with `NM`, one that obeys it.
      inputs: `mean` and `square`, and `variance` unless `variance_power` is 0.
      structure: `Unstructured()`, which keeps the number of each column, or `NM`.
      cycles: at most so many swaps a column. 50 as the authors.
      threshold: of `|e|`, below which a column is done. The authors' 0.1 is of the sum
        over a sequence; ours is their value for 2048 tokens.
      variance_power: `p`; 1 as the authors, 0 leaves the variance out.

    Returns:
      A mask with as many kept in each column as before, and the sizes of the errors `e`.

    Raises:
      ValueError: if shapes do not fit, the mask does not obey the structure (not seen
        under `jit`), a statistic is missing, or `cycles` is below 1.
      TypeError: if the structure is another one, or the mask is not boolean.

    Example:
      >>> w = jnp.array([[1.0], [-1.0], [1.0], [0.9]])
      >>> mask = jnp.array([[True], [True], [False], [False]])
      >>> ones = jnp.ones(4)
      >>> inputs = jp.calibration.Inputs(4.0, square=ones, mean=ones, variance=ones)
      >>> found = jp.posttrain.dsnot(w, mask, inputs)
      >>> found.mask.ravel().tolist(), found.initial_error[0].item()
      ([True, True, False, False], 1.899...)
      >>> w = w.at[1].set(-0.8)
      >>> found = jp.posttrain.dsnot(w, mask, inputs)
      >>> found.mask.ravel().tolist(), round(found.error[0].item(), 4)
      ([True, False, True, False], 0.1)

    References:
      Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs,
      arXiv 2310.08915, and their code for the order of the swaps.
    """
    _given.check("dsnot", mask, w=w)
    if cycles < 1:
        raise ValueError(f"dsnot: got cycles={cycles}; expected at least 1.")
    if isinstance(structure, NM):
        _check_nm(structure, w, mask)
        swap = functools.partial(
            _swap_in_groups, m=structure.m, stride=structure.stride
        )
    elif isinstance(structure, Unstructured):
        swap = _swap
    else:
        raise TypeError(
            f"dsnot: got structure={structure!r}; expected Unstructured() or NM(n, m): "
            "only single weights can be swapped."
        )
    mean = _given.statistic("dsnot", inputs, "mean", w)
    norm = jnp.sqrt(_given.statistic("dsnot", inputs, "square", w))
    weight = jnp.ones_like(mean)
    if variance_power:
        variance = _given.statistic("dsnot", inputs, "variance", w)
        # A constant input comes first, as dividing by 0 would have it, but in order.
        floor = 1e-6 * jnp.max(variance, axis=-1, keepdims=True)
        floor = jnp.where(floor > 0, floor, 1.0)
        weight = jnp.maximum(variance, floor) ** -variance_power
    one = functools.partial(_refine, swap=swap, cycles=cycles, threshold=threshold)
    return _solver.over_stack(one, w.ndim - 2)(w, mask, mean, norm, weight)


def _refine(w, mask, mean, norm, weight, *, swap, cycles, threshold) -> Refined:
    w = _given.wide(w)
    share = w * mean[:, None]  # what each weight gives to its output, on average
    salience = jnp.abs(w) * norm[:, None]
    before = _error(share, mask)
    new = swap(
        share, share * weight[:, None], salience, mask, before, cycles, threshold
    )
    after = _error(share, new)
    # The swaps add up their errors in another order, and may be wrong by a rounding.
    fell = jnp.abs(after) < jnp.abs(before)
    return Refined(jnp.where(fell, new, mask), jnp.where(fell, after, before), before)


def _error(share: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, 0, share), axis=0)


def _swap(share, merit, salience, mask, error, cycles, threshold) -> Array:
    """Swaps in columns. The sign of the error stays, so the pairs are known beforehand."""
    sign, count = jnp.sign(error), min(cycles, share.shape[0])
    toward, merit = share * sign, merit * sign  # [K, N], above 0 where it adds to |e|
    back, grown = _first(jnp.where(mask, -jnp.inf, merit), count)
    goes = mask & (toward < 0)
    out, pruned = _first(jnp.where(goes, -salience, -jnp.inf), count)
    gain = _at(toward, grown) - _at(toward, pruned)  # [count, N], by which |e| falls
    left = jnp.abs(error) - jnp.cumsum(gain, axis=0)
    was = left + gain
    fine = (back > -jnp.inf) & (out > -jnp.inf) & (gain > 0)
    fine &= (was > threshold) & (left >= 0)
    done = jnp.cumprod(fine, axis=0).astype(bool)
    return _put(_put(mask, grown, done, True), pruned, done, False)


def _swap_in_groups(
    share, merit, salience, mask, error, cycles, threshold, *, m, stride
):
    """Swaps one by one: which weight is the least of its group changes with each."""
    sign, count = jnp.sign(error), min(cycles, share.shape[0])
    toward = share * sign
    back, grown = _first(jnp.where(mask, -jnp.inf, merit * sign), count)
    columns = jnp.arange(share.shape[1])

    def step(i, state):
        new, left, active = state
        row = grown[i]  # [N]
        start = row // (m * stride) * (m * stride) + row % stride
        members = start + stride * jnp.arange(m)[:, None]  # [m, N]
        # What came back stays, and so does what the mask had pruned.
        fixed = ~(new & mask)[members, columns]
        cost = jnp.where(fixed, jnp.inf, salience[members, columns])
        least = jnp.argmin(cost, axis=0)
        out = start + stride * least
        gain = toward[row, columns] - toward[out, columns]
        there = (back[i] > -jnp.inf) & jnp.isfinite(jnp.min(cost, axis=0))
        active &= (left > threshold) & (left - gain >= 0)
        do = active & there & (gain > 0)
        new = new.at[row, columns].set(new[row, columns] | do)
        new = new.at[out, columns].set(new[out, columns] & ~do)
        return new, jnp.where(do, left - gain, left), active

    state = mask, jnp.abs(error), jnp.ones(error.shape, bool)
    return lax.fori_loop(0, count, step, state)[0]


def _first(x: Array, count: int) -> tuple[Array, Array]:
    """The largest of each column and their rows, `[count, N]`."""
    values, rows = lax.top_k(x.T, count)
    return values.T, rows.T


def _at(x: Array, rows: Array) -> Array:
    return jnp.take_along_axis(x, rows, axis=0)


def _put(mask: Array, rows: Array, where: Array, value: bool) -> Array:
    columns = jnp.arange(mask.shape[1])
    return mask.at[rows, columns].set(jnp.where(where, value, _at(mask, rows)))


def _check_nm(structure: NM, w: Array, mask: Array) -> None:
    k_axes, _ = structure.matrix_axes("dsnot: w", w.shape)
    if k_axes != (w.ndim - 2,):
        raise ValueError(
            f"dsnot: {structure} groups axes {k_axes} of w, of shape {tuple(w.shape)}; "
            "expected the contracted axis -2. Turn the matrix so that inputs come first."
        )
    structure.units("dsnot: w", w)
    if isinstance(mask, core.Tracer):
        return
    groups = (*w.shape[:-2], -1, structure.m, structure.stride, w.shape[-1])
    most = int(jnp.max(jnp.sum(jnp.reshape(mask, groups), axis=-3)))
    if most > structure.n:
        raise ValueError(
            f"dsnot: mask keeps {most} of a group, which {structure} forbids; swaps keep "
            "the number of each group. Give a mask that obeys it, or structure="
            "Unstructured()."
        )
