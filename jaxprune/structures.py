"""What lives and dies together: single weights, N of every M, blocks, whole channels.

A leaf is seen as `[..., K, N]`: what is contracted, what is produced, the rest batched.
For a two-dimensional Flax kernel these are axes -2 and -1; other layouts say so with
`axis`, an int, a tuple of axes to flatten, or a mapping from path patterns to either.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import _axes, _bits, _select, _tree
from jaxprune._groups import Group as Group
from jaxprune._groups import Groups as Groups
from jaxprune._groups import Member as Member

Axis: TypeAlias = int | tuple[int, ...]
Axes: TypeAlias = Axis | Mapping[str, Axis]


class Structure(Protocol):
    """What selection needs to know of a structure; the classes below are such."""

    def units(self, path: str, leaf: Any) -> int:
        """How many things can be kept or pruned in this leaf; checks that it fits."""
        ...

    def kept_units(self, path: str, leaf: Any, sparsity: Fraction) -> int:
        """How many of them stay when the share `sparsity` of the weights goes."""
        ...

    def scored(
        self, path: str, score: Callable[..., Array], *operands: Array
    ) -> _select.Scored:
        """The scores of the units, from an elementwise score of the weights."""
        ...

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """The mask of the weights when `kept` says which units stay."""
        ...

    def spread(self, path: str, values: Array, like: Array) -> Array:
        """Gives every weight of `like` the value of its unit."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight by itself.

    Example:
      >>> jp.Unstructured()
      Unstructured()
    """

    def units(self, path: str, leaf: Any) -> int:
        """Number of weights."""
        del path
        return math.prod(leaf.shape)

    def kept_units(self, path: str, leaf: Any, sparsity: Fraction) -> int:
        """Number of weights that stay, rounded half down."""
        return _keep(self.units(path, leaf), sparsity)

    def scored(
        self, path: str, score: Callable[..., Array], *operands: Array
    ) -> _select.Scored:
        """The scores of the weights as they are."""
        del path
        return _select.scored(score, *operands)

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """`kept` itself."""
        del path, scores
        return kept

    def spread(self, path: str, values: Array, like: Array) -> Array:
        """`values` themselves."""
        del path, like
        return values


@dataclasses.dataclass(frozen=True)
class NM:
    """N:M sparsity: `n` weights kept of every `m` along the contracted axis.

    Args:
      n: kept in each group, 0 < n < m.
      m: size of a group.
      axis: the contracted axis K, along which groups run. A tuple is flattened.
      stride: distance between the members of a group; 128 puts them in different vector
        registers of a TPU (qwix calls this `offset`).

    A leaf whose axis is no multiple of `m * stride` is refused. Under a gradual schedule
    the share of groups that obey grows, the cheapest first; the others stay dense.

    Example:
      >>> w = jnp.array([[1.0], [-4.0], [2.0], [3.0]])
      >>> _, masks = jp.prune({"kernel": w}, structure=jp.NM(2, 4))
      >>> masks["kernel"].ravel().tolist()
      [False, True, False, True]

    Raises:
      ValueError: unless 0 < n < m and stride >= 1.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """

    n: int
    m: int
    axis: Axes = -2
    stride: int = 1

    def __post_init__(self) -> None:
        _check_whole("NM", n=self.n, m=self.m, stride=self.stride)
        if not 0 < self.n < self.m:
            raise ValueError(
                f"NM: got n={self.n}, m={self.m}; expected 0 < n < m, where n weights are "
                "kept of every m. NM(2, 4) keeps two of four."
            )

    def units(self, path: str, leaf: Any) -> int:
        """Number of groups."""
        axes = self._axes(path, leaf.shape)
        length, span = math.prod(leaf.shape[a] for a in axes), self.m * self.stride
        if length % span:
            raise ValueError(
                f"{path}: {self} does not divide axis {axes} of length {length} (shape "
                f"{tuple(leaf.shape)}); expected a multiple of {span}. Choose another m "
                f"or axis=, or leave the leaf out with where='!{path}'."
            )
        return math.prod(leaf.shape) // self.m

    def kept_units(self, path: str, leaf: Any, sparsity: Fraction) -> int:
        """Number of groups that stay dense; none once `sparsity` is 1 - n/m."""
        most = 1 - Fraction(self.n, self.m)
        if sparsity > most:
            raise ValueError(
                f"{path}: sparsity {float(sparsity)} contradicts {self}, which prunes "
                f"{float(most)} of the weights. Ask for sparsity={float(most)}, or for "
                "another n and m."
            )
        return _keep(self.units(path, leaf), sparsity / most)

    def scored(
        self, path: str, score: Callable[..., Array], *operands: Array
    ) -> _select.Scored:
        """What each group would lose by obeying: the sum of its pruned scores."""
        views = [self._grouped(path, x) for x in operands]
        axis = views[0][1]
        if self.m > 8:
            grouped = score(*(x for x, _, _ in views))
            lost = _upcast(jnp.where(self._keeps(grouped, axis), 0, grouped))
            return _select.stored(_axes.merge_axes(jnp.sum(lost, axis + 1), axis))
        # Member by member, which vectorises and stores nothing but the sums.
        members = [
            score(*(lax.index_in_dim(x, j, axis + 1, False) for x, _, _ in views))
            for j in range(self.m)
        ]
        ranks = _ranks([_bits.ordered(x) for x in members])
        lost = [
            jnp.where(rank < self.n, 0, _upcast(x))
            for rank, x in zip(ranks, members, strict=True)
        ]
        return _select.stored(_axes.merge_axes(sum(lost[1:], lost[0]), axis))

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """The best `n` of each group, and all of the groups that stay dense."""
        grouped, axis, order = self._grouped(path, scores)
        places = *grouped.shape[: axis + 1], 1, *grouped.shape[axis + 2 :]
        mask = self._keeps(grouped, axis) | kept.reshape(places)
        return _axes.restore(mask, scores, order)

    def spread(self, path: str, values: Array, like: Array) -> Array:
        """Each group's value for its members."""
        grouped, axis, order = self._grouped(path, like)
        places = *grouped.shape[: axis + 1], 1, *grouped.shape[axis + 2 :]
        ones = jnp.ones_like(grouped, values.dtype)
        return _axes.restore(values.reshape(places) * ones, like, order)

    def best(self, path: str, scores: Array) -> Bool[Array, "..."]:
        """The mask in which every group obeys."""
        grouped, axis, order = self._grouped(path, scores)
        return _axes.restore(self._keeps(grouped, axis), scores, order)

    def by_group(self, path: str, f: Callable[..., Array], *arrays: Array) -> Array:
        """Values of the groups, as `units` counts them.

        `f(*views, axis)` gets the arrays with the members of a group along `axis`, which
        it must take away.
        """
        views = [self._grouped(path, x) for x in arrays]
        axis = views[0][1]
        return _axes.merge_axes(f(*(x for x, _, _ in views), axis + 1), axis)

    def matrix_axes(
        self, path: str, shape: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes K and N of a leaf of this shape, counted from the front.

        N is what stands behind the first axis of K, or else the one in front of it.
        """
        k_axes = self._axes(path, shape)
        first = min(k_axes)
        n_axes = tuple(a for a in range(first, len(shape)) if a not in k_axes)
        return k_axes, n_axes or tuple(range(max(0, first - 1), first))

    def _axes(self, path: str, shape) -> tuple[int, ...]:
        return _resolve(path, self.axis, len(shape), "NM axis")

    def _grouped(self, path: str, x: Array) -> tuple[Array, int, list[int]]:
        """Views the axis K as groups, and says where it is and how axes were moved.

        Several axes are flattened to one, at the place of the first.
        """
        axes = self._axes(path, x.shape)
        rest = [a for a in range(x.ndim) if a not in axes]
        at = sum(a < min(axes) for a in rest)
        order = [*rest[:at], *axes, *rest[at:]]
        # [..., K, ...] -> [..., groups, m, stride, ...]
        groups = math.prod(x.shape[a] for a in axes) // (self.m * self.stride)
        before, after = ([x.shape[a] for a in part] for part in (rest[:at], rest[at:]))
        x = _axes.whole_groups(x, axes, self.m * self.stride)
        shape = [*before, groups, self.m, self.stride, *after]
        return _axes.reshape(x.transpose(order), shape), at, order

    def _keeps(self, grouped: Array, axis: int) -> Bool[Array, "..."]:
        # The rank of a weight is the number of others that beat it: ties go to the
        # lower index and NaN loses. Elementwise, so that it fuses; no sort.
        x = _bits.ordered(grouped)
        place = jnp.arange(self.m).reshape(self.m, *(1,) * (x.ndim - axis - 2))
        rank = jnp.zeros_like(x, jnp.uint8 if self.m < 256 else jnp.int32)
        for j in range(self.m):
            other = lax.slice_in_dim(x, j, j + 1, axis=axis + 1)
            beats = (other > x) | ((other == x) & (j < place))
            rank = rank + beats.astype(rank.dtype)
        return rank < self.n


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of `rows` x `cols` weights of the matrix `[K, N]`, scored by their sum.

    Args:
      rows: extent along the contracted axis K.
      cols: extent along the produced axis N.
      axis: the axis K, or several to flatten.
      out_axis: the axis N, or several to flatten.

    Example:
      >>> w = jnp.array([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
      >>> _, masks = jp.prune({"kernel": w}, sparsity=0.5, structure=jp.Block(2, 2))
      >>> masks["kernel"].tolist()
      [[True, True, False, False], [True, True, False, False]]

    Raises:
      ValueError: if an extent is below 1.
    """

    rows: int
    cols: int
    axis: Axes = -2
    out_axis: Axes = -1

    def __post_init__(self) -> None:
        _check_whole("Block", rows=self.rows, cols=self.cols)

    def units(self, path: str, leaf: Any) -> int:
        """Number of blocks."""
        k_axes, n_axes = self.matrix_axes(path, leaf.shape)
        for name, extent, axes in (
            ("rows", self.rows, k_axes),
            ("cols", self.cols, n_axes),
        ):
            length = math.prod(leaf.shape[a] for a in axes)
            if length % extent:
                raise ValueError(
                    f"{path}: {self} does not divide its shape {tuple(leaf.shape)}: "
                    f"{name}={extent} against length {length}. Choose a divisor of {length}, "
                    f"or leave the leaf out with where='!{path}'."
                )
        return math.prod(leaf.shape) // (self.rows * self.cols)

    def kept_units(self, path: str, leaf: Any, sparsity: Fraction) -> int:
        """Number of blocks that stay, rounded half down."""
        return _keep(self.units(path, leaf), sparsity)

    def scored(
        self, path: str, score: Callable[..., Array], *operands: Array
    ) -> _select.Scored:
        """The sum of the scores of each block, in float32."""
        scores = score(*operands)
        k_axes, n_axes = self.matrix_axes(path, scores.shape)
        scores = _axes.whole_groups(scores, k_axes, self.rows)
        scores = _axes.whole_groups(scores, n_axes, self.cols)
        moved = scores.transpose(_matrix_order(scores.ndim, k_axes, n_axes))
        rows, cols = (
            math.prod(scores.shape[a] for a in axes) for axes in (k_axes, n_axes)
        )
        batch = moved.shape[: scores.ndim - len(k_axes) - len(n_axes)]
        matrix = _upcast(_axes.reshape(moved, (*batch, rows, cols)))
        # Rows first: that adds whole vectors, where a sum over both axes adds numbers.
        # And one axis at a time: on explicit meshes a reshape may not split two.
        sums = jnp.sum(_axes.split_axis(matrix, len(batch), self.rows), axis=-2)
        sums = jnp.sum(_axes.split_axis(sums, len(batch) + 1, self.cols), axis=-1)
        return _select.stored(sums)

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """Each block's decision for all of its weights."""
        return self.spread(path, kept, scores)

    def spread(self, path: str, values: Array, like: Array) -> Array:
        """Each block's value for all of its weights."""
        k_axes, n_axes = self.matrix_axes(path, like.shape)
        rows = _repeat(values, self.rows, values.ndim - 2)
        matrix = _repeat(rows, self.cols, values.ndim - 1)
        return _axes.restore(matrix, like, _matrix_order(like.ndim, k_axes, n_axes))

    def matrix_axes(
        self, path: str, shape: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes K and N of a leaf of this shape, counted from the front."""
        k_axes = _resolve(path, self.axis, len(shape), "Block axis")
        n_axes = _resolve(path, self.out_axis, len(shape), "Block out_axis")
        if set(k_axes) & set(n_axes):
            raise ValueError(
                f"{path}: Block axis={k_axes} and out_axis={n_axes} overlap; expected two "
                f"different axes of shape {tuple(shape)}. Pass out_axis= too."
            )
        return k_axes, n_axes


@dataclasses.dataclass(frozen=True)
class Channel:
    """Whole slices of a leaf, scored by their sum: neurons, filters, rows or columns.

    Args:
      axis: the axis along which slices are counted; -1 is the outputs of a Flax kernel.
      stack_axes: axes of layers stacked for a scan; each layer chooses for itself, out of
        one budget.

    Example:
      >>> w = jnp.array([[3.0, 1.0], [1.0, 1.0]])
      >>> _, masks = jp.prune({"kernel": w}, sparsity=0.5, structure=jp.Channel())
      >>> masks["kernel"].tolist()
      [[True, False], [True, False]]
    """

    axis: Axes = -1
    stack_axes: Axis = ()

    def units(self, path: str, leaf: Any) -> int:
        """Number of slices."""
        return math.prod(leaf.shape[a] for a in self._axes(path, leaf.shape))

    def kept_units(self, path: str, leaf: Any, sparsity: Fraction) -> int:
        """Number of slices that stay, rounded half down."""
        return _keep(self.units(path, leaf), sparsity)

    def scored(
        self, path: str, score: Callable[..., Array], *operands: Array
    ) -> _select.Scored:
        """The sum of the scores of each slice, in float32."""
        scores = score(*operands)
        stays = self._axes(path, scores.shape)
        rest = tuple(a for a in range(scores.ndim) if a not in stays)
        return _select.stored(jnp.sum(_upcast(scores), axis=rest))

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """Each slice's decision for all of its weights."""
        return self.spread(path, kept, scores)

    def spread(self, path: str, values: Array, like: Array) -> Array:
        """Each slice's value for all of its weights."""
        stays = self._axes(path, like.shape)
        rest = tuple(a for a in range(like.ndim) if a not in stays)
        # Not broadcast_to: the result must lie on the devices as the weights do.
        return jnp.expand_dims(values, rest) * jnp.ones_like(like, values.dtype)

    def _axes(self, path: str, shape) -> tuple[int, ...]:
        axes = _resolve(path, self.axis, len(shape), "Channel axis")
        stack = _resolve(path, self.stack_axes, len(shape), "Channel stack_axes")
        return tuple(sorted({*axes, *stack}))


def _check_whole(structure: str, **extents: int) -> None:
    for name, value in extents.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(
                f"{structure}: got {name}={value!r}; expected a whole number of at least 1."
            )


def _ranks(members: Sequence[Array]) -> list[Array]:
    """How many of the others beat each one; ties go to the earlier."""
    ranks = [jnp.zeros_like(x, jnp.uint8) for x in members]
    for j, later in enumerate(members):
        for i, earlier in enumerate(members[:j]):
            wins = earlier >= later
            ranks[j] += wins.astype(jnp.uint8)
            ranks[i] += (~wins).astype(jnp.uint8)
    return ranks


def _keep(units: int, sparsity: Fraction) -> int:
    return units - math.floor(sparsity * units + Fraction(1, 2))


def _upcast(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _resolve(path: str, axis: Axes, ndim: int, name: str) -> tuple[int, ...]:
    """The axes that `axis` means for one leaf, counted from the front."""
    if isinstance(axis, Mapping):
        found = _tree.lookup(path, axis)
        if found is None:
            raise ValueError(
                f"{path}: no pattern of {name}={dict(axis)} matches it. Add one, such as "
                "'*': -2."
            )
        axis = found
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(
            f"{path}: {name}={axis} is outside a leaf of {ndim} axes. Give its axis by "
            f"pattern, as in axis={{{path!r}: 0, '*': -2}}."
        )
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"{path}: {name}={axis} names an axis twice; expected different ones."
        )
    return axes


def _matrix_order(ndim: int, k_axes, n_axes) -> list[int]:
    batch = [a for a in range(ndim) if a not in (*k_axes, *n_axes)]
    return [*batch, *k_axes, *n_axes]


def _repeat(x: Array, times: int, axis: int) -> Array:
    before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
    x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, times, *after))
    return x.reshape(*before[:-1], before[-1] * times, *after)
