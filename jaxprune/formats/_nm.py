"""N:M sparse matrices: the N weights kept of every M, and their places in a few bits."""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped, UInt, UInt8

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
    (experts, layers of a scan) are leading axes of both fields, and parts of a matrix that
    is sharded come after them (`Layout.parts`).

    Attributes:
      values: `n` rows for each group of a column; the last groups may be padding. In the
        coding `"words"` they are `[..., N / 128, kept, 128]`, so that a load of a TPU
        brings both rows of 8 words.
      codes: where they stand in their groups.
      layout: how the matrix came out of the leaf it was packed from.
      n: values of a group.
      m: weights of a group.
      stride: distance along K between the weights of a group.
      coding: how `codes` are to be read: a bit for each weight of a group (`"bitmap"`), the
        place of each value (`"places"`), both as bits of bytes; or bits in words, which
        TPU kernels read (`"words"`): for values of 16 bits that keep 2:4, 1:2, 1:4, 1:8 or
        1:16, if K is 256 or more and N fills lanes of 128 but for an eighth of N at most.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """

    values: Shaped[Array, "... kept N"] | Shaped[Array, "... N/128 kept 128"]
    codes: Int[Array, "... codes N"]
    layout: _layout.Layout = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})
    coding: Coding = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf that `unpack` gives."""
        return (*self.layout.stack(self.codes.shape[:-2]), *self.layout.shape)

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
        groups = _groups(self.layout.part[0], self.m, self.stride)
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
        layout = self.layout
        return layout.join(_dense(dataclasses.replace(self, layout=layout.of_part)))

    def pick(self, matrix: Shaped[Array, "... K N"]) -> Shaped[Array, "... kept N"]:
        """What a matrix of this shape has where the values stand."""
        groups = self.values.shape[-2] // self.n
        matrix = self.layout.split(matrix)
        weights = _grouped(_as_bits(matrix), self.m, self.stride, groups)
        values = _pick(weights, self.places())
        values = values.reshape(*self.codes.shape[:-2], groups * self.n, -1)
        if self.coding == "words":
            values = _nm_words.by_lanes(values)
        return lax.bitcast_convert_type(values, matrix.dtype)


def kept(mask: Bool[Array, "... K N"], structure: NM) -> Int[Array, "..."]:
    """The most weights that a group of each matrix keeps."""
    m, stride = structure.m, structure.stride
    groups = _grouped(mask, m, stride, _groups(mask.shape[-2], m, stride))
    return jnp.max(jnp.sum(groups, -2), (-2, -1), initial=0)


def pack_matrices(
    w: Shaped[Array, "... K N"],
    mask: Bool[Array, "... K N"],
    structure: NM,
) -> NMArray:
    """The weights that `mask` keeps."""
    n, m, stride = structure.n, structure.m, structure.stride
    coding: Coding = "places" if n * _width(m) < m else "bitmap"
    k, cols = w.shape[-2:]
    if _nm_words.fits(n, m, w.dtype.itemsize, (k, cols)):
        coding = "words"
    return _pack(w, mask, n, m, stride, coding)


def _packed(w, mask, n, m, stride, coding):
    """The packed matrices; NaN, if a group of one keeps more than `n`."""
    *batch, rows, cols = w.shape
    groups = _groups(rows, m, stride)
    tiles = _nm_words.tiles(n, m, groups) if coding == "words" else None
    if tiles:
        groups = tiles.groups
    kept = _grouped(mask, m, stride, groups)
    chosen = _filled(kept, n)
    places = _places_of(chosen, n)
    if tiles:
        codes, swap = _nm_words.encode(places, tiles)
        places = jnp.where(swap[..., None, :], jnp.flip(places, -2), places)
    elif coding == "bitmap":
        codes = _bytes(chosen)
    else:
        bits = [(places >> i) & 1 for i in range(_width(m))]
        codes = _bytes(jnp.stack(bits, -2).reshape(*batch, groups, -1, cols))
    weights = _grouped(jnp.where(mask, _as_bits(w), 0), m, stride, groups)
    values = _pick(weights, places).reshape(*batch, groups * n, cols)
    if coding == "words":
        values = _nm_words.by_lanes(values)
    if jnp.issubdtype(w.dtype, jnp.floating):
        # More weights than there is room for must not go unnoticed, and jit cannot raise.
        # Of bits and in a branch, since XLA may choose between small floats as float32,
        # which mends NaN.
        nan = _as_bits(jnp.asarray(jnp.nan, w.dtype))
        lost = jnp.max(jnp.sum(kept, -2), (-2, -1), initial=0) > n  # [...]
        over = jnp.expand_dims(lost, range(lost.ndim - values.ndim, 0))
        values = lax.cond(
            lost.any(), lambda x: jnp.where(over, nan, x), lambda x: x, values
        )
    values = lax.bitcast_convert_type(values, w.dtype)
    layout = _layout.of((rows, cols), (0,), (1,))
    return NMArray(values, codes, layout, n, m, stride, coding)


_pack = jax.custom_vjp(_packed, nondiff_argnums=(2, 3, 4, 5))


def _pack_forward(w, mask, *static):
    packed = _pack(w, mask, *static)
    return packed, (packed, mask)


def _pack_backward(n, m, stride, coding, kept, gradient):
    packed, mask = kept
    if not jnp.issubdtype(packed.dtype, jnp.floating):
        return _no_gradient(mask), _no_gradient(mask)
    return _dense(dataclasses.replace(packed, values=gradient.values)), _no_gradient(
        mask
    )


_pack.defvjp(_pack_forward, _pack_backward)


@jax.custom_vjp
@jax.jit
def _dense(packed):
    *batch, _, cols = packed.codes.shape
    n, m, stride, k = packed.n, packed.m, packed.stride, packed.layout.matrix[0]
    values = _as_bits(packed.values)
    if packed.coding == "words":
        values = _nm_words.by_rows(values, cols)
    values = values.reshape(*batch, -1, n, cols)
    weights = _spread(values, packed.places(), m)[..., : _groups(k, m, stride), :, :]
    weights = weights.reshape(*batch, -1, stride, m, cols)
    matrix = jnp.swapaxes(weights, -2, -3).reshape(*batch, -1, cols)
    return lax.bitcast_convert_type(matrix[..., :k, :], packed.dtype)


def _dense_backward(packed, gradient):
    floats = jnp.issubdtype(packed.dtype, jnp.floating)
    values = packed.pick(gradient) if floats else _no_gradient(packed.values)
    codes = _no_gradient(packed.codes)
    return (dataclasses.replace(packed, values=values, codes=codes),)


_dense.defvjp(lambda packed: (_dense(packed), packed), _dense_backward)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


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


def _as_bits(x: Array) -> UInt[Array, "..."]:
    """Floats as integers, since floats are not sure to keep the bits of a NaN."""
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{info(x.dtype).bits}"))


# Both are sums of which one term at most is not 0: that needs no gather or scatter, and XLA
# fuses it with what comes before.
def _pick(bits: UInt[Array, "... m N"], places: Int[Array, "... n N"]) -> Array:
    """The weights at these places."""
    place = jnp.arange(bits.shape[-2])[:, None]
    hit = places[..., None, :] == place  # [..., n, m, N]
    return jnp.sum(jnp.where(hit, bits[..., None, :, :], 0), -2, dtype=bits.dtype)


def _spread(bits: UInt[Array, "... n N"], places: Array, m: int) -> Array:
    """The values at these places of `m`, and 0 elsewhere."""
    hit = places[..., None, :, :] == jnp.arange(m)[:, None, None]  # [..., m, n, N]
    return jnp.sum(jnp.where(hit, bits[..., None, :, :], 0), -2, dtype=bits.dtype)


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
