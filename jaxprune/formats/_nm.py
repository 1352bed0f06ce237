"""N:M sparse matrices: the N weights kept of every M, and their places in a few bits."""

import dataclasses
import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped, UInt8

from jaxprune.formats import _layout, _nm_words
from jaxprune.structures import NM

Coding: TypeAlias = Literal["bitmap", "places", "words"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMArray:
    """A matrix `[..., K, N]` of which `n` of every `m` weights along K are stored.

    A group of 2:4 takes 3 bits beside its values if these have 16 bits (8.75 bits a weight
    instead of 16), and otherwise 4; a group of `n`:`m` takes `n * ceil(log2(m))` bits or
    `m`, whichever is less. A group that keeps fewer than `n` holds zeros. Leading axes
    (experts, layers of a scan) are leading axes of both fields.

    Attributes:
      values: `n` rows for each group of a column; the last groups may be padding.
      codes: where they stand in their groups.
      layout: how the matrix came out of the leaf it was packed from.
      n: values of a group.
      m: weights of a group.
      stride: distance along K between the weights of a group.
      coding: how `codes` are to be read: a bit for each weight of a group (`"bitmap"`), the
        place of each value (`"places"`), both as bits of bytes; or bits in words, for values of 16 bits in matrices of 256 rows or more that keep 2:4 or 1:2,
        1:4, 1:8, 1:16 (`"words"`, which TPU kernels read).

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """

    values: Shaped[Array, "... kept N"]
    codes: Int[Array, "... codes N"]
    layout: _layout.Layout = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})
    coding: Coding = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf that `unpack` gives."""
        return (*self.values.shape[:-2], *self.layout.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, those of the places among them."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def tiles(self) -> _nm_words.Tiles:
        """How rows are shared out among words, if this is the coding."""
        groups = _groups(self.layout.matrix[0], self.m, self.stride)
        return _nm_words.tiles(self.n, self.m, groups)

    def places(self) -> Int[Array, "... groups n N"]:
        """The place of each value in its group, 0 to `m - 1`."""
        if self.coding == "words":
            return _nm_words.decode(self.codes, self.tiles)
        groups = self.values.shape[-2] // self.n
        if self.coding == "bitmap":
            return _places_of(_bits(self.codes, groups, self.m), self.n)
        bits = _bits(self.codes, groups, self.n * _width(self.m))
        *batch, _, _, cols = bits.shape
        bits = bits.reshape(*batch, groups, self.n, _width(self.m), cols)
        place = jnp.arange(_width(self.m))[:, None]
        return jnp.sum(bits.astype(jnp.int32) << place, -2)

    def dense(self) -> Shaped[Array, "... K N"]:
        """The matrix, with its zeros."""
        return _dense(self)

    def pick(self, matrix: Shaped[Array, "... K N"]) -> Shaped[Array, "... kept N"]:
        """What a matrix of this shape has where the values stand."""
        groups = self.values.shape[-2] // self.n
        weights = _grouped(matrix, self.m, self.stride, groups)
        return _pick(weights, self.places()).reshape(self.values.shape)


def pack_nm(w: Shaped[Array, "..."], mask: Bool[Array, "..."], structure: NM) -> NMArray:
    """The weights that `mask` keeps, up to `n` of every `m`."""
    if not any(jnp.issubdtype(w.dtype, t) for t in (jnp.floating, jnp.integer)):
        raise TypeError(
            f"w: its type is {w.dtype}; expected floating-point numbers or integers."
        )
    layout = _layout.of(w.shape, *structure.matrix_axes("w", w.shape))
    n, m, stride = (int(x) for x in (structure.n, structure.m, structure.stride))
    coding: Coding = "places" if n * _width(m) < m else "bitmap"
    if _nm_words.fits(n, m, w.dtype.itemsize, layout.matrix[0]):
        coding = "words"
    w, mask = layout.to_matrix(w), layout.to_matrix(mask)
    values, codes, most = _fields(w, mask, n, m, stride, coding)
    if not isinstance(most, jax.core.Tracer) and most > n:
        raise ValueError(
            f"mask: it keeps {most} weights of a group of {m}; expected at most {n}, as "
            f"{structure} says. Make the mask with this structure."
        )
    return NMArray(values, codes, layout, n, m, stride, coding)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _fields(w, mask, n, m, stride, coding):
    """Values, codes, and the most weights that a group keeps."""
    *batch, rows, cols = w.shape
    groups = _groups(rows, m, stride)
    if coding == "words":
        tiles = _nm_words.tiles(n, m, groups)
        groups = tiles.groups
    kept = _grouped(mask, m, stride, groups)
    chosen = _filled(kept, n)
    places = _places_of(chosen, n)
    if coding == "words":
        codes, swap = _nm_words.encode(places, tiles)
        places = jnp.where(swap[..., None, :], jnp.flip(places, -2), places)
    elif coding == "bitmap":
        codes = _bytes(chosen)
    else:
        bits = [(places >> i) & 1 for i in range(_width(m))]
        codes = _bytes(jnp.stack(bits, -2).reshape(*batch, groups, -1, cols))
    weights = _grouped(jnp.where(mask, w, jnp.zeros_like(w)), m, stride, groups)
    values = _pick(weights, places).reshape(*batch, groups * n, cols)
    most = jnp.max(jnp.sum(kept, -2), initial=0)
    if jnp.issubdtype(w.dtype, jnp.floating):
        # More weights than there is room for must not go unnoticed, and jit cannot raise.
        values = jnp.where(most > n, jnp.full_like(values, jnp.nan), values)
    return values, codes, most


@jax.jit
def _dense(packed):
    *batch, rows, cols = packed.values.shape
    n, m, stride, k = packed.n, packed.m, packed.stride, packed.layout.matrix[0]
    values = packed.values.reshape(*batch, rows // n, n, cols)
    weights = _spread(values, packed.places(), m)[..., : _groups(k, m, stride), :, :]
    weights = weights.reshape(*batch, -1, stride, m, cols)
    matrix = jnp.swapaxes(weights, -2, -3).reshape(*batch, -1, cols)
    return matrix[..., :k, :]


def _groups(rows: int, m: int, stride: int) -> int:
    """Groups in a column of so many rows, the last ones padded."""
    return -(-rows // (m * stride)) * stride


def _grouped(x: Array, m: int, stride: int, groups: int) -> Shaped[Array, "... m N"]:
    """The rows of a matrix by groups, and zeros where there are more groups."""
    *batch, rows, cols = x.shape
    axes = [(0, 0)] * len(batch)
    x = jnp.pad(x, [*axes, (0, -rows % (m * stride)), (0, 0)])
    x = jnp.swapaxes(x.reshape(*batch, -1, m, stride, cols), -2, -3)
    x = x.reshape(*batch, -1, m, cols)
    return jnp.pad(x, [*axes, (0, groups - x.shape[-3]), (0, 0), (0, 0)])


def unpack_nm(packed: NMArray) -> Shaped[Array, "..."]:
    """The leaf, with zeros where nothing is kept."""
    return packed.layout.leaf(packed.dense())


def _width(m: int) -> int:
    """Bits of a place in a group."""
    return (m - 1).bit_length()


def _filled(kept: Bool[Array, "... m N"], n: int) -> Bool[Array, "... m N"]:
    """Exactly `n` of every group: the kept ones, and the first others if these are fewer.

    Of more than `n`, the first.
    """
    before = _counts(kept)
    others = _counts(~kept)
    missing = n - before[..., -1:, :]
    return jnp.where(kept, before <= n, others <= missing)


def _counts(bits: Bool[Array, "... m N"]) -> Int[Array, "... m N"]:
    """How many are set, up to each."""
    return lax.cumsum(bits.astype(jnp.int32), bits.ndim - 2)


def _places_of(bits: Array, n: int) -> Int[Array, "... n N"]:
    """Where the `n` bits stand that are set among `m`, rising."""
    before = _counts(bits)[..., None, :, :]  # [..., 1, m, N]
    ranks = jnp.arange(n)[:, None, None]
    return jnp.sum(before <= ranks, -2, dtype=jnp.int32)


def _pick(weights: Shaped[Array, "... m N"], places: Int[Array, "... n N"]) -> Array:
    """The weights at these places, bit for bit."""
    m = weights.shape[-2]
    hit = places[..., None, :] == jnp.arange(m)[:, None]  # [..., n, m, N]
    return _select(hit, weights[..., None, :, :], -2)


def _spread(values: Shaped[Array, "... n N"], places: Array, m: int) -> Array:
    """The values at these places of `m`, bit for bit, and 0 elsewhere."""
    hit = places[..., None, :, :] == jnp.arange(m)[:, None, None]  # [..., m, n, N]
    return _select(hit, values[..., None, :, :], -2)


def _select(hit: Bool[Array, "..."], x: Array, axis: int) -> Array:
    """The one of `x` along an axis for which `hit` is set, or 0.

    As a sum of integers, of which one is not 0: it keeps every bit, needs no gather, and
    XLA fuses it with what comes before.
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    found = jnp.sum(jnp.where(hit, bits, 0), axis, dtype=bits.dtype)
    return lax.bitcast_convert_type(found, x.dtype)


def _bytes(bits: Array) -> UInt8[Array, "... bytes N"]:
    """The bits `[..., groups, width, N]` of each column, 8 in a byte."""
    *batch, groups, width, cols = bits.shape
    flat = bits.astype(jnp.uint8).reshape(*batch, groups * width, cols)
    flat = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, -(groups * width) % 8), (0, 0)])
    place = jnp.arange(8, dtype=jnp.uint8)[:, None]
    flat = flat.reshape(*batch, -1, 8, cols) << place
    return jnp.sum(flat, -2, dtype=jnp.uint8)


def _bits(codes: Array, groups: int, width: int) -> Array:
    """Undoes `_bytes`."""
    *batch, _, cols = codes.shape
    place = jnp.arange(8, dtype=jnp.uint8)[:, None]
    flat = (codes[..., None, :] >> place) & 1
    flat = flat.reshape(*batch, -1, cols)[..., : groups * width, :]
    return flat.reshape(*batch, groups, width, cols)
