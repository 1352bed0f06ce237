"""A user's function at the sizes of a plan, read anew for each signature."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._plans import _state
from jaxprune.structured._plans._kept import Kept
from jaxprune.structured._plans._replay import Replay
from jaxprune.structured._reading import _dims, _local, _trace, _zeros
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._graph import Traced
from jaxprune.structured._reading._propagate import Rule
from jaxprune.structured._reading._values import Dims

if TYPE_CHECKING:
    from jaxprune.structured._plans._plan import Plan


Removed = Literal["zero", "absent"]
_SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion"
)  # fmt: skip


def rewritten(
    plan: "Plan",
    fn: Callable[..., Any],
    rules: Mapping[str, Rule] | None,
    removed: Removed,
) -> Callable[..., Any]:
    """See `Plan.rewrite`."""
    if removed not in get_args(Removed):
        raise ValueError(
            f"removed: got {removed!r}; expected one of {get_args(Removed)}."
        )
    read: dict[Any, tuple[Traced, Replay]] = {}

    def small_fn(params: PyTree, *args: Any) -> Any:
        plan_shapes = plan.small_shapes
        paths, leaves, _ = _tree.flatten(params)
        shapes = {
            p: jnp.shape(x)
            for p, x in zip(paths, leaves, strict=True)
            if not _tree.is_hole(x)
        }
        _state.check_shapes(shapes, plan_shapes, name="params", which="shrunk")
        full = _full(params, plan.shapes), *_full_inputs(plan, args)
        key = _signature((params, args))
        if key in read:
            traced, run = read[key]
        else:
            traced, kept, apart = read_at(plan, fn, full[0], full[1:], rules)
            look = _zeros.look(
                traced.program, [*traced.dims, *traced.inputs], kept.units, rules or {}
            )
            run = Replay(kept, rules or {}, look, apart, absent=removed == "absent")
            if not _has_tracers(traced.program):
                read[key] = traced, run
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(args)]
        return jax.tree.unflatten(traced.out_tree, run(traced.program, leaves))

    return small_fn


def read_at(
    plan: "Plan",
    fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    rules: Mapping[str, Rule] | None,
) -> tuple[Traced, Kept, dict[Dim, tuple[Dim, ...]]]:
    """A function of arguments of full size, what the plan keeps in it, and `apart`."""
    traced = _trace.read(fn, params, args, rules)
    return traced, *_kept(plan, traced, rules or {})


def _signature(tree: PyTree) -> Any:
    """What the reading of a function depends on, besides the function."""
    leaves, treedef = jax.tree.flatten(tree)
    settings = (
        *(getattr(jax.config, n) for n in _SETTINGS),
        jax.sharding.get_abstract_mesh(),
    )
    return treedef, tuple(jax.typeof(x) for x in leaves), settings


def _full(params: PyTree, shapes: Mapping[str, tuple[int, ...]]) -> PyTree:
    paths, leaves, treedef = _tree.flatten(params)
    return treedef.unflatten(
        [
            x if _tree.is_hole(x) or jnp.shape(x) == shapes[p]
            else jax.ShapeDtypeStruct(shapes[p], x.dtype)
            for p, x in zip(paths, leaves, strict=True)
        ]
    )  # fmt: skip


def _full_inputs(plan: "Plan", args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Resizable inputs as they were: axes that are not cut may have any size."""
    paths, leaves, treedef = _tree.flatten(args)
    new = []
    for p, x in zip(paths, leaves, strict=True):
        axes = plan.input_cuts.get(p, {})
        if not axes:
            new.append(x)
            continue
        shape = list(jnp.shape(x))
        for axis, places in axes.items():
            if len(shape) <= axis or shape[axis] != len(places):
                raise ValueError(
                    f"args: the input {p} has the shape {tuple(shape)}, and its axis {axis} "
                    f"has the size {len(places)} in the plan. Pass plan.shrink_inputs(*args)."
                )
            shape[axis] = plan.input_shapes[p][axis]
        new.append(jax.ShapeDtypeStruct(tuple(shape), x.dtype))
    return treedef.unflatten(new)


def _has_tracers(program: Any) -> bool:
    """Whether the function closes over values of a trace around it, which must not stay."""
    here = any(isinstance(c, core.Tracer) for c in program.consts)
    inner = (p for record in program.records for p in record.inner)
    return here or any(map(_has_tracers, inner))


def _kept(
    plan: "Plan", traced: Traced, rules: Mapping[str, Rule]
) -> tuple[Kept, dict[Dim, tuple[Dim, ...]]]:
    """Units that the plan keeps, in another reading of a function.

    Raises:
      ValueError: if this reading couples what the plan does not, or lacks a leaf.
    """
    for path, dims in zip(traced.input_paths, traced.inputs, strict=True):
        for axis, d in enumerate(dims):
            if axis not in plan.input_cuts.get(path, {}):
                _dims.freeze(d, f"input {path}")
    same = {p: {**axes, **plan.same.get(p, {})} for p, axes in plan.cuts.items()}
    axes = [*_places(traced.paths, traced.dims, same, plan.shapes)]
    axes += _places(traced.input_paths, traced.inputs, plan.input_cuts, None)
    units: dict[Dim, np.ndarray] = {}
    for _, d, mask in axes:
        if not mask.all():
            for leaf in dict.fromkeys(_dims.leaves(d)):
                _keep(units, leaf, _dims.units(d, leaf), mask)
    kept = Kept({d: mask for d, mask in units.items() if not mask.all()})
    for name, d, mask in axes:
        if not np.array_equal(kept.mask(d), mask):
            _refuse(name, "the function couples its units with others, that are kept")
        why = [w for x in _dims.leaves(d) if x in kept.units for w in x.frozen]
        if why:
            _refuse(name, "; ".join(dict.fromkeys(why)))
    return kept, _apart(plan, traced, rules)


def _apart(
    plan: "Plan", traced: Traced, rules: Mapping[str, Rule]
) -> dict[Dim, tuple[Dim, ...]]:
    """Dimensions with other units in each layer or head, and these.

    Raises:
      ValueError: if this reading relates the units of one to those of another.
    """
    found: dict[Dim, tuple[Dim, ...]] = {}
    names = {}
    for name, x in ((n, x) for n, xs in plan.apart.items() for x in xs):
        dims = traced.dims[traced.paths.index(x.path)]
        known = [
            y
            for i, units in zip(x.axes, x.units, strict=True)
            for y in dict.fromkeys(_dims.leaves(dims[i]))
            if np.array_equal(_dims.units(dims[i], y), units)
        ]
        if len(known) < len(x.axes):
            _refuse(name, f"{_APART}, and here they are no units of one axis")
        d, *held = known
        found[d] = tuple(dict.fromkeys((*found.get(d, ()), *held)))
        if names.setdefault(d, name) != name:
            _refuse(name, f"{_APART}, and here are those of {names[d]} too")
    among = dict.fromkeys(y for d, held in found.items() for y in (d, *held))
    owners = _local.owners(traced.program, among, rules) if found else {}
    for d, held in found.items():
        if not set(held) <= set(owners[d]):
            _refuse(
                names[d], f"{_APART}, and here are told by number, or meet one another"
            )
    return found


_APART = "its units differ from layer to layer, or head to head"


def _places(
    paths: Sequence[str],
    dims: Sequence[Dims],
    cuts: _state.Cuts,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> list[tuple[str, Dim, np.ndarray]]:
    found = []
    for path, axes in zip(paths, dims, strict=True):
        for axis, d in enumerate(axes):
            mask = np.ones(d.size, bool)
            if axis in cuts.get(path, {}):
                mask[:] = False
                mask[cuts[path][axis]] = True
            found.append((f"{path}:{axis}", d, mask))
    return found


def _keep(units: dict[Dim, np.ndarray], leaf: Dim, own: np.ndarray, mask: np.ndarray):
    """A unit stays where any of its places does."""
    found = np.zeros(leaf.size, bool)
    found[own[(own >= 0) & mask]] = True
    units[leaf] = units[leaf] & found if leaf in units else found


def _refuse(name: str, why: str) -> None:
    raise ValueError(
        f"the plan removes places of {name}, which this function, with these inputs, cannot "
        f"do without: {why}. Trace this function, with these inputs, and plan anew, or leave "
        "the leaf out with ignore=."
    )
