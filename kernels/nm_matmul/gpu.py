"""N:M products on Hopper GPUs, with Mosaic: decoded in registers, from where wgmma reads.

The matrix is the left operand, so that y is computed transposed: of 16 rows of values, each
thread loads pairs that stand on top of each other, which are the words that the codes are
for, and which after decoding are pairs along K, as wgmma wants them. x has few rows, and
comes in the order in which planes are decoded.

Two warpgroups share out the planes of a tile of 64 columns. Each of them copies its values
into a ring of buffers. Thread blocks share out the columns, and where these are too few for
the GPU, the tiles of K; XLA adds up what they find.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxprune.kernels import _calls, _hopper
from jaxtyping import Array, Float

from jaxprune.formats import NMArray

FEW = 64  # rows of x in a call of the kernel
_COLS = 64  # of W, in a tile
_ROWS = 16  # of values, in a plane
_SHARED = 112 << 10  # bytes of buffers, so that two thread blocks fit
_WARPGROUPS = 2

# A thread has columns 16 w + 2 i and the next one, of rows 2 j, 2 j + 1, and 8 more each:
# as lane 4 i + j of warp w.
VALUES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (8, 16), (2, 2))),
    warp_dims=(-5,),
    lane_dims=(-3, -4),
    vector_dim=-1,
)
# The same, of the words that two rows make: row j, and 4 more.
WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 64), (16,), (2,))),
    warp_dims=(-3,),
    lane_dims=(-2, -4),
    vector_dim=-1,
)


class _Chunk(NamedTuple):
    """Planes of a tile that are copied together: the first one, and how many."""

    first: int
    planes: int


class _Share(NamedTuple):
    """What a warpgroup has of each tile: chunks, and code words from the first on."""

    chunks: tuple[_Chunk, ...]
    first: int
    words: int


def matmul(
    x: Float[Array, "M K"], packed: NMArray, *, interpret=False
) -> Float[Array, "M N"]:
    """`x @ W`, in float32.

    Args:
      x: of the type of the values, at most `FEW` rows.
      packed: a matrix of bfloat16 or float16, coded in words.
      interpret: see `plgpu.kernel`.
    """
    tiles, (m, cols) = packed.tiles, (x.shape[0], packed.codes.shape[-1])
    width = -(-max(m, 1) // 8) * 8
    flipped = bool(interpret)  # the interpreter has no transposed operands
    at_once = max(1, 128 // tiles.rows)
    depth = at_once * tiles.rows  # of a chunk, along K
    # Chunks of fewer planes read on.
    x = jnp.pad(_by_plane(x, packed, width), ((0, 0), (0, depth)))
    x = x.T if flipped else x
    codes = packed.codes
    if cols % _COLS:  # a copy does not reach over the edge
        codes = jnp.pad(codes, ((0, 0), (0, -cols % _COLS)))
    column_tiles = codes.shape[1] // _COLS
    splits = min(tiles.number, -(-2 * _hopper.processors() // column_tiles))
    width_of_tile = _whole(tiles.planes * tiles.rows)
    shares = _shares(tiles, at_once)
    words = max(share.words for share in shares) * 8
    stages = max(len(share.chunks) for share in shares)
    fixed = (_WARPGROUPS * 2 * words + width) * _COLS * 4
    of_stage = _WARPGROUPS * (at_once * _ROWS * _COLS + depth * width) * 2
    while stages > 2 and fixed + stages * of_stage > _SHARED:
        stages -= 1

    def body(codes, values, x, y, ws, xs, cs, ys, operand, full, coded, done):
        column, split = lax.axis_index("column"), lax.axis_index("split")
        begin, end = (s * tiles.number // splits for s in (split, split + 1))
        warpgroup = lax.axis_index("warpgroup")

        def share(own: int):
            chunks, first_word, count = shares[own]

            def copy(t, chunk: _Chunk, step):
                slot = own * stages + lax.rem(step, stages)
                plane = t * tiles.planes + chunk.first
                lanes = pl.ds(lax.rem(column, 2) * _COLS, _COLS)
                rows = pl.ds(plane * _ROWS, chunk.planes * _ROWS)
                from_w = values.at[column // 2, rows, lanes]
                to_w = ws.at[slot, pl.ds(0, chunk.planes * _ROWS)]
                start = t * width_of_tile + chunk.first * tiles.rows
                start = pl.multiple_of(start, 64)
                from_x = x.at[_along(start, depth, flipped)]
                plgpu.copy_gmem_to_smem(from_w, to_w, full.at[slot])
                plgpu.copy_gmem_to_smem(from_x, xs.at[slot], full.at[slot])

            def copy_codes(t):
                slot = own * 2 + lax.rem(t - begin, 2)
                rows = pl.ds((t * tiles.words + first_word) * 8, count * 8)
                from_codes = codes.at[rows, pl.ds(column * _COLS, _COLS)]
                to_codes = cs.at[slot, pl.ds(0, count * 8)]
                plgpu.copy_gmem_to_smem(from_codes, to_codes, coded.at[slot])

            def copy_later(t, place: int, step):
                """The chunk `place` places after the first one of tile t, if it is there."""
                later, place = divmod(place, len(chunks))

                @pl.when(t + later < end)
                def _():
                    copy(t + later, chunks[place], step)

            def scope(total):
                copy_codes(begin)
                for ahead in range(stages):
                    copy_later(begin, ahead, ahead)

                def tile(t, _):
                    @pl.when(t + 1 < end)
                    def _():
                        copy_codes(t + 1)

                    code = own * 2 + lax.rem(t - begin, 2)
                    plgpu.barrier_wait(coded.at[code])
                    for place, chunk in enumerate(chunks):
                        step = (t - begin) * len(chunks) + place
                        slot = own * stages + lax.rem(step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        _multiply(
                            total, chunk, tiles, ws.at[slot], xs.at[slot], cs.at[code],
                            first_word, operand.at[own] if interpret else None,
                        )  # fmt: skip
                        plgpu.commit_smem()  # all threads have read it
                        copy_later(t, place + stages, step + stages)

                lax.fori_loop(begin, end, tile, None)
                return total[...]

            shape = _COLS, width
            accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
            return pl.run_scoped(scope, accumulator)

        @pl.when(warpgroup == 1)
        def _():
            if shares[1].chunks:
                ys[...] = share(1)
                plgpu.barrier_arrive(done)

        @pl.when(warpgroup == 0)
        def _():
            total = share(0)
            if shares[1].chunks:
                plgpu.barrier_wait(done)
                total += ys[...]
            ys[...] = total
            plgpu.commit_smem()
            to_y = y.at[split, pl.ds(column * _COLS, _COLS)]
            plgpu.copy_smem_to_gmem(ys, to_y)
            plgpu.wait_smem_to_gmem(0)

    slots, dtype = _WARPGROUPS * stages, x.dtype
    body.__name__ = f"nm_matmul_{packed.n}_{packed.m}"
    found = plgpu.kernel(
        body,
        out_type=_calls.struct((splits, codes.shape[1], width), jnp.float32, x),
        grid=(column_tiles, splits),
        grid_names=("column", "split"),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            _shared((slots, at_once * _ROWS, _COLS), dtype),
            plgpu.SMEM((slots, depth, width), dtype)
            if flipped
            else _shared((slots, width, depth), dtype),
            plgpu.SMEM((_WARPGROUPS * 2, words, _COLS), jnp.int32),
            plgpu.SMEM((_COLS, width), jnp.float32),
            # The interpreter multiplies only what stands in shared memory.
            plgpu.SMEM((_WARPGROUPS, _COLS, max(64, tiles.rows)), dtype)
            if interpret
            else None,
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_barriers=_WARPGROUPS * 2),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret or None,
    )(codes, packed.values, x)
    # Rows of the left operand are columns 16 w + 2 i + h in the order of w, h, i.
    y = jnp.sum(found, 0).reshape(-1, 2, 8, width).swapaxes(1, 2)
    return y.reshape(-1, width)[:cols, :m].T


def _shares(tiles, at_once: int) -> list[_Share]:
    """Of both warpgroups, in whole products of 64 along K as far as possible."""
    unit = max(1, 64 // tiles.rows)
    half = min(tiles.planes, -(-tiles.planes // (2 * unit)) * unit)
    shares = []
    for begin, end in ((0, half), (half, tiles.planes)):
        planes = range(begin, end)
        words = [tiles.half(p, i)[0] for p in planes for i in range(tiles.halvings)]
        words += [tiles.turn(p)[0] for p in planes if tiles.turns]
        chunks = (_Chunk(p, min(at_once, end - p)) for p in planes[::at_once])
        first = min(words, default=0)
        shares.append(_Share(tuple(chunks), first, max(words, default=-1) + 1 - first))
    return shares


def _whole(size: int) -> int:
    """A multiple of what a row of shared memory holds."""
    return -(-size // 64) * 64


def _along(first, size: int, flipped: bool) -> tuple:
    """A stretch of K in x."""
    return (pl.ds(first, size),) if flipped else (slice(None), pl.ds(first, size))


def _by_plane(x: Array, packed: NMArray, width: int) -> Float[Array, "width K"]:
    """Columns of x in the order in which planes are decoded, and 0 where W is padded."""
    tiles, n, m, stride = packed.tiles, packed.n, packed.m, packed.stride
    rows, k = x.shape
    x = jnp.pad(x, ((0, width - rows), (0, -k % (m * stride))))
    x = jnp.swapaxes(x.reshape(width, -1, m, stride), 2, 3).reshape(width, -1)
    x = jnp.pad(x, ((0, 0), (0, tiles.groups * m - x.shape[1])))
    # Words of values become words of rows, of two rows each.
    split = (-1, 8, 2, 2) if n == 2 else (-1, 8, 2, m)
    order = (0, 1, 3, 2, 4) if n == 2 else (0, 1, 4, 2, 3)
    x = x.reshape(width, *split).transpose(order).reshape(width, tiles.number, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 64)))
    return x.reshape(width, -1)


def _multiply(total, chunk: _Chunk, tiles, values, x, codes, first_word, operand):
    """Adds the products with planes of a chunk, so many of them that K is 64 or more."""
    unit, interpret = max(1, 64 // tiles.rows), operand is not None

    def loaded(ref, row, rows, layout):
        part = ref[pl.ds(row, rows)]
        return part if interpret else plgpu.layout_cast(part, layout)

    @functools.cache
    def code(word):
        return loaded(codes, 8 * (word - first_word), 8, WORDS)

    for first in range(0, chunk.planes, unit):
        planes = range(first, min(first + unit, chunk.planes))
        words = []
        for plane in planes:
            pairs = loaded(values, plane * _ROWS, _ROWS, VALUES)
            pairs = _interpreted_words(pairs) if interpret else _as_words(pairs)
            words += _decoded(pairs, code, chunk.first + plane, tiles)
        start, depth = planes.start * tiles.rows, _whole(len(planes) * tiles.rows)
        words += [jnp.zeros_like(words[0])] * (depth // 16 - len(words))
        if interpret:
            part = operand.at[:, pl.ds(0, depth)]
            part[...] = _interpreted_operand(words, values.dtype)
            plgpu.wgmma(total, part, x.at[_along(start, depth, True)])
        else:
            right = x.at[_along(start, depth, False)].transpose((1, 0))
            plgpu.wgmma(total, _as_operand(words, values.dtype), right)
        plgpu.wgmma_wait(0)


def _decoded(pairs: Array, code: Callable, plane: int, tiles) -> list[Array]:
    """The words of all rows of a plane, `[8, 64]` each, of two rows of W."""
    words = [pairs]
    for i in range(tiles.halvings):
        word, bit = tiles.half(plane, i)
        # One multiplication fills every half whose bit is set with ones.
        mask = (_shifted(code(word), bit) & 0x00010001) * 0xFFFF
        ones = [w & mask for w in words]
        zeros = [w ^ one for w, one in zip(words, ones, strict=True)]
        order = (ones, zeros) if tiles.turns else (zeros, ones)
        words = [w for pair in zip(*order, strict=True) for w in pair]
    if tiles.turns:
        word, bit = tiles.turn(plane)
        # By 0 or 16 bits: the halves stay, or change places.
        by = _shifted(code(word), bit - 4) & 16
        back = (32 - by) & 31
        words[1] = (words[1] << by) | lax.shift_right_logical(words[1], back)
    return words


def _shifted(x, by: int):
    """To the right, or to the left."""
    if by < 0:
        return x << -by
    return lax.shift_right_logical(x, jnp.full_like(x, by))


def _as_words(values: Array) -> Array:
    """`[16, 64]` in pairs of columns, as `[8, 64]` words of two rows."""
    rows = values.shape[0] // 2

    @plgpu.inline_mgpu(
        arg_types=(VALUES,),
        return_type=plgpu.ShapeDtypeStruct((rows, _COLS), jnp.int32, layout=WORDS),
    )
    def paired(_, values):
        layout, word = WORDS.to_mgpu(), ir.IntegerType.get_signless(32)
        low_half, high_half, half = (
            arith.constant(word, ir.IntegerAttr.get(word, c))
            for c in (0xFFFF, -0x10000, 16)
        )
        found = []
        for pair in values.registers.reshape(-1, 2):
            upper, lower = (_bitcast(p, ir.VectorType.get((1,), word)) for p in pair)
            upper, lower = (vector.extract(p, [], [0]) for p in (upper, lower))
            columns = (
                arith.ori(arith.andi(upper, low_half), arith.shli(lower, half)),
                arith.ori(arith.shrui(upper, half), arith.andi(lower, high_half)),
            )
            found.append(
                vector.from_elements(ir.VectorType.get((2,), word), list(columns))
            )
        return _fragments(found, layout, (rows, _COLS), is_signed=True)

    return cast(Callable, paired)(values)


def _as_operand(words: list[Array], dtype) -> Array:
    """Words of rows, `[8, 64]` each, as the left operand of wgmma, `[64, 16 * words]`.

    Its rows are columns 16 w + 2 i + h of W in the order of w, h, i.
    """
    cols = 16 * len(words)
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * len(words),
        return_type=plgpu.ShapeDtypeStruct((_COLS, cols), dtype, layout=layout),
    )
    def placed(_, *words):
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        found = []
        for register in (r for w in words for r in w.registers.flat):
            for column in range(2):
                one = vector.extract(register, [], [column])
                found.append(_bitcast(vector.from_elements(word, [one]), pair))
        return _fragments(found, layout.to_mgpu(), (_COLS, cols), is_signed=None)

    return cast(Callable, placed)(*words)


def _bitcast(x, kind):
    return vector.bitcast(kind, x)


def _fragments(registers, layout, shape, is_signed):
    placed = np.empty(len(registers), object)
    placed[:] = registers
    return mgpu.FragmentedArray(
        _registers=placed.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=is_signed,
    )


def _interpreted_words(values: Array) -> Array:
    """As `_as_words`."""
    halves = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
    halves = halves.reshape(-1, 2, _COLS)
    return lax.bitcast_convert_type(halves[:, 0] | halves[:, 1] << 16, jnp.int32)


def _interpreted_operand(words: list[Array], dtype) -> Array:
    """As `_as_operand`."""
    stacked = jnp.stack([jnp.stack([w & 0xFFFF, w >> 16 & 0xFFFF], -1) for w in words])
    # [words, 8, 64, 2] to columns of rows of rows.
    stacked = stacked.reshape(-1, 8, 4, 8, 2, 2).transpose(2, 4, 3, 0, 1, 5)
    halves = stacked.reshape(_COLS, -1).astype(jnp.uint16)
    return lax.bitcast_convert_type(halves, dtype)


def _shared(shape, dtype):
    """Shared memory in the order that the tensor cores read and copies write."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
