"""Packed weights and masks as tensors and JSON, and whether what came fits together.

Kernels trust the places that a packed weight holds, and an index that is out of range
would give a wrong weight without a word. So all of them are looked at on the way in.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxprune import formats
from jaxprune.formats import _nm_words, _shards
from jaxprune.masks import PackedMask

KINDS = {
    x.__name__: x
    for x in (
        formats.BitmapArray,
        formats.BlockSparseArray,
        formats.NMArray,
        PackedMask,
    )
}
_TEMPORARY = 1 << 22  # codes that are looked at together


def is_packed(x: Any) -> bool:
    """Whether `x` is a packed weight or mask."""
    return isinstance(x, tuple(KINDS.values()))


def arrays(x: Any) -> dict[str, Any]:
    """The arrays of a packed leaf, by the names of its fields."""
    return {name: getattr(x, name) for name in array_names(type(x))}


def array_names(kind: type) -> list[str]:
    """The fields that hold arrays."""
    return [f.name for f in dataclasses.fields(kind) if not f.metadata.get("static")]


def geometry(x: Any) -> dict[str, Any]:
    """What else there is to a packed leaf, as JSON."""
    static = {
        f.name: getattr(x, f.name)
        for f in dataclasses.fields(x)
        if f.metadata.get("static")
    }
    if "layout" in static:
        static["layout"] = dataclasses.asdict(static["layout"])
    return {"kind": type(x).__name__, **static}


def rebuilt(kind: str, said: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """The packed leaf of these fields.

    Raises:
      ValueError: if the geometry is none, without the name of the leaf.
    """
    static = dict(said)
    if kind == "PackedMask":
        _wanted(static, {"shape", "axis"})
        shape, axis = _ints("shape", static["shape"], 0), static["axis"]
        if axis is not None and (type(axis) is not int or not 0 <= axis < len(shape)):
            raise ValueError(f"axis is {axis}; expected an axis of {list(shape)}")
        return PackedMask(found["bits"], shape, axis)
    nm = {"n", "m", "stride", "coding"} if kind == "NMArray" else set()
    _wanted(static, {"layout", *nm})
    static["layout"] = _layout(static["layout"])
    if nm:
        n, m, _ = _ints("n, m and stride", [static[x] for x in ("n", "m", "stride")], 1)
        if n >= m:
            raise ValueError(f"{n} of every {m} are kept; expected fewer")
        if static["coding"] not in ("bitmap", "places", "words"):
            raise ValueError(
                f"coding is {static['coding']!r}; expected bitmap, places or words"
            )
    return KINDS[kind](**found, **static)


def check(x: Any) -> None:
    """Looks at a packed leaf of NumPy arrays.

    Raises:
      ValueError: if its fields do not fit together, without the name of the leaf.
    """
    if not isinstance(x, PackedMask) and x.layout.parts:
        own = x.codes.shape[:-1] if isinstance(x, formats.NMArray) else x.values.shape
        leading = own[:-3] if isinstance(x, formats.BlockSparseArray) else own[:-1]
        if tuple(leading[-2:]) != x.layout.parts:
            raise ValueError(
                f"arrays have the leading axes {list(leading)}; expected those of "
                f"{list(x.layout.parts)} parts at their end"
            )
        x = _shards.plain(x)
    match x:
        case formats.BitmapArray():
            _check_bitmap(x)
        case formats.BlockSparseArray():
            _check_blocks(x)
        case formats.NMArray():
            _check_nm(x)
        case PackedMask():
            _check_mask(x)


def _check_bitmap(x: formats.BitmapArray) -> None:
    k, n = x.layout.matrix
    batch, words, tiles = x.values.shape[:-1], -(-k // 32), -(-n // 128)
    _is("values", x.values, (*batch, None))
    _is("bits", x.bits, (*batch, words, n), np.uint32)
    _is("starts", x.starts, (*batch, words, tiles), np.int32)
    for at in np.ndindex(batch):
        bits, starts = np.asarray(x.bits[at]), np.asarray(x.starts[at])
        if k % 32 and (bits[-1] >> np.uint32(k % 32)).any():
            raise ValueError(f"bits are set beyond the {k} rows; expected none")
        counts = np.zeros((words, tiles * 128), np.uint8)
        counts[:, :n] = np.bitwise_count(bits)
        counts = counts.reshape(words, tiles, 128).sum(-1, dtype=np.int64)
        ends = np.cumsum(counts).reshape(words, tiles)
        if (starts != ends - counts).any():
            raise ValueError(
                "starts are not what the bits of the tiles before add up to; expected that"
            )
        if (total := int(counts.sum())) > x.capacity:
            raise ValueError(
                f"{total} bits are set, and there are {x.capacity} values; expected one "
                "for each"
            )


def _check_blocks(x: formats.BlockSparseArray) -> None:
    batch, capacity = x.rows.shape[:-1], x.rows.shape[-1] if x.rows.ndim else None
    _is("values", x.values, (*batch, capacity, None, None))
    for name in ("rows", "columns", "by_row"):
        _is(name, getattr(x, name), (*batch, capacity), np.int32)
    if 0 in x.block:
        raise ValueError(f"blocks are {x.block}; expected rows and columns")
    k_blocks, n_blocks = x.grid
    for at in np.ndindex(batch):
        rows, columns, by_row = (
            np.asarray(a[at], np.int64) for a in (x.rows, x.columns, x.by_row)
        )
        taken = int((rows < k_blocks).sum())
        bad = (rows[:taken] < 0) | (columns[:taken] < 0) | (columns[:taken] >= n_blocks)
        bad |= rows[:taken] >= k_blocks
        if bad.any() or (np.diff(columns[:taken] * k_blocks + rows[:taken]) <= 0).any():
            raise ValueError(
                f"the places of blocks do not go column by column through the {k_blocks} x "
                f"{n_blocks} blocks; expected that"
            )
        if (rows[taken:] != k_blocks).any() or (columns[taken:] != n_blocks).any():
            raise ValueError(
                f"places that are not taken are not ({k_blocks}, {n_blocks}), one past the "
                "last; expected that"
            )
        order = np.argsort(rows[:taken] * n_blocks + columns[:taken])
        rest = np.arange(taken, len(rows))
        if (by_row != np.concatenate([order, rest])).any():
            raise ValueError(
                "by_row is not the order of the blocks row by row; expected it"
            )


def _check_nm(x: formats.NMArray) -> None:
    (k, cols), n, m = x.layout.matrix, x.n, x.m
    batch = x.codes.shape[:-2]
    groups = -(-k // (m * x.stride)) * x.stride
    if x.coding == "words":
        if not _nm_words.fits(n, m, 2, (k, cols)):
            raise ValueError(
                f"a {k} x {cols} matrix of {n}:{m} has codes in words; expected other ones"
            )
        tiles, lanes = x.tiles, -(-cols // 128)
        rows = tiles.number * tiles.words * 8
        _is("codes", x.codes, (*batch, rows, cols), np.int32)
        _is("values", x.values, (*batch, lanes, tiles.groups * n, 128))
        return  # any bits are places of a group
    width = m if x.coding == "bitmap" else n * (m - 1).bit_length()
    _is("codes", x.codes, (*batch, -(-groups * width // 8), cols), np.uint8)
    _is("values", x.values, (*batch, groups * n, cols))
    for codes in _stretches(x.codes):
        bits = np.unpackbits(codes, axis=0, bitorder="little")[: groups * width]
        if x.coding == "bitmap":
            counts = bits.reshape(groups, m, -1).sum(1, dtype=np.int32)
            if (counts != n).any():
                raise ValueError(f"a group has not {n} of its {m} bits; expected that")
            continue
        bits = bits.reshape(groups, n, width // n, -1)
        places = sum(
            bits[:, :, i].astype(np.int32) << i for i in range(width // n)
        ) + np.zeros((groups, n, codes.shape[-1]), np.int32)
        if (places >= m).any() or (np.diff(places, axis=1) <= 0).any():
            raise ValueError(
                f"the places of a group are not rising or not below {m}; expected both"
            )


def _check_mask(x: PackedMask) -> None:
    if x.axis is None:
        return _is("bits", x.bits, x.shape, np.bool_)
    axis, length = x.axis, x.shape[x.axis]
    shape = (*x.shape[:axis], -(-length // 8), *x.shape[axis + 1 :])
    _is("bits", x.bits, shape, np.uint8)
    if length % 8:
        last = np.asarray(np.take(x.bits, -1, axis))
        if (last >> np.uint8(length % 8)).any():
            raise ValueError(f"bits are set beyond the length {length}; expected none")


def _stretches(codes: Any) -> Iterator[np.ndarray]:
    """Columns of `[..., bytes, N]`, a few at a time: eight times as much is made of them."""
    if not codes.size:
        return
    step = max(1, _TEMPORARY // 8 // codes.shape[-2])
    for at in np.ndindex(codes.shape[:-2]):
        for start in range(0, codes.shape[-1], step):
            yield np.asarray(codes[at][:, start : start + step])


def _is(name: str, x: Any, shape: tuple[int | None, ...], dtype: Any = None) -> None:
    """Raises unless an array has this shape, where `None` stands for any size."""
    fits = x.ndim == len(shape) and all(
        b in (None, a) for a, b in zip(x.shape, shape, strict=True)
    )
    if not fits or (dtype is not None and x.dtype != dtype):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        kind = np.dtype(dtype).name if dtype is not None else "any type"
        raise ValueError(
            f"{name} is {x.dtype.name}{list(x.shape)}; expected {kind}[{sizes}]"
        )


def _layout(said: Any) -> formats.Layout:
    if not isinstance(said, dict):
        raise ValueError(
            f"layout is {said!r}; expected shape, axes, out_axes and parts"
        )
    _wanted(said, {"shape", "axes", "out_axes", "parts"})
    shape = _ints("layout.shape", said["shape"], 0)
    axes, out_axes = (
        _ints(f"layout.{x}", said[x], -len(shape)) for x in ("axes", "out_axes")
    )
    if sorted((*axes, *out_axes)) != list(range(-len(shape), 0)):
        raise ValueError(
            f"layout has the axes {list(axes)} and {list(out_axes)}; expected each axis of "
            f"{list(shape)} once, counted from the end"
        )
    layout = formats.Layout(shape, axes, out_axes)
    if said["parts"] is None:
        return layout
    parts = _ints("layout.parts", said["parts"], 1)
    if len(parts) != 2 or any(
        n % p for n, p in zip(layout.matrix, parts, strict=False)
    ):
        raise ValueError(
            f"layout.parts is {list(parts)}; expected two numbers that divide the matrix "
            f"{list(layout.matrix)}"
        )
    return dataclasses.replace(layout, parts=(parts[0], parts[1]))


def _ints(name: str, x: Any, least: int) -> tuple[int, ...]:
    if not isinstance(x, list | tuple) or not all(
        type(n) is int and least <= n < 1 << 62 for n in x
    ):
        raise ValueError(f"{name} is {str(x)[:80]}; expected integers from {least} on")
    if math.prod(max(abs(n), 1) for n in x) >= 1 << 62:
        raise ValueError(f"{name} is {str(x)[:80]}; expected fewer weights than 2**62")
    return tuple(x)


def _wanted(said: Mapping[str, Any], names: set[str]) -> None:
    if said.keys() != names:
        raise ValueError(
            f"it has {sorted(said)}; expected {', '.join(sorted(names))} of it"
        )
