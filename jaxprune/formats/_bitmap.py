"""Matrices of any pattern: a bit for each weight, and the values of those that are kept.

The tiles within tiles follow SpInfer (Fan et al., EuroSys 2025), in other sizes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped, UInt32

from jaxprune.formats import _layout

WORD = 32  # weights of a column whose bits are one word
TILE = 128  # columns of words that share a start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitmapArray:
    """A matrix `[..., K, N]` as one bit a weight, and the values that are kept.

    Values stand in the order of the words of `bits`, row by row, and within a word from
    the lowest bit up; values that are not taken stand at the end, and are 0. The value of
    a weight is found from its own tile of 32 x 128 weights: the tile's start, plus the
    bits of earlier columns, plus the lower bits of its word. There is one capacity for
    the matrix, so that no tile is padded, and another mask that keeps no more weights is
    the same program. Leading axes (experts, layers of a scan) are leading axes of every
    field, and parts of a matrix that is sharded come after them (`Layout.parts`).

    Attributes:
      bits: bit `j` of word `[i, n]` is the weight in row `32 i + j` and column `n`.
      values: the kept weights, of any floating type or integers.
      starts: how many values stand before each tile.
      layout: how the matrix came out of the leaf it was packed from.

    References:
      Fan et al., SpInfer: Leveraging Low-Level Sparsity for Efficient Large Language Model
      Inference on GPUs, EuroSys 2025, section 4.2.
    """

    bits: UInt32[Array, "... words N"]
    values: Shaped[Array, "... capacity"]
    starts: Int32[Array, "... words tiles"]
    layout: _layout.Layout = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Weights that there is room for, in each part of a matrix that is divided."""
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf that `unpack` gives."""
        return (*self.layout.stack(self.values.shape[:-1]), *self.layout.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, those of bits and starts among them."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def kept(mask: Bool[Array, "... K N"]) -> Int32[Array, "..."]:
    """How many weights a matrix keeps."""
    return mask.sum((-2, -1), dtype=jnp.int32)


def pack_matrices(
    w: Shaped[Array, "... K N"], mask: Bool[Array, "... K N"], capacity: int
) -> BitmapArray:
    """The weights of `w` that `mask` keeps."""
    bits, values, starts = _fields(w, mask, capacity)
    return BitmapArray(bits, values, starts, _layout.of(w.shape[-2:], (0,), (1,)))


def _fields(w: Array, mask: Array, capacity: int) -> tuple[Array, Array, Array]:
    kept = _by_word(mask)
    bits = (kept.astype(jnp.uint32) << _places_in_word()[:, 0]).sum(-1, jnp.uint32)
    counts = _by_tile(lax.population_count(bits).astype(jnp.int32)).sum(-1)
    # [..., words, tiles]
    total = counts.reshape(*w.shape[:-2], -1)
    starts = (jnp.cumsum(total, -1, jnp.int32) - total).reshape(counts.shape)

    def gather(w, kept):
        found = jnp.nonzero(kept, size=capacity, fill_value=kept.size)[0]
        values = w.at[found].get(mode="fill", fill_value=0)
        # More weights than there is room for must not go unnoticed, and jit cannot raise.
        return jnp.where(kept.sum() > capacity, _alarm(w.dtype), values)

    flat = (x.reshape(*w.shape[:-2], -1) for x in (_by_word(w), kept))
    return bits, jnp.vectorize(gather, signature="(m),(m)->(c)")(*flat), starts


def matrices(packed: BitmapArray) -> Shaped[Array, "... K N"]:
    """The matrices, with zeros where nothing is kept."""
    kept, index = places(packed.bits, packed.starts)
    take = jnp.vectorize(
        lambda values, index: values.at[index].get(mode="clip"),
        signature="(c),(k,n)->(k,n)",
    )
    matrix = jnp.where(kept, take(packed.values, index), jnp.zeros((), packed.dtype))
    return matrix[..., : packed.layout.matrix[0], :]


def places(
    bits: UInt32[Array, "... words N"], starts: Int32[Array, "... words tiles"]
) -> tuple[Bool[Array, "... rows N"], Int32[Array, "... rows N"]]:
    """Which weights are kept, and the index of each among the values.

    Any rows of words can be asked for by themselves. The index of a weight that is not
    kept is that of the next one.
    """
    *batch, words, n = bits.shape
    counts = _by_tile(lax.population_count(bits).astype(jnp.int32))
    before = jnp.cumsum(counts, -1) - counts + starts[..., None]
    before = before.reshape(*batch, words, -1)[..., None, :n]
    word, place = bits[..., None, :], _places_in_word()  # [..., words, 1, N], [32, 1]
    kept = (word >> place) & 1 != 0
    lower = lax.population_count(word & ((jnp.uint32(1) << place) - 1))
    index = before + lower.astype(jnp.int32)
    return kept.reshape(*batch, -1, n), index.reshape(*batch, -1, n)


def _by_word(matrix: Array) -> Array:
    """`[..., words, N, 32]`, with rows of zeros at the end."""
    *batch, k, n = matrix.shape
    pads = [(0, 0)] * len(batch) + [(0, -k % WORD), (0, 0)]
    return jnp.moveaxis(jnp.pad(matrix, pads).reshape(*batch, -1, WORD, n), -2, -1)


def _by_tile(words: Array) -> Array:
    """`[..., words, tiles, 128]`, with columns of zeros at the end."""
    *batch, n = words.shape
    pads = [(0, 0)] * len(batch) + [(0, -n % TILE)]
    return jnp.pad(words, pads).reshape(*batch, -1, TILE)


def _places_in_word() -> UInt32[Array, "32 1"]:
    return jnp.arange(WORD, dtype=jnp.uint32)[:, None]


def _alarm(dtype) -> Array:
    """NaN, or what an integer has in its place."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(jnp.iinfo(dtype).min, dtype)
    return jnp.asarray(jnp.nan, dtype)
