"""The exact k-th largest score without sorting: compare and count on ordered bits.

One pass over the scores counts three thresholds at once, so each pass narrows the bits
of the threshold by two. A sample brackets the threshold first, and the search stops as
soon as a count is exact. Ties are cut by position, with the same search. On a mesh each
pass needs one all-reduce of a few scalars, and nothing of the scores' size is stored.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxprune import _wide
from jaxprune._wide import Wide

_FIELD = 10  # bits of one of the three counters that share a 32-bit word
_SAMPLE = 1 << 15  # a leaf is thinned out by eights down to this size


class Scored(NamedTuple):
    """The scores of one leaf, as a recipe: computed anew in every pass, never stored."""

    score: Callable[..., Array]
    operands: tuple[Array, ...]
    axes: tuple[int, ...]  # axes of operands and scores alike along which both may be cut


class Cut(NamedTuple):
    """What decides which elements of one leaf are kept.

    Kept are scores above `threshold` and, among those equal to it, the elements before
    the position (`row`, `column`), where a row is everything along the last axis. NaN
    counts as less than every number.
    """

    threshold: UInt[Array, ""]  # ordered bits of a score
    row: Int[Array, ""]
    column: Int[Array, ""]


def scored(score: Callable[..., Array], *operands: Array) -> Scored:
    """A recipe for an elementwise score."""
    return Scored(score, operands, tuple(range(operands[0].ndim)))


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
    dtype = _compare_dtype([s.dtype for s in shapes])
    totals = [
        sum(math.prod(s.shape) for s, g in zip(shapes, groups, strict=True) if g == i)
        for i in range(len(kept))
    ]
    targets = _wide.stack(list(kept))
    whole = _wide.stack([_wide.from_int(n) for n in totals])

    def at(token: Array) -> list[Scored]:
        # Tied to the loop: were the scores hoisted out of it, they would be stored.
        operands, _ = lax.optimization_barrier(([x.operands for x in leaves], token))
        return [
            Scored(lambda *a, f=x.score: f(*a).astype(dtype), tuple(o), x.axes)
            for x, o in zip(leaves, operands, strict=True)
        ]

    def count(thresholds: Array) -> Wide:
        return _count(at(thresholds), thresholds, groups)

    bottom, top = _bounds(dtype)
    low, high = jnp.full(len(kept), bottom), jnp.full(len(kept), top)
    bracket = _bracket(at, shapes, groups, targets, whole, low, high)
    low, at_low = _search(count, targets, low, high, whole, bracket)

    everything = [_rows_columns(s.shape) for s in shapes]
    ends = lax.cond(
        jnp.all(_wide.equal(at_low, targets)),
        lambda: [(jnp.int32(r), jnp.int32(c)) for r, c in everything],
        lambda: _tie_ends(at, everything, groups, low, _wide.subtract(at_low, targets)),
    )
    return [Cut(low[g], *end) for g, end in zip(groups, ends, strict=True)]


def keep(scores: Array, cut: Cut) -> Bool[Array, "..."]:
    """The mask of one leaf: True for the elements that `cut` keeps."""
    scores = scores.astype(_compare_dtype([scores.dtype], like=cut.threshold))
    row, column = _positions(scores.shape)
    before = (row < cut.row) | ((row == cut.row) & (column < cut.column))
    return _above(scores, cut.threshold) | (_ties(scores, cut.threshold) & before)


def threshold_value(cut: Cut) -> Float[Array, ""]:
    """The smallest score that is kept, float32; 0 where everything is."""
    width = jnp.iinfo(cut.threshold.dtype).bits
    dtype = jnp.float32 if width == 32 else jnp.bfloat16 if width == 16 else jnp.float64
    value = _unordered(cut.threshold, dtype).astype(jnp.float32)
    return jnp.where(jnp.isfinite(value), value, 0)


def count(x: Array, test: Callable[[Array], Array]) -> Wide:
    """How many elements of `x` meet an elementwise test."""
    return _count_three(scored(lambda x: x, x), lambda x, _: [test(x)])[0]


def fold_axis(x: Array, axes: Sequence[int] | None = None) -> int | None:
    """An axis that splits into groups of eight inside every shard, or `None`.

    Where the sharding is not in the type (auto meshes), an axis that keeps at least eight
    groups is taken, so that usual shard boundaries fall between them. The last axis comes
    last, because the code then vectorises along it.
    """
    shards = shard_counts(x)
    axes = range(x.ndim) if axes is None else axes
    for axis in sorted(axes, key=lambda a: (a == x.ndim - 1, -x.shape[a])):
        if x.shape[axis] % 64 == 0 and (x.shape[axis] // 8) % shards[axis] == 0:
            return axis
    return None


def shard_counts(x: Array) -> list[int]:
    """Into how many shards each axis of `x` is divided, as far as that can be known."""
    sharding = jax.typeof(x).sharding
    if not isinstance(x, jax.core.Tracer):  # on an auto mesh only the array itself knows
        sharding = getattr(x, "sharding", sharding)
    counts = [1] * x.ndim
    for axis, names in enumerate(getattr(sharding, "spec", ())):
        names = (names,) if isinstance(names, str) else names
        if isinstance(names, tuple):
            counts[axis] = math.prod(sharding.mesh.shape[name] for name in names)
    return counts


def split_axis(x: Array, axis: int, ways: int = 8) -> Array:
    """Reshapes an axis of length `ways` k to (k, `ways`)."""
    length = x.shape[axis] // ways
    return x.reshape(*x.shape[:axis], length, ways, *x.shape[axis + 1 :])


def _search(count, targets, low, high, at_low, probes=None):
    """For each group the largest threshold in [low, high] whose count reaches its target.

    `count` maps thresholds `[groups, 3]` to counts of the same shape, falling as the
    threshold rises. Invariant: count(low) = at_low >= target > count(high + 1). It may
    stop at a smaller threshold once the count there is the target itself.
    """

    def narrow(state, thresholds):
        low, high, at_low = new_low, new_high, new_at = state
        counts = count(thresholds)
        for i in range(3):
            t, n = thresholds[:, i], Wide(counts.hi[:, i], counts.lo[:, i])
            inside, enough = (t > low) & (t <= high), ~_wide.less(n, targets)
            raised = inside & enough & (t > new_low)
            new_low, new_at = jnp.where(raised, t, new_low), _wide.where(raised, n, new_at)
            lowered = inside & ~enough & (t <= new_high)
            new_high = jnp.where(lowered, t - 1, new_high)
        return new_low, new_high, new_at

    def quarters(state):
        low, high, _ = state
        width = high - low
        step = (width >> 2) + ((width & 3) > 0)
        return jnp.stack([low + jnp.minimum(i * step, width) for i in (1, 2, 3)], axis=-1)

    def unfinished(state):
        low, high, at_low = state
        return jnp.any((low < high) & ~_wide.equal(at_low, targets))

    state = (low, high, at_low)
    if probes is not None:
        state = narrow(state, probes)
    low, _, at_low = lax.while_loop(unfinished, lambda s: narrow(s, quarters(s)), state)
    return low, at_low


def _bracket(at, shapes, groups, targets, whole, low, high):
    """Three probes around the wanted threshold, from a sample; `None` for small leaves."""
    strides = [_sample(x)[1] for x in at(low)]
    if max(strides) == 1:
        return None
    # Four standard errors of the count that a 1-in-stride sample estimates.
    variances = [0.0] * len(low)
    for shape, stride, group in zip(shapes, strides, groups, strict=True):
        variances[group] += math.prod(shape.shape) * stride / 4
    margin = _wide.stack([_wide.from_int(int(4 * math.sqrt(v))) for v in variances])
    wanted = _wide.concatenate(  # the lower threshold of the bracket, then the upper
        _wide.minimum(_wide.add(targets, margin), whole),
        _wide.saturating_subtract(targets, margin),
    )

    def count(thresholds):
        samples = [_sample(x)[0] for x in at(thresholds)]
        groups_twice = [*groups, *(g + len(low) for g in groups)]
        return _count(samples * 2, thresholds, groups_twice, strides * 2)

    found, _ = _search(
        count, wanted, jnp.concatenate([low, low]), jnp.concatenate([high, high]),
        _wide.concatenate(whole, whole),
    )  # fmt: skip
    lower, upper = found[: len(low)], found[len(low) :]
    upper = upper + (upper < high)
    return jnp.stack([lower, lower + ((upper - lower) >> 1), upper], axis=-1)


def _sample(leaf: Scored) -> tuple[Scored, int]:
    """Evenly spaced rows of a large leaf, local to each shard, and one in how many."""
    stride = 1
    while leaf.operands[0].size > _SAMPLE:
        axis = fold_axis(leaf.operands[0], leaf.axes)
        if axis is None:
            break
        leaf = leaf._replace(
            operands=tuple(
                lax.index_in_dim(split_axis(x, axis), 0, axis + 1, keepdims=False)
                for x in leaf.operands
            )
        )
        stride *= 8
    return leaf, stride


def _count(leaves, thresholds, groups, strides=None) -> Wide:
    """Counts the scores at or above the thresholds of their group: `[groups, 3]`."""
    rows = [[_wide.from_int(0)] * 3 for _ in range(len(thresholds))]
    for i, (leaf, group) in enumerate(zip(leaves, groups, strict=True)):
        counts = _count_three(
            leaf,
            lambda x, _, ts=thresholds[group]: [x >= _unordered(t, x.dtype) for t in ts],
        )
        if strides is not None:
            counts = [_wide.shift_left(c, strides[i].bit_length() - 1) for c in counts]
        rows[group] = [_wide.add(a, b) for a, b in zip(rows[group], counts, strict=True)]
    return _wide.stack([_wide.stack(row) for row in rows])


def _count_three(leaf: Scored, tests) -> list[Wide]:
    """Counts where up to three tests hold, in one pass.

    `tests(scores, place)` gives boolean arrays; `place()` the rows and columns.
    """

    def plainly(*operands):
        x = leaf.score(*operands)
        masks = tests(x, lambda: _positions(x.shape))
        return [_wide.total(m.astype(jnp.uint32), m.size) for m in masks]

    axis = fold_axis(leaf.operands[0], leaf.axes)
    if axis is None:
        return plainly(*leaf.operands)
    return lax.platform_dependent(
        *leaf.operands,
        cpu=lambda *xs: _count_by_folds(leaf.score, xs, axis, tests),
        default=plainly,
    )


def _count_by_folds(score, operands, axis, tests) -> list[Wide]:
    # XLA's CPU backend sums integers one by one, from a copy of the masks. Adding slices,
    # the three counters side by side in one word, vectorises and stores an eighth.
    shards = shard_counts(operands[0])[axis]
    ways = 32 if operands[0].shape[axis] % (256 * shards) == 0 else 8
    splits = [split_axis(x, axis, ways) for x in operands]

    def masks(i):
        parts = [lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False) for x in splits]
        x = score(*parts)
        return tests(x, lambda: _positions(x.shape, axis, ways, i))

    def add(i, word):
        return word + sum(
            m.astype(jnp.uint32) << (_FIELD * j) for j, m in enumerate(masks(i))
        )

    first = masks(0)
    word = lax.fori_loop(0, ways, add, jnp.zeros_like(first[0], jnp.uint32))
    size = word.size * ways
    if (again := fold_axis(word)) is not None:  # now at most 8 * 32 in a field
        word = jnp.sum(split_axis(word, again), again + 1, dtype=jnp.uint32)
    fields = [(word >> (_FIELD * j)) & ((1 << _FIELD) - 1) for j in range(len(first))]
    return [_wide.total(f, size) for f in fields]


def _tie_ends(at, shapes, groups, low, excess):
    """Where in each leaf the kept ties end, as (row, column); `excess` ties are dropped."""
    found = [
        _count_three(x, lambda s, _, t=low[g]: [_ties(s, t)])[0]
        for x, g in zip(at(low), groups, strict=True)
    ]
    wanted = list(found)
    rest = [Wide(excess.hi[g], excess.lo[g]) for g in range(len(low))]
    for i in reversed(range(len(groups))):
        drop = _wide.minimum(rest[groups[i]], found[i])
        rest[groups[i]] = _wide.subtract(rest[groups[i]], drop)
        wanted[i] = _wide.subtract(found[i], drop)
    wanted, found = _wide.stack(wanted), _wide.stack(found)
    rows = jnp.asarray([r for r, _ in shapes], jnp.uint32)
    columns = jnp.asarray([c for _, c in shapes], jnp.uint32)

    def counter(inside):
        # Thresholds here are how many rows (columns) to leave out at the end.
        def count(skips):
            counts = []
            for i, leaf in enumerate(at(skips)):

                def tests(x, place, i=i):
                    ties, where = _ties(x, low[groups[i]]), place()
                    return [ties & inside(i, *where, skip) for skip in skips[i]]

                counts.append(_wide.stack(_count_three(leaf, tests)))
            return _wide.stack(counts)

        return count

    def in_rows(i, row, column, skip):
        del column
        return row < (rows[i] - skip).astype(jnp.int32)

    skip, found = _search(counter(in_rows), wanted, jnp.zeros_like(rows), rows, found)
    last = (rows - skip).astype(jnp.int32) - 1  # the row in which the kept ties end

    def in_columns(i, row, column, skip):
        end = (columns[i] - skip).astype(jnp.int32)
        return (row < last[i]) | ((row == last[i]) & (column < end))

    skip, _ = _search(counter(in_columns), wanted, jnp.zeros_like(columns), columns, found)
    ends = (columns - skip).astype(jnp.int32)
    return [(last[i], ends[i]) for i in range(len(groups))]


def _rows_columns(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _positions(shape, axis=None, ways=1, offset=0) -> tuple[Array, Array]:
    """Row (over all leading axes) and column of every element, int32.

    With `axis`, the elements are the slice at `offset` of that axis split by `ways`.
    """

    def index(a):
        place = lax.broadcasted_iota(jnp.int32, shape, a)
        return place * ways + offset if a == axis else place

    row = jnp.int32(0)
    for a in range(len(shape) - 1):
        row = row * (shape[a] * (ways if a == axis else 1)) + index(a)
    return row, index(len(shape) - 1) if shape else jnp.int32(0)


# Ordered bits: unsigned integers that rise with the float. The lowest stands for NaN.


def _compare_dtype(dtypes, like=None):
    bits = jnp.iinfo(like.dtype).bits if like is not None else 0
    dtype = jnp.result_type(*dtypes)
    if jnp.finfo(dtype).bits < 16:
        dtype = jnp.dtype(jnp.bfloat16)
    return dtype if jnp.finfo(dtype).bits >= bits else {32: jnp.float32, 64: jnp.float64}[bits]


def _bounds(dtype):
    """The ordered bits of NaN (one below -inf) and of +inf."""
    infinity = jnp.asarray(jnp.inf, dtype)
    return _ordered(-infinity) - 1, _ordered(infinity)


def _ordered(x: Array) -> Array:
    unsigned = jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")
    bits = lax.bitcast_convert_type(x, unsigned)
    sign = unsigned.type(1 << (jnp.iinfo(unsigned).bits - 1))
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _unordered(bits: Array, dtype) -> Array:
    sign = bits.dtype.type(1 << (jnp.iinfo(bits.dtype).bits - 1))
    return lax.bitcast_convert_type(
        jnp.where(bits & sign != 0, bits & ~sign, ~bits), dtype
    )


def _above(x: Array, threshold: Array) -> Array:
    is_nan = threshold == _bounds(x.dtype)[0]
    return jnp.where(is_nan, x == x, x > _unordered(threshold, x.dtype))


def _ties(x: Array, threshold: Array) -> Array:
    is_nan = threshold == _bounds(x.dtype)[0]
    return jnp.where(is_nan, x != x, x == _unordered(threshold, x.dtype))
