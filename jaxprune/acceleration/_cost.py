"""How much faster a product is without the blocks that are pruned: a model, not a timing."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.acceleration._report import Choice, Report
from jaxprune.structures import Block

BLOCKS = (256, 128, 64, 32)  # that a mask is looked through for
WORTH = 1.1  # speedup from which a leaf is packed


class _Device(NamedTuple):
    """What limits a product.

    Attributes:
      flops: a second in bfloat16, at most.
      bandwidth: bytes a second.
      least: the smallest block that there is a kernel for.
      share: of the peak that products reach with blocks of an extent, and dense ones (0).
    """

    flops: float
    bandwidth: float
    least: int
    share: Mapping[int, float]


# Shares on TPU are rounded down from the bundles that the compiler schedules at 512 rows
# (tests/kernels/tpu_bundles.json), for groups that are not full; those on GPU are guesses.
# Neither has been timed.
_OLD = {0: 0.86, 128: 0.80, 256: 0.85, 512: 0.86}
_NEW = {0: 0.97, 128: 0.50, 256: 0.86, 512: 0.97}
_GPU = {0: 0.7, 64: 0.25, 128: 0.5, 256: 0.6}
_DEVICES = {
    "v4": _Device(275e12, 1.2e12, 128, _OLD),
    "v5e": _Device(197e12, 0.82e12, 128, _OLD),
    "v5p": _Device(459e12, 2.77e12, 128, _OLD),
    "v6e": _Device(918e12, 1.64e12, 128, _NEW),
    "tpu7x": _Device(2307e12, 7.4e12, 128, _NEW),
    "h100": _Device(989e12, 3.35e12, 64, _GPU),
    "h200": _Device(989e12, 4.8e12, 64, _GPU),
}
_KINDS = {
    "v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p",
    "v6": "v6e", "7x": "tpu7x", "h200": "h200", "h100": "h100",
}  # fmt: skip


def kind_of(device: str | None) -> str:
    """The device to predict for; by default JAX's own, or a CPU where it is not known."""
    names = ("cpu", *_DEVICES)
    if device is None:
        kind = jax.devices()[0].device_kind.lower()
        return next((v for k, v in _KINDS.items() if k in kind), "cpu")
    if device not in names:
        raise ValueError(f"device: got {device!r}; expected one of {', '.join(names)}.")
    return device


def speedup(
    m: int, k: int, n: int, block: int, density: float, dtype, kind: str
) -> float:
    """Dense time over block-sparse time for `[m, k] @ [k, n]`; 0 where there is no kernel."""
    if kind == "cpu":
        return _speedup_on_cpu(m, k, n, block, density)
    device = _DEVICES[kind]
    size = jnp.dtype(dtype).itemsize
    if block < device.least or (kind.startswith("h") and size == 4):
        return 0.0
    dense = _seconds(device, m, k, n, 1.0, device.share[0], size)
    share = device.share[max(b for b in device.share if b <= block)]
    return dense / _seconds(device, m, k, n, density, share, size)


def _seconds(device, m, k, n, density, share, size):
    work = 2 * m * k * n * density * (size / 2) / (device.flops * share)
    moved = size * (m * k + density * k * n + m * n) / device.bandwidth
    return max(work, moved)


def _speedup_on_cpu(m: int, k: int, n: int, block: int, density: float) -> float:
    """Read off `benchmarks/block_sparse_cpu.py` and `go_no_go.py`, in nanoseconds of a core.

    A weight in a block costs more than one in a dense matrix, the smaller the block the
    more; a call costs something by itself, and so does cutting x and y to stretches.
    """
    weight = 0.17 + 0.033 * m if m <= 32 else 0.25 + 0.0142 * m
    each = next(each for rows, each in _EACH if m <= rows)
    sparse = density * k * n * weight * each[block] + m * (k + n) * 1.0
    return (_CALL + k * n * weight) / (_CALL + sparse)


_CALL = 25e3
# By rows of x at most: a weight's cost in blocks of an extent, over that of a dense one.
_EACH = (
    (4, {256: 0.9, 128: 0.9, 64: 0.9, 32: 0.95}),
    (32, {256: 0.95, 128: 0.95, 64: 1.0, 32: 1.25}),
    (63, {256: 1.2, 128: 1.2, 64: 1.5, 32: 3.0}),
    (math.inf, {256: 1.3, 128: 1.4, 64: 2.1, 32: 3.0}),
)


def predict(
    shapes: Sequence[tuple[int, int, int]],
    structure: Block,
    sparsity: float,
    device: str | None = None,
    *,
    dtype=jnp.bfloat16,
) -> Report:
    """What would pay, before anything is pruned.

    Args:
      shapes: of products, each `(rows of x, K, N)`.
      structure: square blocks, `Block(128, 128)`.
      sparsity: share of blocks that would be pruned.
      device: `"cpu"`, `"v4"`, `"v5e"`, `"v5p"`, `"v6e"`, `"tpu7x"`, `"h100"`, `"h200"`;
        by default JAX's own. Nothing but the CPU has been timed.
      dtype: of the weights.

    Raises:
      ValueError: if the device is not known, or the sparsity not in [0, 1).
      TypeError: if the structure is not a square block.

    Example:
      >>> report = jp.predict([(2048, 4096, 4096)], jp.Block(128, 128), 0.9, "v5e")
      >>> report.choices[0].go
      True
    """
    if not isinstance(structure, Block) or structure.rows != structure.cols:
        raise TypeError(
            f"structure: got {structure!r}; expected a square block, as "
            "jaxprune.Block(128, 128): others are not predicted."
        )
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity: got {sparsity}; expected a share in [0, 1), such as 0.9."
        )
    kind, size = kind_of(device), structure.rows
    choices = []
    for m, k, n in shapes:
        known = max((b for b in BLOCKS if b <= size), default=0)
        found = speedup(m, k, n, known, 1 - sparsity, dtype, kind) if known else 0.0
        go = found >= WORTH
        dense = k * n * jnp.dtype(dtype).itemsize
        kept = math.ceil((1 - sparsity) * -(-k // size) * -(-n // size))
        nbytes = kept * (size**2 * jnp.dtype(dtype).itemsize + 12) if go else dense
        reason = "" if go else f"not {WORTH} times as fast on {kind}"
        choices.append(
            Choice(
                f"{m} x {k} x {n}",
                (k, n),
                m,
                sparsity,
                f"Block({size}, {size})" if go else "dense",
                found,
                False,
                nbytes,
                dense,
                reason,
            )  # fmt: skip
        )
    return Report(tuple(choices))
