"""FLAP: units whose inputs to the next product hardly vary go, and a bias takes over."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from jaxprune._tree import PyTree
from jaxprune.calibration import Statistics
from jaxprune.structured._methods import _consumers
from jaxprune.structured._methods._consumers import Score, statistic
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._plans._choose import RoundTo, best, check_counts, rounded
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._planned import planned
from jaxprune.structured._reading._graph import INPUT, Graph
from jaxprune.structured._reading._kinds import Kind

Fluctuation = Literal["wifv", "ifv", "wifn"]
UNITS: tuple[Kind, ...] = ("neuron", "head", "kv_group", "channel")


def fluctuation(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    *,
    form: Fluctuation = "wifv",
    kinds: Sequence[Kind] = UNITS,
) -> dict[str, np.ndarray]:
    """Scores of units by what they give to the products that read them.

    With x the input of such a product, a column of W for each of its inputs j:
    `"wifv"`, `Var(x_j) Σ_i W_ij²`, the mean square of what is lost where the input is
    replaced by its mean; `"ifv"`, `Var(x_j)`; `"wifn"`, `√E[x_j²] mean_i |W_ij|`, which
    is Wanda-sp. Each is summed over the inputs that belong to a unit, such as the width of
    a head, and over the products that read it. Weights count as they are stored: a scale or
    a mask between a leaf and its product is not seen.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate` with `"variance"`, or `"square"` for `"wifn"`.
      form: which.
      kinds: of groups to score.

    Returns:
      Scores [units] by name of the group, for `plan` or `flap`.

    Raises:
      ValueError: if an option is not known, a statistic is missing, or no product sums over
        any of these units.

    References:
      An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
      arXiv 2312.11983, and their code, which squares `"wifv"` of attention; the paper does
      not, nor do we. Its running variance is not that of all samples; ours is.
    """
    score = _score(form)
    return _consumers.score_inputs(graph, params, statistics, score, kinds=kinds)


def flap(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    *,
    ratio: float,
    form: Fluctuation = "wifv",
    kinds: Sequence[Kind] = UNITS,
    round_to: RoundTo = 1,
    min_keep: int = 1,
) -> Plan:
    """A plan by fluctuation: one threshold for all groups, on standardised scores.

    The scores of the inputs of each product are moved to a mean of 0 and scaled to a
    standard deviation of 1, and averaged over the inputs of a unit. Units of all groups are
    ranked together, and the lowest go until `ratio` of the parameters that units of these
    groups have is gone, where a unit counts by its parameters. `compensate` then gives
    biases for what is lost.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate` with `"variance"`, or `"square"` for `"wifn"`.
      ratio: share of the parameters of all units of these kinds to remove.
      form: see `fluctuation`.
      kinds: of groups to prune.
      round_to: the number kept is a multiple of this, the nearest one, or all. For groups
        of some kinds only, `{"neuron": 16}`.
      min_keep: the least number kept in a group.

    Returns:
      The plan; the nearest to the budget that a threshold can give, except where `round_to`
      moves a group off it, or `min_keep` or its own minimum keeps more. Groups that no
      product with statistics reads keep all.

    Raises:
      ValueError: as `fluctuation`, and if a number is out of range.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"] + params["bias"]
      >>> params = {
      ...     "up": jnp.array([[1.0, 2.0, 0.0, 3.0]]), "down": jnp.ones((4, 1)),
      ...     "bias": jnp.zeros(1),
      ... }
      >>> x = jnp.array([[1.0], [2.0]])
      >>> graph = jp.structured.trace(fn, params, x)
      >>> stats = jp.calibrate(fn, params, [x], statistics=("variance",))
      >>> plan = jp.structured.flap(graph, params, stats, ratio=0.5)
      >>> plan.groups["down:0"].kept.tolist()
      [1, 3]

    References:
      An et al., arXiv 2312.11983, section 3 (adaptive structure search, AL-AM). The authors
      count 512/3 neurons for a head of LLaMA-7B; we count parameters of the groups at hand.
      In a stack that a scan runs over, layers keep the same units here: standardised scores
      are averaged over them.
    """
    if not 0 <= ratio < 1:
        raise ValueError(
            f"ratio: got {ratio!r}; expected a share in [0, 1), such as 0.2."
        )
    check_counts(round_to, min_keep)
    score = _score(form)
    leaves = by_path(graph, params, "params")
    scores = {}
    for group in _consumers.groups_of(graph, kinds):
        uses = _consumers.consumers(group, statistics)
        if uses:
            parts = [
                use.pooled(
                    _standardised(score(use.matrix(leaves), use.inputs)), group.size
                )
                for use in uses
            ]
            sums, counts = (np.sum(x, axis=0) for x in zip(*parts, strict=True))
            scores[group.name] = sums / np.maximum(counts, 1)
    if not scores:
        raise _consumers.nothing_scored(graph, statistics.paths, kinds)
    kept = within_budget(graph, scores, ratio, min_keep)
    sizes = {
        name: rounded(
            len(units), graph[name], round_to, max(min_keep, graph[name].minimum)
        )
        for name, units in kept.items()
    }
    return planned(graph, {name: best(scores[name], n) for name, n in sizes.items()})


def unit_costs(graph: Graph) -> dict[str, float]:
    """Parameters of one unit of each group, where all others stay."""
    found = {}
    for group in graph.groups:
        total = 0.0
        for m in group.members:
            if not m.path.startswith(INPUT):
                places = np.count_nonzero(m.units >= 0) / len(m.units)
                total += np.prod(graph.shapes[m.path]) * places
        found[group.name] = total / group.size
    return found


def within_budget(
    graph: Graph, scores: Mapping[str, np.ndarray], ratio: float, min_keep: int = 1
) -> dict[str, np.ndarray]:
    """Units kept by one threshold, so that about `ratio` of their parameters go.

    The best of each group stay, as many as must.
    """
    costs = unit_costs(graph)
    least = {n: max(min_keep, graph[n].minimum) for n in scores}
    ranked = []
    for name, given in scores.items():
        found = np.where(np.isnan(given), -np.inf, given)
        order = np.argsort(-found, kind="stable")
        safe = set(order[: least[name]].tolist())
        ranked += [
            (i not in safe, -float(found[i]), name, i) for i in range(len(found))
        ]
    ranked.sort(key=lambda x: x[:2])
    sums = np.cumsum([costs[name] for _, _, name, _ in ranked])
    wanted = (1 - ratio) * sums[-1]
    n = int(np.argmin(np.abs(sums - wanted))) + 1
    n = max(n, sum(not may for may, *_ in ranked))
    kept: dict[str, list[int]] = {name: [] for name in scores}
    for _, _, name, i in ranked[:n]:
        kept[name].append(i)
    return {name: np.sort(np.asarray(units, int)) for name, units in kept.items()}


def _score(form: str) -> Score:
    if form not in get_args(Fluctuation):
        raise ValueError(
            f"form: got {form!r}; expected one of {get_args(Fluctuation)}."
        )

    def score(w, inputs):
        if form == "wifn":
            square = statistic("wifn", inputs, "square")
            return jnp.sqrt(square) * jnp.mean(jnp.abs(w), axis=-1)
        variance = statistic(form, inputs, "variance")
        return variance if form == "ifv" else variance * jnp.sum(jnp.square(w), axis=-1)

    return score


def _standardised(x) -> np.ndarray:
    """Each layer of a stack by itself: over the inputs of its products."""
    x = np.asarray(x, np.float64)
    mean, std = (f(x, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
    return (x - mean) / np.where(std > 0, std, 1)
