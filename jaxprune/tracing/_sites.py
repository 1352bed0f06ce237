"""A site: one place where a leaf is contracted, and the leaf as a matrix there."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.tracing import _layout
from jaxprune.tracing._layout import Atoms


class Loop(NamedTuple):
    """A loop around a site.

    Attributes:
      place: of its equation; see `Site`.
      length: how often its body is run; `None` for a `while`, whose length is not known.
      sliced: whether each iteration sees another part of the leaf, which makes the
        iterations stacked matrices. Otherwise all of them use the same matrix.
    """

    place: tuple[int, ...]
    length: int | None
    sliced: bool


class Matrix(NamedTuple):
    """Sizes of a leaf, or of the part of it that a site uses, seen as matrices.

    Attributes:
      stack: how many, run one after the other: layers of a scan.
      batch: how many, side by side: experts, groups of a convolution.
      K: what is contracted.
      N: what is produced.
    """

    stack: int
    batch: int
    K: int
    N: int


@dataclasses.dataclass(frozen=True)
class Site:
    """This leaf, contracted here, over these axes, with that activation.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      primitive: `"dot_general"`, `"conv_general_dilated"`, `"ragged_dot_general"`, or
        the name of a primitive with a rule.
      activation: number of what the leaf is multiplied with. Sites with the same number
        read the same rows of the same value.
      place: of the equation: its index in the jaxpr, followed by that in the jaxpr inside
        it, and so on, where a branch of a `cond` (and the body of a `while`, 1) has an
        index too. Places in order are in the order of evaluation.
      loops: around the site, from the outside.
      stack: axes of the leaf that loops run over, or that are indexed with a number that
        is computed, as (size, stride) in elements of the leaf, the major one first.
      batch: axes that stand side by side.
      k: contracted axes, in the order of the statistics. For a convolution these are
        input channels, then the window.
      n: produced axes.
      offset: of the first element.
      picks: for each stacked loop, then each computed index, which (start, size) of it
        this leaf is, if it is stacked with others.
      wraps: elementwise primitives between the leaf and the product, such as a mask or a
        scale, first to last. Where there is one, the matrix of the product is not that
        of the leaf.
      times: how often the place is run; `None` if that is not known.
      rows: of the activation, each time.
    """

    path: str
    shape: tuple[int, ...]
    primitive: str
    activation: int
    place: tuple[int, ...]
    loops: tuple[Loop, ...]
    stack: Atoms
    batch: Atoms
    k: Atoms
    n: Atoms
    offset: int
    picks: tuple[tuple[int, int] | None, ...]
    wraps: tuple[str, ...]
    times: int | None
    rows: int = dataclasses.field(compare=False)

    @property
    def matrix(self) -> Matrix:
        """Sizes of the matrices."""
        return Matrix(*map(_layout.size, (self.stack, self.batch, self.k, self.n)))

    @property
    def whole(self) -> bool:
        """Whether the site uses all of the leaf, not a slice of it."""
        return math.prod(self.matrix) == math.prod(self.shape)

    @property
    def axes(self) -> tuple[tuple[int, ...], ...] | None:
        """Axes of the leaf that are stack, batch, K and N.

        `None` if the site does not use whole axes of the whole leaf.

        Example:
          >>> from jaxprune import tracing
          >>> def fn(params, x):
          ...     return jnp.einsum("td,hdk->thk", x, params["w"])
          >>> params = {"w": jnp.zeros((2, 4, 3))}
          >>> tracing.sites(fn, params, jnp.zeros((5, 4))).sites[0].axes
          ((), (), (1,), (0, 2))
        """
        if not self.whole:
            return None
        own = {
            d.atoms[0]: i
            for i, d in enumerate(_layout.row_major(self.shape))
            if d.atoms
        }
        found = []
        for atoms in (self.stack, self.batch, self.k, self.n):
            cut = _layout.cut(atoms, self.shape)
            if not all(a in own for a in cut):
                return None
            found.append(tuple(own[a] for a in cut))
        return tuple(found)

    def to_matrix(self, leaf: Array) -> Array:
        """The leaf, or the part of it that is used here, as `[stack, batch, K, N]`.

        Args:
          leaf: of the shape of the leaf, of any dtype: weights, a mask, scores.

        Raises:
          ValueError: if the leaf has another shape.

        Example:
          >>> from jaxprune import tracing
          >>> params = {"w": jnp.arange(6.0).reshape(3, 2)}
          >>> site = tracing.sites(lambda p, x: x @ p["w"].T, params, jnp.ones(2)).sites[0]
          >>> site.to_matrix(params["w"])[0, 0].tolist()
          [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
        """
        digits = self._digits(leaf)
        part = jnp.asarray(leaf).reshape(digits.shape)[digits.slices]
        rest = [i for i in range(part.ndim) if i not in digits.order]
        return part.transpose(*digits.order, *rest).reshape(self.matrix)

    def from_matrix(self, matrices: Array, leaf: Array) -> Array:
        """The leaf with other matrices; the inverse of `to_matrix`.

        Args:
          matrices: `[stack, batch, K, N]`; cast to the dtype of the leaf.
          leaf: the leaf. Elements that the site does not use stay as they are.

        Raises:
          ValueError: if one of them has another shape.
        """
        digits = self._digits(leaf)
        if jnp.shape(matrices) != tuple(self.matrix):
            raise ValueError(
                f"matrices: got the shape {jnp.shape(matrices)} for {self.path}, expected "
                f"[stack, batch, K, N] = {tuple(self.matrix)}, as to_matrix gives them."
            )
        sizes = [s.stop - s.start for s in digits.slices]
        rest = [i for i in range(len(sizes)) if i not in digits.order]
        order = [*digits.order, *rest]
        part = jnp.reshape(matrices, [sizes[i] for i in order])
        part = part.transpose([order.index(i) for i in range(len(order))])
        part = part.astype(leaf.dtype)
        if self.whole:
            return part.reshape(self.shape)
        cut = jnp.asarray(leaf).reshape(digits.shape)
        return cut.at[digits.slices].set(part).reshape(self.shape)

    def _digits(self, leaf: Any) -> _layout.Digits:
        if jnp.shape(leaf) != self.shape:
            raise ValueError(
                f"leaf: got the shape {jnp.shape(leaf)} for {self.path}, expected "
                f"{self.shape}. Pass the leaf that the site was found for."
            )
        digits = _layout.digits(self.shape, self._atoms, self.offset)
        if digits is None:  # such a site is not made; see `is_sliceable`
            raise ValueError(f"{self.path} cannot be cut at {self.place}")
        return digits

    @property
    def _atoms(self) -> Atoms:
        groups = (self.stack, self.batch, self.k, self.n)
        return tuple(a for group in groups for a in group)

    @property
    def is_sliceable(self) -> bool:
        """Whether the part of the leaf can be cut out of it."""
        return _layout.digits(self.shape, self._atoms, self.offset) is not None


class Reading(NamedTuple):
    """An activation, as one or several sites read it.

    Attributes:
      place: of an equation that reads it.
      operand: which operand of that equation it is.
      batch_axes: of the activation, in the order of the sites' batch.
      k_axes: contracted axes; all others are rows.
      windows: (start, size) of each of these axes, first those of the batch, where the
        leaf meets only a part of the axis.
      k_sizes: what K is split into before `moved` of these become batch axes.
      moved: positions in `k_sizes`.
      shape: (batch, K) of the statistics.
      loops: around it, from the outside.
      indices: (place, operand, length) of each computed index into the leaf.
    """

    place: tuple[int, ...]
    operand: int
    batch_axes: tuple[int, ...]
    k_axes: tuple[int, ...]
    windows: tuple[tuple[int, int] | None, ...]
    k_sizes: tuple[int, ...]
    moved: tuple[int, ...]
    shape: tuple[int, int]
    loops: tuple[Loop, ...]
    indices: tuple[tuple[tuple[int, ...], int, int], ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the statistics: stacked loops, then computed indices."""
        loops = [x.length for x in self.loops if x.sliced and x.length is not None]
        return (*loops, *(length for _, _, length in self.indices))
