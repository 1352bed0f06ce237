"""Checksums of arrays that are the same however an array is sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

_ODD = 0x9E3779B1
_SMALL = 1 << 16  # bytes below which a program is not worth compiling


def start(x: Any) -> Any:
    """Starts summing up an array where it lies; `finish` waits for the sum.

    Each element and its place are hashed, and the hashes are added modulo 2**32, twice.
    For its place, the hash of an element is one-to-one in its bits, so that an array with
    one changed element always has another sum; of other changes one in 2**64 goes
    unnoticed. A sharded array takes one pass over each shard and no temporary array, and
    devices tell one another two words.

    Args:
      x: a `jax.Array`, not of typed keys, or an `np.ndarray`.
    """
    if isinstance(x, np.ndarray):
        if x.nbytes <= _SMALL:
            return x
        words = _host_words(x) if x.dtype.itemsize >= 8 else [jnp.asarray(x)]
        return _sums(words)
    if x.nbytes <= _SMALL and x.is_fully_addressable:
        x.copy_to_host_async()
        return x
    return _sums([x])


def keep(started: Any) -> Any:
    """What `finish` still takes when the array is no longer there."""
    return started if isinstance(started, tuple) else finish(started)


def finish(started: Any) -> str:
    """The checksum, 16 hexadecimal digits."""
    if isinstance(started, str):
        return started
    if isinstance(started, tuple):
        sums = [int(np.asarray(s.addressable_data(0))) for s in started]
    else:
        sums = [int(s) for s in _host_sums(np.asarray(started))]
    return "".join(f"{s:08x}" for s in sums)


@jax.jit
def _sums(parts: list[Array]) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    words = [word for x in parts for word in _device_words(x)]
    totals = jnp.uint32(0), jnp.uint32(0)
    for i, word in enumerate(words):
        # One reduction of both, so that the hashes are never held.
        found = lax.reduce(
            _hashes(word, _place(word), i),
            (jnp.uint32(0), jnp.uint32(0)),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            tuple(range(word.ndim)),
        )
        totals = totals[0] + found[0], totals[1] + found[1]
    return totals


def _host_sums(x: np.ndarray) -> list[np.uint32]:
    place = np.arange(x.size, dtype=np.uint32)
    each = [_hashes(w, place, i) for i, w in enumerate(_host_words(x))]
    return [
        np.sum([h[k].sum(dtype=np.uint32) for h in each], dtype=np.uint32)
        for k in (0, 1)
    ]


def _hashes(bits: Any, place: Any, word: int) -> tuple[Any, Any]:
    """Of words of 32 bits; of JAX or of NumPy."""
    x = bits ^ (place * np.uint32(_ODD) + np.uint32(word))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    x = x ^ (x >> np.uint32(16))
    y = x * np.uint32(0x27D4EB2F)
    return x, y ^ (y >> np.uint32(15))


def _place(x: Array) -> UInt32[Array, "..."]:
    """The index in row-major order; past 2**32 elements, mixed from its two words."""
    place, stride = jnp.uint32(0), 1
    sharding = jax.typeof(x).sharding
    for axis in reversed(range(x.ndim)):
        step = jnp.uint32((stride + (stride >> 32) * _ODD) & 0xFFFFFFFF)
        index = lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=sharding)
        place, stride = place + index * step, stride * x.shape[axis]
    return place


def _device_words(x: Array) -> list[UInt32[Array, "..."]]:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [w for part in (x.real, x.imag) for w in _device_words(part)]
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{_width(x.dtype)}"))
    if _width(x.dtype) < 64:
        return [bits.astype(jnp.uint32)]
    return [bits.astype(jnp.uint32), (bits >> 32).astype(jnp.uint32)]


def _host_words(x: Any) -> list[np.ndarray]:
    x = np.ascontiguousarray(x).ravel()  # of one axis: scalars warn where they wrap
    if np.issubdtype(x.dtype, np.complexfloating):
        return [w for part in (x.real, x.imag) for w in _host_words(part)]
    if x.dtype.itemsize == 8:
        bits = x.view(np.uint64)
        low = (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        return [low, (bits >> np.uint64(32)).astype(np.uint32)]
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    if x.dtype != np.bool_ and _width(x.dtype) < 8:
        bits = bits & np.uint32((1 << _width(x.dtype)) - 1)  # above them lies anything
    return [bits]


def _width(dtype: Any) -> int:
    """Bits of an element."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return (jnp.finfo if is_float else jnp.iinfo)(dtype).bits
