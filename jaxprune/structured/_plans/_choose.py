"""Chooses how many units of each group stay, and which."""

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxprune import _tree
from jaxprune.structured._plans._costs import Counter
from jaxprune.structured._plans._latency import Clock
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._planned import planned
from jaxprune.structured._reading import _kinds
from jaxprune.structured._reading._graph import Graph, Group
from jaxprune.structured._reading._kinds import Kind

Scope = Literal["local", "global", "isomorphic"]
RoundTo = int | Mapping[Kind, int]
_STEPS, _TIMED = 40, 10  # of bisection: by counting, and with a clock


class Target(NamedTuple):
    """Shares of the full cost that may remain, each above 0 and at most 1; all are met.

    Attributes:
      parameters: share of the parameters.
      bytes: share of their bytes.
      flops: share of the operations in products.
      latency: share of the seconds that `clock` gives without pruning.
      seconds: seconds by `clock`, whatever they are without pruning.
      clock: seconds of a plan, such as `structured.predicted` of a device or
        `structured.measured` of the function; any function of plans will do.
    """

    parameters: float | None = None
    bytes: float | None = None
    flops: float | None = None
    latency: float | None = None
    seconds: float | None = None
    clock: Clock | None = None


def plan(
    graph: Graph,
    scores: Mapping[str, np.ndarray],
    *,
    ratio: float | None = None,
    target: Target | None = None,
    scope: Scope = "local",
    kinds: Kind | Sequence[Kind] | None = None,
    overrides: Mapping[str, float] | None = None,
    round_to: RoundTo = 1,
    min_keep: int = 1,
    max_ratio: float = 1.0,
    normalize: bool = True,
) -> Plan:
    """Keeps the units of the highest scores.

    Args:
      graph: of `trace`.
      scores: `{group name: scores [units]}`, as `score_groups` gives; ties go to the
        lower number, and NaN loses. With scores `[*owners, units]`, those of `apart=True`,
        each layer or head keeps its own best units, as many as the others.
      ratio: share of units to remove. The share of parameters that goes is larger where
        both sides of a matrix lose units, 1 - (1 - ratio)².
      target: instead of a ratio, what may remain; the smallest ratio that meets it is
        found by bisection, with a clock to a thousandth. Clocks that measure are noisy, and
        a smaller model may be slower: what is found has met the target when it was timed.
      scope: `"local"` removes the ratio from each group; `"global"` ranks units of all
        groups together; `"isomorphic"` those of groups of one kind whose members have the
        same shapes (Fang et al., arXiv 2407.04616).
      kinds: of groups to prune, one or several. By default all but `"layer"`, whole
        steps of a scan, and `"row"`, entries of a table such as a vocabulary.
      overrides: `{pattern: ratio}` for groups whose name matches or, where no name does,
        a member's path; the last match wins, and 0 keeps all. These ratios hold whatever
        `ratio`, `target` or `kinds`.
      round_to: the number kept is a multiple of this, the nearest one, or all. For groups
        of some kinds only, `{"neuron": 16}`; other kinds are as they come.
      min_keep: the least number kept in a group.
      max_ratio: the largest share removed of a group.
      normalize: whether scores are divided by the mean of their group before groups are
        ranked together.

    Raises:
      ValueError: if both or none of `ratio` and `target` are given, a number is out of
        range, scores are missing, a pattern matches nothing, no group is of these kinds,
        or the target cannot be met.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
      >>> scores = jp.structured.score_groups(graph, params, "l2")
      >>> plan = jp.structured.plan(graph, scores, ratio=0.25)
      >>> print(plan)
      group   kind    units  kept  notes
      down:0  neuron  8      6
      parameters: 40 -> 30 (75.0%)
      bytes: 160 -> 120 (75.0%)
      flops: 400 -> 300 (75.0%)
      >>> plan.shrink(params)["up"].shape
      (2, 6)
    """
    wanted = _kinds.wanted(kinds)
    _check(ratio, target, scope, round_to, min_keep, max_ratio)
    fixed = _overrides(graph, overrides or {})
    groups = [g for g in graph.groups if g.kind in wanted and g.name not in fixed]
    if not groups and not any(fixed.values()) and ratio != 0:
        _refuse_nothing(graph, wanted)
    found = {
        g.name: _scores(g, scores) for g in graph.groups if _is_scored(g, groups, fixed)
    }

    def count(group: Group, share: float) -> int:
        least = max(min_keep, group.minimum, round(group.size * (1 - max_ratio)), 1)
        return rounded(round(group.size * (1 - share)), group, round_to, least)

    def counts(share: float) -> dict[str, int]:
        shares = _shares(groups, found, share, scope, normalize)
        shares |= {g.name: fixed[g.name] for g in graph.groups if g.name in fixed}
        return {g.name: count(g, shares.get(g.name, 0.0)) for g in graph.groups}

    def choose(sizes: Mapping[str, int]) -> Plan:
        kept = {
            name: best(scored, sizes[name])
            for name, scored in found.items()
            if sizes.get(name, scored.shape[-1]) < scored.shape[-1]
        }
        return planned(graph, kept)

    share = _bisect(graph, counts, choose, target) if target else ratio or 0.0
    return choose(counts(share))


def groups_of(graph: Graph, kinds: Kind | Sequence[Kind] | None) -> list[Group]:
    """The groups of these kinds; by default of all but layers and rows.

    Raises:
      ValueError: if there are none.
    """
    wanted = _kinds.wanted(kinds)
    found = [g for g in graph.groups if g.kind in wanted]
    if not found:
        _refuse_nothing(graph, wanted)
    return found


def _check(ratio, target, scope, round_to, min_keep, max_ratio) -> None:
    if (ratio is None) == (target is None):
        raise ValueError(
            f"ratio, target: got {ratio!r} and {target!r}; expected one of them, such as "
            "ratio=0.5 or target=structured.Target(flops=0.5)."
        )
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(
            f"ratio: got {ratio!r}; expected a share in [0, 1), such as 0.5."
        )
    if target is not None:
        _check_target(target)
    if scope not in get_args(Scope):
        raise ValueError(f"scope: got {scope!r}; expected one of {get_args(Scope)}.")
    check_counts(round_to, min_keep)
    if not 0 < max_ratio <= 1:
        raise ValueError(f"max_ratio: got {max_ratio!r}; expected a share in (0, 1].")


def check_counts(round_to: RoundTo, min_keep: int) -> None:
    """Refuses what are no whole numbers of 1 or more, and kinds that are none."""
    steps = dict(round_to) if isinstance(round_to, Mapping) else {}
    each = steps.values() if isinstance(round_to, Mapping) else [round_to]
    for name, given, numbers in (
        ("round_to", round_to, each),
        ("min_keep", min_keep, [min_keep]),
    ):
        if not all(isinstance(x, Integral) and x >= 1 for x in numbers):
            raise ValueError(
                f"{name}: got {given!r}; expected whole numbers of 1 or more, such as 8."
            )
    if unknown := [k for k in steps if k not in _kinds.KINDS]:
        raise ValueError(
            f"round_to: got {unknown}; expected some of the kinds {_kinds.KINDS}."
        )


def rounded(n: int, group: Group, round_to: RoundTo, least: int = 1) -> int:
    """The number of units kept, at least so many, as a multiple of the step of the kind."""
    step = round_to.get(group.kind, 1) if isinstance(round_to, Mapping) else round_to
    if n < group.size:
        n = max(round(n / step), -(-least // step)) * step
    return min(max(n, least), group.size)


def _check_target(target: Target) -> None:
    *shares, seconds, clock = target
    known = [x for x in shares if x is not None]
    if not all(0 < x <= 1 for x in known) or not (known or seconds is not None):
        raise ValueError(
            f"target: got {target!r}; expected shares in (0, 1] that may remain, at least "
            "one of parameters, bytes, flops and latency; or seconds."
        )
    if seconds is not None and not seconds > 0:
        raise ValueError(f"target: got seconds={seconds!r}; expected more than 0.")
    if (clock is None) != (target.latency is None and seconds is None):
        raise ValueError(
            f"target: got {target!r}; a latency or seconds need a clock, and a clock needs "
            "one of them. Pass clock=structured.predicted(graph, roofline), or "
            "structured.measured(fn, params, *args)."
        )


def _refuse_nothing(graph: Graph, wanted: set[Kind]) -> None:
    """There is nothing to prune: says what there is."""
    if graph.groups:
        there = ", ".join(sorted({g.kind for g in graph.groups}))
        raise ValueError(
            f"kinds: no group is of a kind in {sorted(wanted)}, or overrides keep them whole. "
            f"The graph has groups of these kinds: {there}. Pass some of them as kinds=."
        )
    why = [f"{name}: {'; '.join(reasons)}" for name, reasons in graph.frozen.items()]
    raise ValueError(
        f"graph: it has no groups to prune. These axes are frozen: {_tree.listing(why)}."
    )


def _overrides(graph: Graph, overrides: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for pattern, share in overrides.items():
        if not 0 <= share < 1:
            raise ValueError(
                f"overrides: got {share!r} for {pattern!r}; expected a share in [0, 1)."
            )
        names = fnmatch.filter([g.name for g in graph.groups], pattern) or [
            g.name
            for g in graph.groups
            if any(fnmatch.fnmatchcase(m.path, pattern) for m in g.members)
        ]
        if not names:
            groups = _tree.listing([g.name for g in graph.groups])
            raise ValueError(
                f"overrides: the pattern {pattern!r} matches no group, nor the path of a "
                f"member. The groups are: {groups}."
            )
        found |= dict.fromkeys(names, share)
    return found


def _is_scored(
    group: Group, groups: Sequence[Group], fixed: Mapping[str, float]
) -> bool:
    return group in groups or fixed.get(group.name, 0) > 0


def _scores(group: Group, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    if group.name not in scores:
        raise ValueError(
            f"scores: the group {group.name} has none. Pass what score_groups gives of the "
            "same graph, or leave the group out with kinds= or overrides=."
        )
    x = np.asarray(scores[group.name], np.float64)
    if x.ndim == 0 or x.shape[-1] != group.size:
        raise ValueError(
            f"scores: {group.name} has {group.size} units, and scores of the shape {x.shape}. "
            "Pass a score for each unit."
        )
    return np.where(np.isnan(x), -np.inf, x)


def best(scores: np.ndarray, n: int) -> np.ndarray:
    """Numbers of the best units, of each layer or head where they have scores of their own."""
    return np.sort(np.argsort(-scores, kind="stable")[..., :n])


def _shares(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    share: float,
    scope: Scope,
    normalize: bool,
) -> dict[str, float]:
    """What each group loses."""
    if scope == "local":
        return {g.name: share for g in groups}
    classes: dict[object, list[Group]] = {}
    for g in groups:
        classes.setdefault(_class(g) if scope == "isomorphic" else None, []).append(g)
    found = {}
    for members in classes.values():
        ranked = [_ranked(scores[g.name], normalize) for g in members]
        order = np.argsort(np.concatenate(ranked), kind="stable")
        lost = np.zeros(len(order), bool)
        lost[order[: round(len(order) * share)]] = True
        ends = np.cumsum([g.size for g in members])[:-1]
        for g, part in zip(members, np.split(lost, ends), strict=True):
            found[g.name] = float(part.mean())
    return found


def _ranked(scores: np.ndarray, normalize: bool) -> np.ndarray:
    """Of each unit; with several rows, what the units of one rank have in the mean."""
    if scores.ndim > 1:
        scores = np.sort(scores).reshape(-1, scores.shape[-1]).mean(0)
    mean = np.mean(scores[np.isfinite(scores)]) if np.isfinite(scores).any() else 0.0
    return scores / mean if normalize and mean > 0 else scores


def _class(group: Group) -> object:
    """The same for groups of the same form in layers of the same form."""
    members = sorted(
        (m.axis, len(m.units), m.expression.count("*")) for m in group.members
    )
    return group.kind, group.size, tuple(members)


def _bisect(
    graph: Graph,
    counts: Callable[[float], dict[str, int]],
    choose: Callable[[Mapping[str, int]], Plan],
    target: Target,
) -> float:
    """The smallest share removed that meets the target."""
    counter, clock = Counter(graph), target.clock
    limits = target._asdict()
    del limits["clock"]

    def costs(sizes: dict[str, int]) -> dict[str, float]:
        found = counter(sizes)._asdict()
        if clock is not None:
            found["latency"] = found["seconds"] = clock(choose(sizes))
        return found

    dense = costs({}) | {"seconds": 1.0}

    @functools.cache
    def shares(sizes: tuple[tuple[str, int], ...]) -> dict[str, float]:
        found = costs(dict(sizes))
        return {
            name: found[name] / (dense[name] or 1)
            for name, x in limits.items()
            if x is not None
        }

    def meets(share: float) -> bool:
        found = shares(tuple(counts(share).items()))
        return all(x <= limits[name] for name, x in found.items())

    low, high = 0.0, 1.0
    if meets(low):
        return low
    if not meets(high):
        raise ValueError(
            f"target: got {target}; with all units removed that may go, these shares remain: "
            f"{shares(tuple(counts(high).items()))}. Ask for more than that, or allow more: "
            "kinds=, max_ratio=, min_keep=, round_to=, ignore= of the trace."
        )
    for _ in range(_STEPS if clock is None else _TIMED):
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
