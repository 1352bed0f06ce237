"""Cuts a function into blocks."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.tracing._blocks import Block, Blocks, Leaf, Slot, block_of, joined
from jaxprune.tracing._replay import bind
from jaxprune.tracing._walk import CALLS, jaxpr_of, scan_operands

BlockOf = Callable[[str], str | None]


def blocks(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    block_of: BlockOf = block_of,
) -> Blocks:
    """Cuts `fn(params, *args)` where the first leaf of each block is used.

    A scan whose layers are leaves of the parameters is cut into its iterations. What does
    not depend on the arguments, such as a cast of the weights, is done in each block that
    needs it.

    Args:
      fn: pure, of arrays.
      params: parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      block_of: name of the block that a leaf belongs to, from its path; `None` for leaves
        that make no block, which are used wherever they are needed.

    Raises:
      ValueError: if a scan runs over layers that were computed from leaves, otherwise
        than by a cast.

    Example:
      >>> from jaxprune import tracing
      >>> def fn(params, x):
      ...     for layer in params["layers"]:
      ...         x = jnp.tanh(x @ layer["kernel"])
      ...     return x
      >>> params = {"layers": [{"kernel": jnp.eye(2)} for _ in range(3)]}
      >>> found = tracing.blocks(fn, params, jnp.ones((1, 2)))
      >>> [block.name for block in found.blocks]
      ['layers/0', 'layers/1', 'layers/2']
    """
    closed = jax.make_jaxpr(fn)(params, *args)
    paths, leaves, _ = _tree.flatten(params)
    paths = [p for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)]
    return _Cutter(block_of).cut(closed, paths)


class _Op(NamedTuple):
    """An equation between numbered values."""

    eqn: Any  # `None`: the output is the input
    ins: tuple[Any, ...]  # numbers or literals
    outs: tuple[int, ...]


class _Piece(NamedTuple):
    """A block in the making: what it does, and where its inputs come from."""

    name: str
    ops: list[_Op]
    leaves: dict[int, Leaf]  # other than whole ones
    reads: dict[int, Slot]  # values that do not lie in the slot of their number
    writes: dict[int, Slot]


class _Cutter:
    def __init__(self, block_of: BlockOf):
        self.block_of = block_of
        self.leaves: dict[int, str] = {}
        self.consts: dict[int, Any] = {}
        self.avals: list[Any] = []
        self.data: set[int] = set()  # values that depend on the arguments
        self.made_by: dict[int, _Op] = {}  # values that do not
        self.programs: dict[Any, Callable] = {}

    def cut(self, closed: ClosedJaxpr, paths: Sequence[str]) -> Blocks:
        invars = closed.jaxpr.invars
        numbers = [self.new(v.aval) for v in invars]
        self.leaves = dict(zip(numbers, paths, strict=False))
        inputs = numbers[len(paths) :]
        self.data |= set(inputs)
        ops, outs = self.inline(closed.jaxpr, closed.consts, numbers)
        pieces = self.pieces(ops, outs)
        outs = [x if self.is_data(x) else self.rest(x, pieces[-1]) for x in outs]
        needed = set(outs)
        found = []
        for piece in reversed(pieces):
            block = self.block(piece, needed)
            if not block.writes:  # nothing comes of it
                continue
            needed -= {s.number for s in block.writes if s.layer is None}
            needed |= {s.number for s in block.reads}
            found.append(block)
        slots = (tuple(map(Slot, numbers)) for numbers in (inputs, outs))
        return Blocks(tuple(reversed(found)), *slots)

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def inline(self, jaxpr: Jaxpr, consts, numbers) -> tuple[list[_Op], list[Any]]:
        """All equations, those of calls in place of the calls."""
        known: dict[Any, Any] = dict(zip(jaxpr.invars, numbers, strict=True))
        for var, x in zip(jaxpr.constvars, consts, strict=True):
            known[var] = x if isinstance(x, int) else self.constant(x, var.aval)
        ops: list[_Op] = []

        def read(x):
            return x if isinstance(x, Literal) else known[x]

        for eqn in jaxpr.eqns:
            ins = [read(x) for x in eqn.invars]
            if eqn.primitive.name in CALLS:
                inner, inner_consts = jaxpr_of(eqn.params)
                done, outs = self.inline(inner, inner_consts, ins)
                ops += done
                known.update(zip(eqn.outvars, outs, strict=True))
                continue
            outs = [self.new(v.aval) for v in eqn.outvars]
            known.update(zip(eqn.outvars, outs, strict=True))
            ops.append(self.op(eqn, ins, outs))
        return ops, [read(x) for x in jaxpr.outvars]

    def constant(self, x: Any, aval: Any) -> int:
        number = self.new(aval)
        self.consts[number] = x
        return number

    def op(self, eqn, ins, outs) -> _Op:
        op = _Op(eqn, tuple(ins), tuple(outs))
        if any(map(self.is_data, ins)):
            self.data |= set(outs)
        else:
            self.made_by |= dict.fromkeys(outs, op)
        return op

    def is_data(self, x: Any) -> bool:
        return isinstance(x, int) and x in self.data

    def sources(self, numbers: Sequence[Any]) -> set[int]:
        """The leaves that values come from which do not depend on the arguments."""
        found, left, seen = set(), list(numbers), set()
        while left:
            x = left.pop()
            if not isinstance(x, int) or x in seen or x in self.data:
                continue
            seen.add(x)
            if x in self.leaves:
                found.add(x)
            elif x in self.made_by:
                left += self.made_by[x].ins
        return found

    def names(self, op: _Op) -> list[str]:
        paths = sorted({self.leaves[x] for x in self.sources(op.ins)})
        found = dict.fromkeys(map(self.block_of, paths))
        return [name for name in found if name]

    def pieces(self, ops: Sequence[_Op], outs: Sequence[Any]) -> list[_Piece]:
        ops = [op for op in ops if any(map(self.is_data, op.outs))]
        alive = self.alive(ops, outs)
        pieces = [_Piece("", [], {}, {}, {})]
        free = begin = 0  # a cut may be made behind the last equation that reads a leaf
        end = 0  # behind the last equation that reads a leaf of a block
        for i, op in enumerate(ops):
            if layered := self.layered(op):
                pieces += self.iterations(op, layered, pieces[-1])
                free = end = i + 1
                continue
            names = self.names(op)
            if names and pieces[-1].name not in names:
                # In a transformer, where nothing but the residual stream is alive.
                begin = min(range(free, i + 1), key=lambda t: (alive[t], -t))
                moved = _take_last(pieces[-1].ops, i - begin)
                pieces.append(_Piece(names[-1], moved, {}, {}, {}))
            pieces[-1].ops.append(op)
            if self.sources(op.ins):
                free = i + 1
            if names:
                end = i + 1
        # The last block ends where no more is alive than in front of it: in front of a
        # head that is no block, or a loss.
        cut = next(
            (t for t in range(end, len(ops)) if alive[t] <= alive[begin]), len(ops)
        )
        while cut < len(ops) and alive[cut] == alive[cut + 1]:
            cut += 1
        if pieces[-1].name and cut < len(ops):
            last = _take_last(pieces[-1].ops, len(ops) - cut)
            pieces.append(_Piece("", last, {}, {}, {}))
        return [p for p in pieces if p.ops] or pieces[-1:]

    def alive(self, ops: Sequence[_Op], outs: Sequence[Any]) -> list[int]:
        """Bytes that rest between one equation and the next, in front of each."""
        made = {x: i for i, op in enumerate(ops) for x in op.outs}
        last = {x: i for i, op in enumerate(ops) for x in op.ins if self.is_data(x)}
        last |= {x: len(ops) for x in outs if self.is_data(x)}
        change = [0] * (len(ops) + 2)
        for x, i in last.items():
            aval = self.avals[x]
            nbytes = math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
            change[made.get(x, -1) + 1] += nbytes
            change[i + 1] -= nbytes
        return list(itertools.accumulate(change))

    def layered(self, op: _Op) -> list[int]:
        """Places of the operands of a scan that are layers of leaves."""
        if op.eqn is None or op.eqn.primitive.name != "scan":
            return []
        first = scan_operands(op.eqn.params, len(op.ins))[1]
        found = [i for i, x in enumerate(op.ins) if i >= first and self.sources([x])]
        # A layer of "layers/up/kernel" is called "layers/0".
        named = found and self.block_of(joined(self.layers_of(op, found), 0, "leaf"))
        return found if named and op.eqn.params["length"] > 1 else []

    def layers_of(self, op: _Op, layered: Sequence[int]) -> str:
        """What the paths of layered leaves begin with."""
        sources = self.sources([op.ins[i] for i in layered])
        return _common([self.leaves[x] for x in sources])

    def iterations(self, op: _Op, layered: list[int], before: _Piece) -> list[_Piece]:
        params = op.eqn.params
        consts, first = scan_operands(params, len(op.ins))
        body = params["jaxpr"]
        inits = op.ins[consts:first]
        given = [x if self.is_data(x) else self.rest(x, before) for x in inits]
        carry = [self.new(self.avals[x]) for x in given]
        final = op.outs[: len(carry)]
        sources = {i: self.layer_source(op, i) for i in layered}
        rest = {
            i: x if self.is_data(x) else self.rest(x, before)
            for i, x in enumerate(op.ins)
            if i >= first and i not in layered
        }
        name = self.layers_of(op, layered)
        pieces = []
        order = range(params["length"])[:: -1 if params["reverse"] else 1]
        for layer in order:
            carried = final if layer == order[-1] else carry
            ins = [self.new(v.aval) for v in body.jaxpr.invars]
            leaves, reads = {}, {}
            for i, number in enumerate(ins):
                if i < consts:
                    ins[i] = op.ins[i]
                elif i < first:
                    reads[number] = Slot(given[i - consts])
                elif i in rest:
                    reads[number] = Slot(rest[i], layer)
                else:
                    path, steps = sources[i]
                    ins[i] = self.layer(path, steps, layer, leaves)
            self.data |= set(reads)
            ops, outs = self.inline(body.jaxpr, body.consts, ins)
            writes = {}
            for i, (x, v) in enumerate(zip(outs, body.jaxpr.outvars, strict=True)):
                number = self.new(v.aval)
                self.data.add(number)
                ops.append(_Op(None, (x,), (number,)))
                ys = i >= len(carry)
                writes[number] = Slot(op.outs[i], layer) if ys else Slot(carried[i])
            given = carried
            ops = [o for o in ops if any(x in self.data for x in o.outs)]
            pieces.append(_Piece(joined(name, layer), ops, leaves, reads, writes))
        return [*pieces, _Piece("", [], {}, {}, {})]

    def rest(self, x: Any, before: _Piece) -> int:
        """A value that rests between blocks, made of any."""
        number = self.new(x.aval if isinstance(x, Literal) else self.avals[x])
        self.data.add(number)
        before.ops.append(_Op(None, (x,), (number,)))
        return number

    def layer_source(self, op: _Op, i: int) -> tuple[int, list[Any]]:
        """The leaf that an operand of a scan is, and the casts in between."""
        x, steps = op.ins[i], []
        while x not in self.leaves:
            made = self.made_by[x]
            if made.eqn.primitive.name != "convert_element_type":
                paths = [self.leaves[y] for y in self.sources([x])]
                raise ValueError(
                    f"fn: a scan runs over layers computed from {_tree.listing(paths)} by "
                    f"{made.eqn.primitive.name}; expected the leaf itself, or a cast of it. "
                    "Do this in the body of the scan, or take the model as one block with "
                    "block_of=lambda path: None."
                )
            steps.insert(0, made.eqn)
            x = made.ins[0]
        return x, steps

    def layer(self, leaf: int, steps, layer: int, leaves) -> int:
        aval = self.avals[leaf]
        x = self.new(core.ShapedArray(aval.shape[1:], aval.dtype))
        leaves[x] = Leaf(self.leaves[leaf], layer)
        self.leaves[x] = self.leaves[leaf]
        for eqn in steps:
            y = self.new(core.ShapedArray(aval.shape[1:], eqn.params["new_dtype"]))
            self.made_by[y] = _Op(eqn, (x,), (y,))
            x = y
        return x

    def block(self, piece: _Piece, needed: set[int]) -> Block:
        made = {y for op in piece.ops for y in op.outs}
        writes = [(x, s) for x, s in piece.writes.items() if s.number in needed]
        writes += [(x, Slot(x)) for x in sorted(made & needed) if x not in piece.writes]
        ops = self.closure(piece.ops, [x for x, _ in writes])
        made = {y for op in ops for y in op.outs}
        used = {x for op in ops for x in op.ins if isinstance(x, int)} - made
        leaves = {x: piece.leaves.get(x, Leaf(self.leaves[x], None))
                  for x in sorted(used & self.leaves.keys())}  # fmt: skip
        reads = {x: piece.reads.get(x, Slot(x)) for x in sorted(used & self.data)}
        fn = self.program(ops, list(leaves), list(reads), [x for x, _ in writes])
        return Block(
            piece.name,
            tuple(leaves.values()),
            tuple(reads.values()),
            tuple(s for _, s in writes),
            fn,
        )

    def closure(self, ops: Sequence[_Op], wanted: Sequence[int]) -> list[_Op]:
        """What is needed of `ops`, and what in front of them is made of leaves only."""
        by_output = {y: op for op in ops for y in op.outs}
        done: dict[int, _Op] = {}  # by identity, in the order in which they run

        def missing(x: Any) -> _Op | None:
            if not isinstance(x, int):
                return None
            op = by_output.get(x) or self.made_by.get(x)
            return None if op is None or id(op) in done else op

        left = [op for x in reversed(wanted) if (op := missing(x))]
        while left:
            op = left[-1]
            if first := [o for x in op.ins if (o := missing(x))]:
                left += first
                continue
            done[id(left.pop())] = op
        return list(done.values())

    def program(self, ops, leaves, reads, writes) -> Callable:
        """The function of these equations; the same one for the same equations."""
        local: dict[int, int] = {}

        def name(x: Any) -> Any:
            if isinstance(x, Literal):
                return repr(x.val), str(x.aval)
            if x in self.consts:
                return "const", id(self.consts[x])
            return local.setdefault(x, len(local))

        def signature(op: _Op) -> Any:
            ins = tuple(map(name, op.ins))
            outs = tuple(map(name, op.outs))
            return ins, outs, None if op.eqn is None else _described(op.eqn)

        key = (
            tuple((name(x), str(self.avals[x])) for x in (*leaves, *reads)),
            len(leaves),
            tuple(map(signature, ops)),
            tuple(map(name, writes)),
        )
        consts = self.consts

        def fn(own, *values):
            known = dict(zip(leaves, own, strict=True))
            known |= zip(reads, values, strict=True)

            def read(x):
                if isinstance(x, Literal):
                    return x.val
                return known[x] if x in known else consts[x]

            for op in ops:
                xs = [read(x) for x in op.ins]
                found = [jnp.asarray(xs[0])] if op.eqn is None else bind(op.eqn, xs)
                known |= zip(op.outs, found, strict=True)
            return tuple(read(x) for x in writes)

        return self.programs.setdefault(key, fn)


def _take_last(ops: list[_Op], count: int) -> list[_Op]:
    """Removes the last equations, and gives them."""
    found = ops[len(ops) - count :]
    del ops[len(ops) - count :]
    return found


def _common(paths: Sequence[str]) -> str:
    """What holds all of these leaves, or the leaf itself if nothing does."""
    holders = [path.split("/")[:-1] or [path] for path in paths]
    found = []
    for parts in zip(*holders, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return "/".join(found)


def _described(eqn: Any) -> Any:
    """An equation in words that are the same for equations that do the same."""
    text = f"{eqn.primitive.name} {eqn.params}"
    if "..." in text or " at 0x" in text:
        return id(eqn)
    params = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda p: isinstance(p, ClosedJaxpr)
    )
    inner = (p for p in params if isinstance(p, ClosedJaxpr))
    return text, tuple(id(c) for p in inner for c in p.consts)
