"""Block-sparse products on Hopper GPUs, with Mosaic: a warpgroup loads, others multiply.

As many thread blocks as the GPU has multiprocessors walk over the tiles of the output. One
warpgroup of each copies pieces of x and of the blocks into a ring of buffers, also those of
the next tile; the others multiply and store. What is there to sum up is read from the
pattern, so that another pattern is the same program.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxprune.kernels import _calls
from jaxprune.kernels._hopper import processors as _processors
from jaxtyping import Array, Float, Int32

_STEP = 64  # contracted at a time: what a row of 128 bytes holds in 16 bits
_CACHE = 24 << 20  # bytes of x that the L2 cache keeps beside everything else
_WARPGROUPS = 2  # that multiply, of large tiles
_FEW_REGISTERS = 40  # for one that only loads


class Tile(NamedTuple):
    """Of the output of `matmul`.

    Attributes:
      rows: of x, 64 for each warpgroup, or two or three times that.
      cols: at most 128, a divisor of the extent of a block.
      stages: pieces of x and of blocks that are held in shared memory.
    """

    rows: int
    cols: int
    stages: int = 4

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return min(_WARPGROUPS, self.rows // 64)


def choose_tile(m: int, outputs: int, extent: int) -> Tile:
    """A large tile reads less of x and of the blocks, a small one keeps the GPU busy.

    Args:
      m: rows of x.
      outputs: blocks along the produced axis.
      extent: of a block along it.
    """
    cols = 128 if extent % 128 == 0 else 64
    if m <= 64:
        return Tile(64, 64, 8)
    tiles = -(-m // 256) * outputs * (extent // cols)
    return Tile(256, cols) if m > 128 and tiles >= _processors() else Tile(128, cols, 5)


def matmul(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    order: Int32[Array, " capacity"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    outputs: int,
    *,
    tile: Tile,
    transpose: bool = False,
    interpret=False,
) -> Float[Array, "M N"]:
    """`x` times the matrix of these blocks, or times its transpose.

    Args:
      x: `M` a multiple of `tile.rows`, `K` of the extent of a block that is contracted.
      values: the blocks, of bfloat16 or float16, extents multiples of 64.
      order: their indices in `values`, sorted by `places`.
      inner: place of each along the contracted axis, counted in blocks.
      places: along the produced axis, rising; `outputs` for room that is not taken.
      outputs: blocks along the produced axis.
      tile: see `choose_tile`.
      transpose: contract the columns of the blocks.
      interpret: see `plgpu.kernel`.
    """
    if interpret and transpose:  # the interpreter has no transposed operands
        values, transpose = values.swapaxes(1, 2), False
    m, k = x.shape
    rows, cols = values.shape[1:]
    bk, bn = (cols, rows) if transpose else (rows, cols)
    m_tiles, pieces, chunks = m // tile.rows, bn // tile.cols, bk // _STEP
    tiles = m_tiles * outputs * pieces
    own = tile.rows // tile.warpgroups  # rows of a tile for each warpgroup
    # Tiles that share x are walked over together: so many that x stays in the cache.
    together = max(1, min(m_tiles, _CACHE // (tile.rows * k * x.dtype.itemsize)))
    ctas = min(tiles, _processors())

    def body(column, first, end, order, inner, x, values, y, xs, ws, ys, full, empty):
        def at(i):
            """Of the i-th tile: first row, place among the columns, and piece of it."""
            i = _turn(i, ctas)
            many = together * outputs * pieces
            first = i // many * together
            count = jnp.minimum(together, m_tiles - first)
            i = lax.rem(i, many)
            row = (first + lax.rem(i, count)) * tile.rows
            return row, i // count // pieces, lax.rem(i // count, pieces)

        def producer(i):
            row, rank, piece = at(i)
            begin = first[rank]

            def load(step, slot, free):
                position = begin + step // chunks
                chunk = lax.rem(step, chunks) * _STEP
                block, place = order[position], inner[position]
                parts = pl.ds(chunk, _STEP), pl.ds(piece * tile.cols, tile.cols)
                free()
                from_x = x.at[pl.ds(row, tile.rows), pl.ds(place * bk + chunk, _STEP)]
                from_w = values.at[(block, *(parts[::-1] if transpose else parts))]
                plgpu.copy_gmem_to_smem(from_x, xs.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(from_w, ws.at[slot], full.at[slot])

            return (end[rank] - begin) * chunks, load

        def consumer(i, warpgroup):
            row, rank, piece = at(i)
            steps = (end[rank] - first[rank]) * chunks
            rows = row + warpgroup * own
            cols = column[rank] * bn + piece * tile.cols

            def operands(slot):
                w = ws.at[slot]
                w = w.transpose((1, 0)) if transpose else w
                return xs.at[slot, pl.ds(warpgroup * own, own)], w

            def place():
                return y.at[pl.ds(rows, own), pl.ds(cols, tile.cols)]

            return steps, operands, place, True

        count = _turns(tiles, ctas)
        _walk(tile, (own, tile.cols), count, producer, consumer, ys, full, empty)

    of_w = (tile.cols, _STEP) if transpose else (_STEP, tile.cols)
    kernel = _kernel(
        body,
        _calls.struct((m, outputs * bn), x.dtype, x),
        [
            _shared((tile.stages, tile.rows, _STEP), x.dtype),
            _shared((tile.stages, *of_w), x.dtype),
        ],
        tile,
        copies=2,
        ctas=ctas,
        name="block_sparse_matmul",
        interpret=interpret,
    )
    return kernel(*_columns(places, outputs), order, inner, x, values)


def products(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    outputs: int,
    *,
    block: tuple[int, int],
    stages: int = 4,
    interpret=False,
) -> Float[Array, "capacity rows cols"]:
    """`xᵀ dy`, where there are blocks, and 0 in room that is not taken.

    Two warpgroups take two pieces of the same column, for which `dy` is loaded once.

    Args:
      x: `M` a multiple of 64.
      dy: of the same type, bfloat16 or float16.
      inner: place of each block along K.
      places: along N, rising; `outputs` for room that is not taken.
      outputs: blocks along N.
      block: extents along K and N, multiples of 64.
      stages: pieces of x and dy that are held in shared memory.
      interpret: see `plgpu.kernel`.
    """
    m = x.shape[0]
    flipped = bool(interpret)  # the interpreter has no transposed operands
    x = x.T if flipped else x
    rows, cols = block
    capacity = inner.shape[0]
    tr, tc = (128 if b % 128 == 0 else 64 for b in block)
    row_pieces, col_pieces = rows // tr, cols // tc
    tile = Tile(tr * _WARPGROUPS, tc, stages)
    pairs = _pairs(places, outputs, row_pieces)
    bound = pairs.unit.shape[0] * col_pieces
    # Where there are few blocks, the rows of x are shared out, too.
    splits = max(1, min(_processors() // bound, m // (8 * _STEP)))
    steps = -(-m // _STEP // splits)
    ctas = min(bound * splits, _processors())
    dtype = x.dtype if splits == 1 else jnp.float32

    def body(unit, column, end, number, inner, x, dy, out, xs, ds, ys, full, empty):
        def at(i):
            i = _turn(i, ctas)
            i, split = i // splits, lax.rem(i, splits)
            item, piece = i // col_pieces, lax.rem(i, col_pieces)
            n = jnp.where(
                column[item] < outputs,
                jnp.clip(m // _STEP - split * steps, 0, steps),
                0,
            )
            return unit[item], end[item], column[item], piece, split, n

        def producer(i):
            first, last, column, piece, split, n = at(i)
            units = [jnp.minimum(first + j, last - 1) for j in range(_WARPGROUPS)]
            places = [
                inner[u // row_pieces] * rows + lax.rem(u, row_pieces) * tr
                for u in units
            ]

            def load(step, slot, free):
                free()
                part = pl.ds((split * steps + step) * _STEP, _STEP)
                for j, place in enumerate(places):
                    parts = part, pl.ds(place, tr)
                    from_x = x.at[parts[::-1] if flipped else parts]
                    plgpu.copy_gmem_to_smem(from_x, xs.at[slot, j], full.at[slot])
                from_dy = dy.at[part, pl.ds(column * cols + piece * tc, tc)]
                plgpu.copy_gmem_to_smem(from_dy, ds.at[slot], full.at[slot])

            return n, load

        def consumer(i, warpgroup):
            first, last, _, piece, split, n = at(i)
            mine = first + warpgroup

            def operands(slot):
                xt = xs.at[slot, warpgroup]
                xt = xt if flipped else xt.transpose((1, 0))
                return xt, ds.at[slot]

            def place():
                part = pl.ds(lax.rem(mine, row_pieces) * tr, tr)
                return out.at[split, mine // row_pieces, part, pl.ds(piece * tc, tc)]

            return n, operands, place, mine < last

        count = _turns(number[0] * col_pieces * splits, ctas)
        _walk(tile, (tr, tc), count, producer, consumer, ys, full, empty)

    of_x = (tr, _STEP) if flipped else (_STEP, tr)
    kernel = _kernel(
        body,
        _calls.struct((splits, capacity, rows, cols), dtype, x),
        [
            _shared((stages, _WARPGROUPS, *of_x), x.dtype),
            _shared((stages, _STEP, tc), x.dtype),
        ],
        tile,
        copies=1 + _WARPGROUPS,
        ctas=ctas,
        name="block_sparse_products",
        interpret=interpret,
    )
    found = kernel(*pairs, inner, x, dy)
    return found[0] if splits == 1 else found.sum(0).astype(x.dtype)


def _walk(tile, shape, count, producer, consumer, ys, full, empty):
    """What each warpgroup does with the tiles of this thread block.

    Args:
      tile: of the output.
      shape: of the part of it that a warpgroup sums up.
      count: of tiles.
      producer: gives for the i-th tile the number of steps, and what loads one of them.
      consumer: gives the number of steps, the operands in a slot of the ring, where the
        result goes, and whether it is wanted.
      ys: where results stand before they are copied out, `[warpgroups, 2, ...]`.
      full: barriers of slots that are loaded.
      empty: barriers of slots that have been read.
    """
    warpgroup = lax.axis_index("warpgroup")
    stages = tile.stages

    def slot(step):
        return lax.rem(step, stages)

    @pl.when(warpgroup == tile.warpgroups)
    def _():
        plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")

        def one(i, done):
            steps, load = producer(i)

            def step(s, _):
                at = slot(done + s)
                load(s, at, lambda: plgpu.barrier_wait(empty.at[at]))

            lax.fori_loop(0, steps, step, None)
            return done + steps

        done = lax.fori_loop(0, count, one, jnp.int32(0))
        # No thread may arrive at a barrier when this one has left.
        for s in range(stages):
            plgpu.barrier_wait(empty.at[slot(done + s)])

    @pl.when(warpgroup < tile.warpgroups)
    def _():
        registers = (512 - _FEW_REGISTERS) // tile.warpgroups // 8 * 8
        plgpu.set_max_registers(min(registers, 256), action="increase")
        for s in range(stages):
            plgpu.barrier_arrive(empty.at[s])

        def one(i, done):
            steps, operands, place, wanted = consumer(i, warpgroup)

            def scope(total):
                def step(s, _):
                    at = slot(done + s)
                    plgpu.barrier_wait(full.at[at])
                    plgpu.wgmma(total, *operands(at))
                    plgpu.wgmma_wait(1)  # for the step before, whose slot is free now

                    @pl.when(s > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[slot(done + s - 1)])

                lax.fori_loop(0, steps, step, None)
                return total[...]

            total = pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[slot(done + steps - 1)])

            @pl.when(wanted)
            def _():
                _store(total.astype(ys.dtype), place(), ys.at[warpgroup])

            return done + steps

        lax.fori_loop(0, count, one, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(total, place, ys):
    """Copies what stands in registers to `place`, a piece at a time."""
    _, rows, cols = ys.shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pieces = [
        (r, c)
        for r in range(0, total.shape[0], rows)
        for c in range(0, total.shape[1], cols)
    ]
    for i, (r, c) in enumerate(pieces):
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ys[i % 2] = total[r : r + rows, c : c + cols]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ys.at[i % 2], place.at[pl.ds(r, rows), pl.ds(c, cols)])


def _kernel(body, out, inputs, tile, *, copies, ctas, name, interpret):
    stores = _shared((tile.warpgroups, 2, 64, 128 // out.dtype.itemsize), out.dtype)
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            *inputs,
            stores,
            plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret or None,
    )


def _shared(shape, dtype):
    """Shared memory in the order that the tensor cores read and copies write."""
    row = 128 // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class _Columns(NamedTuple):
    """Columns of blocks, long ones first.

    Attributes:
      column: which one it is.
      first: its first block.
      end: one past its last block, which may be the first one.
    """

    column: Int32[Array, " outputs"]
    first: Int32[Array, " outputs"]
    end: Int32[Array, " outputs"]


def _columns(places, outputs):
    every = jnp.arange(outputs + 1, dtype=jnp.int32)
    # Comparing all with all is one launch, which a search or a sort is not.
    start = jnp.sum(places[:, None] < every, 0, dtype=jnp.int32)
    length, column = start[1:] - start[:-1], every[:-1]
    longer = (length > length[:, None]) | (
        (length == length[:, None]) & (column < column[:, None])
    )
    rank = jnp.sum(longer, 1, dtype=jnp.int32)
    here = rank == column[:, None]  # [rank, column]
    fields = (column, start[:-1], start[1:])
    return _Columns(*(jnp.sum(here * f, 1, dtype=jnp.int32) for f in fields))


class _Pairs(NamedTuple):
    """Pairs of pieces of blocks of the same column; room not taken is a column of its own.

    Attributes:
      unit: the first piece.
      column: of both.
      end: one past the last piece of the column, which may be the first one.
      number: of pairs, `[1]`.
    """

    unit: Int32[Array, " pairs"]
    column: Int32[Array, " pairs"]
    end: Int32[Array, " pairs"]
    number: Int32[Array, " 1"]


def _pairs(places, outputs, pieces):
    """The pieces are counted block by block, `pieces` in each."""
    capacity = places.shape[0]
    every = jnp.arange(outputs + 2, dtype=jnp.int32)
    start = jnp.sum(places[:, None] < every, 0, dtype=jnp.int32) * pieces
    taken = (start[1:] - start[:-1] + 1) // 2
    done = jnp.cumsum(taken, dtype=jnp.int32)
    pair = jnp.arange((capacity * pieces + outputs + 1) // 2, dtype=jnp.int32)
    column = jnp.sum(done <= pair[:, None], 1, dtype=jnp.int32)
    column = jnp.minimum(column, outputs)
    unit = start[column] + 2 * (pair - (done - taken)[column])
    return _Pairs(unit, column, start[column + 1], done[-1:])


def _turn(i, ctas):
    """The i-th tile of this thread block: one of the first, then one of the last."""
    cta = lax.axis_index("cta")
    return i * ctas + jnp.where(lax.rem(i, 2) == 0, cta, ctas - 1 - cta)


def _turns(tiles, ctas):
    """How many of the tiles fall to this thread block."""
    full = jnp.asarray(tiles, jnp.int32) // ctas
    return full + (_turn(full, ctas) < tiles).astype(jnp.int32)
