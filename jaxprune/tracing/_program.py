"""A jaxpr as a list of equations, with calls inlined, and what lives between them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from jaxprune.tracing._replay import bind
from jaxprune.tracing._walk import CALLS, jaxpr_of, scan_operands

State = dict[str, Array]


class Op(NamedTuple):
    """An equation; values are numbers, or constants."""

    eqn: Any
    ins: tuple[Any, ...]
    outs: tuple[int, ...]


class Constant(NamedTuple):
    """A value that is known."""

    value: Any


class Program:
    """A jaxpr, its leaves, and its equations that depend on an argument."""

    def __init__(self, closed: ClosedJaxpr, paths: Sequence[str]):
        self.count = itertools.count()
        inputs = [next(self.count) for _ in closed.jaxpr.invars]
        self.leaves = dict(zip(inputs, paths, strict=False))
        self.args = inputs[len(paths) :]
        ops: list[Op] = []
        consts = [Constant(x) for x in closed.consts]
        self.outs = self.inline(closed.jaxpr, consts, inputs, ops)
        # What depends on no argument is computed where it is needed.
        data = set(self.args)
        self.fixed: dict[int, Op] = {}
        self.sources: dict[int, frozenset[str]] = {}
        self.ops: list[Op] = []
        for op in ops:
            if data.isdisjoint(keys_of(op.ins)) and not op.eqn.effects:
                sources = self.leaves_of(op.ins)
                self.sources.update(dict.fromkeys(op.outs, sources))
                self.fixed.update(dict.fromkeys(op.outs, op))
            else:
                data.update(op.outs)
                self.ops.append(op)
        self.used = [self.leaves_of(op.ins) for op in self.ops]
        self.last: dict[int, int] = {}
        for i, op in enumerate(self.ops):
            self.last.update(dict.fromkeys(keys_of(op.ins), i))
        self.last.update(dict.fromkeys(keys_of(self.outs), len(self.ops)))
        self.made = dict.fromkeys(self.args, -1)
        for i, op in enumerate(self.ops):
            self.made.update(dict.fromkeys(op.outs, i))
        made = [v for op in self.ops for v in zip(op.outs, op.eqn.outvars, strict=True)]
        given = zip(self.args, closed.jaxpr.invars[len(paths) :], strict=True)
        self.nbytes = {
            k: v.aval.size * v.aval.dtype.itemsize for k, v in [*given, *made]
        }

    def inline(self, jaxpr: Jaxpr, consts, inputs, ops: list[Op]) -> list[Any]:
        """Adds the equations to `ops`; returns the outputs."""
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(x):
            return Constant(x.val) if isinstance(x, Literal) else known[x]

        for eqn in jaxpr.eqns:
            ins = [read(x) for x in eqn.invars]
            if eqn.primitive.name in CALLS:
                inner, values = jaxpr_of(eqn.params)
                found = self.inline(inner, map(Constant, values), ins, ops)
            else:
                found = [next(self.count) for _ in eqn.outvars]
                ops.append(Op(eqn, tuple(ins), tuple(found)))
            known.update(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def leaves_of(self, atoms: Iterable[Any]) -> frozenset[str]:
        """Leaves that values depend on by way of parameters alone."""
        found: set[str] = set()
        for k in keys_of(atoms):
            if k in self.leaves:
                found.add(self.leaves[k])
            elif k in self.fixed:
                found |= self.sources[k]
        return frozenset(found)

    def begin(self, leaves: Sequence[Any]) -> State:
        """The state before the first equation."""
        wanted = self.needed(0)
        given = zip(self.args, leaves, strict=True)
        return {name_of(k): jnp.asarray(x) for k, x in given if k in wanted}

    def needed(self, at: int) -> set[int]:
        """What is made before the equation `at`, and used from there on."""
        return {k for k, made in self.made.items() if made < at <= self.last.get(k, -1)}

    def read(self, x: Any, values: dict[int, Array], state: State) -> Any:
        """A value that is known, or can be computed from parameters."""
        if isinstance(x, Constant):
            return x.value
        if x not in values:
            if x in self.fixed:
                op = self.fixed[x]
                found = bind(op.eqn, [self.read(a, values, state) for a in op.ins])
                values.update(zip(op.outs, found, strict=True))
            else:
                values[x] = state[name_of(x)]
        return values[x]

    def held(self, at: int) -> int:
        """Bytes that are needed to go on from the equation `at`."""
        return sum(self.nbytes[k] for k in self.needed(at))

    def narrowest(self, low: int, high: int) -> int:
        """Where, from `low` to `high`, the least memory is needed to go on."""
        return min(range(low, high + 1), key=lambda at: (self.held(at), at))

    def carried(self, scan: int) -> tuple[int, int]:
        """The first operand that a scan carries, and the first that it slices."""
        op = self.ops[scan]
        return scan_operands(op.eqn.params, len(op.ins))

    def around(self, scan: int) -> set[int]:
        """Values that a scan reads, or that are used after it, apart from its own."""
        op = self.ops[scan]
        first, last = self.carried(scan)
        read = set(keys_of((*op.ins[:first], *op.ins[last:])))
        after = {k for k in self.needed(scan + 1) if self.made[k] < scan}
        return after | {k for k in read if k in self.made}

    def sliced(self, op: Op) -> dict[int, str]:
        """Operands of a scan that are leaves it runs over, and nothing else."""
        if op.eqn.primitive.name != "scan":
            return {}
        _, first = scan_operands(op.eqn.params, len(op.ins))
        others = self.leaves_of(op.ins[:first]) | self.leaves_of(
            x for x in op.ins[first:] if not isinstance(x, Constant) and x in self.fixed
        )
        return {
            i: self.leaves[x]
            for i, x in enumerate(op.ins)
            if i >= first and not isinstance(x, Constant) and x in self.leaves
            if self.leaves[x] not in others
        }


def keys_of(atoms: Iterable[Any]) -> list[int]:
    """Those that are no constants."""
    return [x for x in atoms if not isinstance(x, Constant)]


def name_of(key: int) -> str:
    """Of a value, in a state."""
    return f"value{key}"
