"""Times the products of a leaf, dense and packed, on the device at hand."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.acceleration import _products
from jaxprune.acceleration._packing import Packing, layout_of
from jaxprune.acceleration._sites import Site
from jaxprune.formats import BlockSparseArray

_ROUNDS = 7
_FULL = 0.9  # share of blocks from which they are not timed


def measured(
    leaf: jax.ShapeDtypeStruct | Array,
    mask: np.ndarray,
    packings: Sequence[Packing],
    site: Site,
) -> list[tuple[float, str]]:
    """Seconds of a product with a leaf, dense and packed; and why they are not known.

    The products take turns; a packed one is given by the median of its ratios to the dense
    one, which hardly depends on what else the machine does. Weights are random numbers.
    Of stacked matrices the fullest is taken, with the capacity of all.
    """
    layout = layout_of(leaf.shape, site.axes)
    while mask.ndim > len(layout.shape):
        mask = mask[np.argmax([np.count_nonzero(x) for x in mask])]
    w = jax.random.normal(jax.random.key(0), layout.shape).astype(leaf.dtype)
    x = jax.random.normal(jax.random.key(1), (site.rows, layout.matrix[0]))
    x = x.astype(site.dtype)
    options = {"dtype": jnp.dtype(site.dtype), "precision": site.precision}
    calls = [functools.partial(_dense, x, layout.to_matrix(w), **options)]
    shares = [_share_of_blocks(leaf, packing) for packing in packings]
    for packing, share in zip(packings, shares, strict=True):
        if share < _FULL:
            packed = packing(w, mask)
            transpose = packing.axes != site.axes
            calls.append(
                functools.partial(_packed, x, packed, transpose=transpose, **options)
            )
    dense, *rest = _in_turns(calls)
    found = iter(rest)
    return [(dense, "")] + [
        (next(found), "")
        if x < _FULL
        else (math.nan, f"the mask keeps {x:.0%} of them")
        for x in shares
    ]


def _share_of_blocks(leaf, packing: Packing) -> float:
    """That are kept; 0 in other formats."""
    shapes = packing.shapes(leaf)
    if not isinstance(shapes, BlockSparseArray):
        return 0.0
    return shapes.capacity / math.prod(shapes.grid)


def _in_turns(calls: Sequence[Callable[[], Array]]) -> list[float]:
    """Seconds of each."""
    jax.block_until_ready([call() for call in calls])  # compiles
    repeats = max(1, round(2e-3 / min(_seconds(call, 1) for call in calls)))
    turns = [[_seconds(call, repeats) for call in calls] for _ in range(_ROUNDS)]
    first = statistics.median(turn[0] for turn in turns) / repeats
    return [
        first * statistics.median(turn[i] / turn[0] for turn in turns)
        for i in range(len(calls))
    ]


@functools.partial(jax.jit, static_argnames=("dtype", "precision"))
def _dense(x, w, *, dtype, precision):
    return jnp.dot(x, w.astype(dtype), precision=precision)


@functools.partial(jax.jit, static_argnames=("dtype", "precision", "transpose"))
def _packed(x, packed, *, dtype, precision, transpose):
    packed = dataclasses.replace(packed, values=packed.values.astype(dtype))
    multiply = _products.product_transposed if transpose else _products.product
    return multiply(x, packed, precision=precision)


def _seconds(call: Callable[[], Array], repeats: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(repeats)])
    return time.perf_counter() - start
