"""Runs a jaxpr anew: with leaves that are more than arrays, or reading values inside it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from jaxprune.tracing._moves import permuted
from jaxprune.tracing._sites import Loop
from jaxprune.tracing._walk import CALLS, jaxpr_of, scan_operands

_PLAIN_CALLS = frozenset("jit pjit closed_call core_call".split())
_CHECKPOINTS = frozenset("remat remat2 checkpoint".split())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A leaf on its way to where it is used.

    Attributes:
      value: what stands for the leaf: an array, or a pytree that holds one packed.
      path: of the leaf.
      axes: which axis of the leaf each axis of the view is. A scan over the first axis
        of a leaf takes that away, from the leaf as from its view.
      stacked: leading axes of the leaf that a scan may take away.
      casts: types that the view was cast to, one after the other.
    """

    value: Any
    path: str = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stacked: int = dataclasses.field(metadata={"static": True})
    casts: tuple[Any, ...] = dataclasses.field(metadata={"static": True}, default=())

    def cast(self, x: Array) -> Array:
        """An array of the leaf, as the view sees it."""
        for dtype in self.casts:
            x = x.astype(dtype)
        return x


class Contract(Protocol):
    """What to do where a leaf is contracted."""

    def __call__(
        self,
        x: Array,
        view: View,
        x_axes: tuple[int, ...],
        view_axes: tuple[int, ...],
        *,
        times: int,
        **options: Any,
    ) -> Array | None:
        """The product, free axes of `x` first; `None` to have it done densely.

        Args:
          x: the other operand.
          view: of the leaf, without batch axes in this product.
          x_axes: contracted axes of `x`.
          view_axes: contracted axes of the view, in the same order.
          times: how often this place is run, if it stands in a scan.
          **options: `precision` and `preferred_element_type`.
        """
        ...


class Tap(NamedTuple):
    """What to compute of the operands of an equation.

    Attributes:
      place: of the equation; see `Site`.
      read: `(eqn, operands, indices) -> state`: from the equation, its operands, and the
        computed indices that the tap asks for, an element of a monoid.
      merge: `(state, state) -> state`, of which a state of zeros changes nothing.
      zero: shapes of a state.
      loops: around the equation, from the outside. The states of a loop whose slices are
        matrices of their own are stacked, in front; those of another are merged.
      indices: (place, operand) of each index.
    """

    place: tuple[int, ...]
    read: Callable[[Any, Sequence[Any], Sequence[Array]], Any]
    merge: Callable[[Any, Any], Any]
    zero: Any
    loops: tuple[Loop, ...]
    indices: tuple[tuple[tuple[int, ...], int], ...] = ()


def replay(
    closed: ClosedJaxpr,
    operands: Sequence[Any],
    *,
    contract: Contract | None = None,
    dense: Callable[[View, str], Array] | None = None,
) -> list[Any]:
    """Evaluates a jaxpr some of whose operands are views.

    Views are followed through casts, transpositions, calls, checkpoints, scans, and
    bodies of `cond` and `while`, to the products that they end in. Everything else sees a
    dense array, so that functions with a derivative of their own keep it, and so does
    whoever gets the output.

    Args:
      closed: of `jax.make_jaxpr`.
      operands: arrays or views, one for each input.
      contract: see `Contract`.
      dense: `(view, primitive) -> array`, the array of a view for a primitive that is no
        product.
    """
    run = _Replay(contract, dense)
    out, _ = run(closed.jaxpr, closed.consts, operands, ())
    return run.arrays(out, "the output")


def tap(
    closed: ClosedJaxpr, operands: Sequence[Any], taps: Mapping[Any, Tap]
) -> tuple[list[Any], dict[Any, Any]]:
    """Evaluates a jaxpr, and reads values inside it on the way.

    Taps may stand in scans, branches and bodies of loops, whose states come out with
    them; a branch that is not taken has a state of zeros. What is computed stays the
    same, except that functions with derivatives of their own lose these.

    Args:
      closed: of `jax.make_jaxpr`.
      operands: arrays, one for each input.
      taps: see `Tap`.

    Returns:
      The outputs, and the state of each tap.
    """
    run = _Replay(None, None, taps=dict(taps))
    return run(closed.jaxpr, closed.consts, operands, ())


@dataclasses.dataclass(frozen=True)
class _Replay:
    contract: Contract | None
    dense: Callable[[View, str], Array] | None
    times: int = 1
    taps: dict[Any, Tap] = dataclasses.field(default_factory=dict)
    kept: dict[tuple[int, ...], Sequence[Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, jaxpr: Jaxpr, consts, operands, place) -> tuple[list[Any], dict]:
        """Outputs, and states of the taps in the jaxpr."""
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, operands, strict=True))
        states: dict[Any, Any] = {}

        def read(x):
            return x.val if isinstance(x, Literal) else known[x]

        for i, eqn in enumerate(jaxpr.eqns):
            here = (*place, i)
            found, inner = self.equation(eqn, [read(x) for x in eqn.invars], here)
            known.update(zip(eqn.outvars, found, strict=True))
            states.update(inner)
        return [read(x) for x in jaxpr.outvars], states

    def inside(self, place: tuple[int, ...]) -> dict[Any, Tap]:
        """Taps in an equation."""
        n = len(place)
        return {k: t for k, t in self.taps.items() if t.place[:n] == place}

    def equation(self, eqn: Any, operands: list[Any], place) -> tuple[Sequence, dict]:
        name, params = eqn.primitive.name, eqn.params
        taps = self.inside(place)
        if place in self.indexed:
            self.kept[place] = operands
        if taps and all(t.place == place for t in taps.values()):
            states = {k: self.state(t, eqn, operands) for k, t in taps.items()}
            return bind(eqn, operands), states
        viewed = any(isinstance(x, View) for x in operands)
        if not viewed and not taps:
            return bind(eqn, operands), {}
        if name in _PLAIN_CALLS or (taps and name in CALLS):
            inner, consts = jaxpr_of(params)
            return self(inner, consts, operands, place)
        if name in _CHECKPOINTS:
            inner, consts = jaxpr_of(params)
            again = jax.checkpoint(
                lambda operands: self(inner, consts, operands, place)[0],
                policy=params["policy"],
                prevent_cse=params["prevent_cse"],
            )
            return again(operands), {}
        if name == "scan":
            with eqn.ctx.manager:
                return self.scan(eqn, operands, place, taps)
        if name == "cond":
            with eqn.ctx.manager:
                return self.cond(eqn, operands, place, taps)
        if name == "while":
            with eqn.ctx.manager:
                return self.loop(eqn, operands, place, taps)
        return self.moved(eqn, operands), {}

    @functools.cached_property
    def indexed(self) -> frozenset[tuple[int, ...]]:
        """Places of computed indices."""
        return frozenset(place for t in self.taps.values() for place, _ in t.indices)

    def state(self, t: Tap, eqn: Any, operands: Sequence[Any]) -> Any:
        """What a tap reads."""
        indices = [self.kept[place][operand] for place, operand in t.indices]
        return t.read(eqn, operands, indices)

    def moved(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        """An equation some of whose operands are views."""
        name = eqn.primitive.name
        order = permuted(eqn)
        if order is not None:
            (view,) = operands
            casts = view.casts
            if name == "convert_element_type":
                casts += (eqn.params["new_dtype"],)
            axes = tuple(view.axes[i] for i in order)
            return [dataclasses.replace(view, axes=axes, casts=casts)]
        if name == "dot_general":
            product = self.product(eqn, *operands)
            if product is not None:
                return [product]
        return bind(eqn, self.arrays(operands, name))

    def arrays(self, operands: Sequence[Any], name: str) -> list[Any]:
        """The operands, with arrays in place of views."""
        dense = self.dense
        if dense is None:
            return list(operands)
        return [dense(x, name) if isinstance(x, View) else x for x in operands]

    def product(self, eqn: Any, lhs: Any, rhs: Any) -> Array | None:
        (l_axes, r_axes), (batch, _) = eqn.params["dimension_numbers"]
        both = isinstance(lhs, View) and isinstance(rhs, View)
        if batch or both or self.contract is None:
            return None
        swapped = isinstance(lhs, View)
        if swapped:
            lhs, rhs, l_axes, r_axes = rhs, lhs, r_axes, l_axes
        options = ("precision", "preferred_element_type")
        y = self.contract(
            lhs, rhs, tuple(l_axes), tuple(r_axes), times=self.times,
            **{name: eqn.params[name] for name in options},
        )  # fmt: skip
        if y is None or not swapped:
            return y
        free = len(rhs.axes) - len(r_axes)
        return y.transpose([*range(y.ndim - free, y.ndim), *range(y.ndim - free)])

    def scan(self, eqn: Any, operands: list[Any], place, taps) -> tuple[list, dict]:
        params = eqn.params
        first, second = scan_operands(params, len(operands))
        consts, carry, xs = operands[:first], operands[first:second], operands[second:]
        carry = self.arrays(carry, "the carry of a scan")
        xs = [
            self.arrays([x], "a scan over another axis than the first")[0]
            if isinstance(x, View) and (x.axes[0] != 0 or not x.stacked)
            else x
            for x in xs
        ]
        inner = dataclasses.replace(self, times=self.times * params["length"])
        body = params["jaxpr"]
        stacked = {k for k, t in taps.items() if _is_sliced(t, place)}
        merged = {k: t for k, t in taps.items() if k not in stacked}

        def step(carry, xs):
            carry, sums = carry
            xs = [_without_first(x) if isinstance(x, View) else x for x in xs]
            found, states = inner(
                body.jaxpr, body.consts, [*consts, *carry, *xs], place
            )
            found = inner.arrays(found, "the end of a scan")
            sums = {k: t.merge(sums[k], states[k]) for k, t in merged.items()}
            states = {k: states[k] for k in stacked}
            return (found[: len(carry)], sums), (found[len(carry) :], states)

        sums = {k: _zeros(t, place) for k, t in merged.items()}
        (carry, sums), (ys, states) = lax.scan(
            step, (carry, sums), xs, length=params["length"], reverse=params["reverse"],
            unroll=params["unroll"],
        )  # fmt: skip
        return [*carry, *ys], {**sums, **states}

    def cond(self, eqn: Any, operands: list[Any], place, taps) -> tuple[list, dict]:
        (index,) = self.arrays(operands[:1], "the choice of a branch")

        def run(i, body):
            def branch(operands):
                found, states = self(body.jaxpr, body.consts, operands, (*place, i))
                found = self.arrays(found, "the end of a branch")
                zeros = {
                    k: _zeros(t, place) for k, t in taps.items() if k not in states
                }
                return found, {**zeros, **states}

            return branch

        branches = [run(i, body) for i, body in enumerate(eqn.params["branches"])]
        return lax.switch(index, branches, operands[1:])

    def loop(self, eqn: Any, operands: list[Any], place, taps) -> tuple[list, dict]:
        params = eqn.params
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        first, second = params["cond_nconsts"], params["body_nconsts"]
        tested = self.arrays(operands[:first], "the condition of a while")
        consts = operands[first : first + second]
        carry = self.arrays(operands[first + second :], "the carry of a while")

        def go_on(carry):
            inputs = [*tested, *carry[0]]
            return self(test.jaxpr, test.consts, inputs, (*place, 0))[0][0]

        def step(carry):
            carry, sums = carry
            inputs = [*consts, *carry]
            found, states = self(body.jaxpr, body.consts, inputs, (*place, 1))
            found = self.arrays(found, "the end of a while")
            return found, {k: t.merge(sums[k], states[k]) for k, t in taps.items()}

        return lax.while_loop(
            go_on, step, (carry, {k: _zeros(t, place) for k, t in taps.items()})
        )


def _is_sliced(t: Tap, place: tuple[int, ...]) -> bool:
    return any(x.sliced for x in t.loops if x.place == place)


def _zeros(t: Tap, place: tuple[int, ...]) -> Any:
    """A state before anything is read, as it comes out of the equation at `place`."""
    n = len(place)
    stack = [x.length for x in t.loops if x.sliced and len(x.place) > n]
    return jax.tree.map(lambda x: jnp.zeros((*stack, *x.shape), x.dtype), t.zero)


def _without_first(view: View) -> View:
    axes = tuple(a - 1 for a in view.axes[1:])
    return dataclasses.replace(view, axes=axes, stacked=view.stacked - 1)


def bind(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluates an equation."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*operands, **params)
    return found if eqn.primitive.multiple_results else [found]
