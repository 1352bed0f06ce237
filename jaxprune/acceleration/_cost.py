"""How long a product takes, dense and packed: a model, not a timing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.acceleration._packing import Packed, Packing, layout_of
from jaxprune.acceleration._sites import Site
from jaxprune.formats import BlockSparseArray, NMArray

_FEW = 64  # rows of x up to which there is a kernel for N:M


class _Device(NamedTuple):
    """What limits a product.

    Attributes:
      flops: a second in bfloat16, at most.
      bandwidth: bytes a second.
      least: the smallest block that there is a kernel for.
      share: of the peak that products reach with blocks of an extent, and dense ones (0).
      decoded: weights a second that the kernel for N:M writes out; 0 if there is none.
    """

    flops: float
    bandwidth: float
    least: int
    share: Mapping[int, float]
    decoded: float


# Shares on TPU are rounded down from the bundles that the compiler schedules at 512 rows
# (tests/kernels/tpu_bundles.json), for groups that are not full; those on GPU are guesses.
# Weights decoded are 2**20 a second by the bundles of 2:4 in 1024 columns a step, which are
# the most of any N:M, and the clock that the peak comes to; on v6e and tpu7x, of which the
# units are not known, 1.75 GHz. Neither has been timed.
_OLD = {0: 0.86, 128: 0.80, 256: 0.85, 512: 0.86}
_NEW = {0: 0.97, 128: 0.50, 256: 0.86, 512: 0.97}
_GPU = {0: 0.7, 64: 0.25, 128: 0.5, 256: 0.6}
_DEVICES = {
    "v4": _Device(275e12, 1.2e12, 128, _OLD, 0.60e12),
    "v5e": _Device(197e12, 0.82e12, 128, _OLD, 1.80e12),
    "v5p": _Device(459e12, 2.77e12, 128, _OLD, 2.02e12),
    "v6e": _Device(918e12, 1.64e12, 128, _NEW, 2.18e12),
    "tpu7x": _Device(2307e12, 7.4e12, 128, _NEW, 2.08e12),
    "h100": _Device(989e12, 3.35e12, 64, _GPU, 0.0),
    "h200": _Device(989e12, 4.8e12, 64, _GPU, 0.0),
}
_KINDS = {
    "v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p",
    "v6": "v6e", "7x": "tpu7x", "h200": "h200", "h100": "h100",
}  # fmt: skip


def kind_of(device: str | None) -> str:
    """The device to predict for, by default JAX's own.

    Raises:
      ValueError: if there is no model for it.
    """
    names = ("cpu", *_DEVICES)
    if device is None:
        found = jax.devices()[0]
        kind = found.device_kind.lower()
        device = next((v for k, v in _KINDS.items() if k in kind), found.platform)
        if device not in names:
            raise ValueError(
                f"device: JAX's is {found.device_kind!r}, of which there is no model; "
                f"expected one of {', '.join(names)}. Name one of them, or have the "
                "products timed by accelerate(..., measure=True)."
            )
    if device not in names:
        raise ValueError(f"device: got {device!r}; expected one of {', '.join(names)}.")
    return device


def predicted(
    leaf: Any, packings: Sequence[Packing], kind: str, site: Site
) -> list[tuple[float, str]]:
    """Seconds of a product with a leaf, dense and packed; and why they are not known."""
    k, n = layout_of(leaf.shape, site.axes).matrix
    found = [(dense_seconds(site.rows, k, n, site.dtype, kind), "")]
    for packing in packings:
        shapes, transpose = packing.shapes(leaf), packing.axes != site.axes
        found.append(
            packed_seconds(site.rows, shapes, site.dtype, kind, transpose=transpose)
        )
    return found


def dense_seconds(m: int, k: int, n: int, dtype, kind: str) -> float:
    """Of `[m, k] @ [k, n]`."""
    if kind == "cpu":
        return (_CALL + k * n * _weight(m)) * 1e-9
    device, size = _DEVICES[kind], jnp.dtype(dtype).itemsize
    return max(
        _working(device, m, k, n, device.share[0], size),
        size * (m * k + k * n + m * n) / device.bandwidth,
    )


def packed_seconds(
    m: int, packed: Packed, dtype, kind: str, *, transpose: bool
) -> tuple[float, str]:
    """Of the product with a packed matrix, or its transpose; and why it is not known.

    Args:
      m: rows of x.
      packed: a matrix or a stack of equal ones, of which one is meant.
      dtype: of the product.
      kind: of the device.
      transpose: whether it is contracted over what it produces otherwise.
    """
    if kind == "cpu":
        return _seconds_on_cpu(m, packed, transpose), ""
    device, size = _DEVICES[kind], jnp.dtype(dtype).itemsize
    k, n = packed.layout.matrix
    if isinstance(packed, BlockSparseArray):
        block = min(packed.block)
        if block < device.least:
            return math.nan, f"no kernel on {kind} for blocks of {block}"
        if kind.startswith("h") and size != 2:
            return math.nan, f"no kernel on {kind} for {jnp.dtype(dtype)}"
        density = packed.capacity / math.prod(packed.grid)
        share = device.share[max(b for b in device.share if b <= block)]
        work = _working(device, m, k, n, share, size) * density
        # On TPU the blocks are brought to the order of their rows first.
        reads = 3 if transpose and not kind.startswith("h") else 1
        moved = size * (m * k + reads * density * k * n + m * n) / device.bandwidth
        return max(work, moved), ""
    if not isinstance(packed, NMArray):
        return math.nan, f"no kernel on {kind} for bitmaps, and the time is not known"
    stack = math.prod(packed.shape[: -len(packed.layout.shape)])
    held = packed.nbytes / stack
    if _decodes(device, m, packed, dtype) and not transpose:
        work = _working(device, m, k, n, device.share[0], size)
        moved = (held + size * m * (k + n)) / device.bandwidth
        return max(work, moved, k * n / device.decoded), ""
    written = (held + size * k * n) / device.bandwidth
    return written + dense_seconds(m, k, n, dtype, kind), ""


def _decodes(device: _Device, m: int, packed: NMArray, dtype) -> bool:
    """Whether there is a kernel that writes nothing out to memory."""
    both = packed.dtype == dtype == jnp.bfloat16
    return both and m <= _FEW and packed.coding == "words" and device.decoded > 0


def _working(device, m, k, n, share, size) -> float:
    return 2 * m * k * n * (size / 2) / (device.flops * share)


def _seconds_on_cpu(m: int, packed: Packed, transpose: bool) -> float:
    """Read off `benchmarks/block_sparse_cpu.py` and `go_no_go.py`, in float32 on a core.

    A weight in a block costs more than one in a dense matrix, the smaller the block the
    more; a call costs something by itself, and so does cutting x and y to stretches. For
    few rows of x, blocks are brought to the order of their rows before the transpose.
    N:M and bitmaps are written out before they are multiplied.
    """
    k, n = packed.layout.matrix
    if isinstance(packed, BlockSparseArray):
        each = next(each for rows, each in _EACH if m <= rows)[packed.block[0]]
        kept = packed.capacity / math.prod(packed.grid) * k * n
        moved = kept * 0.5 if transpose and m <= 63 else 0.0
        return (_CALL + kept * _weight(m) * each + moved + m * (k + n) * 1.0) * 1e-9
    coding = packed.coding if isinstance(packed, NMArray) else "any"
    written = _WRITTEN[coding][k * n > 1 << 20]
    return (_CALL + k * n * (_weight(m) + written)) * 1e-9


def _weight(m: int) -> float:
    """Nanoseconds for a weight."""
    return 0.17 + 0.033 * m if m <= 32 else 0.25 + 0.0142 * m


_CALL = 25e3
# Nanoseconds to write out a weight of N:M, by its coding, or of a bitmap; and in matrices of
# more than 2**20 weights, which leave the cache.
_WRITTEN = {
    "places": (0.2, 0.8), "bitmap": (1.0, 4.0), "words": (1.2, 4.0), "any": (1.0, 2.0)
}  # fmt: skip
# By rows of x at most: a weight's cost in blocks of an extent, over that of a dense one.
_EACH = (
    (4, {256: 0.9, 128: 0.9, 64: 0.9, 32: 0.95}),
    (32, {256: 0.95, 128: 0.95, 64: 1.0, 32: 1.25}),
    (63, {256: 1.2, 128: 1.2, 64: 1.5, 32: 3.0}),
    (math.inf, {256: 1.3, 128: 1.4, 64: 2.1, 32: 3.0}),
)
