"""What each leaf is to be pruned to: a sparsity, and the structure of what goes."""

import fnmatch
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from jaxprune import _tree
from jaxprune import allocation as allocations
from jaxprune.allocation import Allocation, Shapes, Sparsities
from jaxprune.posttrain._solver import Sparsity
from jaxprune.structures import NM, Block, Structure, Unstructured

StructureByLeaf = (
    Structure
    | Mapping[str, Structure]
    | Callable[[Shapes, Sparsities], Mapping[str, Structure]]
)


class Wanted(NamedTuple):
    """`sparsity` is `None` where N:M says it."""

    sparsity: Sparsity
    structure: Structure


def by_name(
    shapes: Shapes,
    sparsity: Sparsity,
    structure: StructureByLeaf,
    allocation: Allocation,
) -> dict[str, Wanted]:
    """What each leaf or layer is to be pruned to; refuses too little, and contradictions."""
    if allocation == "global":
        raise ValueError(
            "allocation: got 'global'; expected 'uniform', 'er', 'erk', a mapping or a "
            "function of shapes and sparsity, since matrices are pruned one after the "
            "other. jaxprune.allocation.owl divides a sparsity by activations."
        )
    if isinstance(structure, Mapping):
        structures = _matched(structure, shapes)
        sparsities = _free(structures, shapes, sparsity, allocation)
    elif callable(structure) and not isinstance(structure, type):
        if sparsity is None and not isinstance(allocation, Mapping):
            raise ValueError(
                "sparsity: got None; expected a number in [0, 1) with a structure that is a "
                "function, which is given the sparsities of all leaves."
            )
        sparsities = allocations.allocate(allocation, shapes, sparsity)
        structures = _answered(structure(dict(shapes), dict(sparsities)), shapes)
    else:
        structures = dict.fromkeys(shapes, _checked(structure, "structure"))
        sparsities = _free(structures, shapes, sparsity, allocation)
    return {
        name: Wanted(None if isinstance(x, NM) else sparsities[name], x)
        for name, x in structures.items()
    }


def _checked(structure: Any, name: str) -> Structure:
    if not isinstance(structure, Unstructured | NM | Block):
        raise TypeError(
            f"{name}: got {structure!r}; expected Unstructured(), NM(2, 4) or Block(8, 128), a "
            "mapping of path patterns to them, or a function of shapes and sparsities. "
            "Channels are for jaxprune.structured."
        )
    return structure


def _check_same(structure: Any, sparsity: Fraction) -> None:
    whole = _share(structure)
    if sparsity != whole:
        raise ValueError(
            f"sparsity: got {float(sparsity)} with {structure}, which prunes {whole} of the "
            f"weights. Leave it out, ask for {float(whole)}, or for another n and m."
        )


def _share(structure: NM) -> Fraction:
    return 1 - Fraction(structure.n, structure.m)


def _matched(table: Mapping[str, Structure], shapes: Shapes) -> dict[str, Structure]:
    """The structure of each leaf, by the last pattern that matches."""
    for pattern, x in table.items():
        _checked(x, f"structure for {pattern!r}")
    _tree.check_patterns(list(shapes), table, name="structure")
    found = {p: _tree.lookup(p, table) for p in shapes}
    if missing := [p for p, x in found.items() if x is None]:
        raise ValueError(
            f"structure: no pattern of {list(table)} matches {_tree.listing(missing)}. Put a "
            "pattern '*' in front for all others, or leave them out with where=."
        )
    return {p: x for p, x in found.items() if x is not None}


def _answered(found: Any, shapes: Shapes) -> dict[str, Structure]:
    """What a function gave for each leaf."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"structure: the function gave {found!r}; expected a mapping of paths to "
            "structures, as jaxprune.allocation.mixed_nm gives."
        )
    for what, names in (
        ("nothing for", set(shapes) - set(found)),
        ("what is no leaf,", set(found) - set(shapes)),
    ):
        if names:
            raise ValueError(
                f"structure: the function gave {what} "
                f"{_tree.listing(sorted(map(str, names)))}; expected a structure for each of "
                f"{_tree.listing(sorted(shapes))}."
            )
    return {p: _checked(found[p], f"structure for {p}") for p in shapes}


def _free(
    structures: Mapping[str, Structure],
    shapes: Shapes,
    sparsity: Sparsity,
    allocation: Allocation,
) -> Sparsities:
    """The sparsity of each leaf whose structure does not say it."""
    told = {p: _share(x) for p, x in structures.items() if isinstance(x, NM)}
    free = {p: shape for p, shape in shapes.items() if p not in told}
    if isinstance(allocation, Mapping):
        _tree.check_patterns(list(shapes), allocation, name="allocation")
        reach = {k: fnmatch.filter(free, k) for k in allocation}
        for path, share in told.items():
            own = [k for k in allocation if fnmatch.fnmatchcase(path, k)][-1:]
            for k in (k for k in own if not reach[k]):
                if allocations.exact(allocation[k], f"allocation for {k!r}") != share:
                    raise ValueError(
                        f"allocation: got {allocation[k]} for {k!r}, where {structures[path]} "
                        f"says the sparsity of {path}, {share}. Leave the pattern out, or ask "
                        "for another n and m."
                    )
        allocation = {k: x for k, x in allocation.items() if reach[k]}
    elif not free and allocation != "uniform":
        raise ValueError(
            f"allocation: got {allocation!r}, and N:M says the sparsity of every leaf. Leave "
            "it out; or give each leaf an N by its sparsity, structure=functools.partial("
            "jaxprune.allocation.mixed_nm, m=8)."
        )
    elif not free and sparsity is not None:
        for path in told:
            _check_same(structures[path], allocations.exact(sparsity))
    return allocations.allocate(allocation, free, sparsity) if free else {}
