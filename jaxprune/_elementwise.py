"""Whether a function treats each element of an array by itself, read off its jaxpr."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

_ELEMENTWISE = frozenset(
    "abs add and cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or "
    "pow reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub "
    "tanh xor".split()
)
_CALLS = frozenset("jit pjit closed_call custom_jvp_call custom_vjp_call".split())


def is_elementwise(f: Callable[..., Array], *operands: Array) -> bool:
    """Whether each element of `f(*operands)` depends only on those at its own place.

    A function that reads the shape does not: it says something else of a part of an
    array. In doubt the answer is no.
    """
    shape = operands[0].shape
    seen = []
    for longer in (0, 1):
        parts = [
            jax.ShapeDtypeStruct(tuple(n + longer for n in shape), x.dtype)
            for x in operands
        ]
        try:
            seen.append(_recipe(jax.make_jaxpr(f)(*parts)))
        except (TypeError, ValueError):  # it holds an array of the first shape
            return False
    return seen[0] is not None and seen[0] == seen[1]


def _recipe(closed: Any) -> list | None:
    """The elementwise operations of a jaxpr and their numbers; `None` if it has others."""
    if any(jnp.ndim(c) for c in closed.consts):
        return None
    found: list = [id(c) if isinstance(c, core.Tracer) else c for c in closed.consts]
    for eqn in closed.jaxpr.eqns:
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if not isinstance(inner, ClosedJaxpr) or (part := _recipe(inner)) is None:
                return None
            found.append(part)
        elif name == "broadcast_in_dim":
            if eqn.invars[0].aval.shape:
                return None
        elif name not in _ELEMENTWISE:
            return None
        literals = [float(x.val) for x in eqn.invars if hasattr(x, "val")]
        found.append((name, literals, eqn.params.get("y"), eqn.params.get("new_dtype")))
    return found
