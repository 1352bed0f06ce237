"""Arrays of a mesh with explicit axes, for a while on one whose axes XLA looks after."""

import contextlib
import math
from collections.abc import Iterator

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Shaped

from jaxprune._tree import PyTree


@contextlib.contextmanager
def auto(tree: PyTree) -> Iterator[PyTree]:
    """The same arrays, sharded as they are, but so that any operation on them is allowed.

    On an explicit mesh each operation must say how its output is sharded where that is
    not clear, as in most reshapes; solvers do not. Elsewhere the tree stays as it is.
    """
    mesh = next((m for m in map(_mesh, jax.tree.leaves(tree)) if m is not None), None)
    if mesh is None:
        yield tree
        return
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    free = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    def put(x):
        if _mesh(x) is None:
            return x
        return jax.device_put(x, NamedSharding(free, x.sharding.spec))

    with jax.set_mesh(free):
        yield jax.tree.map(put, tree)


def columns(matrix: Shaped[Array, "stack batch K N"]) -> Array:
    """The same matrix, with what K was sharded over added to N.

    Solvers decide for a column from all of its rows, and need no other column. So one
    exchange of shards, as large as they are, lets each device work by itself; and if N
    does not divide by so many devices, K is made whole on each.
    """
    sharding = matrix.sharding
    if not isinstance(sharding, NamedSharding):
        return matrix
    *stack, k, n = (*sharding.spec, None, None, None, None)[:4]
    if k is None:
        return matrix
    names = (*_several(n), *_several(k))
    both = math.prod(sharding.mesh.shape[name] for name in names)
    names = names if matrix.shape[-1] % both == 0 else _several(n)
    return jax.device_put(matrix, sharding.update(spec=jax.P(*stack, None, names)))


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return names if isinstance(names, tuple) else (names,)


def _mesh(x: jax.Array) -> Mesh | None:
    """The mesh of an array, if it has explicit axes."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    if isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types:
        return mesh
    return None
