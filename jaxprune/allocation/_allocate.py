"""Sparsities from shapes alone, and what a caller may pass as an allocation."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np

from jaxprune import _tree

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Sparsities: TypeAlias = Mapping[str, float | Fraction]
Allocation: TypeAlias = (
    Literal["uniform", "global", "erk", "er"]
    | Sparsities
    | Callable[[Shapes, float | Fraction], Sparsities]
)


def uniform(shapes: Shapes, sparsity: float | Fraction) -> dict[str, Fraction]:
    """The same sparsity in every leaf.

    Example:
      >>> jp.allocation.uniform({"a": (4, 4), "b": (2, 8)}, 0.5)["b"]
      Fraction(1, 2)
    """
    return dict.fromkeys(shapes, exact(sparsity))


def erk(shapes: Shapes, sparsity: float | Fraction) -> dict[str, Fraction]:
    """Erdős–Rényi-Kernel: density proportional to (sum of the axes) / (product of them).

    A leaf whose density would pass 1 stays dense and the rest is divided again, so that
    the densities meet the budget `sum(density * size) = (1 - sparsity) * sum(size)`
    exactly, as fractions. A leaf of stacked layers counts as one tensor; give such
    leaves their sparsity by pattern instead.

    Example:
      >>> found = jp.allocation.erk({"a": (10, 10), "b": (100, 100)}, 0.9)
      >>> round(float(found["a"]), 3), round(float(found["b"]), 3)
      (0.082, 0.908)

    References:
      Evci et al., Rigging the Lottery, arXiv 1911.11134, section 3 (sparsity
      distribution); Mocanu et al., arXiv 1707.04780, Eq. (3).
    """
    raw = {p: Fraction(sum(s or (1,)), max(math.prod(s), 1)) for p, s in shapes.items()}
    return _proportional(raw, _sizes(shapes), exact(sparsity))


def er(shapes: Shapes, sparsity: float | Fraction) -> dict[str, Fraction]:
    """Erdős–Rényi: density proportional to (inputs + outputs) / (inputs * outputs).

    As `erk`, but only the last two axes count: all positions of a convolution kernel
    share a density.

    Example:
      >>> found = jp.allocation.er({"a": (3, 3, 10, 10), "b": (3, 3, 100, 100)}, 0.9)
      >>> round(float(found["a"]), 3), round(float(found["b"]), 3)
      (0.082, 0.908)

    References:
      Mocanu et al., arXiv 1707.04780, Eq. (3); Evci et al., arXiv 1911.11134, section 3.
    """
    raw = {p: Fraction(sum(s[-2:] or (1,)), max(math.prod(s[-2:]), 1))
           for p, s in shapes.items()}  # fmt: skip
    return _proportional(raw, _sizes(shapes), exact(sparsity))


def water_filling(
    shapes: Shapes,
    sparsity: float | Fraction,
    *,
    costs: Mapping[str, float | Fraction] | None = None,
) -> dict[str, Fraction]:
    """PreCropping's densities: every leaf keeps as much as every other, up to all.

    Maximises the sum of the logarithms of the densities under a budget: the density of a
    leaf is `min(1, c / cost)`, with the one `c` that meets the budget. It needs neither
    weights nor data.

    Args:
      shapes: of the leaves to prune, by path.
      sparsity: share of the whole cost that goes.
      costs: of each leaf when dense; by default its number of weights (PreCrop-Params).
        Give FLOPs for PreCrop-FLOPs.

    Example:
      >>> found = jp.allocation.water_filling({"a": (2, 2), "b": (4, 4)}, 0.5)
      >>> found["a"], found["b"]
      (Fraction(0, 1), Fraction(5, 8))

    Raises:
      ValueError: if `costs` lacks a leaf or has a cost that is not above 0.

    References:
      Cai et al., Structured Pruning is All You Need for Pruning CNNs at Initialization,
      arXiv 2203.02549. The program is the paper's; its solution, by the conditions of
      Karush, Kuhn and Tucker, is ours.
    """
    sizes = _sizes(shapes)
    if costs is None:
        found = sizes
    else:
        if missing := sorted(p for p in shapes if not costs.get(p, 0) > 0):
            raise ValueError(
                f"costs: nothing above 0 for {_tree.listing(missing)}; expected the cost "
                "of every leaf that is pruned, such as its FLOPs."
            )
        found = {p: Fraction(costs[p]) for p in shapes}
    raw = {p: Fraction(1) / found[p] if found[p] else Fraction(1) for p in shapes}
    return _proportional(raw, found, exact(sparsity))


def _sizes(shapes: Shapes) -> dict[str, Fraction]:
    return {p: Fraction(math.prod(s)) for p, s in shapes.items()}


def _proportional(
    raw: Mapping[str, Fraction], costs: Mapping[str, Fraction], sparsity: Fraction
) -> dict[str, Fraction]:
    """Densities in proportion to `raw`, at most 1, that meet the budget exactly."""
    budget = (1 - sparsity) * sum(costs.values())
    dense: set[str] = set()
    while True:
        free = [p for p in raw if p not in dense]
        if not free or not budget:  # no weights at all
            return dict.fromkeys(raw, Fraction(0))
        left = budget - sum(costs[p] for p in dense)
        scale = left / sum(raw[p] * costs[p] for p in free)
        over = [p for p in free if scale * raw[p] > 1]
        if not over:
            break
        # One at a time, the largest first: the others may fall back under 1.
        dense.add(max(over, key=lambda p: raw[p]))
    return {p: Fraction(0) if p in dense else 1 - scale * raw[p] for p in raw}


def exact(sparsity: float | Fraction | None, name: str = "sparsity") -> Fraction:
    """The decimal that the caller wrote: 0.9 is nine tenths, not its nearest float.

    Example:
      >>> jp.allocation.exact(0.9)
      Fraction(9, 10)

    Raises:
      ValueError: if it is outside [0, 1).
      TypeError: if it is no number.
    """
    try:
        # NumPy writes a float32 as the shortest decimal that means it, too.
        number = (
            sparsity if isinstance(sparsity, Fraction) else np.asarray(sparsity)[()]
        )
        written = str(number)
        valid = bool(0 <= number < 1)
        is_number = not isinstance(number, np.ndarray | bool | np.bool_ | Mapping)
    except (TypeError, ValueError):
        written, valid, is_number = repr(sparsity), False, False
    if not is_number:
        raise TypeError(
            f"{name}: got {written}; expected a Python number in [0, 1), the share of "
            "weights to prune. Counts are computed exactly, before tracing."
        )
    if not valid:
        raise ValueError(
            f"{name}: got {written}; expected a share of weights to prune in [0, 1). For "
            "90 % write 0.9."
        )
    return Fraction(written)


def allocate(
    allocation: Allocation, shapes: Shapes, sparsity: float | Fraction | None
) -> dict[str, Fraction]:
    """The sparsity of each leaf.

    Args:
      allocation: `"uniform"`, `"er"`, `"erk"`, a mapping from path patterns to sparsities (the
        last match counts; leaves that match none get `sparsity`), or a function of
        shapes and sparsity. `"global"` has no sparsity by leaf: it is answered with the
        whole's, and selection compares scores across leaves.
      shapes: of the leaves to prune, by path.
      sparsity: of the whole; may be `None` where the mapping covers every leaf.

    Example:
      >>> jp.allocation.allocate({"*": 0.5, "head": 0.25}, {"a": (8,), "head": (8,)}, None)
      {'a': Fraction(1, 2), 'head': Fraction(1, 4)}
    """
    if isinstance(allocation, Mapping):
        _tree.check_patterns(list(shapes), allocation, name="allocation")
        found = {p: _tree.lookup(p, allocation) for p in shapes}
        if sparsity is None and None in found.values():
            missing = [p for p, s in found.items() if s is None]
            raise ValueError(
                f"sparsity: got None, but no pattern of allocation={dict(allocation)} "
                f"matches {_tree.listing(missing)}. Give sparsity=, or a pattern '*'."
            )
        return {
            p: exact(sparsity if s is None else s, f"allocation for {p}")
            for p, s in found.items()
        }
    if sparsity is None:
        raise ValueError(
            f"sparsity: got None; expected a number in [0, 1) with allocation={allocation!r}."
        )
    if callable(allocation):
        found = allocation(shapes, sparsity)
        if set(found) != set(shapes):
            raise ValueError(
                f"allocation: the function answered for {_tree.listing(sorted(found))}; "
                f"expected exactly {_tree.listing(sorted(shapes))}."
            )
        return {p: exact(found[p], f"allocation for {p}") for p in shapes}
    if allocation in ("er", "erk"):
        return (er if allocation == "er" else erk)(shapes, exact(sparsity))
    if allocation in ("uniform", "global"):
        return uniform(shapes, sparsity)
    raise ValueError(
        f"allocation: got {allocation!r}; expected 'uniform', 'global', 'er', 'erk', a mapping "
        "{path pattern: sparsity} or a function (shapes, sparsity) -> {path: sparsity}."
    )


def round_to_total(wanted: Sequence[Fraction], total: int) -> list[int]:
    """Rounds to integers that sum to `total`, by largest remainder, ties to the first.

    Example:
      >>> jp.allocation.round_to_total([Fraction(1, 2), Fraction(3, 2), Fraction(1)], 3)
      [1, 1, 1]
    """
    floors = [math.floor(w) for w in wanted]
    order = sorted(range(len(wanted)), key=lambda i: (floors[i] - wanted[i], i))
    for i in order[: max(total - sum(floors), 0)]:
        floors[i] += 1
    return floors
