"""Pruning in one shot, and the step from scores to masks that every method shares."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Bool

from jaxprune import _select, _tree, _wide, scores
from jaxprune import allocation as allocations
from jaxprune import masks as mask_trees
from jaxprune._elementwise import is_elementwise
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.structures import NM, Structure, Unstructured

Score: TypeAlias = Callable[..., Array]


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
    if isinstance(structure, type) or not hasattr(structure, "kept_units"):
        raise TypeError(
            f"structure: got {structure!r}; expected one of jaxprune's, such as "
            "Unstructured(), NM(2, 4), Block(16, 16) or Channel()."
        )
    paths, leaves, _ = _tree.flatten(params)
    chosen = [
        (p, x) for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)
    ]
    paths = tuple(p for p, _ in chosen)
    shapes = {p: tuple(x.shape) for p, x in chosen}
    if sparsity is None and isinstance(structure, NM):
        sparsity = 1 - Fraction(structure.n, structure.m)
    wanted = allocations.allocate(allocation, shapes, sparsity)
    kept = [structure.kept_units(p, x, wanted[p]) for p, x in chosen]
    if allocation in ("global", "er", "erk") and isinstance(structure, Unstructured):
        # Rounding leaf by leaf would miss the budget by a few weights.
        sizes = [structure.units(p, x) for p, x in chosen]
        whole = jax.ShapeDtypeStruct((sum(sizes),), "float32")
        budget = structure.kept_units("", whole, allocations.exact(sparsity))
        parts = [(1 - wanted[p]) * n for p, n in zip(paths, sizes, strict=True)]
        kept = allocations.round_to_total(parts, budget)
    if allocation == "global":
        _check_equal_units(structure, chosen)
        return Plan(paths, structure, (sum(kept),), (0,) * len(paths))
    return Plan(paths, structure, tuple(kept), tuple(range(len(paths))))


def _check_equal_units(structure: Structure, chosen: Sequence[tuple[str, Any]]) -> None:
    """Raises `ValueError` unless units of all leaves are of one size."""
    sizes = {p: math.prod(x.shape) // max(structure.units(p, x), 1) for p, x in chosen}
    least, most = (f(sizes, key=sizes.__getitem__) for f in (min, max))
    if sizes[least] != sizes[most]:
        raise ValueError(
            f"allocation: 'global' compares units of all leaves, but {structure} has "
            f"{sizes[least]} weights a unit in {least} and {sizes[most]} in {most}; the "
            "larger would win by their size, and the sparsity be missed. Divide it with "
            "'uniform', 'erk' or a mapping, or choose leaves alike with where=."
        )


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
      score: scores of a leaf, from the arrays given for it. Where it is elementwise the
        scores are made anew in every pass over them; otherwise they are stored.
      leaves: the arrays that `score` reads, for each leaf.

    Raises:
      ValueError: if `score` does not give one floating-point score a weight.
    """
    if not callable(score):
        raise TypeError(
            f"score: got {type(score).__name__}; expected a function of one weight array, "
            "such as jaxprune.scores.magnitude. A tree of scores is for jaxprune.prune."
        )
    scored = []
    for path, xs in zip(plan.paths, leaves, strict=True):
        _check_scores(path, jax.eval_shape(score, *xs), xs[0])
        stored = not is_elementwise(score, *xs)
        scored.append((_same, (score(*xs),)) if stored else (score, xs))
    units = [
        plan.structure.scored(path, f, *xs)
        for path, (f, xs) in zip(plan.paths, scored, strict=True)
    ]
    cuts = _select.cuts(units, kept, plan.groups)
    masks = []
    for path, (f, xs), unit, cut in zip(plan.paths, scored, units, cuts, strict=True):
        scores, of_units = f(*xs), unit.score(*unit.operands)
        is_fine = of_units.shape == scores.shape
        keep = _select.keep if is_fine else _select.keep_stored
        masks.append(plan.structure.mask(path, scores, keep(of_units, cut)))
    return masks


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
      score: a function of one weight array, or a tree of scores. Higher is kept, ties go
        to the lower index, NaN loses.
      structure: what is kept or pruned as one.
      allocation: `"uniform"`, `"global"` (one threshold for all leaves), `"er"`, `"erk"`,
        a mapping from path patterns to sparsities, or a function; see
        `jaxprune.allocation.allocate`.
      where: which leaves may be pruned: a function `(path, leaf) -> bool`, or glob
        patterns of which the last match decides and `!` excludes; if the first excludes,
        they change the default choice, as `"!head/*"` does. By default all
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
    # A model of Equinox or NNX can be called, too, but is a tree of scores.
    is_function = isinstance(score, jax.tree_util.Partial) or (
        callable(score) and jax.tree_util.all_leaves([score])
    )
    function: Any = score if is_function else _same
    operands = [(x,) for x in (leaves if is_function else _matching(score, chosen))]
    kept = [_wide.from_int(k) for k in made.kept]
    if any(isinstance(x, core.Tracer) for x in jax.tree.leaves((leaves, operands))):
        found = decide(made, kept, function, operands)
    else:
        found = _decide_now(made, kept, function, leaves, operands)
    new = iter(found)
    masks = treedef.unflatten([x if _tree.is_hole(x) else next(new) for x in holed])
    return mask_trees.apply(params, masks), masks


def prune_in_rounds(
    params: PyTree,
    sparsity: float | Fraction,
    *,
    score: Callable[[PyTree], PyTree],
    rounds: int = 100,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
    where: _tree.Where = None,
) -> tuple[PyTree, PyTree]:
    """Prunes in many rounds, and scores anew what each of them leaves.

    The density after round `i` of `n` is that of the end to the power `i / n`. Weights
    that a round prunes do not come back.

    Args:
      params: a tree of arrays.
      sparsity: in the end, in [0, 1).
      score: gives a tree of scores from the parameters, pruned ones at 0.
      rounds: how many; 100 for SynFlow.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves, not as a mapping; see `prune`.
      where: which leaves may be pruned; see `prune`.

    Returns:
      The pruned parameters and the masks.

    Raises:
      ValueError: as `prune`; and if `rounds` is below 1, a score is NaN or infinite, or
        the allocation is a mapping, which would prune all in the first round.

    Example:
      >>> params = {"up": jnp.array([[1.0, -2.0]]), "down": jnp.array([[3.0], [0.5]])}
      >>> def score(params):
      ...     network = lambda p, x: x @ p["up"] @ p["down"]
      ...     return jp.scores.synflow(network, params, jnp.ones(1))
      >>> params, _ = jp.prune_in_rounds(params, 0.5, score=score, rounds=10)
      >>> params["up"].tolist(), params["down"].ravel().tolist()
      ([[1.0, 0.0]], [3.0, 0.0])

    References:
      Tanaka et al., arXiv 2006.05467, Algorithm 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}; expected at least 1.")
    refuse_mapping(allocation)
    if not callable(score):
        raise TypeError(
            f"score: got {type(score).__name__}; expected a function that gives a tree of "
            "scores from the parameters, since each round scores anew."
        )
    final = allocations.exact(sparsity)
    score = jax.jit(score)
    masks = jax.tree.map(lambda x: None, params)
    for i in range(1, rounds + 1):
        density = float(1 - final) ** (i / rounds)
        now = final if i == rounds else Fraction(1 - density)
        found = score(params)
        _check_finite(found, i)
        scored = jax.tree.map(
            lambda m, s: s if m is None else jnp.where(m, s, -jnp.inf),
            masks, found, is_leaf=lambda m: m is None,
        )  # fmt: skip
        params, masks = prune(
            params, now, score=scored, structure=structure,
            allocation=allocation, where=where,
        )  # fmt: skip
    return params, masks


def _check_finite(found: PyTree, number: int) -> None:
    """Raises `ValueError` where scores are NaN or infinite: they would rank at random."""
    for path, x in zip(*_tree.flatten(found)[:2], strict=True):
        if _tree.is_float(x) and (bad := int(jnp.sum(~jnp.isfinite(x)))):
            raise ValueError(
                f"score: in round {number} {bad} of the {x.size} scores of {path} are NaN "
                "or infinite; expected finite ones. If they overflow, as those of SynFlow in "
                "deep networks do, score in float64 or scale the weights down first."
            )


def refuse_mapping(allocation: Allocation) -> None:
    """Raises `ValueError` for sparsities by path, where a method varies the sparsity."""
    if isinstance(allocation, Mapping):
        raise ValueError(
            f"allocation: got {dict(allocation)}; expected 'uniform', 'global', 'er', 'erk' "
            "or a function of shapes and sparsity, since the sparsity here is not the same "
            "throughout and a mapping would fix it."
        )


def require(name: str, value: Any, test: Callable[[Any], Any], wanted: str) -> None:
    """Raises `ValueError` unless `value` passes `test`, or is nothing to be tested."""
    try:
        passes = bool(test(value))
    except (TypeError, ValueError):
        passes = False
    if not passes:
        raise ValueError(f"{name}: got {value!r}; expected {wanted}.")


def _decide_now(
    plan: Plan,
    kept: Sequence[_wide.Wide],
    score: Score,
    leaves: Sequence[Array],
    operands: Sequence[tuple[Array, ...]],
) -> list[Bool[Array, "..."]]:
    """As `decide`, compiled, with the masks where the leaves lie.

    Leaves that are not compared go one by one, and those alike share a program: a model
    has many of few shapes, and to compile one takes longer than to run it.
    """
    shardings = tuple(
        x.sharding if getattr(x, "committed", False) else None for x in leaves
    )
    if plan.groups != tuple(range(len(leaves))):
        return _program(plan, score, shardings)(kept, operands)
    programs: dict[tuple, Callable] = {}
    found = []
    for path, k, x, xs, sharding in zip(
        plan.paths, kept, leaves, operands, shardings, strict=True
    ):
        alike = x.shape, x.dtype, sharding, _is_hashable(plan.structure) or path
        if alike not in programs:
            own = Plan((path,), plan.structure, (), (0,))
            programs[alike] = _program(own, score, (sharding,))
        found += programs[alike]([k], [xs])
    return found


def _is_hashable(x: Any) -> bool:
    """Of a structure: whether it has no mapping of axes, which would differ by path."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _program(plan: Plan, score: Score, shardings: tuple) -> Callable:
    """`decide` under jit, with the masks where the weights lie."""
    arguments = dataclasses.replace(plan, kept=()), score, shardings
    if not _is_hashable(arguments):
        return _compile(*arguments)
    # A closure is not kept: it may hold arrays, and the next one will be another.
    is_closure = getattr(score, "__closure__", ()) is not None
    return (_compile if is_closure else _compile_once)(*arguments)


def _compile(plan: Plan, score: Score, shardings: tuple) -> Callable:
    def run(kept, leaves):
        return decide(plan, kept, score, leaves)

    return jax.jit(run, out_shardings=list(shardings))


_compile_once = functools.lru_cache(maxsize=128)(_compile)


def _same(scores: Array) -> Array:
    return scores


def _matching(scores: PyTree, params: PyTree) -> list[Array]:
    paths, leaves, treedef = _tree.flatten(params)
    scores = _tree.align(scores, params, lambda x: False)
    try:
        found = treedef.flatten_up_to(scores)
    except ValueError as e:
        raise ValueError(
            "score: its structure is not that of params, which has the leaves "
            f"{_tree.listing(paths)}. Give a function of one array, or a tree of scores."
        ) from e
    chosen = [
        (p, x, s)
        for p, x, s in zip(paths, leaves, found, strict=True)
        if not _tree.is_hole(x)
    ]
    for path, leaf, score in chosen:
        _check_scores(path, score, leaf)
    return [s for _, _, s in chosen]


def _check_scores(path: str, scores: Any, leaf: Any) -> None:
    shape = getattr(scores, "shape", None)
    if shape != leaf.shape or not _tree.is_float(scores):
        got = f"{scores.dtype}{list(shape)}" if shape is not None else repr(scores)
        raise ValueError(
            f"score: got {got} for {path}; expected a floating-point score for each weight "
            f"of {list(leaf.shape)}. Give a function of one array, or a tree of arrays."
        )
