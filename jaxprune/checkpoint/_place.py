"""Where arrays of a checkpoint go, and what they become there."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import masks
from jaxprune._tree import is_key


def target(shape: Sequence[int], dtype: Any, like: Any) -> Any:
    """What Orbax is to load: an array that is sharded at once, or one of the host.

    Args:
      shape: as saved.
      dtype: as saved.
      like: the template, or `None`.
    """
    sharding = getattr(like, "sharding", None)
    local = jax.process_count() > 1 and getattr(sharding, "is_fully_addressable", True)
    if not _is_placed(like) or is_key(like) or local or not _is_canonical(dtype):
        return np.broadcast_to(np.zeros((), dtype), tuple(shape))  # takes no memory
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def like_bits(
    shape: Sequence[int], like: masks.PackedMask, axis: int | None
) -> jax.ShapeDtypeStruct:
    """A template for bits that were packed along another axis than `like` is."""
    dtype = jnp.bool_ if axis is None else jnp.uint8
    sharding = getattr(like.bits, "sharding", None)
    if not _is_placed(like.bits):
        sharding = None
    if isinstance(sharding, NamedSharding):
        # As `like` is, but for an axis of bytes that does not divide.
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        sizes = dict(sharding.mesh.shape)
        for i, names in enumerate(spec):
            each = names if isinstance(names, tuple) else (names,) if names else ()
            if shape[i] % math.prod(sizes[n] for n in each):
                spec[i] = None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def repacked(found: masks.PackedMask, like: masks.PackedMask) -> masks.PackedMask:
    """A mask packed along the axis that `like` has, and placed as it is."""
    if found.axis == like.axis:
        return found
    mask = masks.repack(masks.as_bool(found), like)
    if not _is_placed(like.bits):
        return mask
    return jax.device_put(mask, like.bits.sharding)


def settled(found: Any, like: Any, path: str) -> Any:
    """An array as `like` has it: of its type, and free to go elsewhere if `like` is.

    Raises:
      ValueError: if its values have no place in the type of `like`.
    """
    if not hasattr(like, "dtype"):
        return _number(found.item(), like, path)
    found = _cast(found, like.dtype, path)
    if isinstance(like, np.ndarray | np.generic):
        found = np.asarray(found)
        return found[()] if isinstance(like, np.generic) else found
    if isinstance(found, jax.Array) and not _is_placed(like):
        return found
    if _is_placed(like):
        return jax.device_put(found, like.sharding)
    return jnp.asarray(found)


def value(found: Any, like: Any, path: str) -> Any:
    """A number, string or bytes; an array if `like` has one there.

    Raises:
      ValueError: if its value has no place in the type of `like`.
    """
    if not hasattr(like, "dtype"):
        return found
    if not isinstance(found, bool | int | float | complex) or like.shape != ():
        raise ValueError(
            f"like: {path} is an array, but a {type(found).__name__} was saved. Restore "
            "with what was saved."
        )
    return settled(np.asarray(found), like, path)


def keys(words: np.ndarray, impl: str, like: Any) -> jax.Array:
    """Typed keys of saved words, where `like` has them."""
    found = jax.random.wrap_key_data(jnp.asarray(words), impl=impl)
    if like is None or not _is_placed(like):
        return found
    return jax.device_put(found, like.sharding)


def _cast(x: Any, dtype: Any, path: str) -> Any:
    """Floats to other floats; integers to others that can hold them."""
    if x.dtype == dtype:
        return x
    for kind in (jnp.floating, jnp.signedinteger, jnp.unsignedinteger):
        if jnp.issubdtype(x.dtype, kind) and jnp.issubdtype(dtype, kind):
            y = x.astype(dtype)
            if kind is jnp.floating or bool((y.astype(x.dtype) == x).all()):
                return y
    raise ValueError(
        f"like: {path} is of type {dtype}, but {x.dtype} was saved, which it cannot hold. "
        "Restore with the type that was saved."
    )


def on_device(found: np.ndarray) -> Any:
    """An array of the default device, unless that would lose bits."""
    return jnp.asarray(found) if _is_canonical(found.dtype) else found


def _number(found: Any, like: Any, path: str) -> Any:
    if not isinstance(like, bool | int | float) or type(like)(found) != found:
        raise ValueError(
            f"like: {path} is a {type(like).__name__}, but {found!r} was saved as an array. "
            "Restore with what was saved."
        )
    return type(like)(found)


def _is_canonical(dtype: Any) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _is_placed(x: Any) -> bool:
    return getattr(x, "committed", getattr(x, "sharding", None) is not None)
