"""Follows leaves through a jaxpr, up to where they are contracted."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune.tracing import _layout, _moves
from jaxprune.tracing._layout import Atoms
from jaxprune.tracing._moves import Part, Place
from jaxprune.tracing._sites import Loop, Reading, Site

CALLS = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call "
    "custom_vjp_call custom_vjp_call_jaxpr".split()
)


class Contraction(NamedTuple):
    """What a rule says of a primitive: a leaf and an activation, and their axes.

    Attributes:
      leaf: which operand is the leaf.
      x: which operand is the activation.
      leaf_axes: contracted axes of the leaf.
      x_axes: contracted axes of the activation, in the same order.
      leaf_batch: axes of the leaf that stand side by side, if any.
      x_batch: those of the activation, in the same order. All others are rows.
    """

    leaf: int
    x: int
    leaf_axes: tuple[int, ...]
    x_axes: tuple[int, ...]
    leaf_batch: tuple[int, ...] = ()
    x_batch: tuple[int, ...] = ()


Rule = Callable[..., Sequence[Contraction]]
"""`rule(params, *operands)`: parameters of the equation, then shapes of its operands."""


class Value(NamedTuple):
    """What is known of a value before it is computed.

    Attributes:
      number: values with the same number are equal.
      data: whether it may depend on an argument other than the parameters.
      parts: of leaves; several after a concatenation, or a sum of leaves.
    """

    number: int
    data: bool
    parts: tuple[Part, ...] = ()


class Scope(NamedTuple):
    """Where the walk is."""

    place: Place
    loops: tuple[Loop, ...] = ()
    trace: Place = ()  # of the loop or branch: what is computed in it stays in it


class Walk:
    """Collects sites, activations, and the uses of leaves that are no sites."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        batch_axes: Mapping[str, frozenset[int]],
    ):
        self.rules = rules
        self.batch_axes = batch_axes
        self.sites: list[Site] = []
        self.readings: list[Reading] = []
        self.others: dict[str, list[str]] = {}
        self._activations: dict[Any, int] = {}
        self._numbers: dict[Any, int] = {}
        self._count = 0

    def fresh(self) -> int:
        """A number for a value that equals no other."""
        self._count += 1
        return self._count

    def note(self, parts: Sequence[Part], reason: str) -> None:
        """Leaves are used here, and not followed further."""
        for part in parts:
            reasons = self.others.setdefault(part.path, [])
            if reason not in reasons:
                reasons.append(reason)

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], operands: list[Value], scope: Scope
    ) -> list[Value]:
        """Values of the outputs."""
        known: dict[Any, Value] = {}
        for var, x in zip(jaxpr.constvars, consts, strict=True):
            known[var] = Value(self._number("const", id(x)), False)
        known.update(zip(jaxpr.invars, operands, strict=True))

        def read(x):
            if isinstance(x, Literal):
                key = (repr(x.val), str(x.aval))
                return Value(self._number("literal", key), False)
            return known[x]

        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(x) for x in eqn.invars]
            here = scope._replace(place=(*scope.place, i))
            found = self.equation(eqn, values, here)
            known.update(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _number(self, *key: Any) -> int:
        try:
            if key not in self._numbers:
                self._numbers[key] = self.fresh()
            return self._numbers[key]
        except (TypeError, ValueError):  # parameters that cannot be hashed or compared
            return self.fresh()

    def _plain(self, eqn: Any, values: Sequence[Value]) -> list[Value]:
        """Values of the outputs, no parts of leaves."""
        data = any(v.data for v in values)
        if eqn.effects:
            return [Value(self.fresh(), data) for _ in eqn.outvars]
        numbers = tuple(v.number for v in values)
        options = tuple(sorted(eqn.params.items(), key=lambda x: x[0]))
        key = (eqn.primitive.name, numbers, options)
        return [Value(self._number(key, i), data) for i in range(len(eqn.outvars))]

    def equation(self, eqn: Any, values: list[Value], scope: Scope) -> list[Value]:
        name = eqn.primitive.name
        found = self._plain(eqn, values)
        parts = [p for v in values for p in v.parts]
        if not parts:
            return found
        if name in self.rules:
            return self._by_rule(eqn, values, found, scope)
        if name in CALLS:
            inner, consts = jaxpr_of(eqn.params)
            return self.run(inner, consts, values, scope)
        if name == "scan":
            return self._scan(eqn, values, found, scope)
        if name == "cond":
            return self._cond(eqn, values, found, scope)
        if name == "while":
            return self._while(eqn, values, found, scope)
        if name == "dot_general":
            self._dot(eqn, values, scope)
            return found
        if name == "conv_general_dilated":
            self._conv(eqn, values, scope)
            return found
        if name == "ragged_dot_general":
            self._ragged(eqn, values, scope)
            return found
        operands = [v.parts for v in values]
        moved = _moves.move(eqn, operands, [v.data for v in values], scope.place)
        self.note(moved.lost, moved.reason)
        return [f._replace(parts=p) for f, p in zip(found, moved.parts, strict=True)]

    # ---- where the jaxpr has jaxprs in it

    def _scan(self, eqn, values, found, scope):
        params = eqn.params
        first, second = scan_operands(params, len(values))
        length, body = params["length"], params["jaxpr"]
        inputs = []
        for i, value in enumerate(values):
            if i < first:
                inputs.append(value)
                continue
            parts = []
            if i < second:
                self.note(value.parts, "the carry of a scan")
            else:
                parts = [_moves.scanned(p, scope.place) for p in value.parts]
            data = value.data or i < second
            inputs.append(Value(self.fresh(), data, tuple(parts)))
        loop = Loop(scope.place, length, False)
        inner = Scope(scope.place, (*scope.loops, loop), scope.place)
        out = self.run(body.jaxpr, body.consts, inputs, inner)
        return self._leave(out, found, "the end of a scan")

    def _cond(self, eqn, values, found, scope):
        data = values[0].data
        self.note(values[0].parts, "the choice of a branch")
        for i, branch in enumerate(eqn.params["branches"]):
            place = (*scope.place, i)
            inner = Scope(place, scope.loops, place)
            out = self.run(branch.jaxpr, branch.consts, values[1:], inner)
            found = self._leave(out, found, "the end of a branch")
            data |= any(v.data for v in out)
        return [v._replace(data=data) for v in found]

    def _while(self, eqn, values, found, scope):
        params = eqn.params
        first, second = params["cond_nconsts"], params["body_nconsts"]
        tested, consts, carry = (
            values[:first], values[first : first + second], values[first + second :],
        )  # fmt: skip
        self.note([p for v in tested for p in v.parts], "the condition of a while")
        self.note([p for v in carry for p in v.parts], "the carry of a while")
        inputs = [*consts, *(Value(self.fresh(), True) for _ in carry)]
        place = (*scope.place, 1)
        inner = Scope(place, (*scope.loops, Loop(scope.place, None, False)), place)
        body = params["body_jaxpr"]
        out = self.run(body.jaxpr, body.consts, inputs, inner)
        return self._leave(out, found, "the end of a while")

    def _leave(self, out, found, reason):
        for v in out:
            self.note(v.parts, reason)
        return [
            f._replace(data=f.data or v.data) for f, v in zip(found, out, strict=True)
        ]

    # ---- where leaves end

    def _by_rule(self, eqn, values, found, scope):
        shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
        told = self.rules[eqn.primitive.name](eqn.params, *shapes)
        for c in told:
            self._contract(
                eqn, values, scope, c.leaf, c.x,
                list(zip(c.leaf_batch, c.x_batch, strict=True)),
                list(zip(c.leaf_axes, c.x_axes, strict=True)),
            )  # fmt: skip
        for i, value in enumerate(values):
            if i not in {c.leaf for c in told}:
                self.note(value.parts, eqn.primitive.name)
        return found

    def _dot(self, eqn, values, scope):
        (l_axes, r_axes), (l_batch, r_batch) = eqn.params["dimension_numbers"]
        left, right = values
        if left.parts and right.parts:
            self.note([*left.parts, *right.parts], "dot_general with another leaf")
        elif left.parts:
            batch, axes = zip(l_batch, r_batch), zip(l_axes, r_axes)  # noqa: B905
            self._contract(eqn, values, scope, 0, 1, list(batch), list(axes))
        else:
            batch, axes = zip(r_batch, l_batch), zip(r_axes, l_axes)  # noqa: B905
            self._contract(eqn, values, scope, 1, 0, list(batch), list(axes))

    def _contract(self, eqn, values, scope, leaf, x, batch, axes):
        """Axes are pairs, of the leaf and of the activation."""
        name = eqn.primitive.name
        if not axes:
            self.note(values[leaf].parts, f"{name} that contracts no axis")
            return
        batch = sorted(batch, key=lambda pair: pair[1])
        axes = sorted(axes, key=lambda pair: pair[1])
        shape = eqn.invars[x].aval.shape
        used = {a for _, a in (*batch, *axes)}
        rows = math.prod(n for a, n in enumerate(shape) if a not in used)
        for part in values[leaf].parts:
            met = [part.dims[a] for a, _ in (*batch, *axes)]
            windows = tuple(None if d.whole else (d.start, d.size) for d in met)
            free = set(range(len(part.dims))) - {a for a, _ in (*batch, *axes)}
            k = tuple(a for i, _ in axes for a in part.dims[i].atoms)
            chosen = self.batch_axes.get(part.path, frozenset())
            k_sizes, moved, moved_atoms = (), (), ()
            if chosen:
                k = _layout.cut(k, part.shape)
                strides = {_layout.row_major(part.shape)[a].atoms for a in chosen}
                moved = tuple(i for i, a in enumerate(k) if _within(a, strides))
                k_sizes = tuple(n for n, _ in k) if moved else ()
                moved_atoms = tuple(k[i] for i in moved)
                k = tuple(a for i, a in enumerate(k) if i not in moved)
            self._site(
                eqn, scope, part, rows,
                tuple(a for i, _ in batch for a in part.dims[i].atoms) + moved_atoms,
                k,
                tuple(a for i in sorted(free) for a in part.dims[i].atoms),
                (values[x].number, "rows"),
                operand=x,
                batch_axes=tuple(a for _, a in batch),
                k_axes=tuple(a for _, a in axes),
                windows=windows,
                k_sizes=k_sizes,
                moved=moved,
            )  # fmt: skip

    def _conv(self, eqn, values, scope):
        params, name = eqn.params, "conv_general_dilated"
        if values[0].parts or params["batch_group_count"] != 1:
            where = "the left of " if values[0].parts else "batch groups of "
            self.note([p for v in values for p in v.parts], where + name)
            return
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        out, into, *window = numbers.rhs_spec
        rows = math.prod(
            eqn.outvars[0].aval.shape[a]
            for a in (numbers.out_spec[0], *numbers.out_spec[2:])
        )
        for part in values[1].parts:
            dims = part.dims
            split = _layout.reshape((dims[out],), (groups, dims[out].total // groups))
            if split is None or not all(dims[i].whole for i in (into, *window)):
                self.note([part], f"{name} of a concatenation")
                continue
            if not split[0].whole:
                self.note([part], f"{name} of a concatenation")
                continue
            options = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
            key = (numbers, groups, eqn.invars[1].aval.shape[-1:], *(
                tuple(params[o]) for o in options
            ), tuple(dims[i].total for i in window))  # fmt: skip
            self._site(
                eqn, scope, part, rows, split[0].atoms,
                tuple(a for i in (into, *window) for a in dims[i].atoms),
                split[1].atoms,
                (values[0].number, "windows", *key[:2], *key[3:]),
                operand=0,
            )  # fmt: skip

    def _ragged(self, eqn, values, scope):
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (l_axes, r_axes), (l_batch, _) = numbers.dot_dimension_numbers
        name = "ragged_dot_general"
        if (
            any(v.parts for i, v in enumerate(values) if i != 1)
            or l_batch
            or len(numbers.rhs_group_dimensions) != 1
            or len(numbers.lhs_ragged_dimensions) != 1
            or numbers.lhs_ragged_dimensions[0] in l_axes
            or len(values) != 3
        ):
            self.note([p for v in values for p in v.parts], f"{name} of this form")
            return
        pairs = sorted(zip(r_axes, l_axes, strict=True), key=lambda pair: pair[1])
        (group,) = numbers.rhs_group_dimensions
        rows = eqn.invars[0].aval.shape[numbers.lhs_ragged_dimensions[0]]
        for part in values[1].parts:
            if not all(part.dims[a].whole for a in (group, *r_axes)):
                self.note([part], f"{name} of a concatenation")
                continue
            free = sorted(set(range(len(part.dims))) - {group, *r_axes})
            self._site(
                eqn, scope, part, rows, part.dims[group].atoms,
                tuple(a for i, _ in pairs for a in part.dims[i].atoms),
                tuple(a for i in free for a in part.dims[i].atoms),
                (values[0].number, "groups", values[2].number),
                operand=0,
                k_axes=tuple(a for _, a in pairs),
            )  # fmt: skip

    def _site(
        self, eqn, scope, part, rows, batch, k, n, key, operand, batch_axes=(),
        k_axes=(), windows=(), k_sizes=(), moved=(),
    ):  # fmt: skip
        sliced = dict(part.sliced)
        loops = tuple(x._replace(sliced=x.place in sliced) for x in scope.loops)
        shape = _layout.size(batch), _layout.size(k)
        reading = Reading(
            scope.place, operand, batch_axes, k_axes, windows, k_sizes, moved, shape,
            loops, part.indices,
        )  # fmt: skip
        same = reading._replace(place=(), operand=0)
        number = self._activations.setdefault(
            (scope.trace, key, same), len(self.readings)
        )
        lengths = [x.length for x in loops if x.length is not None]
        site = Site(
            path=part.path,
            shape=part.shape,
            primitive=eqn.primitive.name,
            activation=number,
            place=scope.place,
            loops=loops,
            stack=_layout.joined((*part.stack, *part.indexed)),
            batch=_layout.joined(batch),
            k=_layout.joined(k),
            n=_layout.joined(n),
            offset=part.offset,
            picks=(*(sliced[x.place] for x in loops if x.sliced), *part.picked),
            wraps=part.wraps,
            times=math.prod(lengths) if len(lengths) == len(loops) else None,
            rows=rows,
        )
        if not site.is_sliceable:
            self.note([part], f"{eqn.primitive.name} of a part that is no slice")
            return
        if number == len(self.readings):
            self.readings.append(reading)
        self.sites.append(site)


def _within(atom: tuple[int, int], axes: set[Atoms]) -> bool:
    n, stride = atom
    return any(s <= stride and n * stride <= s * size for ((size, s),) in axes if size)


def scan_operands(params: Mapping[str, Any], operands: int) -> tuple[int, int]:
    """The first operand of a scan that is carried, and the first that is sliced."""
    if "num_consts" in params:
        first = params["num_consts"]
        return first, first + params["num_carry"]
    parts = params["ft_in"].update(range(operands)).unpack()  # since JAX 0.11
    consts, carry, _ = (len(list(x)) for x in parts)
    return consts, consts + carry


def jaxpr_of(params: Mapping[str, Any]) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr in an equation that calls it, and its constants."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    found = next(params[name] for name in names if name in params)
    if isinstance(found, ClosedJaxpr):
        return found.jaxpr, found.consts
    return found, ()
