"""Runs a jaxpr with leaves that are more than arrays, up to where they are contracted."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

_PLAIN_CALLS = frozenset("jit pjit closed_call core_call".split())
_CHECKPOINTS = frozenset("remat remat2 checkpoint".split())
_AS_IT_IS = frozenset(
    "copy copy_p optimization_barrier sharding_constraint reshard mesh_cast name".split()
)


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


def replay(
    closed: ClosedJaxpr,
    operands: Sequence[Any],
    *,
    contract: Contract,
    dense: Callable[[View, str], Array],
) -> list[Any]:
    """Evaluates a jaxpr some of whose operands are views.

    Views are followed through casts, transpositions, calls, checkpoints and scans to the
    products that they end in. Everything else sees a dense array, so that functions with a
    derivative of their own keep it, and so does whoever gets the output.

    Args:
      closed: of `jax.make_jaxpr`.
      operands: arrays or views, one for each input.
      contract: see `Contract`.
      dense: `(view, primitive) -> array`, the array of a view for a primitive that is no
        product.
    """
    run = _Replay(contract, dense)
    return run.arrays(run(closed.jaxpr, closed.consts, operands), "the output")


@dataclasses.dataclass(frozen=True)
class _Replay:
    contract: Contract
    dense: Callable[[View, str], Array]
    times: int = 1

    def __call__(self, jaxpr: Jaxpr, consts, operands) -> list[Any]:
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, operands, strict=True))

        def read(x):
            return x.val if isinstance(x, Literal) else known[x]

        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [read(x) for x in eqn.invars])
            known.update(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if not any(isinstance(x, View) for x in operands):
            return _bind(eqn, operands)
        if name in _AS_IT_IS and len(operands) == 1:
            return operands
        if name == "convert_element_type":
            (view,) = operands
            return [dataclasses.replace(view, casts=(*view.casts, params["new_dtype"]))]
        if name == "transpose":
            (view,) = operands
            axes = tuple(view.axes[i] for i in params["permutation"])
            return [dataclasses.replace(view, axes=axes)]
        if name == "dot_general":
            product = self.product(eqn, *operands)
            if product is not None:
                return [product]
        elif name in _PLAIN_CALLS:
            inner, consts = _jaxpr(params)
            return self(inner, consts, operands)
        elif name in _CHECKPOINTS:
            inner, consts = _jaxpr(params)
            again = jax.checkpoint(
                functools.partial(self, inner, consts),
                policy=params["policy"],
                prevent_cse=params["prevent_cse"],
            )
            return again(operands)
        elif name == "scan":
            return self.scan(eqn, operands)
        return _bind(eqn, self.arrays(operands, name))

    def arrays(self, operands: Sequence[Any], name: str) -> list[Any]:
        """The operands, with arrays in place of views."""
        return [self.dense(x, name) if isinstance(x, View) else x for x in operands]

    def product(self, eqn: Any, lhs: Any, rhs: Any) -> Array | None:
        (l_axes, r_axes), (batch, _) = eqn.params["dimension_numbers"]
        if batch or (isinstance(lhs, View) and isinstance(rhs, View)):
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

    def scan(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        params = eqn.params
        first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, xs = operands[:first], operands[first:second], operands[second:]
        carry = self.arrays(carry, "the carry of a scan")
        xs = [
            self.dense(x, "a scan over another axis than the first")
            if isinstance(x, View) and (x.axes[0] != 0 or not x.stacked)
            else x
            for x in xs
        ]
        inner = dataclasses.replace(self, times=self.times * params["length"])
        body = params["jaxpr"]

        def step(carry, xs):
            xs = [_without_first(x) if isinstance(x, View) else x for x in xs]
            found = inner(body.jaxpr, body.consts, [*consts, *carry, *xs])
            found = inner.arrays(found, "the end of a scan")
            return found[: len(carry)], found[len(carry) :]

        carry, ys = lax.scan(
            step, carry, xs, length=params["length"], reverse=params["reverse"],
            unroll=params["unroll"],
        )  # fmt: skip
        return [*carry, *ys]


def _without_first(view: View) -> View:
    axes = tuple(a - 1 for a in view.axes[1:])
    return dataclasses.replace(view, axes=axes, stacked=view.stacked - 1)


def _jaxpr(params: dict[str, Any]) -> tuple[Jaxpr, Sequence[Any]]:
    found = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return (
        (found.jaxpr, found.consts) if isinstance(found, ClosedJaxpr) else (found, ())
    )


def _bind(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*operands, **params)
    return found if eqn.primitive.multiple_results else [found]
