"""Optimal Brain Surgeon for whole units: what goes least, and how the rest takes over."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.calibration import Inputs, Statistics
from jaxprune.structured._methods import _consumers
from jaxprune.structured._methods._biases import replaced
from jaxprune.structured._methods._consumers import Consumer, statistic
from jaxprune.structured._methods._flap import UNITS
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._planned import planned
from jaxprune.structured._reading._graph import Graph, Group
from jaxprune.structured._reading._kinds import Kind


def refit(
    plan: Plan, params: PyTree, statistics: Statistics, *, damping: float = 0.01
) -> PyTree:
    """The best weights for products that lose inputs: exact least squares.

    For `x W` that keeps the inputs S, `W_S` becomes `H_SS⁻¹ H_S: W`, with
    `H = E[x xᵀ] + damping · mean(diag) I`: of all weights on S these give the nearest
    outputs. It is what the steps of Optimal Brain Surgeon come to,
    `W -= H⁻¹_:P (H⁻¹_PP)⁻¹ W_P` for the inputs P that go, one by one or together.

    Args:
      plan: what is kept.
      params: of full size.
      statistics: of `jaxprune.calibrate` with `"gram"`, of these parameters.
      damping: share of the mean of the diagonal; it holds weights to what they were.

    Returns:
      The parameters, of full size, with new weights where inputs are kept: for
      `plan.shrink`. Solved in float64 on the host. Leaves without statistics stay.

    Raises:
      ValueError: if a statistic is missing, damping is out of range or too small for the
        matrix to be inverted, or a leaf has several products, is quantized, or goes
        through a mask or a scale.

    Example:
      >>> def fn(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((1, 2)), "down": jnp.array([[1.0], [2.0]])}
      >>> x = jnp.array([[1.0], [-1.0]])
      >>> graph = jp.structured.trace(fn, params, x)
      >>> stats = jp.calibrate(fn, params, [x], statistics=("gram",))
      >>> plan = jp.structured.planned(graph, {"down:0": [0]})
      >>> new = jp.structured.refit(plan, params, stats, damping=1e-6)
      >>> new["down"].round(4).tolist()  # the first takes over what the second gave
      [[3.0], [2.0]]

    References:
      Wang et al., "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
      arXiv 2403.18955 (OBSPA), of which the update is known here and the rest was not read;
      Li et al., "Týr-the-Pruner", arXiv 2503.09657, whose code ends with the same solution.
    """
    _check_damping(damping)
    _consumers.check_alike(plan)
    paths, leaves, _ = _tree.flatten(params)
    known = dict(zip(paths, leaves, strict=True))
    new = {}
    for path in plan.cuts:
        lost = []
        for use in statistics[path] if path in statistics else ():
            kept = _consumers.kept_inputs(plan, use.site)
            if kept is not None:
                lost.append((use, kept))
        if len(lost) > 1:
            raise ValueError(
                f"plan: {path} loses inputs in {len(lost)} products, which may need different "
                "weights. Keep its inputs with overrides= of the plan."
            )
        for use, kept in lost:
            _consumers.check_fits(use.site, known[path])
            w = np.asarray(use.site.to_matrix(known[path]), np.float64)
            h = _damped(use.inputs, damping)
            each = [
                _solved(w[i], h[i], kept[i], path) for i in np.ndindex(*w.shape[:2])
            ]
            fitted = jnp.asarray(np.reshape(each, w.shape), jnp.float32)
            new[path] = use.site.from_matrix(fitted, known[path])
    return replaced(params, new)


def obs_scores(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    *,
    damping: float = 0.01,
    kinds: Sequence[Kind] = UNITS,
) -> dict[str, np.ndarray]:
    """Scores of units: what removing one costs after the best update of the others.

    `½ tr(W_Pᵀ (H⁻¹_PP)⁻¹ W_P)` for the inputs P of a unit, summed over the products that
    read it: half the increase of the mean squared error of their outputs.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate` with `"gram"`.
      damping: see `refit`.
      kinds: of groups to score.

    Returns:
      Scores [units] by name of the group.

    Raises:
      ValueError: as `refit`, or if no product sums over any of these units.
    """
    found = {}
    for name, local in locals_of(graph, params, statistics, damping, kinds).items():
        found[name] = local.scores()
    return found


def obs_plan(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    *,
    ratio: float | Mapping[str, float],
    rounds: int = 1,
    damping: float = 0.01,
    kinds: Sequence[Kind] = UNITS,
    min_keep: int = 1,
) -> Plan:
    """A plan by `obs_scores`, which are found anew after each round of removals.

    In each round the units of the lowest scores go and the weights are updated, so that
    of two units that do the same, only one goes. `refit` then gives the weights.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate` with `"gram"`.
      ratio: share of the units of each group to remove, or `{group: ratio}`; groups
        without a ratio keep all.
      rounds: at most as many as units that go. Týr-the-Pruner takes 16 for neurons.
      damping: see `refit`.
      kinds: of groups to prune.
      min_keep: the least number kept in a group.

    Raises:
      ValueError: as `refit`, or if a number is out of range.

    References:
      As `refit`. Týr's scores add a term of first order; it is 0 for dense weights here.
    """
    if rounds < 1 or min_keep < 1:
        raise ValueError(
            f"rounds, min_keep: got {rounds!r} and {min_keep!r}; expected 1 or more."
        )
    kept = {}
    for name, local in locals_of(graph, params, statistics, damping, kinds).items():
        share = ratio if isinstance(ratio, int | float) else ratio.get(name, 0.0)
        if not 0 <= share < 1:
            raise ValueError(
                f"ratio: got {share!r} for {name}; expected a share in [0, 1)."
            )
        least = max(min_keep, graph[name].minimum)
        kept[name] = local.chosen(max(round(local.size * (1 - share)), least), rounds)
    return planned(graph, kept)


class _Local:
    """The products that read a group, while its units go."""

    def __init__(self, size: int, uses: Sequence[Consumer], leaves, damping: float):
        self.size = size
        self.alive = np.ones(size, bool)
        self.parts = []
        for use in uses:
            w = np.asarray(use.matrix(leaves), np.float64)
            h = _damped(use.inputs, damping)
            for i in np.ndindex(*w.shape[:2]):
                inverse = _inverse(h[i], use.site.path)
                self.parts.append((w[i].copy(), inverse, use.units[i]))

    def scores(self) -> np.ndarray:
        found = np.zeros(self.size)
        for w, inverse, units in self.parts:
            if np.bincount(units[units >= 0]).max() == 1:  # a unit is one input
                each, diagonal = np.sum(w * w, axis=1), np.diagonal(inverse)
                each = np.where(diagonal > 0, each / np.maximum(diagonal, 1e-300), 0)
                found[units[units >= 0]] += each[units >= 0] / 2
                continue
            for u in range(self.size):
                at = np.flatnonzero(units == u)
                block = inverse[np.ix_(at, at)]
                if len(at) and block.any():  # those that are gone are 0
                    found[u] += np.sum(w[at] * np.linalg.solve(block, w[at])) / 2
        return found

    def chosen(self, n: int, rounds: int) -> np.ndarray:
        """The `n` units that stay, of those that are left."""
        left = max(int(self.alive.sum()) - n, 0)
        for some in np.array_split(np.arange(left), min(rounds, left) or 1):
            scores = np.where(self.alive, self.scores(), np.inf)
            self.remove(np.argsort(scores, kind="stable")[: len(some)])
        return np.flatnonzero(self.alive)

    def remove(self, gone: np.ndarray) -> None:
        """Updates weights and inverses for units that go."""
        self.alive[gone] = False
        for w, inverse, units in self.parts:
            at = np.flatnonzero(np.isin(units, gone))
            if not len(at):
                continue
            factor = np.linalg.solve(inverse[np.ix_(at, at)], inverse[at])
            w -= factor.T @ w[at]
            inverse -= inverse[:, at] @ factor
            for x in (w, inverse, inverse.T):
                x[at] = 0


def locals_of(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    damping: float,
    kinds: Sequence[Kind],
) -> dict[str, _Local]:
    """What reads each group."""
    leaves = by_path(graph, params, "params")
    found: dict[str, _Local] = {}
    for group in _consumers.groups_of(graph, kinds):
        local = local_of(group, leaves, statistics, damping)
        if local is not None:
            found[group.name] = local
    if not found:
        raise _consumers.nothing_scored(graph, statistics.paths, kinds)
    return found


def local_of(
    group: Group, leaves: dict[str, Array], statistics: Statistics, damping: float
) -> _Local | None:
    """What reads a group; `None` if nothing does, where statistics are known."""
    _check_damping(damping)
    uses = _consumers.consumers(group, statistics)
    return _Local(group.size, uses, leaves, damping) if uses else None


def _damped(inputs: Inputs, damping: float) -> np.ndarray:
    gram = np.asarray(statistic("the update", inputs, "gram"), np.float64)
    k = gram.shape[-1]
    diagonal = gram[..., range(k), range(k)]
    mean = diagonal.mean(axis=-1)
    share = np.where(mean > 0, damping * mean, 1.0)
    return gram + share[..., None, None] * np.eye(k)


def _solved(w: np.ndarray, h: np.ndarray, kept: np.ndarray, path: str) -> np.ndarray:
    """The weights on what is kept; others as they were."""
    at = np.flatnonzero(kept)
    new = w.copy()
    new[at] = _inverse(h[np.ix_(at, at)], path) @ (h[at] @ w)
    return new


def _inverse(h: np.ndarray, path: str) -> np.ndarray:
    try:
        lower = np.linalg.cholesky(h)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"damping: the matrix of the inputs of {path} is not positive definite. Give "
            "more damping, or more batches to the calibration."
        ) from None
    half = np.linalg.inv(lower)
    return half.T @ half


def _check_damping(damping: float) -> None:
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: got {damping!r}; expected a share of 0 or more.")
