"""A plan from the units that are kept."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.structured._plans._costs import Counter
from jaxprune.structured._plans._kept import Kept
from jaxprune.structured._plans._plan import Apart, Choice, Plan
from jaxprune.structured._plans._state import Cuts
from jaxprune.structured._reading import _dims, _local
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._graph import INPUT, Graph, Group, Member
from jaxprune.structured._reading._local import Tables
from jaxprune.structured._reading._values import Dims


def planned(graph: Graph, kept: Mapping[str, Any]) -> Plan:
    """The plan that keeps these units, in any way they were chosen.

    Args:
      graph: of `trace`.
      kept: `{group: numbers of units}`, sorted or not, or a boolean for each unit, by
        names that `graph[name]` knows; groups that are not named keep all. Where
        `graph.within(name)` names other groups, numbers may be `[*owners, kept]`, as many for
        each layer or head but other ones.

    Raises:
      ValueError: if a group is not known or named twice, units are no whole numbers or out
        of range, or too few are kept.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
      >>> plan = jp.structured.planned(graph, {"down:0": [0, 1, 5]})
      >>> plan.shrink(params)["down"].shape
      (3, 3)
    """
    found = _chosen(graph, kept)
    choices = {
        g.name: Choice(g.kind, g.size, found.get(g.name, np.arange(g.size)), g.notes)
        for g in graph.groups
    }
    places, tables = _units(graph, choices)
    cuts, same = _cuts(graph, places, tables)
    inputs = {p: axes for p, axes in cuts.items() if p.startswith(INPUT)}
    dims, counter = _axes(graph), Counter(graph)
    return Plan(
        groups=choices,
        shapes=dict(graph.shapes),
        cuts={p: axes for p, axes in cuts.items() if p not in inputs},
        input_shapes={
            p.removeprefix(INPUT): tuple(d.size for d in dims[p]) for p in inputs
        },
        input_cuts={p.removeprefix(INPUT): axes for p, axes in inputs.items()},
        before=counter({}),
        after=counter({name: c.left for name, c in choices.items()}),
        apart={
            g.name: tuple(_apart(m, dims[m.path], tables) for m in g.members)
            for g in graph.groups
            if g.members[0]._leaf in tables
        },
        same=same,
    )


def _axes(graph: Graph) -> dict[str, Dims]:
    """Of leaves, and of inputs."""
    traced = graph._traced
    inputs = (f"{INPUT}{p}" for p in traced.input_paths)
    return {
        **dict(zip(traced.paths, traced.dims, strict=True)),
        **dict(zip(inputs, traced.inputs, strict=True)),
    }


def _units(graph: Graph, choices: Mapping[str, Choice]) -> tuple[Kept, Tables]:
    """What the function runs with, and which units these are where they differ.

    It runs as if all layers and heads kept the first ones.
    """
    owners = graph._owners() if any(c.kept.ndim > 1 for c in choices.values()) else {}
    units: dict[Dim, np.ndarray] = {}
    tables: Tables = {}
    for g in graph.groups:
        leaf, chosen = g.members[0]._leaf, choices[g.name].kept
        if chosen.shape[-1] == g.size:
            continue
        units[leaf] = np.arange(g.size) < chosen.shape[-1]
        if chosen.ndim > 1:
            tables[leaf] = owners[leaf], chosen
        else:
            units[leaf] = np.isin(np.arange(g.size), chosen)
    return Kept(units), tables


def _cuts(graph: Graph, places: Kept, tables: Tables) -> tuple[Cuts, Cuts]:
    """What is kept of each axis; and, where units differ, of what the function runs with."""
    dims, cuts, same = _axes(graph), {}, {}
    for m in (m for g in graph.groups for m in g.members):
        if not places.changed(m._dim):
            continue
        at = places.places(m._dim)
        if tables.keys() & set(_dims.leaves(m._dim)):
            same.setdefault(m.path, {})[m.axis] = at
            at = _local.places(dims[m.path], m.axis, at, tables)
        cuts.setdefault(m.path, {})[m.axis] = at
    return cuts, same


def _apart(member: Member, dims: Dims, tables: Tables) -> Apart:
    """Where the units of a member and of its owners lie."""
    owners, _ = tables[member._leaf]
    leaves = [member._leaf, *owners]
    axes = [member.axis, *(_local.axis_of(dims, member.axis, h) for h in owners)]
    units = [_dims.units(dims[i], x) for i, x in zip(axes, leaves, strict=True)]
    return Apart(member.path, tuple(axes), tuple(units))


def _chosen(graph: Graph, kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Numbers of units, by the name that each group has."""
    found: dict[str, np.ndarray] = {}
    for name, units in kept.items():
        try:
            g = graph[name]
        except KeyError as error:
            raise ValueError(f"kept: {error.args[0]}") from None
        chosen = _numbers(graph, g, units)
        few = chosen.shape[-1] < g.minimum or not chosen.size
        if few or chosen.min() < 0 or chosen.max() >= g.size:
            raise ValueError(
                f"kept: got {chosen.tolist()} for {g.name}; expected at least {g.minimum} "
                f"numbers from 0 to {g.size - 1}."
            )
        if not np.array_equal(found.setdefault(g.name, chosen), chosen):
            raise ValueError(
                f"kept: {name!r} is the group {g.name}, of which other units are kept under "
                "another name. Name each group once."
            )
    return found


def _numbers(graph: Graph, group: Group, units: Any) -> np.ndarray:
    """Sorted, [kept] or [*owners, kept]."""
    x = np.asarray(units)
    if x.dtype == bool and x.shape == (group.size,):
        return np.flatnonzero(x)
    whole = np.issubdtype(x.dtype, np.integer) or not x.size
    if whole and x.ndim == 1:
        return np.unique(x.astype(int))
    within = graph.within(group.name)
    sizes = tuple(graph[h].size for h in within)
    chosen = np.sort(x.astype(int), -1) if whole else x
    if not whole or x.shape[:-1] != sizes or (np.diff(chosen) == 0).any():
        apart = (
            f"; or, for each unit of {', '.join(within)}, as many different numbers, of the "
            f"shape {(*sizes, 'kept')}" if within else ""
        )  # fmt: skip
        raise ValueError(
            f"kept: got an array of {x.dtype} and shape {x.shape} for {group.name}; expected "
            f"a list of whole numbers, or {group.size} booleans, True for what is kept{apart}."
        )
    return chosen
