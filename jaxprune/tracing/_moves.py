"""What becomes of views of leaves where a primitive moves or wraps them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal

from jaxprune.tracing import _layout
from jaxprune.tracing._layout import Atoms, Dim

Place = tuple[int, ...]

AS_THEY_ARE = frozenset(
    "copy copy_p optimization_barrier sharding_constraint reshard mesh_cast name "
    "convert_element_type device_put pvary".split()
)
ELEMENTWISE = frozenset(
    "add sub mul div rem neg abs sign max min pow integer_pow square sqrt rsqrt cbrt "
    "exp exp2 log log1p expm1 tanh logistic erf floor ceil round clamp select_n not "
    "and or xor eq ne lt le gt ge is_finite shift_left shift_right_logical "
    "shift_right_arithmetic add_any nextafter reduce_precision".split()
)


class Part(NamedTuple):
    """What a value shows of a leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      dims: axes of the value.
      offset: of the first element.
      stack: axes of the leaf that loops around run over.
      sliced: place of each of these loops, and which (start, size) of it is this leaf.
      indexed: axes of the leaf that are indexed with a computed number.
      indices: place, operand and length of each.
      picked: which (start, size) of each length is this leaf.
      wraps: elementwise primitives on the way.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    offset: int = 0
    stack: Atoms = ()
    sliced: tuple[tuple[Place, tuple[int, int] | None], ...] = ()
    indexed: Atoms = ()
    indices: tuple[tuple[Place, int, int], ...] = ()
    picked: tuple[tuple[int, int] | None, ...] = ()
    wraps: tuple[str, ...] = ()


class Moved(NamedTuple):
    """Parts of each output; parts that are lost, and why."""

    parts: Sequence[tuple[Part, ...]]
    lost: Sequence[Part] = ()
    reason: str = ""


def move(
    eqn: Any, operands: Sequence[tuple[Part, ...]], data: Sequence[bool], place: Place
) -> Moved:
    """Parts of the outputs of an equation.

    Args:
      eqn: the equation.
      operands: parts of leaves that each operand shows.
      data: whether each operand may depend on an activation.
      place: of the equation.
    """
    name = eqn.primitive.name
    found = None
    if name in AS_THEY_ARE and len(operands) == len(eqn.outvars):
        return Moved(operands)
    if name in ELEMENTWISE or name in ("concatenate", "stack"):
        if any(data):
            lost = [p for parts in operands for p in parts]
            return Moved([()], lost, f"{name} with an activation")
        if name in ELEMENTWISE:
            return _elementwise(eqn, operands)
        return Moved([_concatenate(eqn, operands)])
    if name in ("split", "unstack"):
        found = _split(eqn, operands[0])
    elif name == "dynamic_slice":
        found = _each([_dynamic_slice(eqn, part, place) for part in operands[0]])
    elif name in _MOVES:
        found = _each([_MOVES[name](eqn, part) for part in operands[0]])
    if found is None:
        lost = [p for parts in operands for p in parts]
        return Moved([()] * len(eqn.outvars), lost, name)
    return Moved(found)


def permuted(eqn: Any) -> tuple[int, ...] | None:
    """Order of the axes of the operand, where they and its type are all that changes."""
    if eqn.primitive.name == "transpose":
        return tuple(eqn.params["permutation"])
    if eqn.primitive.name in AS_THEY_ARE and len(eqn.invars) == 1:
        return tuple(range(eqn.invars[0].aval.ndim))
    return None


def scanned(part: Part, place: Place) -> Part:
    """One of the first axis, another in each iteration of the loop at `place`."""
    first = part.dims[0]
    return part._replace(
        dims=part.dims[1:],
        stack=(*part.stack, *first.atoms),
        sliced=(*part.sliced, (place, _window(first))),
    )


def _each(moved: Sequence[Part | None]) -> list[tuple[Part, ...]] | None:
    """One output; parts of which nothing is left are not in it."""
    parts = [p for p in moved if p is not None]
    if len(parts) < len(moved):
        return None
    return [tuple(p for p in parts if math.prod(d.size for d in p.dims))]


def _elementwise(eqn: Any, operands: Sequence[tuple[Part, ...]]) -> Moved:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    merged: dict[Any, Part] = {}
    lost = []
    for parts, x in zip(operands, eqn.invars, strict=True):
        if x.aval.shape != shape:
            lost += parts
            continue
        for part in parts:
            key = part._replace(wraps=())
            wraps = merged[key].wraps if key in merged else ()
            wraps += tuple(w for w in part.wraps if w not in wraps)
            merged[key] = part._replace(wraps=wraps)
    kept = tuple(p._replace(wraps=(*p.wraps, name)) for p in merged.values())
    return Moved([kept], lost, name)


def _concatenate(eqn: Any, operands: Sequence[tuple[Part, ...]]) -> tuple[Part, ...]:
    stacks = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if stacks else "dimension"]
    total = eqn.outvars[0].aval.shape[axis]
    start, found = 0, []
    for parts, x in zip(operands, eqn.invars, strict=True):
        for part in parts:
            dims = list(part.dims)
            if stacks:
                dims.insert(axis, Dim((), 0, 1))
            dims[axis] = Dim(dims[axis].atoms, dims[axis].start + start, total)
            found.append(part._replace(dims=tuple(dims)))
        start += 1 if stacks else x.aval.shape[axis]
    return tuple(found)


def _split(eqn: Any, parts: tuple[Part, ...]) -> list[tuple[Part, ...]] | None:
    axis, start, found = eqn.params["axis"], 0, []
    unstacks = eqn.primitive.name == "unstack"
    sizes = [1] * len(eqn.outvars) if unstacks else map(int, eqn.params["sizes"])
    for count in sizes:
        moved = _each([_slice_axis(p, axis, start, count) for p in parts])
        if moved is None:
            return None
        kept = moved[0]
        if unstacks:
            kept = tuple(
                p._replace(dims=(*p.dims[:axis], *p.dims[axis + 1 :])) for p in kept
            )
        found.append(kept)
        start += count
    return found


def _dynamic_slice(eqn: Any, part: Part, place: Place) -> Part | None:
    moved: Part | None = part
    for axis, count in enumerate(eqn.params["slice_sizes"]):
        start, dim = eqn.invars[1 + axis], part.dims[axis]
        if moved is None:
            return None
        if count == dim.total:
            continue
        if isinstance(start, Literal):
            at = min(max(int(start.val), 0), dim.total - count)
            moved = _slice_axis(moved, axis, at, count)
        else:
            index = (place, 1 + axis, dim.total)
            moved = _indexed(moved, axis, index) if count == 1 else None
    return moved


def _slice_axis(
    part: Part, axis: int, start: int, count: int, step: int = 1
) -> Part | None:
    found = _layout.take(part.dims[axis], start, count, step)
    if found is None:
        return None
    dims = (*part.dims[:axis], found[0], *part.dims[axis + 1 :])
    return part._replace(dims=dims, offset=part.offset + found[1])


def _window(dim: Dim) -> tuple[int, int] | None:
    return None if dim.whole else (dim.start, dim.size)


def _indexed(part: Part, axis: int, index: tuple[Place, int, int]) -> Part:
    """One of an axis, which one is computed."""
    dim = part.dims[axis]
    return part._replace(
        dims=(*part.dims[:axis], Dim((), 0, 1), *part.dims[axis + 1 :]),
        indices=(*part.indices, index),
        indexed=(*part.indexed, *dim.atoms),
        picked=(*part.picked, _window(dim)),
    )


def _transpose(eqn: Any, part: Part) -> Part | None:
    order = permuted(eqn)
    return (
        None
        if order is None
        else part._replace(dims=tuple(part.dims[i] for i in order))
    )


def _reshape(eqn: Any, part: Part) -> Part | None:
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    permutes = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if permutes or before.size != after.size:
        return None
    dims = _layout.reshape(part.dims, after.shape)
    return None if dims is None else part._replace(dims=dims)


def _slice(eqn: Any, part: Part) -> Part | None:
    params = eqn.params
    steps = params["strides"] or [1] * len(part.dims)
    starts, limits = params["start_indices"], params["limit_indices"]
    moved: Part | None = part
    for axis, (a, b, step) in enumerate(zip(starts, limits, steps, strict=True)):
        if moved is None:
            return None
        moved = _slice_axis(moved, axis, a, -(-(b - a) // step), step)
    return moved


_MOVES: dict[str, Callable[[Any, Part], Part | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _reshape,
    "slice": _slice,
}
