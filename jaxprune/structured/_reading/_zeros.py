"""Where removing units differs from setting their weights to 0, decided from the jaxpr.

With its weights at 0 a unit may still have a value, such as sigmoid(0), which is harmless if
it is multiplied by a zero weight, and is not where values of several units are summed. So
each value is followed along each dimension: is it 0 at units whose weights are?
"""

import collections
import functools
from collections.abc import Container, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import core, dtypes
from jax.extend.core import Literal

from jaxprune.structured._reading import _dims, _values
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._propagate import Program, Record
from jaxprune.structured._reading._removed import (
    PLAIN_CALLS,
    REDUCTIONS,
    Scope,
    Zeros,
    at_removed,
    unsettled,
)
from jaxprune.structured._reading._values import Dims
from jaxprune.tracing._walk import scan_operands

_NOTHING: frozenset[Dim] = frozenset()
# f(0) = 0, or the value moves.
_FIXED = frozenset(
    "neg sign floor ceil round expm1 log1p tanh sin tan asin atan sinh asinh atanh sqrt "
    "cbrt abs erf erf_inv square real imag conj convert_element_type reduce_precision "
    "copy copy_p stop_gradient sharding_constraint layout_constraint reshard mesh_cast "
    "name device_put pvary "
    "reshape transpose squeeze expand_dims broadcast_in_dim slice split rev tile "
    "reduce_max reduce_min reduce_sum reduce_prod reduce_window_sum reduce_window_max "
    "reduce_window_min cumsum cummax cummin cumprod dynamic_slice unstack "
    "bitcast_convert_type scatter-mul scatter_mul".split()
)
_ALL_ZERO = frozenset(
    "add sub max min add_any select_n clamp or xor concatenate stack pad rem atan2 "
    "dynamic_update_slice scatter scatter-add scatter_add complex nextafter sort".split()
)
_PRODUCTS = frozenset("mul and".split())
_INFINITE = frozenset("rsqrt log div rem lgamma digamma pow integer_pow".split())
CHECKPOINTS = frozenset("remat remat2 checkpoint".split())
_LARGE = 1 << 20


def look(
    program: Program,
    zeroed: Iterable[Dims],
    among: Iterable[Dim],
    rules: Container[str] = (),
) -> "Look":
    """Follows where values are 0 without weights.

    Args:
      program: the whole function; its first operands are those of `zeroed`.
      zeroed: dimensions of the inputs whose units are set to 0.
      among: leaves to look at.
      rules: names of primitives that users have rules for.
    """
    found = Look(frozenset(among), rules)
    zeros = [found.among(dims) for dims in zeroed]
    zeros += [_NOTHING] * (len(program.operands) - len(zeros))
    found.run(program, zeros)
    return found


class Look:
    """What was found.

    Attributes:
      candidates: dimensions that may lose units.
      notes: for these, where a shrunk function may differ from the masked one.
      zeros: of each value, by program.
    """

    def __init__(self, candidates: frozenset[Dim], rules: Container[str]):
        self.candidates, self.rules = candidates, rules
        self.notes: dict[Dim, dict[str, None]] = {}
        self.zeros: dict[Program, dict[Any, Zeros]] = {}
        self.quiet = 0  # inside a loop whose carry is not settled yet
        self._leaves = functools.cache(
            lambda d: frozenset(_dims.leaves(d)) & candidates
        )

    def among(self, dims: Dims) -> frozenset[Dim]:
        return frozenset().union(*(self._leaves(d) for d in dims))

    def note(self, dims: Iterable[Dim], reason: str) -> None:
        for d in () if self.quiet else dims:
            self.notes.setdefault(d, {})[reason] = None

    def run(
        self,
        program: Program,
        operands: Sequence[Zeros],
        outer: Scope | None = None,
        call: Record | None = None,
    ) -> list[Zeros]:
        """Zeros of the outputs of a program."""
        known: dict[Any, Zeros] = {}
        self.zeros[program] = known
        scope = Scope(program, known, outer, call)
        if outer is not None and call is not None:
            outer.inner[call] = scope
        for v, c in zip(program.jaxpr.constvars, program.consts, strict=True):
            known[v] = _constant(c)
        known.update(zip(program.jaxpr.invars, operands, strict=True))

        def read(x: Any) -> Zeros:
            return _constant(x.val) if isinstance(x, Literal) else known[x]

        for record in program.records:
            zeros = [read(x) for x in record.eqn.invars]
            outs = self.record(scope, record, zeros)
            for v, z, dims in zip(record.eqn.outvars, outs, record.outs, strict=True):
                known[v] = None if z is None else z & self.among(dims)
        return [read(x) for x in program.jaxpr.outvars]

    def record(
        self, scope: Scope, record: Record, zeros: list[Zeros]
    ) -> Sequence[Zeros]:
        name, n = record.eqn.primitive.name, len(record.outs)
        if (
            not record.inner
            and any(z is not None for z in zeros)
            and not any(self.among(x.dims) for x in record.operands)
            and not any(map(self.among, record.outs))
        ):
            return [_NOTHING] * n
        if name == "scan":
            return self.scan(record, zeros)
        if name == "while":
            return self.loop(record, zeros)
        if name == "cond":
            outs = [self.run(p, zeros[1:]) for p in record.inner]
            return [_meet(column) for column in zip(*outs, strict=True)]
        if record.inner:
            followed = name in PLAIN_CALLS or name in CHECKPOINTS
            return self.run(record.inner[0], zeros, scope if followed else None, record)
        if name == "optimization_barrier":
            return zeros
        self.sums(scope, record, zeros)
        if name in _INFINITE:
            self.infinite(record, zeros)
        return [self.value(record, zeros, dims) for dims in record.outs]

    def value(self, record: Record, zeros: list[Zeros], dims: Dims) -> Zeros:
        """Of an output."""
        name = record.eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            return self.product(zeros[:2], self.uncontracted(record), dims)
        operands = [x.dims for x in record.operands]
        if name in _PRODUCTS:
            return self.product(zeros, operands, dims)
        if name in ("concatenate", "pad"):
            return self.joined(record, zeros)
        if name == "gather":
            return self.gathered(record, zeros[0])
        met = _operands_to_meet(record, zeros, self.stays_zero(record))
        found = _meet(zeros[i] for i in met) if met else _NOTHING
        if found is None or (len(operands) == 1 and name != "broadcast_in_dim"):
            return found
        # In an outer sum units stand in two axes, and come from one operand in each.
        times = [self.occurrences(operands[i]) for i in met if zeros[i] is not None]
        here = self.occurrences(dims)
        return frozenset(
            d for d in found if here[d] < 2 or all(n[d] == here[d] for n in times)
        )

    def occurrences(self, dims: Dims) -> collections.Counter[Dim]:
        """How often each leaf stands in the axes."""
        return collections.Counter(x for d in dims for x in _dims.leaves(d))

    def product(
        self, zeros: Sequence[Zeros], operands: Sequence[Dims], dims: Dims
    ) -> Zeros:
        """Of a product: 0 where one operand is, along axes that come from it."""
        if any(z is None for z in zeros):
            return None
        pairs = [
            (z & has, has)
            for z, has in zip(zeros, map(self.among, operands), strict=True)
            if z is not None
        ]
        found = _NOTHING.union(*(z for z, _ in pairs))
        # A dimension that stands in two axes must be 0 along both.
        here = self.occurrences(dims)
        return frozenset(
            d
            for d in found
            if here[d] < 2 or all(d in z for z, has in pairs if d in has)
        )

    def uncontracted(self, record: Record) -> list[Dims]:
        """Axes of the two operands of a product that its output has."""
        left, right = (x.dims for x in record.operands[:2])
        name, params = record.eqn.primitive.name, record.eqn.params
        if name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            group = (record.extra,) if params["feature_group_count"] > 1 else ()
            return [(left[numbers.lhs_spec[0]], *group), (right[numbers.rhs_spec[0]],)]
        if name == "dot_general":
            l_axes, r_axes = params["dimension_numbers"][0]
        else:
            numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            l_axes, r_axes = numbers[0]
        return [
            tuple(d for i, d in enumerate(x) if i not in axes)
            for x, axes in ((left, l_axes), (right, r_axes))
        ]

    def gathered(self, record: Record, zeros: Zeros) -> Zeros:
        """Of a gather: slices keep their units; what is asked for may be any."""
        if zeros is None:
            return None
        dims, offset = (
            record.outs[0],
            record.eqn.params["dimension_numbers"].offset_dims,
        )
        slices = self.among(tuple(dims[i] for i in offset))
        rows = self.among(tuple(d for i, d in enumerate(dims) if i not in offset))
        return zeros & (slices - rows)

    def joined(self, record: Record, zeros: Sequence[Zeros]) -> Zeros:
        """Of a concatenation, or a padded value: a part has what its operand has."""
        if all(z is None for z in zeros):
            return None
        having = [
            (self.among(x.dims), z) for x, z in zip(record.operands, zeros, strict=True)
        ]
        found = self.among(record.outs[0])
        if record.eqn.primitive.name == "pad" and zeros[1] is not None:
            found &= self.unpadded(record)
        return frozenset(
            d
            for d in found
            if all(z is None or d in z for has, z in having if d in has)
        )

    def unpadded(self, record: Record) -> frozenset[Dim]:
        """Dimensions at whose units nothing is padded: those of all axes with edges."""
        dims, here = record.operands[0].dims, self.occurrences(record.outs[0])
        edges = record.eqn.params["padding_config"]
        padded = [self._leaves(d) for d, e in zip(dims, edges, strict=True) if any(e)]
        found = self.among(dims).intersection(*padded)
        return frozenset(d for d in found if here[d] < 2)

    def stays_zero(self, record: Record) -> bool:
        """Whether f(0) = 0 of a comparison with numbers."""
        name, operands = record.eqn.primitive.name, record.eqn.invars
        if name not in ("max", "min", "clamp"):
            return False
        values = [np.asarray(x.val).item() for x in operands if _number(x)]
        if name == "clamp":
            bounded = _number(operands[0]) and _number(operands[2])
            return bounded and values[0] <= 0 <= values[-1]
        if len(values) != 1:
            return False
        return values[0] <= 0 if name == "max" else values[0] >= 0

    def sums(self, scope: Scope, record: Record, zeros: Sequence[Zeros]) -> None:
        """Notes where units meet one another and are not all 0."""
        name, params = record.eqn.primitive.name, record.eqn.params
        left = _first(record)
        gone: frozenset[Dim] = _NOTHING
        if name == "dot_general":
            gone = self.among(tuple(left[i] for i in params["dimension_numbers"][0][0]))
        elif name == "conv_general_dilated":
            right = record.operands[1].dims
            gone = self._leaves(right[params["dimension_numbers"].rhs_spec[1]])
        elif name == "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            gone = self.among(tuple(left[i] for i in numbers[0][0]))
        elif name.startswith("reduce_") and "axes" in params:
            self.reduction(scope, record)
            return
        elif name in ("argmax", "argmin", "top_k"):
            axes = params.get("axes", (params.get("axis", -1),))
            self.note(
                self.among(tuple(left[i] for i in axes)),
                f"{name} chooses among units, those without weights among them",
            )
            return
        elif name == "gather":
            numbers = params["dimension_numbers"]
            gone = self.among(tuple(left[i] for i in numbers.collapsed_slice_dims))
        elif name in self.rules:
            gone = frozenset().union(*(self.among(x.dims) for x in record.operands))
            gone -= frozenset().union(*map(self.among, record.outs))
        met = zeros[:1] if name == "gather" else zeros
        if any(z is None for z in met):
            return
        zero = _NOTHING.union(*(z for z in met if z is not None))
        self.note(gone - zero, f"{name} over units that are not 0 without weights")

    def reduction(self, scope: Scope, record: Record) -> None:
        """Notes where what removed units would add is not known; see `_removed`."""
        name = record.eqn.primitive.name
        pending = unsettled(scope, record, self.candidates)
        for dims in pending.values():
            for d in dims:
                at = None
                if name in REDUCTIONS:
                    at = at_removed(scope, record.eqn.invars[0], frozenset([d]))
                if at is None or len(pending) > 1:
                    self.note([d], f"{name} over units that are not 0 without weights")

    def infinite(self, record: Record, zeros: Sequence[Zeros]) -> None:
        """Notes where a unit without weights is no number."""
        name, eqn = record.eqn.primitive.name, record.eqn
        if name in ("integer_pow", "pow"):
            exponent = eqn.params.get("y", -1)
            if name == "pow" and _number(eqn.invars[1]):
                exponent = eqn.invars[1].val
            if exponent >= 0:
                return
        z = zeros[1 if name in ("div", "rem") else 0]
        met = self.among(record.operands[0].dims)
        self.note(met if z is None else z & met, f"{name} of 0 without weights")

    def scan(self, record: Record, zeros: list[Zeros]) -> list[Zeros]:
        first, second = scan_operands(record.eqn.params, len(zeros))
        length = self._leaves(record.extra)
        self.note(length, "a step without weights may still change what passes it")
        consts, carry, xs = zeros[:first], zeros[first:second], zeros[second:]
        carry = self.settled(record.inner[0], carry, lambda c: [*consts, *c, *xs])
        return self.run(record.inner[0], [*consts, *carry, *xs])

    def loop(self, record: Record, zeros: list[Zeros]) -> list[Zeros]:
        params = record.eqn.params
        first, second = params["cond_nconsts"], params["body_nconsts"]
        test, body = record.inner
        consts = zeros[first : first + second]
        carry = self.settled(body, zeros[first + second :], lambda c: [*consts, *c])
        self.run(test, [*zeros[:first], *carry])
        self.run(body, [*consts, *carry])
        return carry

    def settled(self, body: Program, carry: list[Zeros], operands: Any) -> list[Zeros]:
        """The carry of a loop after any number of steps."""
        self.quiet += 1
        while True:
            outs = self.run(body, operands(carry))[: len(carry)]
            met = [_meet(pair) for pair in zip(carry, outs, strict=True)]
            if met == carry:
                self.quiet -= 1
                return carry
            carry = met


def _operands_to_meet(record: Record, zeros: Sequence[Zeros], fixed: bool) -> list[int]:
    """Operands all of which must be 0, so that an output is; none if it never is."""
    name, eqn = record.eqn.primitive.name, record.eqn
    every = list(range(len(zeros)))
    if fixed:
        return [i for i, x in enumerate(eqn.invars) if not _number(x)]
    if name in ("scatter", "scatter-add", "scatter_add"):
        return [0, 2]
    if name == "dynamic_update_slice":
        return [0, 1]
    if name == "select_n":
        return every[1:]
    if name in _ALL_ZERO:
        return every
    powers = name == "integer_pow" and eqn.params["y"] > 0
    powers |= name == "pow" and _number(eqn.invars[1]) and eqn.invars[1].val > 0
    return [0] if name in _FIXED or powers or name == "div" else []


def _first(record: Record) -> Dims:
    """Dimensions of the first operand."""
    return record.operands[0].dims if record.operands else ()


def _meet(zeros: Iterable[Zeros]) -> Zeros:
    found: Zeros = None
    for z in zeros:
        found = z if found is None else found if z is None else found & z
    return found


def _number(x: Any) -> bool:
    return isinstance(x, Literal) and np.ndim(x.val) == 0


def _constant(x: Any) -> Zeros:
    if isinstance(x, core.Tracer) or int(np.prod(_values.shape_of(x))) > _LARGE:
        return _NOTHING
    if jnp.issubdtype(dtypes.result_type(x), dtypes.prng_key):
        return _NOTHING
    return _NOTHING if np.any(np.asarray(x) != 0) else None
