"""Takes some places of an array, along several axes, and leaves it where it lies."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.sharding import NamedSharding, PartitionSpec


def cut(x: Any, axes: Mapping[int, np.ndarray]) -> Any:
    """What is kept of an array, or the shape of it.

    An axis that is sharded stays so, if the mesh divides its new size, and is whole on each
    device otherwise. An array of NumPy stays on the host.

    Args:
      x: an array, a number, or a `jax.ShapeDtypeStruct`.
      axes: the places that are kept, by axis: [kept], or of the rank of the array, where
        other places are kept at each place of other axes.
    """
    if not axes:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = cut_shape(x.shape, axes)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=_fitted(x.sharding, shape))
    axes = dict(sorted(axes.items(), key=lambda a: -_owners(a[1])))
    if isinstance(x, np.ndarray):
        for axis, at in axes.items():
            one = at.ndim == 1
            x = np.take(x, at, axis) if one else np.take_along_axis(x, at, axis)
        return x
    sharding = getattr(x, "sharding", None)
    if isinstance(x, core.Tracer) or not isinstance(sharding, NamedSharding):
        return _take(jnp.asarray(x), tuple(axes), tuple(axes.values()))
    fitted = _fitted(sharding, cut_shape(x.shape, axes))
    return _jitted(tuple(axes), fitted)(x, tuple(axes.values()))


def cut_shape(shape: Sequence[int], axes: Mapping[int, np.ndarray]) -> tuple[int, ...]:
    """Of what is kept."""
    return tuple(kept_size(axes[i], i) if i in axes else n for i, n in enumerate(shape))


def kept_size(places: np.ndarray, axis: int) -> int:
    """How many are kept along an axis."""
    return places.shape[axis] if places.ndim > 1 else len(places)


def _owners(places: np.ndarray) -> int:
    """In how many axes it counts what is kept: these must not be cut before."""
    return sum(n > 1 for n in places.shape) if places.ndim > 1 else 0


@functools.cache
def _jitted(axes: tuple[int, ...], sharding: NamedSharding) -> Any:
    return jax.jit(lambda x, places: _take(x, axes, places), out_shardings=sharding)


def _take(x: Any, axes: Sequence[int], places: Sequence[np.ndarray]) -> Any:
    sharding = jax.typeof(x).sharding
    if not _named(sharding.spec):
        for axis, at in zip(axes, places, strict=True):
            if at.ndim == 1:
                x = jnp.take(x, at, axis=axis, mode="clip")
            else:
                x = jnp.take_along_axis(x, at, axis, mode="clip")
        return x
    if any(at.ndim > 1 for at in places):
        x = jax.sharding.reshard(x, sharding.update(spec=PartitionSpec()))
        return jax.sharding.reshard(
            _take(x, axes, places),
            _fitted(sharding, cut_shape(x.shape, dict(zip(axes, places, strict=True)))),
        )
    names = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    names = (None if i in axes else n for i, n in enumerate(names))
    whole = sharding.update(spec=PartitionSpec(*names))
    x = jax.sharding.reshard(x, whole)
    for axis, at in zip(axes, places, strict=True):
        x = x.at[(*[slice(None)] * axis, at)].get(out_sharding=whole, mode="clip")
    return jax.sharding.reshard(x, _fitted(sharding, x.shape))


def _named(spec: PartitionSpec) -> bool:
    return any(name is not None for name in spec)


def _fitted(sharding: Any, shape: Sequence[int]) -> Any:
    """The sharding, without the axes that it does not divide."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    names = [
        name
        if n % math.prod(sharding.mesh.shape[m] for m in _several(name)) == 0
        else None
        for name, n in zip(sharding.spec, shape, strict=False)
    ]
    return sharding.update(spec=PartitionSpec(*names))


def _several(name: Any) -> tuple[Any, ...]:
    if name is None or name is PartitionSpec.UNCONSTRAINED:
        return ()
    return name if isinstance(name, tuple) else (name,)
