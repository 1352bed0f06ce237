"""A leaf as a matrix `[..., K, N]`, and back."""

import dataclasses
import math

from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are contracted and produced, without its leading ones.

    Attributes:
      shape: of the leaf, from its first contracted or produced axis on.
      axes: contracted axes, counted from the end.
      out_axes: produced axes, counted from the end.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """K and N."""
        k, n = (math.prod(self.shape[a] for a in x) for x in (self.axes, self.out_axes))
        return k, n

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
