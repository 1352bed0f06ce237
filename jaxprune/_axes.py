"""Axes of arrays, and how a mesh divides them: counted, split, merged, made whole."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array


def shard_counts(x: Array) -> list[int]:
    """Into how many shards each axis of `x` is divided, as far as that can be known."""
    sharding = jax.typeof(x).sharding
    # On an auto mesh only the array itself knows.
    if not isinstance(x, core.Tracer):
        sharding = getattr(x, "sharding", sharding)
    counts = [1] * x.ndim
    for axis, names in enumerate(getattr(sharding, "spec", ())):
        names = (names,) if isinstance(names, str) else names
        if isinstance(names, tuple):
            counts[axis] = math.prod(sharding.mesh.shape[name] for name in names)
    return counts


def split_axis(x: Array, axis: int, ways: int = 8) -> Array:
    """Reshapes an axis of length `ways` k to (k, `ways`)."""
    length = x.shape[axis] // ways
    return x.reshape(*x.shape[:axis], length, ways, *x.shape[axis + 1 :])


def merge_axes(x: Array, axis: int) -> Array:
    """Makes one of `axis` and the next."""
    both = x.shape[axis] * x.shape[axis + 1]
    return x.reshape(*x.shape[:axis], both, *x.shape[axis + 2 :])


def reshape(x: Array, shape: Sequence[int]) -> Array:
    """As `x.reshape`, one group of axes at a time, and merged before they are split.

    That is what types can follow on explicit meshes, if the first of them is sharded.
    """
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.explicit_axes:
        return x.reshape(shape)
    if x.size == 0:  # Sizes say nothing of which axes become which.
        whole = sharding.update(spec=jax.P(*[None] * len(shape)))
        return jnp.reshape(x, shape, out_sharding=whole)
    for at, old, new in reversed(_changes(x.shape, shape)):
        before, after = x.shape[:at], x.shape[at + len(old) :]
        x = x.reshape(*before, math.prod(old), *after).reshape(*before, *new, *after)
    return x


def _changes(old: Sequence[int], new: Sequence[int]):
    """The least groups of axes of equal size, with the place in `old` where each begins."""
    found = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, other = i, j
        i, j = i + 1, j + 1
        while math.prod(old[start:i]) != math.prod(new[other:j]):
            if math.prod(old[start:i]) < math.prod(new[other:j]):
                i += 1
            else:
                j += 1
        # Ones go with what stands before them: they must not come first, unsharded.
        while i < len(old) and old[i] == 1:
            i += 1
        while j < len(new) and new[j] == 1:
            j += 1
        found.append((start, tuple(old[start:i]), tuple(new[other:j])))
    return found


def whole_groups(x: Array, axes: Sequence[int], span: int) -> Array:
    """Makes axes whole on every device, where groups along them would straddle shards.

    Groups stay where they are if no axis but the first is sharded, and each shard holds a
    multiple of `span`. On an auto mesh XLA sees to it.
    """
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.explicit_axes:
        return x
    counts = shard_counts(x)
    first, *others = axes
    own = math.prod(x.shape[a] for a in axes) // counts[first]
    if all(counts[a] == 1 for a in others) and (counts[first] == 1 or own % span == 0):
        return x
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    for a in axes:
        spec[a] = None
    return jax.sharding.reshard(x, sharding.update(spec=jax.P(*spec)))


def restore(x: Array, like: Array, order: Sequence[int]) -> Array:
    """Undoes a transposition by `order` and any reshape behind it, and lies as `like`."""
    x = reshape(x, [like.shape[a] for a in order])
    x = x.transpose([order.index(a) for a in range(like.ndim)])
    sharding = jax.typeof(like).sharding
    if jax.typeof(x).sharding == sharding or not sharding.mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, sharding)
