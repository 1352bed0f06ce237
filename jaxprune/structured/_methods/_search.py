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
from jaxprune.calibration import Statistics, calibrate
from jaxprune.structured._methods import _consumers, _obs
from jaxprune.structured._methods._biases import replaced
from jaxprune.structured._methods._flap import UNITS, unit_costs
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._methods._taps import TokenWeights
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._planned import planned
from jaxprune.structured._reading._graph import Graph, Group
from jaxprune.structured._reading._kinds import Kind


@dataclasses.dataclass(frozen=True, eq=False)
class Supernet:
    """Variants of each group, to be put together; at each level a group loses more.

    Attributes:
      ratios: by group, the share of its units that each level removes, rising.
      start: by group, the level of the expected ratio.
      kept: by group, the units that stay at each level.
      leaves: by group, the leaves that were fitted at each level, by path.
      mass: by group, the parameters that one level more removes.
    """

    ratios: dict[str, tuple[float, ...]]
    start: dict[str, int]
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
        known = levels.keys() == self.kept.keys()
        if not known or any(not 0 <= levels[n] < len(x) for n, x in self.kept.items()):
            wanted = [f"{n}: 0 to {len(x) - 1}" for n, x in self.kept.items()]
            raise ValueError(
                f"levels: got {dict(levels)}; expected a number for each group, "
                f"{_tree.listing(wanted)}."
            )


def supernet(
    graph: Graph,
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    ratio: float | Mapping[str, float],
    step: float = 0.125,
    levels: int = 9,
    rounds: int = 16,
    damping: float = 0.01,
    kinds: Sequence[Kind] = UNITS,
    token_weights: TokenWeights = None,
) -> Supernet:
    """Prunes each group at some ratios as `obs_plan` does, and fits what reads it.

    Groups come in the order in which the function reads them. The variants of each are made
    from what goes into its products in the function whose earlier groups have lost the
    expected `ratio`, and fitted there by `refit`, to what its weights gave for these inputs
    before: what earlier groups lose is seen, not made up for. Groups in the layers of one
    scan are one group, and see nothing of each other.

    To refine what `search` has found, make another supernet around it, with a smaller step.
    With a ratio of 0 nothing is expected to be lost, and all variants are made from what
    goes into the products of the full model.

    It costs, for each group, a run of `jaxprune.calibrate` with the Gram matrices of what
    reads it: a compilation, and forward passes that end where the group is read.

    Args:
      graph: of `trace`.
      fn: the function that was traced: `fn(params, *args)`.
      params: the parameters that it was traced with.
      batches: tuples of arguments `args`; anything else is one argument. They are kept, as
        each group sees all of them.
      ratio: share of the units of a group that is expected to go, or `{group: ratio}`;
        groups without a ratio are left out. By one share for all, query heads go with
        their keys and values, where several have the same.
      step: share of the units of a group that one level more removes, at least one unit.
        0.125 is the paper's, which then takes halves of it.
      levels: at most how many, an odd number: the expected ratio, and as many on each side
        as there are units to go or to stay.
      rounds: see `obs_plan`; for each level, going on from the one before it.
      damping: see `refit`.
      kinds: of groups to prune.
      token_weights: see `jaxprune.calibrate`.

    Raises:
      ValueError: as `refit`; if an option is out of range, a group is not known, or two
        groups are read by one leaf, which then cannot be fitted for each by itself.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.eye(4), "down": jnp.arange(1.0, 5.0)[:, None]}
      >>> x = jnp.eye(4)
      >>> graph = jp.structured.trace(fn, params, x)
      >>> given = graph, fn, params, [x]
      >>> net = jp.structured.supernet(*given, ratio=0.5, step=0.25, levels=3)
      >>> net.ratios, net.start
      ({'down:0': (0.25, 0.5, 0.75)}, {'down:0': 1})
      >>> [kept.tolist() for kept in net.kept["down:0"]]
      [[1, 2, 3], [2, 3], [3]]
      >>> levels = {"down:0": 2}  # as a search would find them
      >>> found = {name: net.ratios[name][i] for name, i in levels.items()}
      >>> finer = jp.structured.supernet(*given, ratio=found, step=0.125, levels=3)
      >>> finer.ratios
      {'down:0': (0.5, 0.75)}

    References:
      Li et al., "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution
      Optimization", arXiv 2503.09657, of which the abstract and the authors' summary were
      read, and their code. What stands for the layers in front is there the variant at the
      expected ratio, as here; the mean of all variants, by what they keep, is commented out
      as the slower form. There, attention and MLP of one block see the same error; here the
      MLP sees that of its attention too. Their variants are each made anew; here a level
      keeps part of what the one before it keeps.
    """
    _check_options(step, levels)
    batches, known = list(batches), by_path(graph, params, "params")
    order, costs = _in_order(graph, params, kinds), unit_costs(graph)
    net, expected = Supernet({}, {}, {}, {}, {}, graph), params
    for name, share in _shares(graph, order, ratio).items():
        group, reading = graph[name], order[name]
        statistics = calibrate(
            fn, expected, batches, statistics=("gram",), token_weights=token_weights,
            where=lambda path, _, reading=reading: path in reading,
        )  # fmt: skip
        local = _obs.local_of(group, known, statistics, damping)
        if local is None:
            raise _consumers.nothing_scored(graph, statistics.paths, kinds)
        each, sizes, start = _sizes(group, share, step, levels)
        kept = tuple(local.chosen(n, rounds) for n in sizes)
        net.kept[name], net.start[name] = kept, start
        net.ratios[name] = tuple(1 - n / group.size for n in sizes)
        net.mass[name] = costs[name] * each
        net.leaves[name] = tuple(
            _fitted(graph, params, statistics, {name: units}, damping) for units in kept
        )
        expected = replaced(expected, net.leaves[name][start])
    return net


def _check_options(step: float, levels: int) -> None:
    if not 0 < step < 1:
        raise ValueError(
            f"step: got {step!r}; expected a share in (0, 1), such as 0.1."
        )
    if levels < 3 or levels % 2 == 0:
        raise ValueError(
            f"levels: got {levels!r}; expected an odd number, 3 or more: the expected ratio "
            "and as many on each side."
        )


def _in_order(
    graph: Graph, params: PyTree, kinds: Sequence[Kind]
) -> dict[str, frozenset[str]]:
    """The leaves that read each group, in the order in which groups are first read."""
    sites = _consumers.trace_of(graph, params).sites
    first, found = {}, {}
    for group in _consumers.groups_of(graph, kinds):
        numbers = _consumers.readers(group, sites)
        if numbers:
            first[group.name] = numbers[0]
            found[group.name] = frozenset(sites[i].path for i in numbers)
    if not found:
        paths = tuple(dict.fromkeys(s.path for s in sites))
        raise _consumers.nothing_scored(graph, paths, kinds)
    return {name: found[name] for name in sorted(found, key=lambda n: first[n])}


def _coarsest(graph: Graph, order: Mapping[str, frozenset[str]]) -> list[str]:
    """The groups, without query heads of which a leaf reads the groups of keys too."""
    shared = [order[n] for n in order if graph[n].kind == "kv_group"]
    return [
        n for n in order
        if graph[n].kind != "head" or not any(order[n] & paths for paths in shared)
    ]  # fmt: skip


def _shares(
    graph: Graph,
    order: Mapping[str, frozenset[str]],
    ratio: float | Mapping[str, float],
) -> dict[str, float]:
    """The expected ratio of each group that has one, in order."""
    if isinstance(ratio, Mapping):
        given = ratio
    else:
        given = dict.fromkeys(_coarsest(graph, order), ratio)
    odd = [n for n in given if n not in order]
    if odd or not given:
        raise ValueError(
            f"ratio: got {_tree.listing(odd)}; expected some of the groups that can be "
            f"fitted, which are {_tree.listing(list(order))}."
        )
    read: dict[str, str] = {}
    for name in (n for n in order if n in given):
        if not 0 <= given[name] < 1:
            raise ValueError(
                f"ratio: got {given[name]!r} for {name}; expected a share in [0, 1)."
            )
        for path in order[name]:
            if read.setdefault(path, name) != name:
                raise ValueError(
                    f"graph: {path} reads {read[path]} and {name}, so that it cannot be "
                    "fitted for each by itself. Leave one of them out with kinds= or ratio=."
                )
    return {n: float(given[n]) for n in order if n in given}


def _sizes(
    group: Group, ratio: float, step: float, levels: int
) -> tuple[int, list[int], int]:
    """Units in one level, how many stay at each, and the level of the expected ratio."""
    most = group.size - max(group.minimum, 1)
    gone = min(round(ratio * group.size), most)
    each = max(round(step * group.size), 1)
    below, above = (min(x // each, levels // 2) for x in (gone, most - gone))
    sizes = [group.size - gone - each * i for i in range(-below, above + 1)]
    return each, sizes, below


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
    key: Array,
    start: Mapping[str, int] | None = None,
    generations: int = 50,
    offspring: int = 32,
) -> Search:
    """Looks for the levels of least `fitness`, at the same number of parameters.

    From the best so far, each of `offspring` variants moves one level from one group to
    another of the same kind and the same number of parameters, one to four times, mostly
    few; the best of them and of what there was goes on. So the budget is that of the
    start, and the fitness never rises. For finer levels, make another `supernet` around
    what was found, and search again: the paper does it four times, each with half the step.

    Args:
      net: of `supernet`.
      params: the parameters that it was made from.
      fitness: of parameters of full size, less is better: such as `divergence`.
      key: of `jax.random.key`.
      start: `{group: level}`; by default those of the expected ratios.
      generations: how often.
      offspring: tried in each.

    Raises:
      ValueError: if levels are none of the supernet, or no group has a partner.

    References:
      Li et al., arXiv 2503.09657, and their code, whose selection is in several steps of
      more and more tokens; here each variant sees the same.
    """
    levels = dict(net.start if start is None else start)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    best = float(fitness(net.params(levels, params)))
    if not np.isfinite(best):
        raise ValueError(
            f"fitness: it is {best} at the start; expected a finite number. Look for values "
            "that are none in its data, or in what it computes."
        )
    if not _moves(net, levels):
        raise ValueError(
            f"start: from the levels {levels} nothing can be moved: no two groups of one kind "
            "and one number of parameters have a level below and a level above. Start "
            "between the ends, or make a supernet of more levels."
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
        apart = jnp.where(p == -jnp.inf, 0, p - q)  # of what never comes
        return jnp.sum(jnp.exp(p) * apart)

    tokens = sum(y.size // y.shape[-1] for _, y in known)
    return lambda params: sum(float(total(params, *x)) for x in known) / tokens


def _moves(net: Supernet, levels: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of groups, of which the first may lose less and the second more."""
    kinds = {n: net._graph[n].kind for n in levels}
    return [
        (a, b)
        for a in levels for b in levels
        if a != b and levels[a] > 0 and levels[b] + 1 < len(net.kept[b])
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
