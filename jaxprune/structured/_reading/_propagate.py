"""Carries dimensions through a jaxpr, and remembers each equation for a run at other sizes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune.structured._reading import _dims, _indexing, _rules, _values
from jaxprune.structured._reading._dims import Dim, unify
from jaxprune.structured._reading._values import Dims, Moved, Operand
from jaxprune.tracing._walk import CALLS, jaxpr_of, scan_operands


class Rule(NamedTuple):
    """What to do with a primitive of your own.

    Attributes:
      axes: `(params, *operands) -> (operand axes, output axes)`: from the parameters of
        the equation and shapes of its operands, a tuple of labels for each operand and
        each output, one label for each axis. Axes with one label lose the same units,
        wherever they stand; those labelled `None` must stay whole.
      run: `(params, *operands) -> outputs`, the primitive at other sizes, an array or
        several. Without it the primitive is bound with the parameters it had.
    """

    axes: Callable[..., tuple[Sequence[Any], Sequence[Any]]]
    run: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Record:
    """An equation, with what its operands and outputs look like.

    Attributes:
      eqn: the equation.
      operands: what went in.
      outs: dimensions of what came out.
      extra: see `Moved`.
      inner: programs in the equation, such as branches or the body of a loop.
      loops: lengths of the scans around it.
    """

    eqn: Any
    operands: tuple[Operand, ...]
    outs: tuple[Dims, ...]
    extra: Any = None
    inner: tuple["Program", ...] = ()
    loops: Dims = ()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A jaxpr and its records."""

    jaxpr: Jaxpr
    consts: tuple[Any, ...]
    const_dims: tuple[Dims, ...]
    operands: tuple[Operand, ...]
    records: tuple[Record, ...]
    outs: tuple[Operand, ...]


class Propagation:
    """Walks a jaxpr once.

    Attributes:
      unknown: names of primitives that are not known, and how often they came.
    """

    def __init__(self, rules: Mapping[str, Rule] | None = None):
        self.rules = rules or {}
        self.unknown: dict[str, int] = {}

    def run(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        operands: Sequence[Operand],
        loops: Dims = (),
    ) -> Program:
        """Dimensions of everything in a jaxpr."""
        const_dims = tuple(_dims.fresh(_values.shape_of(c)) for c in consts)
        known = {
            v: Operand(d, False)
            for v, d in zip(jaxpr.constvars, const_dims, strict=True)
        }
        known.update(zip(jaxpr.invars, operands, strict=True))

        def read(x: Any) -> Operand:
            if isinstance(x, Literal):
                return Operand(_dims.fresh(_values.shape_of(x.aval)), False)
            return known[x]

        records = []
        for eqn in jaxpr.eqns:
            own = eqn.primitive.name in self.rules
            record = self.equation(eqn, tuple(read(x) for x in eqn.invars), loops)
            if eqn.primitive.name in CALLS and not own:
                found = list(record.inner[0].outs)
            else:
                found = _indexing.numbered(eqn, record.operands, record.outs)
            known.update(zip(eqn.outvars, found, strict=True))
            records.append(record)
        outs = tuple(read(x) for x in jaxpr.outvars)
        return Program(
            jaxpr, tuple(consts), const_dims, tuple(operands), tuple(records), outs
        )

    def closed(
        self, x: ClosedJaxpr, operands: Sequence[Operand], loops: Dims = ()
    ) -> Program:
        """As `run`."""
        return self.run(x.jaxpr, x.consts, operands, loops)

    def equation(self, eqn: Any, operands: tuple[Operand, ...], loops: Dims) -> Record:
        """One equation."""
        name = eqn.primitive.name
        if name in self.rules:
            return _record(eqn, operands, self._by_rule(eqn, operands), loops=loops)
        if name in CALLS:
            inner = self.run(*jaxpr_of(eqn.params), operands, loops)
            moved = Moved([x.dims for x in inner.outs])
            return _record(eqn, operands, moved, (inner,), loops)
        if name == "scan":
            return self._scan(eqn, operands, loops)
        if name == "cond":
            return self._cond(eqn, operands, loops)
        if name == "while":
            return self._while(eqn, operands, loops)
        if _is_empty(eqn) and not _rules.keeps_axes(eqn):
            moved = _values.unknown(eqn, operands, "an empty array")
            return _record(eqn, operands, moved, loops=loops)
        moved = _rules.apply(eqn, operands)
        if moved is None:
            self.unknown[name] = self.unknown.get(name, 0) + 1
            moved = _values.unknown(eqn, operands, f"unknown primitive {name}")
        return _record(eqn, operands, moved, loops=loops)

    def _by_rule(self, eqn, operands):
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        rule, name = self.rules[eqn.primitive.name], eqn.primitive.name
        ins, outs = rule.axes(eqn.params, *shapes)
        known: dict[Any, Dim] = {}
        for x, labels in zip(operands, ins, strict=True):
            _check_rank(name, "an operand", len(x.dims), labels)
            for d, label in zip(x.dims, labels, strict=True):
                if label is None:
                    _dims.freeze(d, f"kept whole by the rule of {name}")
                else:
                    unify(known.setdefault(label, d), d)
        found = []
        for v, labels in zip(eqn.outvars, outs, strict=True):
            _check_rank(name, "an output", len(v.aval.shape), labels)
            dims = [
                known.get(x) or Dim(n)
                for x, n in zip(labels, v.aval.shape, strict=True)
            ]
            for d, label in zip(dims, labels, strict=True):
                if label not in known:
                    _dims.freeze(d, f"made by {name}")
            found.append(tuple(dims))
        return Moved(found)

    def _scan(self, eqn, operands, loops):
        params = eqn.params
        first, second = scan_operands(params, len(operands))
        length = Dim(params["length"])
        for x in operands[second:]:
            unify(length, x.dims[0])
        _dims.mark(length, "length of a scan")
        inputs = [*operands[:first]]
        inputs += [Operand(x.dims, True) for x in operands[first:second]]
        inputs += [x._replace(dims=x.dims[1:]) for x in operands[second:]]
        inner = self.closed(params["jaxpr"], inputs, (*loops, length))
        carry = second - first
        outs = [x.dims for x in inner.outs]
        for x, dims in zip(operands[first:second], outs[:carry], strict=True):
            _unify_all(x.dims, dims)
        outs = [*outs[:carry], *((length, *dims) for dims in outs[carry:])]
        return _record(eqn, operands, Moved(outs, length), (inner,), loops)

    def _cond(self, eqn, operands, loops):
        inner = tuple(
            self.closed(b, operands[1:], loops) for b in eqn.params["branches"]
        )
        outs = [x.dims for x in inner[0].outs]
        for other in inner[1:]:
            for dims, x in zip(outs, other.outs, strict=True):
                _unify_all(dims, x.dims)
        return _record(eqn, operands, Moved(outs), inner, loops)

    def _while(self, eqn, operands, loops):
        params = eqn.params
        first, second = params["cond_nconsts"], params["body_nconsts"]
        tested, consts = operands[:first], operands[first : first + second]
        carry = operands[first + second :]
        inputs = [Operand(x.dims, True) for x in carry]
        test = self.closed(params["cond_jaxpr"], [*tested, *inputs], loops)
        body = self.closed(params["body_jaxpr"], [*consts, *inputs], loops)
        for x, y in zip(carry, body.outs, strict=True):
            _unify_all(x.dims, y.dims)
        return _record(
            eqn, operands, Moved([x.dims for x in carry]), (test, body), loops
        )


def _is_empty(eqn: Any) -> bool:
    return any(0 in _values.shape_of(v.aval) for v in (*eqn.invars, *eqn.outvars))


def _record(eqn, operands, moved, inner=(), loops: Dims = ()) -> Record:
    return Record(eqn, operands, tuple(moved.outs), moved.extra, inner, loops)


def _unify_all(a: Dims, b: Dims) -> None:
    for x, y in zip(a, b, strict=True):
        unify(x, y)


def _check_rank(name: str, what: str, rank: int, names: Sequence[Any]) -> None:
    if len(names) != rank:
        raise ValueError(
            f"rules: the rule of {name!r} gives the axes {tuple(names)} to {what} of rank "
            f"{rank}. Give a name to each axis."
        )
