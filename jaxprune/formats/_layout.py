"""A leaf as a matrix `[..., K, N]`, or as equal parts of one, and back."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are contracted and produced, without its leading ones.

    Attributes:
      shape: of the leaf, from its first contracted or produced axis on.
      axes: contracted axes, counted from the end.
      out_axes: produced axes, counted from the end.
      parts: into how many parts the matrix is divided along K and N, each of which is
        packed by itself, for weights that are sharded. Fields of the packed leaf then
        have these two as their axes after the leading ones; `None` where they have not.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    parts: tuple[int, int] | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """K and N."""
        k, n = (math.prod(self.shape[a] for a in x) for x in (self.axes, self.out_axes))
        return k, n

    @property
    def part(self) -> tuple[int, int]:
        """K and N of one part; those of the matrix if it is not divided."""
        (k, n), (rows, cols) = self.matrix, self.parts or (1, 1)
        return k // rows, n // cols

    @property
    def of_part(self) -> "Layout":
        """That of a part, as a matrix by itself."""
        return Layout(self.part, (-2,), (-1,))

    def stack(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        """Leading axes of the leaf, from those of the matrices that are packed."""
        return leading[:-2] if self.parts else leading

    def to_matrix(self, leaf: Array) -> Array:
        """`[..., K, N]`."""
        batch = leaf.ndim - len(self.shape)
        order = [*range(batch), *(a + leaf.ndim for a in (*self.axes, *self.out_axes))]
        return leaf.transpose(order).reshape(*leaf.shape[:batch], *self.matrix)

    def leaf(self, matrix: Array) -> Array:
        """Undoes `to_matrix`."""
        batch, ndim = matrix.ndim - 2, matrix.ndim - 2 + len(self.shape)
        order = [*range(batch), *(a + ndim for a in (*self.axes, *self.out_axes))]
        split = [self.shape[a] for a in (*self.axes, *self.out_axes)]
        leaf = matrix.reshape(*matrix.shape[:batch], *split)
        return leaf.transpose([order.index(a) for a in range(ndim)])

    def split(self, matrix: Array) -> Array:
        """`[..., K, N]` -> `[..., parts of K, parts of N, rows, cols]`, if it has parts."""
        if self.parts is None:
            return matrix
        *batch, k, n = matrix.shape
        (rows, cols), (k_parts, n_parts) = self.part, self.parts
        # An axis at a time: on explicit meshes a reshape may not split two.
        matrix = matrix.reshape(*batch, k_parts, rows, n)
        matrix = matrix.reshape(*batch, k_parts, rows, n_parts, cols)
        return jnp.swapaxes(matrix, -2, -3)

    def join(self, parts: Array) -> Array:
        """Undoes `split`."""
        if self.parts is None:
            return parts
        *batch, k_parts, n_parts, rows, cols = parts.shape
        parts = jnp.swapaxes(parts, -2, -3)
        parts = parts.reshape(*batch, k_parts, rows, n_parts * cols)
        return parts.reshape(*batch, k_parts * rows, n_parts * cols)


def of(
    shape: tuple[int, ...], axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> Layout:
    """The layout of a leaf whose axes, counted from the front, are these.

    Raises:
      ValueError: if other axes than leading ones are neither contracted nor produced.
    """
    both, ndim = (*axes, *out_axes), len(shape)
    batch = ndim - len(both)
    if min(both) < batch:
        raise ValueError(
            f"w: its shape is {shape}, of which axes {axes} are contracted and {out_axes} "
            "produced; expected the others in front of them. Name all axes that belong "
            "to the matrix, or move the others to the front."
        )
    return Layout(
        tuple(shape[batch:]),
        tuple(a - ndim for a in axes),
        tuple(a - ndim for a in out_axes),
    )
