"""Numbers of types that safetensors lacks, several in a byte."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

# The bits that each of them takes.
BITS = {
    np.dtype(x): (jnp.finfo if jnp.issubdtype(x, jnp.floating) else jnp.iinfo)(x).bits
    for x in (
        jnp.int2, jnp.uint2, jnp.int4, jnp.uint4, jnp.float4_e2m1fn, jnp.float8_e3m4,
        jnp.float8_e4m3, jnp.float8_e4m3b11fnuz,
    )
}  # fmt: skip
NAMES = {dtype.name: dtype for dtype in BITS}


def size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes that an array takes."""
    return -(-math.prod(shape) * BITS[dtype] // 8)


def narrowed(x: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "bytes"]:
    """The numbers one after the other, the first of a byte in its lowest bits."""
    bits = BITS[x.dtype]
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    each = 8 // bits
    raw = np.pad(raw, (0, -raw.size % each)).reshape(-1, each)
    raw <<= np.arange(each, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(raw, axis=1)


def widened(
    raw: UInt8[np.ndarray, "bytes"], dtype: np.dtype, shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """Undoes `narrowed`."""
    bits = BITS[dtype]
    each = 8 // bits
    places = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    parts = (raw[:, None] >> places) & np.uint8((1 << bits) - 1)
    parts = parts.reshape(-1)[: math.prod(shape)]
    if jnp.issubdtype(dtype, jnp.signedinteger):  # which fill their byte with the sign
        parts = (parts << (8 - bits)).view(np.int8) >> (8 - bits)
    return parts.view(dtype).reshape(shape)
