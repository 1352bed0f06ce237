"""Cuts a function into blocks that run one after the other, each with its own leaves."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.tracing._program import Program, State, name_of
from jaxprune.tracing._replay import bind


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a function.

    Attributes:
      name: what its leaves have in common, with the number of the layer.
      paths: leaves that it uses.
      index: which slice, along the first axis, of the leaves that a scan runs over; `None`
        outside of scans.
      sliced: these leaves.
      fn: `fn(leaves, state) -> state`; the blocks of one scan have the same function, so
        that it is compiled once.
    """

    name: str
    paths: tuple[str, ...]
    index: int | None
    sliced: frozenset[str]
    fn: Callable[[dict[str, Array], State], State]

    def take(self, params: PyTree) -> dict[str, Array]:
        """What `fn` needs of the parameters, by path."""
        paths, leaves, _ = _tree.flatten(params)
        known = dict(zip(paths, leaves, strict=True))
        return {
            path: known[path][self.index] if path in self.sliced else known[path]
            for path in self.paths
        }

    def put(self, params: PyTree, leaves: Mapping[str, Array]) -> PyTree:
        """The parameters with other leaves in this block."""
        paths, old, treedef = _tree.flatten(params)
        if unknown := sorted(leaves.keys() - set(self.paths)):
            raise ValueError(
                f"leaves: {unknown[0]} is no leaf of the block {self.name}; expected some "
                f"of {_tree.listing(self.paths)}."
            )
        new = []
        for path, x in zip(paths, old, strict=True):
            if path in leaves and path in self.sliced:
                new.append(jnp.asarray(x).at[self.index].set(leaves[path]))
            else:
                new.append(leaves.get(path, x))
        return treedef.unflatten(new)


class Blocks(NamedTuple):
    """A function, cut into blocks.

    Attributes:
      begin: `begin(*args) -> state`.
      blocks: run in this order.
      finish: `finish(state)` gives what the function does.
    """

    begin: Callable[..., State]
    blocks: tuple[Block, ...]
    finish: Callable[[State], Any]


def numbered(path: str) -> str | None:
    """The path up to its first number: `layers/3` of `layers/3/attn/kernel`.

    Example:
      >>> numbered("layers/3/attn/kernel"), numbered("h_11/mlp/kernel"), numbered("head")
      ('layers/3', 'h_11', None)
    """
    names = path.split("/")[:-1]
    for i, name in enumerate(names):
        if re.search(r"\d$", name):
            return "/".join(names[: i + 1])
    return None


def blocks(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    block_of: Callable[[str], str | None] = numbered,
) -> Blocks:
    """Cuts `fn(params, *args)` where one block of layers ends and the next begins.

    A scan over stacked leaves has a block for each iteration. Elsewhere, blocks are told
    by the names of leaves, and cut where the least memory is needed to go on, which in a
    transformer is where only the residual stream is alive. What comes before the first
    block and after the last are blocks too, `"start"` and `"end"`. What depends on
    parameters alone is computed in each block that needs it.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      block_of: name of the block that a leaf belongs to, from its path; `None` for leaves
        of no block, such as embeddings. By default the path up to its first number.

    Example:
      >>> from jaxprune import tracing
      >>> def fn(params, x):
      ...     return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]
      >>> from jax import lax
      >>> params, x = {"w": jnp.full((2, 4, 4), 0.1)}, jnp.ones((3, 4))
      >>> cut = tracing.blocks(fn, params, x)
      >>> state = cut.begin(x)
      >>> for block in cut.blocks:
      ...     state = block.fn(block.take(params), state)
      >>> bool(jnp.allclose(cut.finish(state), fn(params, x)))
      True
      >>> [block.name for block in cut.blocks]
      ['start', 'w/0', 'w/1', 'end']
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    paths = _tree.paths(params)
    program = Program(closed, paths)
    treedef = jax.tree.structure(out)

    def begin(*args: Any) -> State:
        return program.begin(jax.tree.leaves(args))

    def finish(state: State) -> Any:
        return treedef.unflatten([state[f"out{i}"] for i in range(treedef.num_leaves)])

    return Blocks(begin, _Cutter(program, block_of).blocks(), finish)


class _Cutter:
    """The blocks of a program."""

    def __init__(self, program: Program, block_of: Callable[[str], str | None]):
        self.program, self.block_of = program, block_of

    def blocks(self) -> tuple[Block, ...]:
        program = self.program
        found: list[Block] = []
        scans = [i for i, op in enumerate(program.ops) if program.sliced(op)]
        start, before = 0, None
        for scan in [*scans, None]:
            end = len(program.ops) if scan is None else scan
            cuts = self.cuts(start, end, final=scan is None)
            for i, (name, first, last) in enumerate(cuts):
                final = scan is None and i == len(cuts) - 1
                name = name or ("end" if final else "between" if found else "start")
                leave = before if i == 0 else None
                enter = scan if i == len(cuts) - 1 else None
                found.append(self.segment(name, first, last, leave, enter, final))
            if scan is not None:
                found += self.iterations(scan)
                start, before = scan + 1, scan
        return tuple(found)

    def cuts(
        self, start: int, end: int, final: bool
    ) -> list[tuple[str | None, int, int]]:
        """Names and ends of the blocks from the equation `start` to `end`."""
        program = self.program
        runs: list[list[Any]] = []
        for i in range(start, end):
            found = (self.block_of(p) for p in program.used[i])
            names = {name for name in found if name is not None}
            if not names:
                continue
            if runs and runs[-1][0] in names:
                runs[-1][2] = i
            else:
                runs.append([min(names), i, i])
        places, low = [], start
        for _, first, last in runs:
            users = [i for i in range(low, first) if program.used[i]]
            places.append(program.narrowest(max([low, *(i + 1 for i in users)]), first))
            low = last + 1
        names = [None, *(name for name, _, _ in runs)]
        if final and runs:
            after = next((i for i in range(low, end) if program.used[i]), end)
            # A loss is small: the last block ends where it holds what the others do.
            held = program.held(places[-1])
            alike = (i for i in range(low, after + 1) if program.held(i) <= held)
            places.append(next(alike, program.narrowest(low, after)))
            names.append(None)
        return list(zip(names, [start, *places], [*places, end], strict=True))

    def segment(
        self,
        name: str,
        first: int,
        last: int,
        leave: int | None,
        enter: int | None,
        final: bool,
    ) -> Block:
        """Equations from `first` to `last`, after one scan and before another."""
        program = self.program
        ops = program.ops[first:last]
        atoms = [x for op in ops for x in op.ins]
        if enter is not None:
            scan = program.ops[enter]
            atoms += scan.ins[slice(*program.carried(enter))]
        if final:
            atoms += program.outs
        paths = sorted(program.leaves_of(atoms))

        def fn(leaves: dict[str, Array], state: State) -> State:
            values = {k: leaves[p] for k, p in program.leaves.items() if p in leaves}
            if leave is not None:
                outs = enumerate(program.ops[leave].outs)
                values.update({k: state[f"scan{i}"] for i, k in outs})
            for op in ops:
                out = bind(op.eqn, [program.read(x, values, state) for x in op.ins])
                values.update(zip(op.outs, out, strict=True))
            if final:
                return {
                    f"out{i}": jnp.asarray(program.read(x, values, state))
                    for i, x in enumerate(program.outs)
                }
            if enter is None:
                return {
                    name_of(k): program.read(k, values, state)
                    for k in program.needed(last)
                }
            return self.enter(enter, values, state)

        return Block(name, tuple(paths), None, frozenset(), fn)

    def enter(self, scan: int, values: dict[int, Array], state: State) -> State:
        """The state before the first iteration."""
        program = self.program
        op = program.ops[scan]
        first, last = program.carried(scan)
        length, reverse = op.eqn.params["length"], op.eqn.params["reverse"]
        found = {
            name_of(k): program.read(k, values, state) for k in program.around(scan)
        }
        for i, var in enumerate(op.eqn.outvars):
            if i < last - first:
                x = jnp.asarray(program.read(op.ins[first + i], values, state))
                found[f"scan{i}"] = x
            else:
                found[f"scan{i}"] = jnp.zeros(var.aval.shape, var.aval.dtype)
        found["iteration"] = jnp.int32(length - 1 if reverse else 0)
        return found

    def iterations(self, scan: int) -> list[Block]:
        """A block for each iteration."""
        program = self.program
        op = program.ops[scan]
        params, sliced = op.eqn.params, program.sliced(op)
        first, last = program.carried(scan)
        body = jax.extend.core.jaxpr_as_fun(params["jaxpr"])
        around, carries = program.around(scan), last - first
        own = sorted(set(sliced.values()))
        shared = program.leaves_of(
            x for i, x in enumerate(op.ins) if i not in sliced and not first <= i < last
        )

        def fn(leaves: dict[str, Array], state: State) -> State:
            at = state["iteration"]
            values = {k: leaves[p] for k, p in program.leaves.items() if p in leaves}
            consts = [program.read(x, values, state) for x in op.ins[:first]]
            carry = [state[f"scan{i}"] for i in range(carries)]
            xs = []
            for i, x in enumerate(op.ins[last:], last):
                if i in sliced:
                    xs.append(leaves[sliced[i]])
                else:
                    whole = jnp.asarray(program.read(x, values, state))
                    xs.append(lax.dynamic_index_in_dim(whole, at, keepdims=False))
            out = body(*consts, *carry, *xs)
            found = {name_of(k): state[name_of(k)] for k in around}
            for i, x in enumerate(out):
                if i < carries:
                    found[f"scan{i}"] = x
                else:
                    found[f"scan{i}"] = lax.dynamic_update_index_in_dim(
                        state[f"scan{i}"], x, at, 0
                    )
            found["iteration"] = at + (-1 if params["reverse"] else 1)
            return found

        prefix = _common(own)
        order = range(params["length"])
        return [
            Block(f"{prefix}/{i}", tuple(own + sorted(shared)), i, frozenset(own), fn)
            for i in (reversed(order) if params["reverse"] else order)
        ]


def _common(paths: Sequence[str]) -> str:
    """The names that paths begin with."""
    found = []
    for names in zip(*(p.split("/") for p in paths), strict=False):
        if len(set(names)) > 1:
            break
        found.append(names[0])
    return "/".join(found) or "scan"
