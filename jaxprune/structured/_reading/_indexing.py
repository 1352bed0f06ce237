"""Dimensions where units are asked for by number: gathers, scatters, choices."""

from collections.abc import Sequence
from typing import Any

from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import freeze, mark, unify
from jaxprune.structured._reading._values import Dims, Moved, Operand, frozen_dim

CHOICES = frozenset("argmax argmin".split())
_COMPARISONS = frozenset("eq ne lt le gt ge is_finite dot_general".split())


def numbered(
    eqn: Any, operands: Sequence[Operand], outs: Sequence[Dims]
) -> list[Operand]:
    """Outputs, with what is known of their values as numbers of units."""
    name, data = eqn.primitive.name, any(x.data for x in operands)
    found = [Operand(dims, data) for dims in outs]
    if name == "iota":
        return [found[0]._replace(numbers=outs[0][eqn.params["dimension"]])]
    if name in ("top_k", *CHOICES):
        axis = eqn.params["axes"][0] if name in CHOICES else eqn.params.get("axis", -1)
        numbers = operands[0].dims[axis]
        return [*found[:-1], found[-1]._replace(numbers=numbers, chosen=True)]
    told = {_dims.find(x.numbers): x for x in operands if x.numbers is not None}
    if name == "gather" and not operands[0].data and operands[1].chosen:
        return [found[0]._replace(data=False)]  # weights, whichever they are
    if name == "eq" and len(told) == 2 and any(x.chosen for x in told.values()):
        a, b = told
        if a.size == b.size:
            unify(a, b)  # one of many, as one_hot says it
    elif len(told) == 1 and name not in _COMPARISONS:
        (x,) = told.values()
        return [o._replace(numbers=x.numbers, chosen=x.chosen) for o in found]
    return found


def top_k(eqn: Any, operands: Sequence[Operand]) -> Moved:
    dims = list(operands[0].dims)
    axis = eqn.params.get("axis", -1) % len(dims)
    d, k = _dims.find(dims[axis]), eqn.params["k"]
    mark(d, "chosen")
    if d.form == "leaf":
        d.minimum = max(d.minimum, k)
    else:
        freeze(d, "top_k of several parts together")
    dims[axis] = frozen_dim(k, "chosen by top_k")
    return Moved([tuple(dims)] * 2)


def gather(eqn: Any, operands: Sequence[Operand]) -> Moved:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.outvars[0].aval.shape
    (dims, data, *_), (index, _, numbered, chosen) = operands
    batched = tuple(numbers.operand_batching_dims)
    for a, b in zip(batched, numbers.start_indices_batching_dims, strict=True):
        unify(dims[a], index[b])
    gone = {*numbers.collapsed_slice_dims, *batched}
    slices = [i for i in range(len(dims)) if i not in gone]
    out = list(_dims.fresh(shape))
    rows = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for i, d in zip(rows, index[:-1], strict=True):
        out[i] = d
    for o, i in zip(numbers.offset_dims, slices, strict=True):
        if sizes[i] == dims[i].size:
            out[o] = dims[i]
            if not data and not chosen:
                mark(dims[i], "width of a table")
        else:
            freeze((dims[i], out[o]), "gather")
    for i in numbers.collapsed_slice_dims:
        mark(dims[i], "indexed")
        if i not in numbers.start_index_map:
            freeze(dims[i], "gather")
        elif chosen and numbered is not None and numbered.size == dims[i].size:
            unify(
                numbered, dims[i]
            )  # what is chosen is used: experts and their routers
    freeze(index[-1], "gather")
    return Moved([tuple(out)])


def scatter(eqn: Any, operands: Sequence[Operand]) -> Moved:
    numbers = eqn.params["dimension_numbers"]
    dims, index, new = (x.dims for x in operands)
    batched = tuple(numbers.operand_batching_dims)
    for a, b in zip(batched, numbers.scatter_indices_batching_dims, strict=True):
        unify(dims[a], index[b])
    gone = {*numbers.inserted_window_dims, *batched}
    slices = [i for i in range(len(dims)) if i not in gone]
    for u, i in zip(numbers.update_window_dims, slices, strict=True):
        if new[u].size == dims[i].size:
            unify(dims[i], new[u])
        else:
            freeze((dims[i], new[u]), "scatter")
    rows = [i for i in range(len(new)) if i not in numbers.update_window_dims]
    for i, d in zip(rows, index[:-1], strict=True):
        unify(new[i], d)
    freeze([dims[i] for i in numbers.inserted_window_dims], "scatter")
    freeze(index[-1], "scatter")
    return Moved([dims])


def dynamic_slice(eqn: Any, operands: Sequence[Operand]) -> Moved:
    out, name = [], eqn.primitive.name
    for d, size in zip(operands[0].dims, eqn.params["slice_sizes"], strict=True):
        if size != d.size:
            freeze(d, name)
        out.append(d if size == d.size else frozen_dim(size, name))
    return Moved([tuple(out)])


def dynamic_update(eqn: Any, operands: Sequence[Operand]) -> Moved:
    for a, b in zip(operands[0].dims, operands[1].dims, strict=True):
        if a.size == b.size:
            unify(a, b)
        else:
            freeze((a, b), eqn.primitive.name)
    return Moved([operands[0].dims])
