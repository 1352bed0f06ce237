"""Runs a function that was read, with fewer units, equation by equation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jaxtyping import Array

from jaxprune.structured._plans import _derivatives
from jaxprune.structured._plans._kept import Kept
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._propagate import Program, Record, Rule
from jaxprune.structured._reading._removed import (
    PLAIN_CALLS,
    REDUCTIONS,
    Scope,
    mean_of,
    reduced,
)
from jaxprune.structured._reading._values import Dims, Operand
from jaxprune.structured._reading._zeros import CHECKPOINTS, Look
from jaxprune.tracing._replay import bind
from jaxprune.tracing._walk import CALLS, scan_operands


class Replay:
    """Evaluates programs with what is kept.

    Args:
      kept: what is kept.
      rules: of users' own primitives.
      look: at the whole program, for `kept.units`.
      apart: dimensions that keep other units for each unit of others, and these.
      absent: whether removed units count as never having been, rather than as units
        whose weights are 0.
    """

    def __init__(
        self,
        kept: Kept,
        rules: Mapping[str, Rule],
        look: Look,
        apart: Mapping[Dim, tuple[Dim, ...]],
        absent: bool = False,
    ):
        self.kept = kept
        self.rules = rules
        self.look = look
        self.apart = apart
        self.absent = absent

    def __call__(
        self,
        program: Program,
        operands: Sequence[Any],
        outer: Scope | None = None,
        call: Record | None = None,
    ) -> list[Any]:
        """Outputs of a program; `outer` and `call` say where it stands, if that counts."""
        scope = Scope(program, self.look.zeros[program], outer, call)
        known = scope.values
        for v, c, dims in zip(
            program.jaxpr.constvars, program.consts, program.const_dims, strict=True
        ):
            known[v] = self.kept.cut(c, dims)
        known.update(zip(program.jaxpr.invars, operands, strict=True))
        if (
            outer is not None
            and call is not None
            and call.eqn.primitive.name in PLAIN_CALLS
        ):
            outer.inner[call] = scope

        def read(v: Any, x: Operand) -> Any:
            return self.kept.cut(v.val, x.dims) if isinstance(v, Literal) else known[v]

        for record in program.records:
            values = list(map(read, record.eqn.invars, record.operands))
            found = self.equation(scope, record, values)
            known.update(zip(record.eqn.outvars, found, strict=True))
        return list(map(read, program.jaxpr.outvars, program.outs))

    def equation(
        self, scope: Scope, record: Record, values: list[Any]
    ) -> Sequence[Any]:
        """Outputs of an equation; as it stands, where nothing in it changes."""
        eqn, name = record.eqn, record.eqn.primitive.name
        if self.absent and (mean := mean_of(scope, record)) is not None:
            values = [values[0], self.mean_divisor(*mean, eqn)]
        dims = [d for x in record.operands for d in x.dims]
        dims += [d for out in record.outs for d in out]
        if not any(map(self.kept.changed, dims)):
            return self.same(scope, record, values)
        if name in self.rules:
            return self.own(record, values)
        with eqn.ctx.manager:
            if name in CALLS:
                return self.call(scope, record, values)
            if name in _RUNS:
                return _RUNS[name](self, record, values)
        found = bind(eqn, values)
        if name in REDUCTIONS and not self.absent:
            units = self.kept.units
            return [reduced(scope, record, found[0], self.kept.size, units)]
        return found

    def same(self, scope: Scope, record: Record, values: list[Any]) -> Sequence[Any]:
        """Nothing changes here; but the mean of a sum outside may stand in a call."""
        if self.absent and record.eqn.primitive.name in PLAIN_CALLS:
            return self(record.inner[0], values, scope, record)
        return bind(record.eqn, values)

    def mean_divisor(self, dims: Dims, less: float, eqn: Any) -> np.ndarray:
        count = math.prod(map(self.kept.size, dims)) - less
        number = count if eqn.primitive.name == "div" else 1 / count
        return np.asarray(number, eqn.invars[1].aval.dtype)

    def own(self, record: Record, values: list[Any]) -> Sequence[Any]:
        run = self.rules[record.eqn.primitive.name].run
        if run is None:
            return bind(record.eqn, values)
        found = run(record.eqn.params, *values)
        return found if record.eqn.primitive.multiple_results else [found]

    def call(self, scope: Scope, record: Record, values: list[Any]) -> Sequence[Any]:
        name, (inner,) = record.eqn.primitive.name, record.inner
        if name.startswith("custom_jvp"):
            return _derivatives.custom_jvp(self, record, values)
        if name.startswith("custom_vjp"):
            return _derivatives.custom_vjp(self, record, values)
        if name in CHECKPOINTS:
            again = jax.checkpoint(
                lambda values: self(inner, values, scope, record),
                policy=record.eqn.params["policy"],
                prevent_cse=record.eqn.params["prevent_cse"],
            )
            return again(values)
        return self(inner, values, scope, record)


def _rebound(record: Record, values: list[Any], **params: Any) -> Sequence[Any]:
    eqn = record.eqn
    found = eqn.primitive.bind(*values, **{**eqn.params, **params})
    return found if eqn.primitive.multiple_results else [found]


def _reshape(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    return _rebound(record, values, new_sizes=run.kept.shape(record.outs[0]))


def _broadcast(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    return _rebound(record, values, shape=run.kept.shape(record.outs[0]))


def _iota(run: Replay, record: Record, values: list[Any]) -> list[Any]:
    """Numbers that units had: frequencies of a rotation stay with their pairs."""
    eqn, axis = record.eqn, record.eqn.params["dimension"]
    numbers = lax.iota(eqn.params["dtype"], eqn.outvars[0].aval.shape[axis])
    numbers = run.kept.cut(numbers, record.outs[0][axis : axis + 1])
    return [lax.broadcast_in_dim(numbers, run.kept.shape(record.outs[0]), (axis,))]


def _slice(run: Replay, record: Record, values: list[Any]) -> list[Any]:
    params, x = record.eqn.params, values[0]
    steps = params["strides"] or (1,) * x.ndim
    for axis, d in enumerate(record.operands[0].dims):
        full = slice(
            params["start_indices"][axis], params["limit_indices"][axis], steps[axis]
        )
        kept = run.kept.mask(d)
        if full == slice(0, d.size, 1):
            continue
        places = (np.cumsum(kept) - 1)[full][kept[full]]
        step = int(places[1] - places[0]) if len(places) > 1 else 1
        if (np.diff(places) == step).all() and len(places):
            x = lax.slice_in_dim(x, int(places[0]), int(places[-1]) + 1, step, axis)
        else:
            x = jnp.take(x, places, axis=axis)
    return [x]


def _split(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    axis = record.eqn.params["axis"]
    sizes = tuple(run.kept.size(dims[axis]) for dims in record.outs)
    return _rebound(record, values, sizes=sizes)


def _conv(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    return _rebound(record, values, feature_group_count=run.kept.size(record.extra))


def _dynamic_slice(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    return _rebound(record, values, slice_sizes=run.kept.shape(record.outs[0]))


def _pad(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    config = [
        (run.kept.size(edge[0]), run.kept.size(edge[1]), inner) if edge else (low, high, inner)
        for (low, high, inner), edge in zip(
            record.eqn.params["padding_config"], record.extra, strict=True
        )
    ]  # fmt: skip
    return _rebound(record, values, padding_config=tuple(config))


def _random_bits(run: Replay, record: Record, values: list[Any]) -> list[Any]:
    """The bits that these units would have got."""
    (bits,) = bind(record.eqn, values)
    return [run.kept.cut(bits, record.outs[0])]


def _chosen(run: Replay, record: Record, values: list[Any]) -> list[Any]:
    """Of argmax and top_k: numbers of units are those that they had."""
    params, found = record.eqn.params, list(bind(record.eqn, values))
    axis = params["axes"][0] if "axes" in params else params.get("axis", -1)
    d = record.operands[0].dims[axis]
    if run.kept.changed(d):
        table = jnp.asarray(run.kept.places(d), found[-1].dtype)
        found[-1] = jnp.take(table, found[-1], axis=0, mode="clip")
    return found


def _gather(run: Replay, record: Record, values: list[Any]) -> list[Any]:
    """Units are asked for by the numbers that they had; those removed are 0."""
    params, x, index = record.eqn.params, values[0], jnp.asarray(values[1])
    numbers, dims = params["dimension_numbers"], record.operands[0].dims
    alive: Array | None = None
    for i, axis in enumerate(numbers.start_index_map):
        if axis in numbers.collapsed_slice_dims and run.kept.changed(dims[axis]):
            at, here = _renumbered(
                run.kept.mask(dims[axis]), index[..., i], params["mode"]
            )
            index = index.at[..., i].set(at)
            alive = here if alive is None else alive & here
    sizes = tuple(
        run.kept.size(d) if n == d.size else n
        for d, n in zip(dims, params["slice_sizes"], strict=True)
    )
    (found,) = _rebound(record, [x, index], slice_sizes=sizes)
    if alive is not None:
        rows = [i for i in range(found.ndim) if i not in numbers.offset_dims]
        alive = lax.broadcast_in_dim(alive, found.shape, rows)
        found = jnp.where(alive, found, jnp.zeros((), found.dtype))
    return [found]


def _renumbered(mask: np.ndarray, index: Array, mode: Any) -> tuple[Array, Array]:
    """Where units are now, and whether they are; out of bounds stays so."""
    n, kept = len(mask), int(mask.sum())
    inside = (index >= 0) & (index < n)
    table = jnp.asarray(np.cumsum(mask) - 1).astype(index.dtype)
    at = jnp.take(table, index, mode="clip")
    here = jnp.take(jnp.asarray(mask), index, mode="clip")
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        outside = jnp.asarray(kept, index.dtype)
        return jnp.where(inside, jnp.maximum(at, 0), outside), here | ~inside
    return jnp.maximum(at, 0), here


def _scan(run: Replay, record: Record, values: list[Any]) -> list[Any]:
    params, (inner,) = record.eqn.params, record.inner
    first, second = scan_operands(params, len(values))
    carried = second - first

    def step(carry: Any, xs: Any) -> Any:
        found = run(inner, [*values[:first], *carry, *xs])
        return found[:carried], found[carried:]

    carry, ys = lax.scan(
        step, values[first:second], values[second:], length=run.kept.size(record.extra),
        reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *ys]


def _cond(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    branches = [lambda xs, p=p: run(p, xs) for p in record.inner]
    return lax.switch(values[0], branches, values[1:])


def _while(run: Replay, record: Record, values: list[Any]) -> Sequence[Any]:
    params, (test, body) = record.eqn.params, record.inner
    first, second = params["cond_nconsts"], params["body_nconsts"]
    tested, consts = values[:first], values[first : first + second]
    return lax.while_loop(
        lambda carry: run(test, [*tested, *carry])[0],
        lambda carry: run(body, [*consts, *carry]),
        values[first + second :],
    )


_RUNS = {
    "argmax": _chosen,
    "argmin": _chosen,
    "broadcast_in_dim": _broadcast,
    "cond": _cond,
    "conv_general_dilated": _conv,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "random_bits": _random_bits,
    "reshape": _reshape,
    "scan": _scan,
    "slice": _slice,
    "split": _split,
    "top_k": _chosen,
    "while": _while,
}
