"""Pruning in one shot, and the step from scores to masks that every method shares."""

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import jax
from jax import core
from jaxtyping import Array, Bool

from jaxprune import _select, _tree, _wide, scores
from jaxprune import allocation as allocations
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.structures import NM, Structure, Unstructured

Score: TypeAlias = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many units each leaf, or group of leaves, keeps; all of it exact and static.

    Attributes:
      paths: of the leaves to prune.
      structure: what is kept or pruned as one.
      kept: units kept, a number for each group.
      groups: the group of each leaf.
    """

    paths: tuple[str, ...]
    structure: Structure
    kept: tuple[int, ...]
    groups: tuple[int, ...]


def plan(
    params: PyTree,
    *,
    sparsity: float | Fraction | None,
    structure: Structure,
    allocation: Allocation = "uniform",
) -> Plan:
    """Counts what stays in each leaf; holes in `params` are not pruned.

    Raises:
      ValueError: if a leaf does not fit the structure, or the sparsity contradicts it.
    """
    chosen = [
        (p, x) for p, x in zip(*_tree.flatten(params)[:2], strict=True)
        if not _tree.is_hole(x)
    ]  # fmt: skip
    paths = tuple(p for p, _ in chosen)
    shapes = {p: tuple(x.shape) for p, x in chosen}
    if sparsity is None and isinstance(structure, NM):
        sparsity = 1 - Fraction(structure.n, structure.m)
    wanted = allocations.allocate(allocation, shapes, sparsity)
    kept = [structure.kept_units(p, x, wanted[p]) for p, x in chosen]
    if allocation == "global":
        return Plan(paths, structure, (sum(kept),), (0,) * len(paths))
    if allocation == "erk" and isinstance(structure, Unstructured):
        # Rounding leaf by leaf would miss the budget by a few weights.
        sizes = [structure.units(p, x) for p, x in chosen]
        whole = jax.ShapeDtypeStruct((sum(sizes),), "float32")
        budget = structure.kept_units("", whole, allocations.exact(sparsity))
        parts = [(1 - wanted[p]) * n for p, n in zip(paths, sizes, strict=True)]
        kept = allocations.round_to_total(parts, budget)
    return Plan(paths, structure, tuple(kept), tuple(range(len(paths))))


def decide(
    plan: Plan,
    kept: Sequence[_wide.Wide],
    score: Score,
    leaves: Sequence[tuple[Array, ...]],
) -> list[Bool[Array, "..."]]:
    """The masks that keep exactly `kept` units in each group of `plan`.

    Args:
      plan: which leaves, in which structure and groups.
      kept: units kept in each group, traced or not.
      score: elementwise score of a leaf, from the arrays given for it.
      leaves: the arrays that `score` reads, for each leaf.
    """
    scored = [
        plan.structure.scored(path, score, *xs)
        for path, xs in zip(plan.paths, leaves, strict=True)
    ]
    cuts = _select.cuts(scored, kept, plan.groups)
    return [
        plan.structure.mask(
            path, score(*xs), _select.keep(unit.score(*unit.operands), cut)
        )
        for path, xs, unit, cut in zip(plan.paths, leaves, scored, cuts, strict=True)
    ]


def prune(
    params: PyTree,
    sparsity: float | Fraction | None = None,
    *,
    score: Score | PyTree = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
    where: _tree.Where = None,
) -> tuple[PyTree, PyTree]:
    """Prunes once, to exact counts.

    Args:
      params: a tree of arrays: linen, NNX state, Equinox, tuples, dicts.
      sparsity: share of the selected weights to prune, in [0, 1). With `NM` it may be
        left out; with a mapping as `allocation` too.
      score: an elementwise function of one weight array, or a tree of scores. Higher is
        kept, ties go to the lower index, NaN loses.
      structure: what is kept or pruned as one.
      allocation: `"uniform"`, `"global"` (one threshold for all leaves), `"erk"`, a
        mapping from path patterns to sparsities, or a function; see
        `jaxprune.allocation.allocate`.
      where: which leaves may be pruned: a function `(path, leaf) -> bool`, or glob
        patterns of which the last match decides and `!` excludes. By default all
        floating-point leaves of two or more axes that are no bias, scale, norm statistic
        or embedding table.

    Returns:
      The parameters with pruned weights at 0, and the masks: booleans, True = keep, and
      `None` for leaves that were not selected.

    Raises:
      ValueError: if the sparsity is outside [0, 1) or contradicts the structure, a leaf
        does not fit it, or `where` selects nothing.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "bias": jnp.ones(2)}
      >>> params, masks = jp.prune(params, sparsity=0.5)
      >>> params["kernel"].tolist(), masks["bias"]
      ([[3.0, 0.0], [0.0, 2.0]], None)
    """
    chosen = _tree.select(params, where)
    made = plan(chosen, sparsity=sparsity, structure=structure, allocation=allocation)
    _, holed, treedef = _tree.flatten(chosen)
    leaves = [x for x in holed if not _tree.is_hole(x)]
    function: Any = score if callable(score) else lambda s: s
    operands = [(x,) for x in (leaves if callable(score) else _matching(score, chosen))]

    def run(operands):
        kept = [_wide.from_int(k) for k in made.kept]
        return decide(made, kept, function, operands)

    if not any(isinstance(x, core.Tracer) for x in jax.tree.leaves(operands)):
        shardings = [x.sharding if isinstance(x, jax.Array) else None for x in leaves]
        run = jax.jit(
            run, out_shardings=shardings
        )  # the masks lie where the weights do
    found = iter(run(operands))
    masks = treedef.unflatten([x if _tree.is_hole(x) else next(found) for x in holed])
    return mask_trees.apply(params, masks), masks


def _matching(scores: PyTree, params: PyTree) -> list[Array]:
    paths, leaves, treedef = _tree.flatten(params)
    try:
        found = treedef.flatten_up_to(scores)
    except ValueError as e:
        raise ValueError(
            "score: its structure is not that of params, which has the leaves "
            f"{_tree.listing(paths)}. Give a function of one array, or a tree of scores."
        ) from e
    pairs = [
        (p, x, s) for p, x, s in zip(paths, leaves, found, strict=True)
        if not _tree.is_hole(x)
    ]  # fmt: skip
    for path, leaf, score in pairs:
        if getattr(score, "shape", None) != leaf.shape:
            raise ValueError(
                f"score: {path} has shape {getattr(score, 'shape', None)} but the weight "
                f"has {leaf.shape}; expected one score a weight."
            )
    return [s for _, _, s in pairs]
