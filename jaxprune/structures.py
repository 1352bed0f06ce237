"""What lives and dies together: single weights, N of every M, blocks, whole channels.

A leaf is seen as `[..., K, N]`: what is contracted, what is produced, the rest batched.
For a two-dimensional Flax kernel these are axes -2 and -1; other layouts say so with
`axis`, an int, a tuple of axes to flatten, or a mapping from path patterns to either.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import _select, _tree

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
        if not 0 < self.n < self.m:
            raise ValueError(
                f"NM: got n={self.n}, m={self.m}; expected 0 < n < m, where n weights are "
                "kept of every m. NM(2, 4) keeps two of four."
            )
        if self.stride < 1:
            raise ValueError(f"NM: got stride={self.stride}; expected at least 1.")

    def units(self, path: str, leaf: Any) -> int:
        """Number of groups."""
        shape, axis = _merged_shape(path, leaf.shape, self.axis, "NM")
        span = self.m * self.stride
        if shape[axis] % span:
            raise ValueError(
                f"{path}: {self} does not divide axis {axis} of length {shape[axis]} "
                f"(shape {tuple(leaf.shape)}); expected a multiple of {span}. Choose another "
                f"m or axis=, or leave the leaf out with where=['*', '!{path}']."
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
        grouped, axis = self._grouped(path, score(*operands))
        lost = _upcast(jnp.where(self._keeps(grouped, axis), 0, grouped))
        return _select.stored(jnp.sum(lost, axis + 1))

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """The best `n` of each group, and all of the groups that stay dense."""
        grouped, axis = self._grouped(path, scores)
        mask = self._keeps(grouped, axis) | jnp.expand_dims(kept, axis + 1)
        return _unmerge(mask, scores.shape, _axis_of(path, self.axis), axis)

    def _grouped(self, path: str, x: Array) -> tuple[Array, int]:
        # [..., K, ...] -> [..., groups, m, stride, ...]
        x, axis = _merge(x, _axis_of(path, self.axis))
        groups = x.shape[axis] // (self.m * self.stride)
        shape = (*x.shape[:axis], groups, self.m, self.stride, *x.shape[axis + 1 :])
        return x.reshape(shape), axis

    def _keeps(self, grouped: Array, axis: int) -> Bool[Array, "..."]:
        # The rank of a weight is the number of others that beat it: ties go to the lower
        # index and NaN loses. Elementwise, so that it fuses; no sort.
        x = jnp.where(jnp.isnan(grouped), -jnp.inf, grouped)
        place = lax.broadcasted_iota(jnp.int32, x.shape, axis + 1)
        rank = (
            jnp.zeros(x.shape, jnp.uint8)
            if self.m < 256
            else jnp.zeros(x.shape, jnp.int32)
        )
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
        if self.rows < 1 or self.cols < 1:
            raise ValueError(
                f"Block: got rows={self.rows}, cols={self.cols}; expected both at least 1."
            )

    def units(self, path: str, leaf: Any) -> int:
        """Number of blocks."""
        k_axes, n_axes = self._axes(path, leaf.shape)
        for name, extent, axes in (
            ("rows", self.rows, k_axes),
            ("cols", self.cols, n_axes),
        ):
            length = math.prod(leaf.shape[a] for a in axes)
            if length % extent:
                raise ValueError(
                    f"{path}: {self} does not divide its shape {tuple(leaf.shape)}: "
                    f"{name}={extent} against length {length}. Choose a divisor of {length}, "
                    f"or leave the leaf out with where=['*', '!{path}']."
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
        k_axes, n_axes = self._axes(path, scores.shape)
        matrix = _as_matrix(scores, k_axes, n_axes)
        *batch, rows, cols = matrix.shape
        blocks = matrix.reshape(*batch, rows // self.rows, self.rows, -1, self.cols)
        # Rows first: that adds whole vectors, where a sum over both axes adds numbers.
        sums = jnp.sum(_upcast(blocks), axis=-3)
        return _select.stored(jnp.sum(sums, axis=-1))

    def mask(self, path: str, scores: Array, kept: Bool[Array, "..."]) -> Array:
        """Each block's decision for all of its weights."""
        k_axes, n_axes = self._axes(path, scores.shape)
        *batch, rows, cols = kept.shape
        wide = jnp.broadcast_to(
            kept[..., :, None, :, None], (*batch, rows, self.rows, cols, self.cols)
        )
        matrix = wide.reshape(*batch, rows * self.rows, cols * self.cols)
        return _from_matrix(matrix, scores.shape, k_axes, n_axes)

    def _axes(self, path: str, shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        k_axes = _normalise(path, _axis_of(path, self.axis), len(shape), "Block axis")
        n_axes = _normalise(
            path, _axis_of(path, self.out_axis), len(shape), "Block out_axis"
        )
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
        stays = self._axes(path, scores.shape)
        rest = tuple(a for a in range(scores.ndim) if a not in stays)
        return jnp.broadcast_to(jnp.expand_dims(kept, rest), scores.shape)

    def _axes(self, path: str, shape) -> tuple[int, ...]:
        axes = _normalise(path, _axis_of(path, self.axis), len(shape), "Channel axis")
        stack = _normalise(path, self.stack_axes, len(shape), "Channel stack_axes")
        return tuple(sorted({*axes, *stack}))


def _keep(units: int, sparsity: Fraction) -> int:
    return units - math.floor(sparsity * units + Fraction(1, 2))


def _upcast(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _axis_of(path: str, axis: Axes) -> Axis:
    if not isinstance(axis, Mapping):
        return axis
    found = _tree.lookup(path, axis)
    if found is None:
        raise ValueError(
            f"{path}: no pattern of axis={dict(axis)} matches it. Add one, such as '*': -2."
        )
    return found


def _normalise(path: str, axis: Axis, ndim: int, name: str) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(
            f"{path}: {name}={axis} is outside a leaf of {ndim} axes. Give its axis by "
            f"pattern, as in axis={{{path!r}: 0, '*': -2}}."
        )
    return tuple(a % ndim for a in axes)


def _merged_shape(path, shape, axis, name):
    axes = _normalise(path, _axis_of(path, axis), len(shape), f"{name} axis")
    if len(axes) == 1:
        return list(shape), axes[0]
    rest = [a for a in range(len(shape)) if a not in axes]
    at = sum(a < min(axes) for a in rest)
    merged = [shape[a] for a in rest]
    merged.insert(at, math.prod(shape[a] for a in axes))
    return merged, at


def _merge(x: Array, axis: Axis) -> tuple[Array, int]:
    """Flattens several axes to one, at the place of the first."""
    if isinstance(axis, int):
        return x, axis % x.ndim
    shape, at = _merged_shape("", x.shape, axis, "")
    rest = [a for a in range(x.ndim) if a not in {a % x.ndim for a in axis}]
    order = [*rest[:at], *(a % x.ndim for a in axis), *rest[at:]]
    return x.transpose(order).reshape(shape), at


def _unmerge(mask: Array, shape, axis: Axis, at: int) -> Array:
    """Undoes `_merge`, and the grouping of its axis, for a mask."""
    if isinstance(axis, int):
        return mask.reshape(shape)
    ndim = len(shape)
    axes = [a % ndim for a in axis]
    rest = [a for a in range(ndim) if a not in axes]
    order = [*rest[:at], *axes, *rest[at:]]
    mask = mask.reshape([shape[a] for a in order])
    return mask.transpose([order.index(a) for a in range(ndim)])


def _as_matrix(x: Array, k_axes, n_axes) -> Array:
    batch = [a for a in range(x.ndim) if a not in (*k_axes, *n_axes)]
    x = x.transpose([*batch, *k_axes, *n_axes])
    return x.reshape(
        *x.shape[: len(batch)], math.prod(x.shape[len(batch) : -len(n_axes)]), -1
    )


def _from_matrix(matrix: Array, shape, k_axes, n_axes) -> Array:
    batch = [a for a in range(len(shape)) if a not in (*k_axes, *n_axes)]
    order = [*batch, *k_axes, *n_axes]
    out = matrix.reshape([shape[a] for a in order])
    return out.transpose([order.index(a) for a in range(len(shape))])
