"""Which patterns the zeros of a weight have: groups of N:M, and empty blocks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.structures import NM


class Patterns(NamedTuple):
    """What the zeros of a weight look like.

    Attributes:
      sparsity: share of zeros.
      groups: for each axis and size of group that divides it, the N:M that every group
        keeps to, if some weight must be 0 for it; a larger group only if it asks for more
        than the smaller ones.
      empty_blocks: share of the square blocks of each extent that hold nothing but zeros,
        the last ones padded; without extents larger than the matrix.
    """

    sparsity: float
    groups: tuple[NM, ...]
    empty_blocks: dict[int, float]


def patterns(
    w: np.ndarray,
    *,
    groups: Sequence[int] = (2, 4, 8, 16),
    blocks: Sequence[int] = (16, 32, 64, 128, 256),
) -> Patterns:
    """The patterns in the zeros of one weight, read on the host.

    Args:
      w: a matrix, or a stack of them `[..., K, N]`; of other arrays only the sparsity is
        told.
      groups: sizes of the groups that are looked for, along each of the last two axes.
      blocks: extents of the blocks that are looked for.

    Example:
      >>> w = np.ones((32, 32))
      >>> w[:, 16:] = 0
      >>> w[::2] = 0
      >>> found = jp.analysis.patterns(w)
      >>> found.sparsity, found.groups[:1], found.empty_blocks
      (0.75, (NM(n=1, m=2, axis=-2, stride=1),), {16: 0.5, 32: 0.0})
    """
    kept = np.asarray(w) != 0
    sparsity = 1 - float(np.count_nonzero(kept)) / max(kept.size, 1)
    if kept.ndim < 2 or not kept.size or not sparsity:
        return Patterns(sparsity, (), {})
    kept = kept.reshape(-1, *kept.shape[-2:])
    found = [*_groups(kept, -2, groups), *_groups(kept.swapaxes(1, 2), -1, groups)]
    empty = {
        size: _empty(kept, size) for size in blocks if size <= min(kept.shape[-2:])
    }
    return Patterns(sparsity, tuple(found), empty)


def _groups(kept: np.ndarray, axis: int, sizes: Sequence[int]) -> list[NM]:
    """Of groups along the middle axis."""
    number, k, n = kept.shape
    found, least = [], 1.0
    for m in sorted(sizes):
        if k % m:
            continue
        counts = kept.reshape(number, -1, m, n).sum(2, dtype=np.uint8)
        most = max(1, int(counts.max()))
        if most / m < least:
            least = most / m
            found.append(NM(most, m, axis=axis))
    return found


def _empty(kept: np.ndarray, size: int) -> float:
    _, k, n = kept.shape
    rows = np.logical_or.reduceat(kept, np.arange(0, k, size), axis=1)
    return 1 - float(np.logical_or.reduceat(rows, np.arange(0, n, size), axis=2).mean())
