"""Measures of which links a pruned layer has left: degrees, dead units, N:M readiness.

All take weights of any dtype, or a boolean mask (True = kept).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


class Vanished(NamedTuple):
    """How many whole rows and columns of each matrix have no link left, int32."""

    rows: Int[Array, "*batch"]
    columns: Int[Array, "*batch"]


def degrees(
    kernel: Shaped[Array, "..."], *, axis: int | tuple[int, ...] = -2, eps: float = 0.0
) -> Int[Array, "..."]:
    """Number of links that each unit has kept.

    A link is kept where `|w| > eps`, or where a mask is True. NaN counts as kept, since
    it is not zero. This is the complement of `jaxprune.penalties.missing_links` except
    for weights of exactly `eps`, which count in neither.

    Args:
      kernel: weights or a mask.
      axis: the axes that a unit's links run along; all others stay. The default counts
        the inputs of each unit of a Flax kernel, and -1 the outputs of each input. A
        convolution `[h, w, in, out]` takes `(0, 1, 2)`.
      eps: size up to which a weight counts as missing; a mask is not compared with it.

    Returns:
      Int32 counts, of the shape of `kernel` without `axis`.

    Raises:
      ValueError: if an axis is out of range or occurs twice, or `eps` is negative or
        not finite.

    Example:
      >>> degrees(jnp.array([[0.0, 1.0], [2.0, 3.0]]))
      Array([1, 2], dtype=int32)
    """
    return jnp.sum(_links(kernel, eps), axis=_axes(kernel, axis), dtype=jnp.int32)


def degree_deviation(
    kernel: Shaped[Array, "..."], *, axis: int | tuple[int, ...] = -2, eps: float = 0.0
) -> Float[Array, "..."]:
    """Standard deviation of the units' degrees, in percent of the number of inputs.

    Of the whole population: 0 if all units have kept equally many links, 50 if half
    have kept all and half none. NeuroPrune reports 0.13 for a fine-tuned BERT-base with
    `eps=1e-4`, and 12.12 for one pruned to half of its weights.

    Args:
      kernel: weights or a mask.
      axis: the axes that a unit's links run along; see `degrees`. Units are counted
        along the last axis that remains, and axes before it are batch axes.
      eps: size up to which a weight counts as missing.

    Returns:
      Float32 in [0, 50], one for each matrix.

    Raises:
      ValueError: as `degrees`, or if no axis remains, or `kernel` is empty.

    Example:
      >>> degree_deviation(jnp.array([[True, False], [True, False]]))
      Array(50., dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, figures 1 and 2.
    """
    axes = _axes(kernel, axis)
    if len(axes) == kernel.ndim or kernel.size == 0:
        raise ValueError(
            f"kernel has shape {kernel.shape} and axis is {axis}; wanted at least one "
            f"unit with at least one input left over. Leave an axis of units out of "
            f"axis."
        )
    fan_in = math.prod(kernel.shape[i] for i in axes)
    kept = degrees(kernel, axis=axes, eps=eps).astype(jnp.float32)
    return jnp.std(kept * (100 / fan_in), axis=-1)


def vanished(
    kernel: Shaped[Array, "*batch rows columns"], *, eps: float = 0.0
) -> Vanished:
    """Counts rows and columns without any link.

    In a Flax kernel a row is an input that feeds no unit, and a column is a unit that
    reads no input.

    Args:
      kernel: weights or a mask of two axes, or a stack of them.
      eps: size up to which a weight counts as missing; see `degrees`.

    Returns:
      The two counts for each matrix.

    Raises:
      ValueError: if `kernel` has fewer than two axes, or `eps` is negative or not
        finite.

    Example:
      >>> rows, columns = vanished(jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]]))
      >>> int(rows), int(columns)
      (1, 1)
    """
    if kernel.ndim < 2:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted at least two axes, [..., rows, "
            f"columns]. Reshape it first."
        )
    links = _links(kernel, eps)
    return Vanished(
        rows=jnp.sum(~jnp.any(links, axis=-1), axis=-1, dtype=jnp.int32),
        columns=jnp.sum(~jnp.any(links, axis=-2), axis=-1, dtype=jnp.int32),
    )


def four_group_share(
    kernel: Shaped[Array, "..."], *, axis: int = -2, eps: float = 0.0
) -> Float[Array, ""]:
    """Share of groups of four that 2:4 sparsity would accept as they are.

    Groups are four consecutive weights along `axis`, and acceptable with at least two
    missing. An incomplete group at the end is not counted. A random mask of density 1/2
    has a share of 11/16. On an explicit mesh, reshard a kernel that is sharded along
    `axis` first.

    Args:
      kernel: weights or a mask.
      axis: the contracted axis, along which N:M groups run.
      eps: size up to which a weight counts as missing; see `degrees`.

    Returns:
      One float32 in [0, 1], over the whole array.

    Raises:
      ValueError: if there is no group, `axis` is out of range, or `eps` is negative or
        not finite.

    Example:
      >>> four_group_share(jnp.array([[0.0, 1.0], [0.0, 2.0], [3.0, 3.0], [4.0, 4.0]]))
      Array(0.5, dtype=float32)
    """
    (axis,) = _axes(kernel, axis)
    groups = kernel.shape[axis] // 4
    if groups == 0 or kernel.size == 0:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted at least four weights along axis "
            f"{axis}. Choose another axis, or leave this leaf out."
        )
    before, after = kernel.shape[:axis], kernel.shape[axis + 1 :]
    whole = kernel
    if kernel.shape[axis] % 4:
        whole = lax.slice_in_dim(kernel, 0, 4 * groups, axis=axis)
    links = _links(whole, eps).reshape(*before, groups, 4, *after)
    missing = jnp.sum(~links, axis=axis + 1, dtype=jnp.int32)  # [..., groups, ...]
    return jnp.mean(missing >= 2, dtype=jnp.float32)


def _links(kernel: Array, eps: float) -> Bool[Array, "..."]:
    if not 0 <= eps < math.inf:
        raise ValueError(
            f"eps is {eps}; wanted a finite number >= 0, up to which a weight counts "
            f"as missing. Use 0 to count exact zeros."
        )
    if kernel.dtype == jnp.bool_:
        return kernel
    # Negated so that NaN is a link; widened because |-128| overflows int8.
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    return ~(jnp.abs(kernel.astype(wide)) <= eps)


def _axes(kernel: Array, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as a tuple of different numbers >= 0."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(-kernel.ndim <= i < kernel.ndim for i in axes):
        raise ValueError(
            f"axis is {axis} for a kernel of shape {kernel.shape}; wanted numbers from "
            f"{-kernel.ndim} to {kernel.ndim - 1}. Leave biases and scales out."
        )
    found = tuple(i % kernel.ndim for i in axes)
    if len(set(found)) != len(found):
        raise ValueError(
            f"axis is {axis} for a kernel of shape {kernel.shape}; wanted different "
            f"axes. Name each once."
        )
    return found
