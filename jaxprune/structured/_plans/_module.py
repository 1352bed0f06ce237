"""What is common to modules of Flax that are given back at the sizes of a plan."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._verify import difference


@dataclasses.dataclass(frozen=True)
class Patch:
    """What changes in the configuration of a model; `str(patch)` has a line for each.

    Attributes:
      changes: by path of the module, then attribute: what it was and what it is.
    """

    changes: dict[str, dict[str, tuple[Any, Any]]]

    def __str__(self) -> str:
        return "\n".join(
            f"{path or '(the model)'}: {name} {old} -> {new}"
            for path, names in self.changes.items()
            for name, (old, new) in names.items()
        )


def places(plan: Plan, path: str, axis: int) -> np.ndarray | None:
    """The places that a leaf keeps along an axis, counted from the end; `None` for all."""
    return plan.cuts.get(path, {}).get(len(plan.shapes.get(path, ())) + axis)


def groups_left(plan: Plan, path: str, axis: int, groups: int) -> int:
    """How many groups of channels are left, each of one width.

    Args:
      plan: the plan.
      path: of a leaf.
      axis: of the channels, counted from the end.
      groups: how many there were.
    """
    kept = places(plan, path, axis)
    if kept is None:
        return groups
    found = np.bincount(kept.ravel() // (plan.shapes[path][axis] // groups))
    widths = set(found[found > 0].tolist())
    if len(widths) > 1:
        refuse(
            f"{path} keeps groups of {sorted(widths)} channels, which are not of one width"
        )
    return int((found > 0).sum())


def changed(module: Any, new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of attributes, those that get another value: the old one and the new one."""
    old = {name: getattr(module, name) for name in new}
    return {name: (old[name], x) for name, x in new.items() if old[name] != x}


def check_equal(
    expected: Callable[..., Any],
    found: Callable[..., Any],
    small: PyTree,
    args: tuple[Any, ...],
    tolerance: float,
) -> None:
    """Raises `ValueError` if the module does not do what the rewritten function does.

    Args:
      expected: the rewritten function, of `small` and `args`.
      found: the module.
      small: the shrunk variables.
      args: the other arguments.
      tolerance: see `verify`.
    """
    wanted = jax.jit(expected)(small, *args)
    try:
        got = jax.jit(found)(small, *args)
    except Exception as error:
        raise ValueError(
            "model: it does not run at the new sizes, some of which its code must know by "
            f"another way: {error}. {_WAY_OUT}"
        ) from error
    for path, x, y in zip(
        _tree.paths(wanted), jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True
    ):
        error = difference(x, y)
        if not error <= tolerance:
            refuse(
                f"its output {path} differs from that of the rewritten function by {error:.1e} "
                "of the largest value: dropout draws other numbers, or a constant comes from "
                "a size, such as the root of a head's width in attention"
            )


_WAY_OUT = (
    "Use plan.rewrite(fn), which needs no module; or keep these units, with kinds= or "
    "overrides= of structured.plan."
)


def refuse(why: str) -> NoReturn:
    """The model cannot be given back as a module."""
    raise ValueError(f"model: {why}. {_WAY_OUT}")
