"""What each leaf is to be pruned to: a sparsity, and the structure of what goes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxprune import _tree
from jaxprune import allocation as allocations
from jaxprune.allocation import Allocation, Shapes, Sparsities
from jaxprune.posttrain._solver import Sparsity
from jaxprune.posttrain._work import Work
from jaxprune.structures import NM, Structure
from jaxprune.tracing import Leaf

Structures = (
    Structure
    | Mapping[str, Structure]
    | Callable[[Shapes, Sparsities], Mapping[str, Structure]]
)


class Wanted(NamedTuple):
    """`sparsity` is `None` where N:M says it."""

    sparsity: Sparsity
    structure: Structure


def by_leaf(
    work: Work, sparsity: Sparsity, structure: Structures, allocation: Allocation
) -> dict[Leaf, Wanted]:
    """What each leaf or layer is to be pruned to; refuses what says too little."""
    if allocation == "global":
        raise ValueError(
            "allocation: got 'global'; expected 'uniform', 'er', 'erk', a mapping or a "
            "function of shapes and sparsity, since matrices are pruned one after the "
            "other. jaxprune.allocation.owl divides a sparsity by activations."
        )
    shapes = work.shapes
    if callable(structure):
        sparsities = allocations.allocate(allocation, shapes, sparsity)
        found = structure(shapes, sparsities)
        if not isinstance(found, Mapping) or set(found) != set(shapes):
            names = sorted(found) if isinstance(found, Mapping) else [repr(found)]
            raise ValueError(
                f"structure: the function answered {_tree.listing(names)}; expected a "
                f"structure for exactly {_tree.listing(sorted(shapes))}."
            )
        # What the function was told is in the N:M that it gave.
        free = {p: s for p, s in sparsities.items() if not isinstance(found[p], NM)}
    else:
        found = _matched(structure, shapes)
        free = _sparsities(found, shapes, sparsity, allocation)
    return {
        leaf: Wanted(free.get(name), found[name]) for leaf, name in work.names.items()
    }


def _matched(
    structure: Structure | Mapping[str, Structure], shapes: Shapes
) -> dict[str, Structure]:
    if not isinstance(structure, Mapping):
        return dict.fromkeys(shapes, structure)
    _tree.check_patterns(list(shapes), structure, name="structure")
    found = {p: _tree.lookup(p, structure) for p in shapes}
    if missing := [p for p, x in found.items() if x is None]:
        raise ValueError(
            f"structure: no pattern of {list(structure)} matches {_tree.listing(missing)}. "
            "Add a pattern '*' in front for all others, or leave them out with where=."
        )
    return {p: x for p, x in found.items() if x is not None}


def _sparsities(
    found: Mapping[str, Structure],
    shapes: Shapes,
    sparsity: Sparsity,
    allocation: Allocation,
) -> Sparsities:
    """Without a sparsity, that of each leaf whose structure does not say it."""
    if sparsity is None:
        shapes = {p: s for p, s in shapes.items() if not isinstance(found[p], NM)}
    return allocations.allocate(allocation, shapes, sparsity) if shapes else {}
