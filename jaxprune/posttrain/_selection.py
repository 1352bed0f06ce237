"""Masks of one matrix from its scores, to exact counts, within a comparison group."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from jaxprune import _bits, _select, _wide, allocation
from jaxprune._wide import Wide
from jaxprune.structures import NM, Block, Structure, Unstructured


def counts(
    shape: Sequence[int],
    rows: int,
    sparsity: Fraction,
    structure: Structure,
    group: str,
) -> Wide:
    """How many units to keep in every `rows` rows of `[K, N]`, the last perhaps fewer.

    Units of one output with the group `"output"`, else of all. They add up to what is to
    be kept of all rows, rounded half down.
    """
    high, wide = unit_shape(structure)
    columns = 1 if group == "output" else shape[1] // wide
    flat = jax.ShapeDtypeStruct((shape[0] // high, columns), "float32")
    total = math.prod(flat.shape)
    kept = Unstructured().kept_units("", flat, sparsity)
    heights = [min(rows, shape[0] - r) // high for r in range(0, shape[0], rows)]
    wanted = [Fraction(kept * h * columns, max(total, 1)) for h in heights]
    return _wide.from_ints(allocation.round_to_total(wanted, kept))


def best(
    scores: Float[Array, "K N"], kept: Wide, structure: Structure, group: str
) -> Bool[Array, "K N"]:
    """The mask of the whole matrix that keeps the highest scores, `kept` in all.

    With `"output"` that many of each output.
    """
    if isinstance(structure, NM):
        return best_of_groups(scores, structure, structure.stride)
    whole = jax.tree.map(lambda x: x[0], kept)
    return best_of_tile(scores, whole, structure, group)


def best_of_groups(
    scores: Float[Array, "K N"], nm: NM, stride: int
) -> Bool[Array, "K N"]:
    """The mask in which every group obeys, from scores of at least 0; NaN loses."""
    if nm.m > 8:
        return dataclasses.replace(nm, stride=stride).best("", scores)
    scores = jnp.where(jnp.isnan(scores), -1, scores)
    groups = scores.reshape(-1, nm.m, stride * scores.shape[1])
    members = [groups[:, i] for i in range(nm.m)]
    keep = []  # member by member, which vectorises
    for i, own in enumerate(members):
        wins = [
            other >= own if j < i else other > own
            for j, other in enumerate(members)
            if j != i
        ]
        keep.append(sum(x.astype(jnp.uint8) for x in wins) < nm.n)
    return jnp.stack(keep, axis=1).reshape(scores.shape)


def unit_shape(structure: Structure) -> tuple[int, int]:
    """Rows and columns of what is kept or pruned as one."""
    return (structure.rows, structure.cols) if isinstance(structure, Block) else (1, 1)


def best_of_tile(
    scores: Float[Array, "rows N"],
    kept: Wide,
    structure: Structure,
    group: str,
) -> Bool[Array, "rows N"]:
    """The mask that keeps `kept` units, in each output or in all, by the scores' sums."""
    high, wide = unit_shape(structure)
    rows, columns = scores.shape
    if (high, wide) != (1, 1):
        parts = scores.reshape(rows // high, high, columns // wide, wide)
        scores = jnp.sum(parts, axis=(1, 3))
    if group == "output":
        mask = _best_by_column(scores, kept.lo)
    else:
        cut = _select.cuts([_select.stored(scores)], [kept], [0])[0]
        mask = _select.keep(scores, cut)
    if (high, wide) != (1, 1):
        mask = jnp.repeat(jnp.repeat(mask, high, axis=0), wide, axis=1)
    return mask


def _best_by_column(
    scores: Float[Array, "rows N"], kept: UInt32[Array, ""]
) -> Bool[Array, "rows N"]:
    """Keeps the `kept` highest of each column; ties go to the lower row.

    Bisection on ordered bits. Columns do not meet, so that on a mesh that shards them
    nothing is exchanged.
    """
    bits = _bits.ordered(scores)

    def narrow(i, found):
        # The highest threshold that at least `kept` scores reach, bit by bit.
        probe = found | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(_count(bits >= probe) >= kept, probe, found)

    zero = jnp.zeros_like(bits[0])
    threshold = lax.fori_loop(0, 32, narrow, zero)
    above = bits > threshold
    ties = bits == threshold
    left = kept - _count(above)

    row = lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
    steps = max(1, math.ceil(math.log2(scores.shape[0] + 1)))

    def place(i, end):
        # The highest end before which at most `left` ties stand.
        probe = end | (jnp.uint32(1) << (jnp.uint32(steps - 1) - i.astype(jnp.uint32)))
        return jnp.where(_count(ties & (row < probe)) <= left, probe, end)

    end = lax.fori_loop(0, steps, place, zero)
    return above | (ties & (row < end))


def _count(test: Bool[Array, "rows N"]) -> UInt32[Array, " N"]:
    """How many of each column are true."""
    # XLA's CPU backend sums down a column one by one; adding halves vectorises. Seven
    # times at most, as many as a byte can count.
    counts = test.astype(jnp.uint8)
    for _ in range(7):
        if counts.shape[0] % 2 == 0:
            half = counts.shape[0] // 2
            counts = counts[:half] + counts[half:]
    return jnp.sum(counts, axis=0, dtype=jnp.uint32)


def group_order(structure: Structure, rows: int) -> np.ndarray | None:
    """The order of rows in which members of a group are neighbours, if not as they are."""
    if not isinstance(structure, NM) or structure.stride == 1:
        return None
    places = np.arange(rows).reshape(-1, structure.m, structure.stride)
    return places.transpose(0, 2, 1).reshape(-1)
