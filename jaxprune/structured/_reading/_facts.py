"""Follows what is known of values through a function: which leaf one is, or comes from."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jax.extend import core

from jaxprune.structured._reading._propagate import Program, Record
from jaxprune.tracing._walk import CALLS, scan_operands

PRODUCTS = frozenset("dot_general conv_general_dilated".split())
_MOVES = frozenset(
    "convert_element_type reshape squeeze expand_dims broadcast_in_dim transpose copy "
    "copy_p sharding_constraint".split()
)


class Fact(NamedTuple):
    """What a value is.

    Attributes:
      kind: a leaf, moved and cast; its product with an activation; an activation that was
        multiplied with it, element by element.
      path: of the leaf.
    """

    kind: Literal["leaf", "product", "scaled"]
    path: str


Facts = Sequence[Fact | None]


def follow(
    program: Program,
    facts: Facts,
    step: Callable[[Record, list[Fact | None]], Facts],
    lost: Callable[[Facts], None],
) -> list[Fact | None]:
    """Carries facts through casts, reshapes, calls and scans.

    Args:
      program: all of a function, or a part.
      facts: of its inputs.
      step: facts of the outputs of any other equation.
      lost: told of values that go where they are not followed, such as into a carry.

    Returns:
      Facts of the outputs.
    """
    known: dict[Any, Fact | None] = dict(zip(program.jaxpr.invars, facts, strict=True))

    def read(x: Any) -> Fact | None:
        return None if isinstance(x, core.Literal) else known.get(x)

    for record in program.records:
        given = [read(x) for x in record.eqn.invars]
        found = _equation(record, given, step, lost)
        known.update(zip(record.eqn.outvars, found, strict=True))
    return [read(x) for x in program.jaxpr.outvars]


def _equation(record: Record, facts: list[Fact | None], step, lost) -> Facts:
    eqn, name = record.eqn, record.eqn.primitive.name
    none = [None] * len(eqn.outvars)
    if name in CALLS and record.inner:
        return follow(record.inner[0], facts, step, lost)
    if name == "scan" and record.inner:
        first, second = scan_operands(eqn.params, len(facts))
        carried = facts[first:second]
        lost(carried)
        inside = [*facts[:first], *(None for _ in carried), *facts[second:]]
        lost(follow(record.inner[0], inside, step, lost))
        return none
    if name in _MOVES:
        return [facts[0], *none[1:]]
    return step(record, facts)
