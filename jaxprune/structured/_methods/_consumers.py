"""Where the units of a group are multiplied with weights, and what is known of them there."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.calibration import Inputs, Statistics
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._reading import _kinds
from jaxprune.structured._reading._graph import Graph, Group
from jaxprune.structured._reading._kinds import Kind
from jaxprune.tracing import Site, Trace, of_jaxpr

Score = Callable[[Array, Inputs], Array]


class Consumer(NamedTuple):
    """A product that sums over the units of a group.

    Attributes:
      site: where; `site.to_matrix(leaf)` is `[stack, batch, K, N]`.
      inputs: statistics of what the leaf is multiplied with there.
      units: for each input the unit that it belongs to, or -1, `[stack, batch, K]`.
    """

    site: Site
    inputs: Inputs
    units: np.ndarray

    def matrix(self, params: dict[str, Array]) -> Array:
        """The weights `[stack, batch, K, N]`, in float32 at least."""
        leaf = jnp.asarray(params[self.site.path])
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        return self.site.to_matrix(leaf).astype(wide)

    def pooled(
        self, values: Array | np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums of values `[stack, batch, K]` over the places of each unit, and how many."""
        places, values = self.units.reshape(-1), np.asarray(values, np.float64)
        hit = places >= 0
        sums = np.bincount(places[hit], values.reshape(-1)[hit], minlength=size)
        return sums, np.bincount(places[hit], minlength=size)


def consumers(group: Group, statistics: Statistics) -> tuple[Consumer, ...]:
    """The products that sum over the units of a group, where statistics are known.

    Those that stand side by side for each unit, as the matrices of experts do, do not
    sum over them, and are left out.
    """
    found = []
    for member in group.members:
        if member.path not in statistics:
            continue
        for site, inputs in statistics[member.path]:
            units = units_of_inputs(site, member.units, member.axis)
            if units is not None:
                found.append(Consumer(site, inputs, units))
    return tuple(found)


def readers(group: Group, sites: Sequence[Site]) -> list[int]:
    """Numbers of the products that sum over the units of a group, as for `consumers`."""
    return [
        i
        for i, site in enumerate(sites)
        if any(
            m.path == site.path and units_of_inputs(site, m.units, m.axis) is not None
            for m in group.members
        )
    ]


def units_of_inputs(site: Site, units: np.ndarray, axis: int) -> np.ndarray | None:
    """The unit of each input, `[stack, batch, K]`; `None` if the axis is not contracted."""
    shape = [-1 if i == axis else 1 for i in range(len(site.shape))]
    places = np.broadcast_to(units.astype(np.int32).reshape(shape), site.shape)
    matrices = np.asarray(site.to_matrix(jnp.asarray(places)))  # [stack, batch, K, N]
    first = matrices[..., :1]
    if (matrices != first).any() or (first == first[..., :1, :]).all():
        return None
    return first[..., 0]


def trace_of(graph: Graph, params: PyTree) -> Trace:
    """Where the leaves are used in the function that was traced."""
    program = graph._traced.program
    closed = ClosedJaxpr(program.jaxpr, list(program.consts))
    return of_jaxpr(closed, params)


def groups_of(graph: Graph, kinds: Sequence[Kind]) -> Iterator[Group]:
    """The groups of some kinds."""
    wanted = _kinds.wanted(kinds)
    return (g for g in graph.groups if g.kind in wanted)


def score_inputs(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    score: Score,
    *,
    kinds: Sequence[Kind],
) -> dict[str, np.ndarray]:
    """Scores of the inputs of products, summed over those that belong to a unit.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate`.
      score: `score(weights [stack, batch, K, N], inputs) -> [stack, batch, K]`.
      kinds: of groups to score.

    Returns:
      Scores [units] by name of the group. Groups whose units no product sums over, or
      none with statistics, have no score.
    """
    leaves = by_path(graph, params, "params")
    found = {}
    for group in groups_of(graph, kinds):
        uses = consumers(group, statistics)
        if uses:
            found[group.name] = sum(
                use.pooled(score(use.matrix(leaves), use.inputs), group.size)[0]
                for use in uses
            )
    if not found:
        raise nothing_scored(graph, statistics.paths, kinds)
    return found


def nothing_scored(
    graph: Graph, paths: Sequence[str], kinds: Sequence[Kind]
) -> ValueError:
    """The error where no group has a consumer among the leaves at these paths."""
    groups = [f"{g.name} ({g.kind})" for g in graph.groups]
    return ValueError(
        f"kinds, statistics: no product with statistics sums over the units of a group of "
        f"the kinds {tuple(kinds)}. The groups are: {_tree.listing(groups)}; statistics are "
        f"known of: {_tree.listing(paths)}."
    )


def statistic(caller: str, inputs: Inputs, name: str) -> Array:
    """A statistic of the inputs.

    Raises:
      ValueError: if it was not collected.
    """
    found = getattr(inputs, name)
    if found is None:
        raise ValueError(
            f"statistics: {caller} needs {name!r}, which was not collected. Pass "
            f"statistics=({name!r},) to jaxprune.calibrate."
        )
    return found


def check_fits(site: Site, leaf: Array) -> None:
    """Raises `ValueError` unless new weights can be written into a leaf."""
    why = ""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        why = f"has the type {leaf.dtype}"
    elif site.wraps:
        why = f"goes through {_tree.listing(list(site.wraps))} before it is multiplied"
    if why:
        raise ValueError(
            f"params: {site.path} loses inputs and {why}, so that no new weights can be "
            "written into it. Keep its inputs, or give it as the matrix that is multiplied."
        )


def check_alike(plan: Plan) -> None:
    """Refuses plans with other units in each layer or head."""
    if plan.apart:
        raise ValueError(
            f"plan: {_tree.listing(list(plan.apart))} keep other units in each layer or head, "
            "for which no weights are fitted here. Pass numbers without an axis for owners to "
            "planned, so that all keep the same, or leave this step out."
        )


def kept_inputs(plan: Plan, site: Site) -> np.ndarray | None:
    """Which inputs of a product a plan keeps, `[stack, batch, K]`; `None` if all."""
    kept: np.ndarray | None = None
    for axis, places in plan.cuts.get(site.path, {}).items():
        mask = np.zeros(site.shape[axis], bool)
        mask[places] = True
        shape = [-1 if i == axis else 1 for i in range(len(site.shape))]
        whole = np.broadcast_to(mask.reshape(shape), site.shape)
        matrices = np.asarray(site.to_matrix(jnp.asarray(whole)))
        by_input = np.asarray(
            matrices.any(axis=-1)
        )  # an axis that is produced loses no input
        kept = by_input if kept is None else np.logical_and(kept, by_input)
    return None if kept is None or kept.all() else kept


def units_of_outputs(site: Site, units: np.ndarray, axis: int) -> np.ndarray:
    """The unit of each output `[N]` of a product with one matrix."""
    shape = [-1 if i == axis else 1 for i in range(len(site.shape))]
    places = np.broadcast_to(units.astype(np.int32).reshape(shape), site.shape)
    return np.asarray(site.to_matrix(jnp.asarray(places)))[0, 0, 0]
