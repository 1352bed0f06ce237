"""Exact counts beyond 2³¹: unsigned integers in two 32-bit words, without x64 mode."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

_WORD = 1 << 32
_SPLIT = 12  # bits of the low part while a long sum is under way


class Wide(NamedTuple):
    """The unsigned integer `hi * 2**32 + lo`, or an array of them."""

    hi: UInt32[Array, "..."]
    lo: UInt32[Array, "..."]

    def __int__(self) -> int:
        return (int(self.hi) << 32) + int(self.lo)

    def to_float(self) -> Float[Array, "..."]:
        """The nearest float32, for ratios and prints."""
        return self.hi.astype(jnp.float32) * float(_WORD) + self.lo.astype(jnp.float32)


def from_int(value: int) -> Wide:
    """Splits a Python integer in [0, 2**64)."""
    return Wide(*(x[0] for x in from_ints([value])))


def from_ints(values: Sequence[int]) -> Wide:
    """Splits several Python integers in [0, 2**64) to one vector."""
    for value in values:
        if not 0 <= value < _WORD * _WORD:
            raise ValueError(f"value: got {value}; expected an integer in [0, 2**64).")
    words = np.asarray([divmod(v, _WORD) for v in values], np.uint32).reshape(-1, 2)
    return Wide(jnp.asarray(words[:, 0]), jnp.asarray(words[:, 1]))


def narrow(lo: UInt32[Array, "..."]) -> Wide:
    """Numbers below 2**32."""
    return Wide(jnp.zeros_like(lo), lo)


def stack(values: Sequence[Wide]) -> Wide:
    """Stacks along a new first axis."""
    return Wide(jnp.stack([v.hi for v in values]), jnp.stack([v.lo for v in values]))


def shift_left(a: Wide, bits: int | np.ndarray) -> Wide:
    """`a << bits`, for 0 <= bits < 32."""
    carried = (a.lo >> 1) >> (31 - bits)  # never a shift by 32, which is undefined
    return Wide((a.hi << bits) | carried, a.lo << bits)


def add(a: Wide, b: Wide) -> Wide:
    """`a + b`, modulo 2**64."""
    lo = a.lo + b.lo
    return Wide(a.hi + b.hi + (lo < a.lo).astype(jnp.uint32), lo)


def subtract(a: Wide, b: Wide) -> Wide:
    """`a - b`, modulo 2**64."""
    return Wide(a.hi - b.hi - (a.lo < b.lo).astype(jnp.uint32), a.lo - b.lo)


def less(a: Wide, b: Wide) -> Array:
    """`a < b`."""
    return (a.hi < b.hi) | ((a.hi == b.hi) & (a.lo < b.lo))


def equal(a: Wide, b: Wide) -> Array:
    """`a == b`."""
    return (a.hi == b.hi) & (a.lo == b.lo)


def where(condition: Array, a: Wide, b: Wide) -> Wide:
    """Elementwise choice."""
    return Wide(jnp.where(condition, a.hi, b.hi), jnp.where(condition, a.lo, b.lo))


def minimum(a: Wide, b: Wide) -> Wide:
    """The smaller of two."""
    return where(less(a, b), a, b)


def saturating_subtract(a: Wide, b: Wide) -> Wide:
    """`max(a - b, 0)`."""
    return where(less(a, b), narrow(jnp.zeros_like(a.lo)), subtract(a, b))


def total(counts: UInt32[Array, "..."], bound: int, *, lead: int = 0) -> Wide:
    """Sums `counts` exactly over all axes behind the first `lead`.

    Args:
      counts: of axes shorter than 2**20, but for the longest, which is short enough for
        its sum to stay below 2**32.
      bound: of each sum, below 2**44: the largest possible count times the number of
        counts. Below 2**32 one plain sum is enough.
      lead: how many axes stay.
    """
    axes = range(lead, counts.ndim)
    if bound < _WORD or not axes:
        return narrow(jnp.sum(counts, tuple(axes), dtype=jnp.uint32))
    # As much as fits in one sum: on a mesh, what is left of the array moves between devices.
    share = -(-bound // max(math.prod(counts.shape[a] for a in axes), 1))
    at_once = _at_once(counts.shape, tuple(axes), share)
    sums = jnp.sum(counts, at_once, jnp.uint32, keepdims=True)
    low_bits = (1 << _SPLIT) - 1
    low, high = sums & low_bits, sums >> _SPLIT
    # From here on, low < 2**12 and an axis < 2**20: no word overflows.
    for axis in sorted(set(axes) - set(at_once), key=lambda a: -counts.shape[a]):
        low, high = (jnp.sum(x, axis, jnp.uint32, keepdims=True) for x in (low, high))
        low, high = low & low_bits, high + (low >> _SPLIT)
    low, high = (x.reshape(counts.shape[:lead]) for x in (low, high))
    return add(Wide(high >> (32 - _SPLIT), high << _SPLIT), narrow(low))


def _at_once(
    shape: tuple[int, ...], axes: tuple[int, ...], largest: int
) -> tuple[int, ...]:
    """The axes whose sum leaves least behind, of those that one word can hold.

    The longest is among them, if there are any: it would overflow behind the others.
    """
    longest = max(axes, key=shape.__getitem__, default=0)
    others = [a for a in axes if a != longest]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(others, n) for n in range(len(others) + 1)
    )
    sizes = {(longest, *s): math.prod(shape[a] for a in (longest, *s)) for s in subsets}
    fit = [s for s in sizes if sizes[s] * largest < _WORD]
    return max(fit, key=sizes.__getitem__, default=())


def sums(members: np.ndarray, counts: Wide) -> Wide:
    """Sums along the first axis: row `i` is the sum of the rows with `members[i]`.

    Args:
      members: booleans `[sums, rows]`, fewer than 2**16 rows.
      counts: `[rows, ...]`.
    """
    chosen = members.reshape(*members.shape, *(1,) * (counts.lo.ndim - 1))

    def add_rows(x: Array) -> Array:
        return jnp.sum(jnp.where(chosen, x, 0), axis=1, dtype=jnp.uint32)

    low, high = add_rows(counts.lo & 0xFFFF), add_rows(counts.lo >> 16)
    return add(Wide(add_rows(counts.hi) + (high >> 16), high << 16), narrow(low))


def interpolate(start: int, end: int, fraction: Float[Array, ""]) -> Wide:
    """`start + (end - start) * fraction`, rounded half up in the distance from `start`.

    Exact for the float32 value of `fraction` (in [0, 1]) to 2**-31 of the distance; at
    0 and 1 it is `start` and `end` themselves.
    """
    moved, origin = share(from_int(abs(end - start)), fraction), from_int(start)
    return add(origin, moved) if end >= start else subtract(origin, moved)


def share(count: Wide, fraction: Float[Array, ""]) -> Wide:
    """`count * fraction`, rounded half up; `count` is one number below 2**63.

    Exact for the float32 value of `fraction` (in [0, 1]) to 2**-31 of `count`.
    """
    limbs = [x for word in (count.lo, count.hi) for x in (word & 0xFFFF, word >> 16)]
    fixed = (jnp.clip(fraction, 0.0, 1.0) * 2.0**31).astype(jnp.uint32)
    parts = [fixed & 0xFFFF, fixed >> 16]
    acc = [jnp.uint32(0)] * 7
    for i, limb in enumerate(limbs):
        for j, part in enumerate(parts):
            product = limb * part
            acc[i + j] += product & 0xFFFF
            acc[i + j + 1] += product >> 16
    acc[1] += jnp.uint32(1 << 14)  # half of 2**31, the unit of `fixed`
    carry = jnp.uint32(0)
    for i in range(7):
        acc[i] += carry
        acc[i], carry = acc[i] & 0xFFFF, acc[i] >> 16
    # The product in units of 2**-31: drop 31 bits, which is one limb and 15 bits.
    words = [(acc[i] >> 15) | ((acc[i + 1] & 0x7FFF) << 1) for i in range(1, 5)]
    return Wide(words[2] | (words[3] << 16), words[0] | (words[1] << 16))


def popcount(words: jax.Array) -> Wide:
    """Number of set bits of an unsigned integer array."""
    return total(
        jax.lax.population_count(words).astype(jnp.uint32),
        words.size * jnp.iinfo(words.dtype).bits,
    )
