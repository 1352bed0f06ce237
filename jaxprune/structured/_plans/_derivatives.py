"""Functions with derivatives of their own, at other sizes.

Their rules are Python functions that saw the full sizes. So the derivative, too, is read as
a jaxpr at full sizes and run at the new ones, the first time that it is asked for.
"""

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.structured._plans._kept import Kept
from jaxprune.structured._reading import _dims, _local
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._propagate import Program, Propagation, Record
from jaxprune.structured._reading._removed import Zeros
from jaxprune.structured._reading._values import Dims, Operand
from jaxprune.structured._reading._zeros import Look
from jaxprune.tracing._replay import bind

if TYPE_CHECKING:
    from jaxprune.structured._plans._replay import Replay


def custom_jvp(run: "Replay", record: Record, values: list[Any]) -> Sequence[Any]:
    """Evaluates a `custom_jvp` function, and keeps its rule."""
    shapes, places = _shapes(record), _differentiable(record)
    zeros = _zeros_of(run, record)

    def full(xs: list[Any], tangents: list[Any]) -> tuple[Any, Any]:
        floats = [xs[i] for i in places]
        return jax.jvp(_of_floats(record, xs, places), (floats,), (tangents,))

    @jax.custom_jvp
    def call(xs: list[Any]) -> list[Any]:
        return run(record.inner[0], xs)

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (xs,), (moved,) = primals, tangents
        closed = jax.make_jaxpr(full)(shapes, [shapes[i] for i in places])
        dims = [x.dims for x in record.operands]
        outs = _float_outs(record)
        again, program = _read(
            run, record, closed, [*dims, *(dims[i] for i in places)],
            [*record.outs, *(record.outs[i] for i in outs)],
            zeros=[*zeros, *(zeros[i] for i in places)],
        )  # fmt: skip
        found = again(program, [*xs, *(moved[i] for i in places)])
        values, tangent = found[: len(record.outs)], found[len(record.outs) :]
        return values, _filled(values, outs, tangent)

    return call(values)


def custom_vjp(run: "Replay", record: Record, values: list[Any]) -> Sequence[Any]:
    """Evaluates a `custom_vjp` function, and keeps its rule."""
    shapes, places = _shapes(record), _differentiable(record)
    zeros = _zeros_of(run, record)
    outs = _float_outs(record)

    @jax.custom_vjp
    def call(xs: list[Any]) -> list[Any]:
        return run(record.inner[0], xs)

    def forward(xs: list[Any]) -> Any:
        return call(xs), xs

    def full(xs: list[Any], cotangents: list[Any]) -> list[Any]:
        floats = [xs[i] for i in places]
        found, back = jax.vjp(_of_floats(record, xs, places), floats)
        (grads,) = back(_filled(found, outs, cotangents))
        return grads

    def backward(xs: list[Any], cotangents: list[Any]) -> Any:
        closed = jax.make_jaxpr(full)(
            shapes, [_shapes_of_outs(record)[i] for i in outs]
        )
        dims = [x.dims for x in record.operands]
        again, program = _read(
            run, record, closed, [*dims, *(record.outs[i] for i in outs)],
            [dims[i] for i in places],
            zeros=[*zeros, *(frozenset() for _ in outs)],
        )  # fmt: skip
        found = again(program, [*xs, *(cotangents[i] for i in outs)])
        return (_filled(xs, places, found),)

    call.defvjp(forward, backward)
    return call(values)


def _of_floats(record: Record, xs: list[Any], places: list[int]) -> Any:
    """The equation as a function of those operands that have derivatives."""

    def f(floats: list[Any]) -> list[Any]:
        full = dict(enumerate(xs)) | dict(zip(places, floats, strict=True))
        return list(bind(record.eqn, list(full.values())))

    return f


def _read(
    run: "Replay",
    record: Record,
    closed: Any,
    operands: Sequence[Dims],
    outs: Sequence[Dims],
    zeros: Sequence[Zeros],
) -> tuple["Replay", Program]:
    """A derivative, and what runs it; its dimensions are those that the function has.

    It is read with copies of these, for what a rule couples must not change the function.
    """
    copies: dict[Dim, Dim] = {}
    operands, outs = ([_copied(x, copies) for x in xs] for xs in (operands, outs))
    propagation = Propagation(run.rules)
    program = propagation.run(
        closed.jaxpr, closed.consts, [Operand(d, True) for d in operands], record.loops
    )
    for x, dims in zip(program.outs, outs, strict=True):
        for a, b in zip(x.dims, dims, strict=True):
            _dims.unify(a, b)
    lost = {d: copies[d] for d in run.kept.units if d in copies}
    kept = Kept({_dims.find(new): run.kept.units[d] for d, new in lost.items()})
    for d, new in copies.items():
        whole = d not in lost or _dims.find(new).form == "leaf"
        if not whole or not np.array_equal(kept.mask(new), run.kept.mask(d)):
            _refuse(record, "it couples units that the function does not couple")
    for new in lost.values():
        if why := _dims.find(new).frozen:
            _refuse(record, "; ".join(why))
    apart = {
        _dims.find(new): tuple(_dims.find(copies.get(h, h)) for h in run.apart[d])
        for d, new in copies.items()
        if d in run.apart
    }
    roots = collections.Counter(map(_dims.find, lost.values()))
    if any(roots[d] > 1 for d in apart):
        _refuse(record, "it couples units that the function does not couple")
    among = dict.fromkeys(x for d, held in apart.items() for x in (d, *held))
    owners = _local.owners(program, among, run.rules, inner=True) if apart else {}
    if any(not set(held) <= set(owners[d]) for d, held in apart.items()):
        _refuse(record, "it relates units of one layer or head to those of another")
    look = Look(frozenset(kept.units), run.rules)
    look.run(
        program,
        [z and frozenset(_dims.find(lost[d]) for d in z if d in lost) for z in zeros],
    )
    return type(run)(kept, run.rules, look, apart, run.absent), program


def _copied(dims: Dims, copies: dict[Dim, Dim]) -> Dims:
    """The same dimensions of new leaves, which are added to `copies`."""
    found = []
    for d in map(_dims.find, dims):
        if d.form == "leaf":
            found.append(copies.setdefault(d, Dim(d.size)))
        else:
            parts = _copied(tuple(_dims.parts(d)), copies)
            found.append(Dim(d.size, d.form, parts))
    return tuple(found)


def _refuse(record: Record, why: str) -> None:
    name = record.eqn.params.get("name") or record.eqn.primitive.name
    raise ValueError(
        f"the derivative rule of {name!r} cannot be run with fewer units: {why}. Leave the "
        "leaves that reach it out of the plan, with ignore= in structured.trace, or take "
        "its rule away."
    )


def _zeros_of(run: "Replay", record: Record) -> list[Zeros]:
    """Of the operands. Tangents are 0 where the values are 0 for want of weights."""
    inner = record.inner[0]
    known = run.look.zeros[inner]
    return [known[v] for v in inner.jaxpr.invars]


def _shapes(record: Record) -> list[Any]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in record.eqn.invars]


def _shapes_of_outs(record: Record) -> list[Any]:
    return [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in record.eqn.outvars
    ]


def _differentiable(record: Record) -> list[int]:
    return [i for i, v in enumerate(record.eqn.invars) if _is_float(v.aval.dtype)]


def _float_outs(record: Record) -> list[int]:
    return [i for i, v in enumerate(record.eqn.outvars) if _is_float(v.aval.dtype)]


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _filled(like: Sequence[Any], places: list[int], found: Sequence[Any]) -> list[Any]:
    """`found` at its places, and zeros of no type for what has no derivative."""
    known = dict(zip(places, found, strict=True))
    return [
        known[i] if i in known else np.zeros(np.shape(x), jax.dtypes.float0)
        for i, x in enumerate(like)
    ]
