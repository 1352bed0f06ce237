"""Which units may differ from layer to layer of a scan, or from head to head.

All layers of a scan, and all heads, have the same number of units in each axis, but need not
have the same ones, where nothing in the function relates a unit of one to a unit of another
of the same number: the units are local to the layer, or to the head.
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np

from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._propagate import Program, Record
from jaxprune.structured._reading._values import Dims, shape_of
from jaxprune.tracing._walk import CALLS, scan_operands

# What these give, or give it for, is known by the number of the unit.
_NUMBERED = frozenset("iota random_bits argmax argmin top_k gather".split())
_PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot_general".split())


def owners(
    program: Program,
    among: Iterable[Dim],
    rules: Container[str] = (),
    *,
    inner: bool = False,
) -> dict[Dim, tuple[Dim, ...]]:
    """For each dimension those for each unit of which it may have units of its own.

    Args:
      program: the whole function.
      among: leaves that can lose units.
      rules: names of primitives that users have rules for.
      inner: whether it is a part of another, so that its outputs are none of that.
    """
    among = tuple(among)
    found = {d: {h for h in among if h is not d} for d in among}
    if not inner:  # which units come out could not be told
        _numbered(found, [x.dims for x in program.outs])
    _walk(program, found, rules)
    return {d: tuple(h for h in among if h in found[d]) for d in among}


def one_way(found: dict[Dim, tuple[Dim, ...]]) -> dict[Dim, tuple[Dim, ...]]:
    """Of two that own each other only one does: it is cut by what the other was."""
    order = {d: i for i, d in enumerate(found)}
    return {
        d: tuple(h for h in held if d not in found[h] or order[d] > order[h])
        for d, held in found.items()
    }


def _walk(program: Program, found: dict[Dim, set[Dim]], rules: Container[str]) -> None:
    """Takes away from `found` what the program relates."""
    _numbered(found, program.const_dims)
    loops = program.records[0].loops if program.records else ()
    around = _leaves_of(loops)
    for dims in (*(x.dims for x in program.operands), *(x.dims for x in program.outs)):
        _value(found, dims, around)
    for record in program.records:
        own = record.eqn.primitive.name in rules
        values = [*(x.dims for x in record.operands), *record.outs]
        for dims in values:
            _value(found, dims, around)
        if own or record.eqn.primitive.name in _NUMBERED:
            _numbered(found, values)
        _numbered(found, [x.dims for x, v in zip(record.operands, record.eqn.invars,
                                                 strict=True) if _is_table(v)])  # fmt: skip
        if record.eqn.primitive.name in _PRODUCTS:
            _product(found, record)
        if record.eqn.primitive.name == "scan" and not own:
            _carry(found, record)
        for inner in () if own and record.eqn.primitive.name in CALLS else record.inner:
            _walk(inner, found, rules)


def _is_table(v: Any) -> bool:
    """Whether an operand is an array that is written in the code."""
    return hasattr(v, "val") and bool(shape_of(v.val))


def _numbered(found: dict[Dim, set[Dim]], values: Iterable[Dims]) -> None:
    for d in set().union(*map(_leaves_of, values)):
        if d in found:
            found[d].clear()


def _value(found: dict[Dim, set[Dim]], dims: Dims, around: set[Dim]) -> None:
    """Wherever there is a unit, there must be one of its owner, and one only."""
    parts = [_dims.leaves(d) for d in dims]
    for axis, leaves in enumerate(parts):
        for d in found.keys() & set(leaves):
            if any(d in other for i, other in enumerate(parts) if i != axis):
                found[d].clear()
            found[d] = {h for h in found[d] if _owns(h, d, dims, axis, around)}


def _owns(owner: Dim, d: Dim, dims: Dims, axis: int, around: set[Dim]) -> bool:
    if owner in around:  # this is of one step of a scan, and has none of other steps
        return owner not in _leaves_of(dims)
    return _has(dims, axis, d, owner)


def _has(dims: Dims, axis: int, d: Dim, owner: Dim) -> bool:
    """Whether each place of `d` along an axis is one of `owner`, once."""
    beside = [i for i, x in enumerate(dims) if owner in _dims.leaves(x)]
    if beside == [axis]:
        parts = [_dims.factors(x) for x in _dims.segments(dims[axis])]
        counts = [
            (x.count(d), x.count(owner))
            for x in parts
            if any(d in _dims.leaves(y) for y in x)
        ]
        return all(n == (1, 1) for n in counts)
    if len(beside) != 1:
        return False
    alone = all(x.count(d) <= 1 for x in map(_dims.factors, _dims.segments(dims[axis])))
    return alone and _dims.factors(dims[beside[0]]).count(owner) == 1


def _product(found: dict[Dim, set[Dim]], record: Record) -> None:
    """What is summed over must be so for one unit of the owner at a time."""
    left, right = (x.dims for x in record.operands[:2])
    params = record.eqn.params
    if record.eqn.primitive.name == "dot_general":
        (axes, others), (l_batch, r_batch) = params["dimension_numbers"]
        summed = [left[i] for i in axes]
        free = [d for i, d in enumerate(left) if i not in (*axes, *l_batch)]
        free += [d for i, d in enumerate(right) if i not in (*others, *r_batch)]
    else:
        summed = free = [*left, *right]
    met = _leaves_of(free)
    for d in found.keys() & _leaves_of(summed):
        found[d] -= met


def _leaves_of(dims: Iterable[Dim]) -> set[Dim]:
    return {x for d in dims for x in _dims.leaves(d)}


def _carry(found: dict[Dim, set[Dim]], record: Record) -> None:
    """What is carried from step to step is not local to a step; nor are steps to anything."""
    _numbered(found, [(record.extra,)])
    first, second = scan_operands(record.eqn.params, len(record.operands))
    length = set(_dims.leaves(record.extra))
    carried = {
        x
        for v in record.operands[first:second]
        for d in v.dims
        for x in _dims.leaves(d)
    }
    for d in found.keys() & carried:
        found[d] -= length


Tables = dict[Dim, tuple[Sequence[Dim], np.ndarray]]


def places(dims: Dims, axis: int, same: np.ndarray, tables: Tables) -> np.ndarray:
    """What is kept along an axis of a leaf, at each place of the axes of owners.

    Args:
      dims: of the leaf.
      axis: which.
      same: places that would be kept, [kept], if the first units were everywhere.
      tables: for dimensions that keep other units, their owners, and numbers of the units
        that are kept, in order, [*owners, kept].

    Returns:
      Numbers of places, of the rank of the leaf, size 1 in axes that do not matter; or
      [kept], if none does. They lie as those of `same` do: a unit in place of a unit.
    """
    shape = [-1 if i == axis else 1 for i in range(len(dims))]
    own: dict[Dim, np.ndarray] = {}
    found = same.reshape(shape)
    here = [d for d in dict.fromkeys(_dims.leaves(dims[axis])) if d in tables]
    for d in sorted(here, key=lambda d: len(tables[d][0])):  # owners have fewer
        held, table = tables[d]
        first = along(dims, axis, d).ravel()[same].reshape(shape)  # -1 where it is not
        index = []
        for h in held:
            other = axis_of(dims, axis, h)
            at = along(dims, other, h)
            if other == axis:
                at = own.get(h, at.ravel()[same].reshape(shape))
            index.append(at.clip(0))
        own[d] = table[(*index, first.clip(0))]
        step = _dims.steps(dims[axis], d)[same].reshape(shape)
        found = found + (own[d] - first) * step
    return found.ravel() if found.size == len(same) else found


def along(dims: Dims, axis: int, leaf: Dim) -> np.ndarray:
    """Numbers of units of a leaf along an axis, or -1; of the rank of `dims`."""
    found = _dims.units(dims[axis], leaf)
    return found.reshape([-1 if i == axis else 1 for i in range(len(dims))])


def axis_of(dims: Dims, axis: int, owner: Dim) -> int:
    """Where an owner of units along an axis lies: there, if it can be."""
    if owner in _dims.leaves(dims[axis]):
        return axis
    return next(i for i, d in enumerate(dims) if owner in _dims.leaves(d))
