"""Packing and unpacking where the shards of a weight lie: each device does its own part.

No axis of a packed array can be sharded like that of the weight, since how many values a
shard keeps is its own affair. So a sharded matrix is divided into parts, a shard each, with
axes of their own (`Layout.parts`), and these are sharded as the weight was.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxprune.formats._layout import Layout


class Place(NamedTuple):
    """Where a leaf lies, and where its packed form does; hashable.

    Attributes:
      mesh: its devices.
      leaf: names of mesh axes for each axis of the leaf.
      packed: those of the leading axes, and of the parts along K and N if there are any.
      counts: shards along K and N.
      names: of the mesh axes that are looked after here, all of them or the explicit ones.
    """

    mesh: Any
    leaf: tuple
    packed: tuple
    counts: tuple[int, int]
    names: frozenset

    def local(self, layout: Layout) -> Layout:
        """The layout of a shard."""
        shape = list(layout.shape)
        for axes, count in zip(
            (layout.axes, layout.out_axes), self.counts, strict=True
        ):
            shape[axes[0]] //= count
        parts = layout.parts and tuple(
            p // c for p, c in zip(layout.parts, self.counts, strict=True)
        )
        return dataclasses.replace(layout, shape=tuple(shape), parts=parts)

    def put(self, x: Any, spec: tuple) -> Array:
        """`x`, sharded like this."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        if not isinstance(x, core.Tracer) and isinstance(self.mesh, Mesh):
            return jax.device_put(x, sharding)
        if self.mesh.explicit_axes:
            # Auto axes have no place in a type; `run` divides along them.
            named = (_several(names) for names in spec)
            spec = tuple(
                tuple(n for n in names if n in self.mesh.explicit_axes)
                for names in named
            )
            sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def run(self, f: Callable, specs: tuple, out: tuple) -> Callable:
        """`f` of what each device has."""
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=tuple(PartitionSpec(*s) for s in specs),
            out_specs=PartitionSpec(*out),
            axis_names=self.names,
        )


def of_leaf(
    w: Array, layout: Layout, parts: tuple[int, int] | None, unit: tuple[int, int]
) -> tuple[Place | None, Layout]:
    """Where a leaf is packed, and the layout that it gets; `None` if it is not sharded.

    An axis stays sharded if it is the first of those that make K or N, and if its shards
    hold whole units.

    Args:
      w: the leaf.
      layout: without parts.
      parts: what the caller wants, or `None`: as many as there are shards.
      unit: rows and columns that belong together.
    """
    if parts is not None:
        parts = _checked(parts, layout, unit)
    found = _sharding(w)
    if found is None:
        return None, dataclasses.replace(layout, parts=parts)
    mesh, spec, names = found
    batch = w.ndim - len(layout.shape)
    leaf = [*spec[:batch], *[None] * len(layout.shape)]
    ends, counts = [], []
    for i, axes in enumerate((layout.axes, layout.out_axes)):
        at = axes[0] + w.ndim
        count = _size(mesh, spec[at])
        whole = count == 1 or layout.matrix[i] % (count * unit[i]) == 0
        fits = whole and (parts is None or parts[i] % count == 0)
        leaf[at] = spec[at] if fits else None
        ends.append(leaf[at])
        counts.append(count if fits else 1)
    packed = tuple(leaf[:batch])
    rows, cols = counts
    if parts is None and (rows, cols) != (1, 1):
        parts = rows, cols
    if parts is not None:
        packed += tuple(ends)
    else:  # One shard: nothing keeps the names of axes of the mesh that have one device.
        leaf[batch:] = [None] * len(layout.shape)
    place = Place(mesh, tuple(leaf), packed, (rows, cols), names)
    return place, dataclasses.replace(layout, parts=parts)


def of_packed(packed: Any) -> Place | None:
    """Where a packed leaf lies; `None` if it is whole, or sharded in other ways."""
    layout: Layout = packed.layout
    batch = len(packed.shape) - len(layout.shape)
    leading = batch + (2 if layout.parts else 0)
    found = [_sharding(x) for x in jax.tree.leaves(packed) if not _is_unknown(x)]
    if not found:
        return None
    if None in found or len({x[1][:leading] for x in found if x}) > 1:
        return None
    mesh, spec, names = next(x for x in found if x)
    if any(any(x[1][leading:]) for x in found if x):
        return None
    leaf = [*spec[:batch], *[None] * len(layout.shape)]
    ends, counts = [None, None], [1, 1]
    for i, axes in enumerate((layout.axes, layout.out_axes)):
        count = _size(mesh, spec[batch + i]) if layout.parts else 1
        if count > 1 and layout.shape[axes[0]] % count == 0:
            leaf[axes[0]] = ends[i] = spec[batch + i]
            counts[i] = count
    kept = (*spec[:batch], *(ends if layout.parts else ()))
    return Place(mesh, tuple(leaf), kept, (counts[0], counts[1]), names)


def plain(packed: Any) -> Any:
    """The parts as a stack of matrices, for functions that know of no parts."""
    if packed.layout.parts is None:
        return packed
    return dataclasses.replace(packed, layout=packed.layout.of_part)


def leaf_struct(packed: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and, on a mesh, sharding of the leaf that `unpack` gives."""
    place = None
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(packed)):
        place = of_packed(packed)
    sharding = place and NamedSharding(place.mesh, PartitionSpec(*place.leaf))
    return jax.ShapeDtypeStruct(packed.shape, packed.dtype, sharding=sharding)


def _sharding(x: Any) -> tuple[Any, tuple, frozenset] | None:
    """Mesh, names for each axis, and which axes of the mesh, of an array that is sharded.

    Under `jax.jit` only explicit axes of a mesh are known.
    """
    sharding = getattr(x, "sharding", None)
    if isinstance(x, core.Tracer):
        sharding = jax.typeof(x).sharding
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = frozenset(kinds)
    if isinstance(x, core.Tracer):
        names = frozenset(n for n, k in kinds.items() if k == AxisType.Explicit)
    spec = tuple(sharding.spec) + (None,) * (np.ndim(x) - len(sharding.spec))
    if not any(spec) or not names:
        return None
    return mesh, spec, names


def _is_unknown(x: Any) -> bool:
    """Whether it is not known how an array is sharded: one that is traced, by its type."""
    return isinstance(x, core.Tracer) and not jax.typeof(x).sharding.mesh.explicit_axes


def _several(names: Any) -> tuple:
    if names is None:
        return ()
    return names if isinstance(names, tuple) else (names,)


def _size(mesh: Any, names: Any) -> int:
    return math.prod(mesh.shape[n] for n in _several(names))


def _checked(
    parts: tuple[int, int], layout: Layout, unit: tuple[int, int]
) -> tuple[int, int]:
    rows, cols = (int(p) for p in parts)
    for count, length, own, name in zip(
        (rows, cols), layout.matrix, unit, ("K", "N"), strict=True
    ):
        if count < 1 or (count > 1 and length % (count * own)):
            raise ValueError(
                f"parts: got {tuple(parts)} for a matrix {list(layout.matrix)}; expected "
                f"numbers that divide it into whole groups or blocks, and {count} does not "
                f"divide {name} = {length} into multiples of {own}. Leave parts= out."
            )
    return rows, cols
