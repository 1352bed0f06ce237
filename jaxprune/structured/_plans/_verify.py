"""Compares a shrunk function with the masked one."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._plans._rewrite import read_at
from jaxprune.structured._reading._propagate import Rule

if TYPE_CHECKING:
    from jaxprune.structured._plans._plan import Plan


class Verification(NamedTuple):
    """How far a shrunk function is from the masked one.

    Attributes:
      equal: whether all outputs agree.
      errors: of each output, by path: the largest difference, relative to the largest
        value; infinite where shapes differ, NaN where the masked output is no number.
      reasons: why they may differ: notes of the groups that lose units.
    """

    equal: bool
    errors: dict[str, float]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0, key=lambda e: (e != e, e))
        if self.equal:
            return f"equal: the largest relative difference is {worst:.1e}"
        lines = [f"different: the largest relative difference is {worst:.1e}"]
        return "\n".join([*lines, *self.reasons])


def verified(
    plan: "Plan",
    fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    tolerance: float,
    rules: Mapping[str, Rule] | None,
) -> Verification:
    """See `Plan.verify`."""
    small_args = plan.shrink_inputs(*args)
    masked_args = plan.mask_inputs(*args)
    expected = jax.jit(fn)(plan.mask(params), *masked_args)
    small = jax.jit(plan.rewrite(fn, rules=rules))(plan.shrink(params), *small_args)
    traced, kept, _ = read_at(plan, fn, params, args, rules)
    paths, wanted, _ = _tree.flatten(expected)
    got = _tree.flatten(small)[1]
    outs = iter(traced.program.outs)
    errors = {
        p: difference(kept.cut(x, next(outs).dims), y)
        for p, x, y in zip(paths, wanted, got, strict=True)
        if not _tree.is_hole(x)
    }
    equal = all(e <= tolerance for e in errors.values())
    reasons = [
        f"{name}: {note}"
        for name, g in plan.groups.items()
        if g.left < g.size
        for note in g.notes
    ]
    if any(np.isnan(e) for e in errors.values()):
        reasons.append("the masked function gives NaN, to which nothing can be equal")
    if not equal and not reasons:
        reasons.append("no reason is known: this should not be")
    return Verification(equal, errors, () if equal else tuple(reasons))


def difference(expected: Any, found: Any) -> float:
    """The largest one, relative to the largest value; infinite where shapes differ."""
    if jnp.shape(expected) != jnp.shape(found):
        return float("inf")
    if not jnp.issubdtype(jnp.asarray(expected).dtype, jnp.number):
        return 0.0 if bool(jnp.all(expected == found)) else float("inf")
    kind = np.complex128 if jnp.iscomplexobj(expected) else np.float64
    a, b = np.asarray(expected).astype(kind), np.asarray(found).astype(kind)
    if not a.size:
        return 0.0
    with np.errstate(invalid="ignore"):  # infinite values may be equal
        far = np.where(a == b, 0.0, np.abs(a - b))
    scale = np.max(np.abs(a), where=np.isfinite(a), initial=0.0)
    return float(np.max(far) / (scale if scale > 0 else 1.0))
