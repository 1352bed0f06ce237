"""Arrays of a mesh with explicit axes, for a while on one whose axes XLA looks after."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

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


def _mesh(x: jax.Array) -> Mesh | None:
    """The mesh of an array, if it has explicit axes."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    if isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types:
        return mesh
    return None
