"""Block-sparse matrices: the blocks that are kept, and where each of them stands."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxprune.formats import _layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparseArray:
    """A matrix `[..., K, N]` of which only the blocks that are kept are stored.

    The places are arrays like the values, and there are as many as `capacity`: another
    mask with no more blocks is the same program. Places that are not taken stand at the
    end, with values of 0 and a row and column one past the last. Leading axes (experts,
    layers of a scan) are leading axes of every field, and parts of a matrix that is sharded
    come after them (`Layout.parts`), with places of their own.

    Attributes:
      values: the blocks, column by column, and in a column from the first row down.
      rows: place of each block along K, counted in blocks.
      columns: place of each block along N, counted in blocks.
      by_row: the same blocks row by row: their indices in `values`.
      layout: how the matrix came out of the leaf it was packed from.
    """

    values: Float[Array, "... capacity rows cols"]
    rows: Int32[Array, "... capacity"]
    columns: Int32[Array, "... capacity"]
    by_row: Int32[Array, "... capacity"]
    layout: _layout.Layout = dataclasses.field(metadata={"static": True})

    @property
    def block(self) -> tuple[int, int]:
        """Extent of a block along K and N."""
        rows, cols = self.values.shape[-2:]
        return rows, cols

    @property
    def capacity(self) -> int:
        """Blocks that there is room for, in each part of a matrix that is divided."""
        return self.values.shape[-3]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of a part along K and N, the last padded where a block does not divide."""
        (k, n), (rows, cols) = self.layout.part, self.block
        return -(-k // rows), -(-n // cols)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf that `unpack` gives."""
        return (*self.layout.stack(self.values.shape[:-3]), *self.layout.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, those of the places among them."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def kept(mask: Bool[Array, "... K N"], size: tuple[int, int]) -> Int32[Array, "..."]:
    """How many blocks a matrix keeps."""
    return _blocks(mask, size).any((-2, -1)).sum(-1, dtype=jnp.int32)


def pack_matrices(
    w: Float[Array, "... K N"],
    mask: Bool[Array, "... K N"],
    size: tuple[int, int],
    capacity: int,
) -> BlockSparseArray:
    """The blocks of `w` that hold a weight kept by `mask`."""
    *_, k, n = w.shape
    kept = _blocks(mask, size).any((-2, -1))  # [..., blocks]
    values = _blocks(jnp.where(mask, w, jnp.zeros_like(w)), size)
    grid = -(-k // size[0]), -(-n // size[1])
    found = _vectorized(w.ndim - 2, _gather, grid, capacity)(values, kept)
    chosen, rows, columns, by_row = found
    return BlockSparseArray(
        chosen, rows, columns, by_row, _layout.of((k, n), (0,), (1,))
    )


def matrices(packed: BlockSparseArray) -> Float[Array, "... K N"]:
    """The matrices, with zeros where no block is."""
    scatter = _vectorized(packed.values.ndim - 3, _scatter, packed.grid)
    values = scatter(packed.values, packed.rows, packed.columns)
    rows, cols = packed.block
    batch, (k_blocks, n_blocks) = values.shape[:-3], packed.grid
    # [..., N blocks, K blocks, rows, cols] -> [..., K, N]
    values = values.reshape(*batch, n_blocks, k_blocks, rows, cols)
    matrix = jnp.moveaxis(values, -4, -2)
    matrix = matrix.reshape(*batch, k_blocks * rows, n_blocks * cols)
    k, n = packed.layout.matrix
    return matrix[..., :k, :n]


def _blocks(matrix: Array, size: tuple[int, int]) -> Array:
    """`[..., blocks, rows, cols]`, column by column."""
    *batch, k, n = matrix.shape
    rows, cols = size
    pads = [(0, 0)] * len(batch) + [(0, -k % rows), (0, -n % cols)]
    matrix = jnp.pad(matrix, pads)
    split = matrix.reshape(*batch, -(-k // rows), rows, -(-n // cols), cols)
    # [..., K blocks, rows, N blocks, cols] -> [..., N blocks, K blocks, rows, cols]
    split = jnp.moveaxis(split, -2, -4)
    return split.reshape(*batch, -1, rows, cols)


def _gather(grid, capacity, values, kept):
    k_blocks, n_blocks = grid
    places = jnp.nonzero(kept, size=capacity, fill_value=kept.size)[0]
    places = places.astype(jnp.int32)
    taken = places < kept.size
    columns = jnp.where(taken, places // k_blocks, n_blocks)
    rows = jnp.where(taken, places % k_blocks, k_blocks)
    chosen = values.at[places].get(mode="fill", fill_value=0)
    # More blocks than there is room for must not go unnoticed, and jit cannot raise.
    lost = kept.sum() > capacity
    chosen = jnp.where(lost, jnp.full_like(chosen, jnp.nan), chosen)
    index = jnp.zeros(kept.size, jnp.int32)
    index = index.at[places].set(jnp.arange(capacity, dtype=jnp.int32), mode="drop")
    row_major = kept.reshape(n_blocks, k_blocks).T.ravel()
    index = index.reshape(n_blocks, k_blocks).T.ravel()
    found = jnp.nonzero(row_major, size=capacity, fill_value=kept.size)[0]
    unused = jnp.arange(capacity, dtype=jnp.int32)
    by_row = jnp.where(found < kept.size, index.at[found].get(mode="clip"), unused)
    return chosen, rows, columns, by_row


def _scatter(grid, values, rows, columns):
    k_blocks, n_blocks = grid
    places = jnp.where(rows < k_blocks, columns * k_blocks + rows, k_blocks * n_blocks)
    empty = jnp.zeros((k_blocks * n_blocks, *values.shape[1:]), values.dtype)
    return empty.at[places].set(values, mode="drop")


def _vectorized(axes: int, f, *static):
    """`f` over leading axes."""

    def g(*arrays):
        return f(*static, *arrays)

    for _ in range(axes):
        g = jax.vmap(g)
    return g
