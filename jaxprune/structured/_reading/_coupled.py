"""Groups as data, and which axes of parameters only read units."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from jaxprune import _groups, _tree, tracing
from jaxprune.structured._reading import _kinds
from jaxprune.structured._reading._propagate import Program


def as_groups(
    groups: Sequence[Any],
    kinds: _kinds.Kind | Sequence[_kinds.Kind] | None,
    stays: Callable[[Any], bool],
) -> _groups.Groups:
    """The traced groups of these kinds, with the members that stay.

    Raises:
      ValueError: if nothing is left.
    """
    wanted = _kinds.wanted(kinds)
    found = []
    for g in (g for g in groups if g.kind in wanted):
        members = tuple(
            _groups.Member(m.path, m.axis, tuple(m.units.tolist()))
            for m in g.members
            if stays(m)
        )
        if members:
            found.append(_groups.Group(g.name, g.size, members, g.minimum))
    if not found:
        here = sorted({g.kind for g in groups})
        raise ValueError(
            f"kinds: no group is left of the kinds {sorted(wanted)}. The graph has: "
            f"{_tree.listing(here)}."
        )
    return _groups.Groups(tuple(found))


def readers(
    program: Program, paths: Sequence[str], leaves: Mapping[str, Any]
) -> set[tuple[str, int]]:
    """Axes `(path, axis)` along which a leaf is contracted wherever it is used.

    Args:
      program: of the function.
      paths: of the leaves of its parameters, in the order of its inputs.
      leaves: shapes and dtypes, by path.
    """
    closed = ClosedJaxpr(program.jaxpr, list(program.consts))
    named = [(p, jax.ShapeDtypeStruct(*leaves[p])) for p in paths]
    # A list keeps the order of the inputs; its paths are numbers.
    trace = tracing.of_jaxpr(closed, [x for _, x in named])
    axes: dict[str, list[set[int]]] = {}
    for site in trace.sites:
        axes.setdefault(site.path, []).append(_contracted(site))
    found = set()
    for i, path in enumerate(paths):
        if str(i) in axes and str(i) not in trace.untraced:
            found |= {(path, a) for a in set.intersection(*axes[str(i)])}
    return found


def _contracted(site: tracing.Site) -> set[int]:
    """Axes of the leaf that hold digits of K."""
    found = set()
    for axis, size in enumerate(site.shape):
        step = math.prod(site.shape[axis + 1 :])
        if any(step < stride * n and stride < step * size for n, stride in site.k):
            found.add(axis)
    return found
