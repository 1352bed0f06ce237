"""Follows the outputs of a product to the `top_k` or `argmax` that is taken over them."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune.tracing import Reading, Site
from jaxprune.tracing._walk import CALLS, jaxpr_of, scan_operands

Place = tuple[int, ...]
# Axes that the outputs of a product lie along, from a first up to another, row-major.
Run = tuple[int, int]
Marks = frozenset[tuple[int, Run]]  # with the number of the site

_RESHAPES = frozenset(("reshape", "squeeze", "expand_dims"))
# Of these an output has the other axes of an operand, and this one if its size is the same.
_PARTS = frozenset(
    "slice dynamic_slice dynamic_update_slice pad concatenate split".split()
)
_MIXES = frozenset(
    "dot_general conv_general_dilated ragged_dot_general gather scatter scatter-add "
    "scatter_add top_k argmax argmin while scan cond".split()
)
_NONE: Marks = frozenset()


class Choice(NamedTuple):
    """The equation of a choice.

    Attributes:
      place: of the equation; see `jaxprune.tracing.Site`.
      loops: places of the loops around it.
      axis: which it chooses along.
      scope: place of the loop or branch that it stands in.
    """

    place: Place
    loops: tuple[Place, ...]
    axis: int
    scope: Place


class _Scope(NamedTuple):
    place: Place = ()
    loops: tuple[Place, ...] = ()
    trace: Place = ()


def choices(
    jaxpr: Jaxpr, sites: Sequence[Site], readings: Sequence[Reading]
) -> dict[int, Choice]:
    """The first choice among the outputs of each site that has one, by its number."""
    walk = _Walk(sites, readings)
    walk.run(jaxpr, [_NONE] * len(jaxpr.invars), _Scope())
    return walk.found


class _Walk:
    def __init__(self, sites: Sequence[Site], readings: Sequence[Reading]):
        self.sites, self.readings = sites, readings
        self.by_place: dict[Place, list[int]] = {}
        for i, site in enumerate(sites):
            self.by_place.setdefault(site.place, []).append(i)
        self.scopes: dict[int, Place] = {}
        self.found: dict[int, Choice] = {}

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Marks], scope: _Scope) -> list[Marks]:
        """Marks of the outputs."""
        known: dict[Any, Marks] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(x):
            return _NONE if isinstance(x, Literal) else known.get(x, _NONE)

        for i, eqn in enumerate(jaxpr.eqns):
            here = scope._replace(place=(*scope.place, i))
            found = self.equation(eqn, [read(x) for x in eqn.invars], here)
            known.update(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def equation(self, eqn: Any, marks: list[Marks], scope: _Scope) -> list[Marks]:
        name, params, place = eqn.primitive.name, eqn.params, scope.place
        if place in self.by_place:
            return [self.product(eqn, scope)]
        if name in CALLS:
            return self.run(jaxpr_of(params)[0], marks, scope)
        if name == "scan":
            return self.scan(eqn, marks, scope)
        if name == "cond":
            outs = [
                self.run(branch.jaxpr, marks[1:], _inside(scope, j))
                for j, branch in enumerate(params["branches"])
            ]  # after it, what is so in every branch
            return [frozenset.intersection(*each) for each in zip(*outs, strict=True)]
        if name == "while":
            first, second = params["cond_nconsts"], params["body_nconsts"]
            consts, carry = marks[first : first + second], marks[first + second :]
            inner = _inside(scope, 1)._replace(loops=(*scope.loops, place))
            body = params["body_jaxpr"].jaxpr
            self.run(body, [*consts, *(_NONE for _ in carry)], inner)
            return [_NONE for _ in carry]  # it may not be run at all
        if name in ("top_k", "argmax"):
            self.choose(eqn, marks[0], scope)
        return _through(eqn, marks)

    def product(self, eqn: Any, scope: _Scope) -> Marks:
        """Where the outputs of the sites of a product lie."""
        found = set()
        for i in self.by_place[scope.place]:
            self.scopes[i] = scope.trace
            matrix = self.sites[i].matrix
            run = _produced(eqn, matrix.N, self.readings[self.sites[i].activation])
            if run is not None and matrix.batch == 1:
                found.add((i, run))
        return frozenset(found)

    def choose(self, eqn: Any, marks: Marks, scope: _Scope) -> None:
        ndim = len(eqn.invars[0].aval.shape)
        (axis,) = eqn.params.get("axes", (eqn.params.get("axis", -1),))
        choice = Choice(scope.place, scope.loops, axis % ndim, scope.trace)
        for i, run in marks:
            site = self.sites[i]
            # Layers side by side, or an index that is known only where the product is.
            apart = any(x.sliced and x.place not in scope.loops for x in site.loops)
            if self.readings[site.activation].indices:
                apart |= self.scopes[i] != scope.trace
            if run == (choice.axis, choice.axis + 1) and not apart:
                self.found.setdefault(i, choice)

    def scan(self, eqn: Any, marks: list[Marks], scope: _Scope) -> list[Marks]:
        first, second = scan_operands(eqn.params, len(marks))
        inputs = [
            *marks[:first],
            *(_NONE for _ in marks[first:second]),  # so in the first round only
            *(
                _moved(m, lambda a, b: (a - 1, b - 1) if a else None)
                for m in marks[second:]
            ),
        ]
        inner = _Scope(scope.place, (*scope.loops, scope.place), scope.place)
        out = self.run(eqn.params["jaxpr"].jaxpr, inputs, inner)
        n = second - first
        return [*out[:n], *(_moved(m, lambda a, b: (a + 1, b + 1)) for m in out[n:])]


def _inside(scope: _Scope, branch: int) -> _Scope:
    place = (*scope.place, branch)
    return scope._replace(place=place, trace=place)


def _produced(eqn: Any, n: int, reading: Reading) -> Run | None:
    """Axes of a product that hold the outputs of a leaf, all of them and no other."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name == "conv_general_dilated":
        axis = eqn.params["dimension_numbers"].out_spec[1]
        return (axis, axis + 1) if shape[axis] == n else None
    if name != "dot_general":
        return None
    contracted, batch = eqn.params["dimension_numbers"]
    free = [
        len(x.aval.shape) - len(c) - len(b)
        for x, c, b in zip(eqn.invars, contracted, batch, strict=True)
    ]
    start = len(batch[0]) + (0 if reading.operand == 1 else free[0])
    stop = start + free[1 - reading.operand]
    return (start, stop) if math.prod(shape[start:stop]) == n else None


def _through(eqn: Any, marks: Sequence[Marks]) -> list[Marks]:
    """Where the same outputs lie after an equation."""
    name = eqn.primitive.name
    has_body = any(isinstance(x, Jaxpr | ClosedJaxpr) for x in eqn.params.values())
    if not any(marks) or name in _MIXES or has_body:  # of a kernel, or a shard_map
        return [_NONE] * len(eqn.outvars)
    found = []
    for j, out in enumerate(eqn.outvars):
        after = getattr(out.aval, "shape", ())
        new: set[tuple[int, Run]] = set()
        for i, (x, own) in enumerate(zip(eqn.invars, marks, strict=True)):
            if own and (name != "optimization_barrier" or i == j):
                to = functools.partial(
                    _axes_after, eqn, before=x.aval.shape, after=after
                )
                new |= _moved(own, to)
        found.append(frozenset(new))
    return found


def _axes_after(
    eqn: Any,
    start: int,
    stop: int,
    *,
    before: tuple[int, ...],
    after: tuple[int, ...],
) -> Run | None:
    """Where axes go; `None` where they end, or their entries change places."""
    name, params = eqn.primitive.name, eqn.params
    sizes, run = before[start:stop], range(start, stop)
    if name in _RESHAPES:
        return _reshaped(math.prod(before[:start]), math.prod(sizes), after)
    if name in ("transpose", "broadcast_in_dim"):
        if name == "transpose":
            to = [params["permutation"].index(a) for a in run]
        else:
            to = [params["broadcast_dimensions"][a] for a in run]
        # One behind the other, as they were, and none that was spread.
        fits = to == list(range(to[0], to[0] + len(to)))
        return (to[0], to[-1] + 1) if fits and _at(after, to) == sizes else None
    own = () if name in _PARTS else _worked(params)
    if any(a in own for a in run):
        return None
    if name.startswith("reduce_") and "axes" in params:
        shift = sum(a < start for a in own)
        return start - shift, stop - shift
    if name in _PARTS:
        return (start, stop) if after[start:stop] == sizes else None
    return (start, stop) if after == before else None


def _at(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[a] for a in axes)


def _reshaped(lead: int, n: int, shape: tuple[int, ...]) -> Run | None:
    """Axes of `n` entries behind `lead`, without axes of one entry around them."""
    for a, size in enumerate(shape):
        if math.prod(shape[:a]) == lead and size != 1:
            stops = range(a + 1, len(shape) + 1)
            return next(((a, b) for b in stops if math.prod(shape[a:b]) == n), None)
    return None


def _worked(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Axes that an equation says it works along."""
    found = (params.get(k, ()) for k in ("axes", "axis", "dimension", "dimensions"))
    return tuple(a for x in found for a in ((x,) if isinstance(x, int) else x or ()))


def _moved(marks: Marks, to: Callable[[int, int], Run | None]) -> Marks:
    pairs = ((i, to(*run)) for i, run in marks)
    return frozenset((i, run) for i, run in pairs if run is not None)
