"""The value that a removed unit would still have, in a function of masked weights.

Where a sum runs over units, those without weights may be no zeros: in the variance of a
layer norm each of them is (0 - mean)². Their weights are all 0, so all removed units have one
value, and it is computed once, backwards from where it is needed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jaxtyping import Array

from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._propagate import Program, Record
from jaxprune.structured._reading._rules import is_pointwise
from jaxprune.structured._reading._values import Dims
from jaxprune.tracing._replay import bind

Zeros: TypeAlias = frozenset[Dim] | None
"""A value is 0 at removed units of these dimensions. `None` is 0 everywhere."""

PLAIN_CALLS = frozenset("jit pjit closed_call core_call".split())
_MOVES = frozenset("broadcast_in_dim reshape squeeze expand_dims".split())
REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod".split())


@dataclasses.dataclass(eq=False)
class Scope:
    """A program, and where it stands.

    Attributes:
      program: the program.
      zeros: of its values.
      outer: the scope around it, if operands can be followed there.
      call: the equation of that scope.
      values: once it runs.
      inner: scopes of the calls in it that have run, by record.
    """

    program: Program
    zeros: Mapping[Any, Zeros]
    outer: "Scope | None" = None
    call: Record | None = None
    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    inner: dict[Record, "Scope"] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def makers(self) -> dict[Any, tuple[Record, int]]:
        """The record that makes a value, and which of its outputs it is."""
        return {
            v: (record, i)
            for record in self.program.records
            for i, v in enumerate(record.eqn.outvars)
        }

    def dims(self, v: Any) -> Dims:
        """Of a value."""
        if v in self.makers:
            record, i = self.makers[v]
            return record.outs[i]
        program = self.program
        names = (*program.jaxpr.constvars, *program.jaxpr.invars)
        found = (*program.const_dims, *(x.dims for x in program.operands))
        return found[names.index(v)]


Sizes: TypeAlias = Callable[[Dim], int]
At: TypeAlias = Callable[[Sizes], Array]
"""Computes a value at removed units: one place in their axis, and kept ones in others."""


def at_removed(scope: Scope, v: Any, removed: frozenset[Dim]) -> At | None:
    """The value of `v` at units that are removed of `removed`.

    Args:
      scope: of `v`.
      v: a variable.
      removed: dimensions that lose units, all in one axis.

    Returns:
      What computes it once the scope has run; `None` if that cannot be told.
    """
    if isinstance(v, Literal):
        return (lambda _: v.val) if np.ndim(v.val) == 0 else None
    dims = scope.dims(v)
    axes = [i for i, d in enumerate(dims) if removed.intersection(_dims.leaves(d))]
    if not axes:
        return lambda _: scope.values[v]
    if len(axes) > 1 or not removed <= set(_dims.leaves(dims[axes[0]])):
        return None
    axis, zeros = axes[0], scope.zeros.get(v, frozenset())

    def shape(sizes: Sizes) -> list[int]:
        return [1 if i == axis else sizes(d) for i, d in enumerate(dims)]

    if zeros is None or removed <= zeros:
        return lambda sizes: jnp.zeros(shape(sizes), v.aval.dtype)
    if v not in scope.makers:
        outer = _operand(scope, v)
        return None if outer is None else at_removed(*outer, removed)
    record, i = scope.makers[v]
    name, eqn = record.eqn.primitive.name, record.eqn
    if name in PLAIN_CALLS:
        return _inside(scope, record, i, removed)
    if not (
        is_pointwise(eqn) or name in _MOVES or name in ("transpose", "dot_general")
    ):
        return None
    if name == "dot_general" and _contracts(record, removed):
        return None
    if any(_cuts(x.dims, dims[axis], removed) for x in record.operands):
        return None
    parts = [at_removed(scope, x, removed) for x in eqn.invars]
    found = [p for p in parts if p is not None]
    if len(found) < len(parts):
        return None

    def compute(sizes: Sizes) -> Array:
        xs = [p(sizes) for p in found]
        if name == "broadcast_in_dim":
            order = eqn.params["broadcast_dimensions"]
            return lax.broadcast_in_dim(xs[0], shape(sizes), order)
        if name in _MOVES:
            return lax.reshape(xs[0], shape(sizes))
        return bind(eqn, xs)[0]

    return compute


def _contracts(record: Record, removed: frozenset[Dim]) -> bool:
    """Whether the units are summed over in a product."""
    axes = record.eqn.params["dimension_numbers"][0][0]
    dims = (record.operands[0].dims[i] for i in axes)
    return any(removed.intersection(_dims.leaves(d)) for d in dims)


def _cuts(dims: Dims, whole: Dim, removed: frozenset[Dim]) -> bool:
    """Whether units lie along another axis here, where removed ones may differ."""
    met = (d for d in dims if removed.intersection(_dims.leaves(d)))
    return any(_dims.leaves(d) != _dims.leaves(whole) for d in met)


def _inside(scope: Scope, record: Record, i: int, removed: frozenset[Dim]) -> At | None:
    """Of an output of a call."""
    if record not in scope.inner:
        return None
    inner = scope.inner[record]
    return at_removed(inner, inner.program.jaxpr.outvars[i], removed)


def reduced(
    scope: Scope, record: Record, found: Array, sizes: Sizes, lost: Mapping[Dim, Any]
) -> Array:
    """A sum, product or extremum over units, with those that are removed.

    Args:
      scope: where the record stands.
      record: the reduction.
      found: what it gives over units that are kept.
      sizes: how many units a dimension has by now.
      lost: dimensions that lose units.
    """
    name, axes = record.eqn.primitive.name, record.eqn.params["axes"]
    v, dims = record.eqn.invars[0], record.operands[0].dims
    pending = unsettled(scope, record, frozenset(lost))
    if len(pending) != 1:
        return found
    (removed,) = pending.values()
    at = at_removed(scope, v, removed)
    if at is None:
        return found
    (axis,) = pending
    one = at(sizes)
    count = dims[axis].size - sizes(dims[axis])
    if name == "reduce_sum":
        return found + (jnp.sum(one, axis=axes) * count).astype(found.dtype)
    if name == "reduce_prod":
        return found * (jnp.prod(one, axis=axes) ** count).astype(found.dtype)
    both = jnp.maximum if name == "reduce_max" else jnp.minimum
    over = jnp.max if name == "reduce_max" else jnp.min
    return both(found, over(one, axis=axes).astype(found.dtype))


def unsettled(
    scope: Scope, record: Record, removed: frozenset[Dim]
) -> dict[int, frozenset[Dim]]:
    """Axes of a reduction along which removed units count, and these."""
    v = record.eqn.invars[0]
    zeros = frozenset() if isinstance(v, Literal) else scope.zeros.get(v, frozenset())
    found = {}
    for axis in record.eqn.params["axes"]:
        met = removed.intersection(_dims.leaves(record.operands[0].dims[axis]))
        adds_nothing = record.eqn.primitive.name == "reduce_sum" and (
            zeros is None or met <= zeros
        )
        if met and not adds_nothing:
            found[axis] = met
    return found


def mean_of(scope: Scope, record: Record) -> tuple[Dims, float] | None:
    """Where a sum over units is divided by their number, as in a mean.

    Returns:
      The dimensions of the units, and how many less than these the number is: 1 in an
      unbiased variance.
    """
    eqn, name = record.eqn, record.eqn.primitive.name
    if name not in ("div", "mul"):
        return None
    number = _number(scope, eqn.invars[1])
    dims = _summed(scope, eqn.invars[0]) if number else None
    if dims is None or not number:
        return None
    count = math.prod(d.size for d in dims)
    less = count - (number if name == "div" else 1 / number)
    return next(((dims, n) for n in (0.0, 1.0) if abs(less - n) <= 1e-6 * count), None)


def _number(scope: Scope, v: Any) -> float | None:
    """A number that is written in the code, or computed from such numbers."""
    if isinstance(v, Literal):
        return float(v.val) if np.ndim(v.val) == 0 else None
    if v.aval.shape:
        return None
    if v not in scope.makers:
        outer = _operand(scope, v)
        return None if outer is None else _number(*outer)
    record, _ = scope.makers[v]
    name = record.eqn.primitive.name
    if name not in ("convert_element_type", "sub", "max"):
        return None
    parts = [_number(scope, x) for x in record.eqn.invars]
    found = [x for x in parts if x is not None]
    if len(found) < len(parts):
        return None
    if name == "sub":
        return found[0] - found[1]
    return max(found)


def _operand(scope: Scope, v: Any) -> tuple[Scope, Any] | None:
    """What an operand of a program is in the scope around it."""
    names = list(scope.program.jaxpr.invars)
    if scope.outer is None or scope.call is None or v not in names:
        return None
    return scope.outer, scope.call.eqn.invars[names.index(v)]


def _summed(scope: Scope, v: Any) -> Dims | None:
    if isinstance(v, Literal):
        return None
    if v not in scope.makers:
        outer = _operand(scope, v)
        return None if outer is None else _summed(*outer)
    record, i = scope.makers[v]
    name = record.eqn.primitive.name
    if name == "reduce_sum":
        dims = record.operands[0].dims
        return tuple(dims[a] for a in record.eqn.params["axes"])
    if name in (*_MOVES, "convert_element_type"):
        return _summed(scope, record.eqn.invars[0])
    if name in PLAIN_CALLS and record in scope.inner:
        inner = scope.inner[record]
        return _summed(inner, inner.program.jaxpr.outvars[i])
    return None
