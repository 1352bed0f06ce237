"""Týr-the-Pruner: how much each group loses is searched for, among variants made before."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.calibration import Statistics
from jaxprune.structured import _obs
from jaxprune.structured._biases import replaced
from jaxprune.structured._flap import UNITS, unit_costs
from jaxprune.structured._kinds import Kind
from jaxprune.structured._plan import Plan
from jaxprune.structured._planned import planned
from jaxprune.structured._trace import Graph


@dataclasses.dataclass(frozen=True, eq=False)
class Supernet:
    """Variants of each group, pruned by themselves, to be put together.

    Attributes:
      ratios: what the levels remove of a group, rising.
      kept: by group, the units that stay at each level.
      leaves: by group, the leaves that were fitted at each level, by path.
      mass: by group, the parameters that one level more removes, about.
    """

    ratios: tuple[float, ...]
    kept: dict[str, tuple[np.ndarray, ...]]
    leaves: dict[str, tuple[dict[str, Array], ...]]
    mass: dict[str, float]
    _graph: Graph = dataclasses.field(repr=False)

    def plan(self, levels: Mapping[str, int]) -> Plan:
        """The plan that keeps what the levels of the groups keep."""
        self._check(levels)
        return planned(self._graph, {n: self.kept[n][i] for n, i in levels.items()})

    def params(self, levels: Mapping[str, int], params: PyTree) -> PyTree:
        """The parameters, of full size, with the leaves that were fitted."""
        self._check(levels)
        new: dict[str, Array] = {}
        for name, level in levels.items():
            new |= self.leaves[name][level]
        return replaced(params, new)

    def _check(self, levels: Mapping[str, int]) -> None:
        wrong = {n: i for n, i in levels.items() if not 0 <= i < len(self.ratios)}
        if wrong or levels.keys() != self.kept.keys():
            raise ValueError(
                f"levels: got {dict(levels)}; expected a number from 0 to "
                f"{len(self.ratios) - 1} for each of {_tree.listing(list(self.kept))}."
            )


def supernet(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    *,
    ratios: Sequence[float],
    rounds: int = 16,
    damping: float = 0.01,
    kinds: Sequence[Kind] = UNITS,
) -> Supernet:
    """Prunes each group at each ratio by `obs_plan`, and fits what reads it by `refit`.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate` with `"gram"`.
      ratios: levels, evenly spaced, from the least: `(0.0, 0.125, 0.25, 0.375, 0.5)`.
      rounds: see `obs_plan`.
      damping: see `refit`.
      kinds: of groups to prune.

    Raises:
      ValueError: as `refit`; if ratios do not rise evenly in [0, 1), or two groups are
        read by one leaf, which then cannot be fitted for each by itself.

    References:
      Li et al., "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution
      Optimization", arXiv 2503.09657, and their code. There, what earlier layers lose at
      the expected ratio is seen by later ones; here all statistics are of the full model.
    """
    steps = np.diff(ratios)
    if len(ratios) < 2 or not np.allclose(steps, steps[0]) or steps[0] <= 0:
        raise ValueError(
            f"ratios: got {tuple(ratios)!r}; expected two or more that rise evenly, such as "
            "(0.0, 0.25, 0.5)."
        )
    kept: dict[str, tuple[np.ndarray, ...]] = {}
    leaves: dict[str, tuple[dict[str, Array], ...]] = {}
    read: dict[str, str] = {}
    found = _obs.locals_of(graph, params, statistics, damping, kinds)
    for name, local in found.items():
        levels = []
        for ratio in ratios:
            n = max(round(local.size * (1 - float(ratio))), graph[name].minimum)
            levels.append(local.chosen(n, rounds))
        kept[name] = tuple(levels)
        leaves[name] = tuple(
            _fitted(graph, params, statistics, {name: units}, damping)
            for units in levels
        )
        for path in {p for fitted in leaves[name] for p in fitted}:
            if read.setdefault(path, name) != name:
                raise ValueError(
                    f"graph: {path} reads {read[path]} and {name}, so that it cannot be "
                    "fitted for each by itself. Leave one of them out with kinds=."
                )
    costs = unit_costs(graph)
    mass = {n: costs[n] * graph[n].size * float(steps[0]) for n in kept}
    return Supernet(tuple(map(float, ratios)), kept, leaves, mass, graph)


def _fitted(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    units: dict[str, np.ndarray],
    damping: float,
) -> dict[str, Array]:
    """The leaves that read a group, fitted, with zeros for what is removed."""
    plan = planned(graph, units)
    new = _obs.refit(plan, params, statistics, damping=damping)
    paths, old, _ = _tree.flatten(params)
    rest = zip(paths, old, *(_tree.flatten(t)[1] for t in (new, plan.mask(new))),
               strict=True)  # fmt: skip
    return {p: masked for p, x, fitted, masked in rest if fitted is not x}


class Search(NamedTuple):
    """What a search has found.

    Attributes:
      levels: by group, for `Supernet.plan` and `Supernet.params`.
      fitness: of these levels.
      history: of the best, at the start and after each generation.
    """

    levels: dict[str, int]
    fitness: float
    history: tuple[float, ...]


def search(
    net: Supernet,
    params: PyTree,
    fitness: Callable[[PyTree], Any],
    *,
    start: int | Mapping[str, int],
    key: Array,
    generations: int = 50,
    offspring: int = 32,
) -> Search:
    """Looks for the levels of least `fitness`, at the same number of parameters.

    From the best so far, each of `offspring` variants moves one level from one group to
    another of the same kind and the same number of parameters, one to four times, mostly
    few; the best of them and of what there was goes on. So the budget is that of the
    start, and the fitness never rises. For finer levels, make another supernet around
    what was found, and search again.

    Args:
      net: of `supernet`.
      params: the parameters that it was made from.
      fitness: of parameters of full size, less is better: such as `divergence`.
      start: level of all groups, or `{group: level}`.
      key: of `jax.random.key`.
      generations: how often.
      offspring: tried in each.

    Raises:
      ValueError: if levels are none of the supernet, or no group has a partner.

    References:
      Li et al., arXiv 2503.09657, and their code, whose selection is in several steps of
      more and more tokens; here each variant sees the same.
    """
    levels = dict.fromkeys(net.kept, start) if isinstance(start, int) else dict(start)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    best = float(fitness(net.params(levels, params)))
    if not _moves(net, levels):
        raise ValueError(
            f"start: from the levels {levels} nothing can be moved: no two groups of one kind "
            "and one number of parameters have a level below and a level above. Start "
            "between the ends, or give more ratios."
        )
    history = [best]
    for _ in range(generations):
        parent, tried = levels, {tuple(levels.values())}
        for _ in range(offspring):
            new = _mutated(net, parent, random)
            if tuple(new.values()) in tried:
                continue
            tried.add(tuple(new.values()))
            found = float(fitness(net.params(new, params)))
            if found < best:
                best, levels = found, new
        history.append(best)
    return Search(levels, best, tuple(history))


def divergence(
    fn: Callable[..., Any], params: PyTree, batches: Iterable[Any]
) -> Callable[[PyTree], float]:
    """Mean divergence of Kullback and Leibler of logits from those of these parameters.

    Args:
      fn: `fn(params, *args)` gives logits `[..., classes]`.
      params: of the full model.
      batches: tuples of arguments `args`; anything else is one argument. They are kept, with
        the logits.

    Returns:
      A function from parameters of the same shapes to the divergence, over all tokens.

    Raises:
      ValueError: if there is no batch.
    """
    run = jax.jit(fn)
    known = []
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        known.append((args, run(params, *args)))
    if not known:
        raise ValueError("batches: there is none; expected at least one.")

    @jax.jit
    def total(params: PyTree, args: tuple[Any, ...], wanted: Array) -> Array:
        p, q = (jax.nn.log_softmax(x.astype(jnp.float32))
                for x in (wanted, fn(params, *args)))  # fmt: skip
        return jnp.sum(jnp.exp(p) * (p - q))

    tokens = sum(y.size // y.shape[-1] for _, y in known)
    return lambda params: sum(float(total(params, *x)) for x in known) / tokens


def _moves(net: Supernet, levels: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of groups, of which the first may lose less and the second more."""
    last = len(net.ratios) - 1
    kinds = {n: net._graph[n].kind for n in levels}
    return [
        (a, b)
        for a in levels for b in levels
        if a != b and levels[a] > 0 and levels[b] < last
        and kinds[a] == kinds[b] and np.isclose(net.mass[a], net.mass[b])
    ]  # fmt: skip


def _mutated(
    net: Supernet, levels: Mapping[str, int], random: np.random.Generator
) -> dict[str, int]:
    new = dict(levels)
    for _ in range(min(random.integers(1, 5, 2))):
        if moves := _moves(net, new):
            a, b = moves[random.integers(len(moves))]
            new[a], new[b] = new[a] - 1, new[b] + 1
    return new
