"""The exact k-th largest score without sorting: compare and count on ordered bits.

One pass over the scores counts three thresholds at once, so each pass narrows the bits
of the threshold by two. A sample brackets the threshold first, and the search stops as
soon as a count is exact. Ties are cut by position, with the same search. On a mesh each
pass needs one all-reduce of a few scalars, and nothing of the scores' size is stored.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt, UInt32

from jaxprune import _axes, _bits, _wide
from jaxprune._wide import Wide

_FIELD = 10  # bits of one of the three counters that share a 32-bit word
_SMALL = 1 << 12  # up to this, less code to compile counts for more than time
_SAMPLE = 1 << 15  # a leaf is thinned out by eights down to this size


class Scored(NamedTuple):
    """The scores of a leaf, as a recipe: computed anew in every pass, never stored."""

    score: Callable[..., Array]  # elementwise, of the operands
    operands: tuple[Array, ...]


class Cut(NamedTuple):
    """What decides which elements of one leaf are kept.

    Kept are scores above `threshold` and, among those equal to it, the elements before
    the position (`row`, `column`), where a row is everything along the last axis. NaN
    counts as less than every number.
    """

    threshold: UInt[Array, ""]  # ordered bits of a score
    row: UInt32[Array, ""]
    column: UInt32[Array, ""]


def scored(score: Callable[..., Array], *operands: Array) -> Scored:
    """A recipe for an elementwise score."""
    return Scored(score, operands)


def stored(scores: Array) -> Scored:
    """A recipe for scores that are there already."""
    return Scored(lambda x: x, (scores,))


def cuts(
    leaves: Sequence[Scored], kept: Sequence[Wide], groups: Sequence[int]
) -> list[Cut]:
    """Finds the cut of each leaf that keeps exactly the wanted numbers.

    Args:
      leaves: a recipe for floating-point scores a leaf, cheap to compute.
      kept: how many to keep in each group of leaves.
      groups: the group of each leaf; the leaves of a group share one threshold, and the
        last leaf loses its ties first.
    """
    shapes = [jax.eval_shape(leaf.score, *leaf.operands) for leaf in leaves]
    dtype = _bits.compare_dtype([s.dtype for s in shapes])
    sizes = [math.prod(s.shape) for s in shapes]
    group = np.asarray(groups)
    members = group == np.arange(len(kept))[:, None]  # [groups, leaves]
    targets = _wide.stack(list(kept))

    def at(token: Array) -> list[Scored]:
        # Tied to the loop: were the scores hoisted out of it, they would be stored.
        operands, _ = lax.optimization_barrier(([x.operands for x in leaves], token))
        return [
            Scored(lambda *a, f=x.score: f(*a).astype(dtype), tuple(o))
            for x, o in zip(leaves, operands, strict=True)
        ]

    def count(thresholds: Array) -> Wide:
        return _count_from(at(thresholds), _bits.unordered(thresholds, dtype)[group])

    bottom, top = (jnp.full(len(kept), bits) for bits in _bits.bounds(dtype))
    everything, nothing = _wide.from_ints(sizes), _wide.from_ints([0] * len(sizes))
    start = _Range(bottom, top, everything, nothing)
    probes = _bracket(at, dtype, sizes, group, members, targets, start)
    found = _search(count, targets, members, start, dtype=dtype, probes=probes)

    ends = np.asarray([_rows_columns(s.shape) for s in shapes], np.uint32).T
    excess = _wide.subtract(_wide.sums(members, found.at_low), targets)
    ends = lax.cond(
        jnp.any((excess.hi | excess.lo) != 0),
        lambda: _tie_ends(at, ends, group, found, excess),
        lambda: jnp.asarray(ends),
    )
    return [Cut(found.low[g], *ends[:, i]) for i, g in enumerate(groups)]


def keep(scores: Array, cut: Cut) -> Bool[Array, "..."]:
    """The mask of one leaf: True for the elements that `cut` keeps."""
    scores = scores.astype(_bits.dtype_of(cut.threshold, scores.dtype))
    above, ties = _above_and_ties(scores, cut.threshold)
    return above | (ties & _before(*_positions(scores), cut.row, cut.column))


def keep_stored(scores: Array, cut: Cut) -> Bool[Array, "..."]:
    """As `keep`, for scores that are stored, each of them shared by many weights.

    Behind a branch: otherwise XLA would draw the mask, and whatever the scores are
    computed from, again for each of those weights.
    """
    scores = scores.astype(_bits.dtype_of(cut.threshold, scores.dtype))
    nothing = cut.threshold == _bits.bounds(scores.dtype)[1]
    return lax.cond(nothing, lambda x, _: x < x, keep, scores, cut)


def threshold_value(cut: Cut) -> Float[Array, ""]:
    """A number that divides the scores kept from the others, float32.

    It is the smallest score kept where ties had to be cut, and lies between that and
    the largest other score elsewhere; 0 where everything is kept, or nothing.
    """
    dtype = _bits.dtype_of(cut.threshold, jnp.bfloat16)
    value = _bits.unordered(cut.threshold, dtype).astype(jnp.float32)
    return jnp.where(jnp.isfinite(value), value, 0)


def count(x: Array, test: Callable[[Array], Array]) -> Wide:
    """How many elements of `x` meet an elementwise test."""
    counts = _count_leaf(stored(x), lambda x, _: [test(x)])
    return Wide(counts.hi[0], counts.lo[0])


def reduced(leaf: Scored, combine: Callable[..., Array], initial: float) -> Array:
    """All scores combined to one number, by `jnp.maximum`, `jnp.minimum` or `jnp.add`.

    Stores nothing of their size, which XLA's CPU backend does wherever it reduces.
    """
    totals: Any = {jnp.maximum: jnp.max, jnp.minimum: jnp.min, jnp.add: jnp.sum}
    total = totals[combine]

    def plainly(*operands):
        return total(leaf.score(*operands), initial=initial)

    axis = fold_axis(leaf.operands[0])
    if axis is None or leaf.operands[0].size <= _SMALL:
        return plainly(*leaf.operands)

    def by_folds(*operands):
        def score(i, *slices):
            return leaf.score(*slices)

        return total(_fold(score, combine, initial, operands, axis), initial=initial)

    return lax.platform_dependent(*leaf.operands, cpu=by_folds, default=plainly)


def fold_axis(x: Array) -> int | None:
    """An axis that splits into groups of eight inside every shard, or `None`.

    With several devices the sharding may not be in the type (auto meshes); then an axis
    that keeps a multiple of eight groups is taken, so that usual shard boundaries fall
    between them. The last axis comes last, because the code then vectorises along it.
    """
    shards = _axes.shard_counts(x)
    unit = 8 if jax.device_count() == 1 else 64
    for axis in sorted(range(x.ndim), key=lambda a: (a == x.ndim - 1, -x.shape[a])):
        length = x.shape[axis]
        if length and length % unit == 0 and (length // 8) % shards[axis] == 0:
            return axis
    return None


class _Range(NamedTuple):
    """Where a search stands: `count(low) >= target > count(end)` in every group."""

    low: Array  # [groups]
    end: Array  # [groups]
    at_low: Wide  # [leaves]
    at_end: Wide  # [leaves]


def _search(
    count: Callable[[Array], Wide],
    targets: Wide,
    members: np.ndarray,
    start: _Range,
    *,
    dtype: jnp.dtype | None = None,
    probes: Array | None = None,
) -> _Range:
    """Narrows the range of each group to one threshold, or to the exact count.

    Args:
      count: maps thresholds `[groups, 3]` to counts `[leaves, 3]`, which fall as the
        threshold rises.
      targets: wanted count of each group. Where it is 0, `end` is the answer.
      members: which leaves are in a group, `[groups, leaves]`.
      start: the range to search.
      dtype: the float whose ordered bits are searched; `None` for plain integers.
      probes: the thresholds to try first.
    """
    group = np.argmax(members, axis=0)

    def quarters(at: _Range) -> Array:
        width = at.end - at.low
        quarter, rest = width >> 2, width & 3
        return jnp.stack(
            [at.low + i * quarter + ((i * rest) >> 2) for i in (1, 2, 3)], axis=-1
        )

    def interpolated(at: _Range) -> Array:
        """Around the place of the target, were the elements spread evenly."""
        low, end = at.low[:, None], at.end[:, None]
        before, after = (_wide.sums(members, n) for n in (at.at_low, at.at_end))
        inside = jnp.maximum(_wide.subtract(before, after).to_float(), 1)
        share = _wide.saturating_subtract(before, targets).to_float() / inside
        # Two standard deviations; at least a 32nd, for what is not spread evenly.
        apart = jnp.clip(2 * jnp.sqrt(share * (1 - share) / inside), 1 / 32, 1 / 4)
        shares = jnp.stack([share - apart, share, share + apart], axis=-1)
        first, last = (_value(x, dtype) for x in (low, end))
        guess = _place(first + jnp.clip(shares, 0, 1) * (last - first), dtype)
        guess = jnp.clip(guess, low + 1, end - 1)
        return jnp.where(jnp.isfinite(last - first), guess, quarters(at))

    def narrow(state):
        at, probes = state
        width = at.end - at.low
        counts = count(probes)
        enough = ~_wide.less(
            _wide.sums(members, counts), jax.tree.map(lambda x: x[:, None], targets)
        )
        for i in range(3):
            probe = probes[:, i]
            counts_at = jax.tree.map(lambda x, i=i: x[:, i], counts)
            inside = (probe > at.low) & (probe < at.end)
            raised, lowered = inside & enough[:, i], inside & ~enough[:, i]
            at = _Range(
                jnp.where(raised, probe, at.low),
                jnp.where(lowered, probe, at.end),
                _wide.where(raised[group], counts_at, at.at_low),
                _wide.where(lowered[group], counts_at, at.at_end),
            )
        # Whatever the scores, two passes divide the range by four.
        fast = at.end - at.low <= width >> 2
        return at, jnp.where(fast[:, None], interpolated(at), quarters(at))

    def unfinished(state):
        at, _ = state
        exact = _wide.equal(_wide.sums(members, at.at_low), targets)
        return jnp.any((at.end - at.low > 1) & ~exact)

    none = (targets.hi | targets.lo) == 0
    start = start._replace(
        low=jnp.where(none, start.end, start.low),
        at_low=_wide.where(none[group], start.at_end, start.at_low),
    )
    probes = quarters(start) if probes is None else probes
    return lax.while_loop(unfinished, narrow, (start, probes))[0]


def _bracket(at, dtype, sizes, group, members, targets, start) -> Array | None:
    """Probes around the wanted thresholds, from a sample; `None` for small leaves."""
    strides = np.asarray([_sample(x)[1] for x in at(start.low)])
    if strides.max() == 1:
        return None
    # Four standard errors of the count that a 1-in-stride sample estimates.
    variances = members @ (np.asarray(sizes, float) * strides / 4)
    margin = _wide.from_ints([int(4 * math.sqrt(v)) for v in variances])
    wanted = _wide.stack(
        [
            _wide.minimum(
                _wide.add(targets, margin), _wide.sums(members, start.at_low)
            ),
            _wide.saturating_subtract(targets, margin),
        ]
    )
    shifts = np.log2(strides).astype(np.uint32)[:, None]

    def count(thresholds):
        samples = [_sample(x)[0] for x in at(thresholds)]
        counts = _count_from(samples, _bits.unordered(thresholds, dtype)[group])
        return _wide.shift_left(counts, shifts)

    lower, upper = lax.map(
        lambda w: _search(count, w, members, start, dtype=dtype).low, wanted
    )
    # Right behind the lower one: it may be a score that many share, above all 0, whose
    # next is the smallest normal number where others are taken for 0.
    tiny = _bits.ordered(jnp.asarray(jnp.finfo(dtype).tiny, dtype))
    second = jnp.where(lower == _bits.ordered(jnp.zeros((), dtype)), tiny, lower + 1)
    upper = upper + (upper < start.end)
    return jnp.stack([lower, second, upper], axis=-1)


def _sample(leaf: Scored) -> tuple[Scored, int]:
    """Evenly spaced rows of a large leaf, local to each shard, and one in how many."""
    stride = 1
    while leaf.operands[0].size > _SAMPLE:
        axis = fold_axis(leaf.operands[0])
        if axis is None:
            break
        operands = (_axes.split_axis(x, axis) for x in leaf.operands)
        leaf = scored(
            leaf.score,
            *(lax.index_in_dim(x, 0, axis + 1, keepdims=False) for x in operands),
        )
        stride *= 8
    return leaf, stride


def _tie_ends(
    at, ends, group, found: _Range, excess: Wide
) -> UInt32[Array, "2 leaves"]:
    """Rows and columns at which the kept ties of each leaf end; `excess` are dropped."""
    ties = _wide.subtract(found.at_low, found.at_end)
    order = np.arange(len(group))
    later = (group[:, None] == group) & (order[:, None] < order)
    drop = _wide.minimum(
        ties,
        _wide.saturating_subtract(
            jax.tree.map(lambda x: x[group], excess), _wide.sums(later, ties)
        ),
    )

    def count_from(row: Array, column: Array) -> Wide:
        """Counts the ties at or behind positions, each `[leaves, 3]`."""

        def tests(x, place, i):
            _, is_tie = _above_and_ties(x, found.low[group[i]])
            r, c = place()
            return [is_tie & ~_before(r, c, row[i, j], column[i, j]) for j in range(3)]

        return _count(at(row), tests)

    # The last row, and then the last column, that all ties to drop are at or behind.
    # A loop, so that the code that counts is compiled once.
    def search(state, ends):
        row, at_low, by_column = state
        found = _search(
            lambda probes: count_from(
                jnp.where(by_column, row[:, None], probes),
                jnp.where(by_column, probes, 0),
            ),
            drop,
            np.eye(len(group), dtype=bool),
            _Range(jnp.zeros_like(row), ends, at_low, _wide.narrow(row * 0)),
        )
        row = jnp.where(by_column, row, found.low)
        return (row, found.at_low, True), found.low

    start = (jnp.zeros(len(group), jnp.uint32), ties, False)
    return lax.scan(search, start, jnp.asarray(ends))[1]


def _count_from(leaves: Sequence[Scored], thresholds: Array) -> Wide:
    """Counts the scores at or above `thresholds`, floats `[leaves, k]`."""
    return _count(
        leaves,
        lambda x, _, i: [x >= thresholds[i, j] for j in range(thresholds.shape[1])],
    )


def _count(leaves: Sequence[Scored], tests) -> Wide:
    """Counts in each leaf where up to three tests hold, `[leaves, k]`.

    `tests(scores, place, i)` gives boolean arrays for leaf `i`; `place()` the row and
    column of every element.
    """
    return _wide.stack(
        [_count_leaf(x, lambda *a, i=i: tests(*a, i)) for i, x in enumerate(leaves)]
    )


def _count_leaf(leaf: Scored, tests) -> Wide:
    def plainly(*operands):
        x = leaf.score(*operands)
        masks = [m.astype(jnp.uint32) for m in tests(x, lambda: _positions(x))]
        if x.size <= _SMALL:
            return _wide.total(jnp.stack(masks), x.size, lead=1)
        return _wide.stack([_wide.total(m, m.size) for m in masks])

    axis = fold_axis(leaf.operands[0])
    if axis is None or leaf.operands[0].size <= _SMALL:
        return plainly(*leaf.operands)
    return lax.platform_dependent(
        *leaf.operands,
        cpu=lambda *xs: _count_by_folds(leaf.score, xs, axis, tests),
        default=plainly,
    )


def _count_by_folds(score, operands, axis, tests) -> Wide:
    # XLA's CPU backend sums integers one by one, from a copy of the masks. Adding
    # slices, the counters side by side in a word, vectorises and stores an eighth.
    ways = _ways(operands[0], axis)

    def masks(i, *slices):
        x = score(*slices)
        found = tests(x, lambda: _positions(x, axis, ways, i))
        return [m.astype(jnp.uint32) for m in found]

    def word_of(i, *slices):
        return sum(m << (_FIELD * j) for j, m in enumerate(masks(i, *slices)))

    first = [
        lax.index_in_dim(_axes.split_axis(x, axis, ways), 0, axis + 1, False)
        for x in operands
    ]
    fields = len(jax.eval_shape(lambda *xs: masks(0, *xs), *first))
    word = _fold(word_of, jnp.add, np.uint32(0), operands, axis)
    size = word.size * ways
    if (again := fold_axis(word)) is not None:  # now at most 8 * 32 in a field
        word = jnp.sum(_axes.split_axis(word, again), again + 1, dtype=jnp.uint32)
    shifts = _FIELD * np.arange(fields, dtype=np.uint32)
    counts = (word >> shifts.reshape(-1, *(1,) * word.ndim)) & ((1 << _FIELD) - 1)
    return _wide.total(counts, size, lead=1)


def _fold(f, combine, initial, operands, axis: int) -> Array:
    """`f(i, *slices)` combined over the slices `i` of an axis split by `_ways`."""
    ways = _ways(operands[0], axis)
    splits = [_axes.split_axis(x, axis, ways) for x in operands]

    def part(i):
        slices = (lax.dynamic_index_in_dim(s, i, axis + 1, False) for s in splits)
        return f(i, *slices)

    start = jnp.full_like(part(0), initial)
    return lax.fori_loop(0, ways, lambda i, x: combine(x, part(i)), start, unroll=4)


def _ways(x: Array, axis: int) -> int:
    """How many slices of `axis` are taken together."""
    return 32 if x.shape[axis] % (256 * _axes.shard_counts(x)[axis]) == 0 else 8


def _rows_columns(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _positions(x: Array, axis=None, ways=1, offset=0) -> tuple[Array, Array]:
    """Row (over all leading axes) and column of every element of `x`, uint32.

    With `axis`, the elements are the slice at `offset` of that axis split by `ways`.
    """
    shape = x.shape
    # Divided as `x` is: on an explicit mesh each device would number all elements.
    sharding = jax.typeof(x).sharding
    sharding = None if sharding.mesh.empty else sharding

    def index(a):
        place = lax.broadcasted_iota(jnp.uint32, shape, a, out_sharding=sharding)
        return place * ways + offset if a == axis else place

    row = jnp.uint32(0)
    for a in range(len(shape) - 1):
        row = row * (shape[a] * (ways if a == axis else 1)) + index(a)
    return row, index(len(shape) - 1) if shape else jnp.uint32(0)


def _before(row: Array, column: Array, end_row: Array, end_column: Array) -> Array:
    return (row < end_row) | ((row == end_row) & (column < end_column))


def _value(bits: Array, dtype) -> Array:
    if dtype is None:
        return bits.astype(jnp.float32)
    return _bits.unordered(bits, dtype).astype(jnp.promote_types(dtype, jnp.float32))


def _place(value: Array, dtype) -> Array:
    if dtype is None:
        return value.astype(jnp.uint32)
    return _bits.ordered(value.astype(dtype))


def _above_and_ties(scores: Array, threshold: Array) -> tuple[Array, Array]:
    above = scores >= _bits.unordered(threshold + 1, scores.dtype)
    everything = threshold == _bits.bounds(scores.dtype)[0]
    enough = (scores >= _bits.unordered(threshold, scores.dtype)) | everything
    return above, enough & ~above
