"""Cuts trees at planned places: parameters, and whatever has subtrees like them."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree, masks
from jaxprune._tree import PyTree
from jaxprune.structured._plans._cut import cut, cut_shape

_WANTED = {"full": "those that were traced", "shrunk": "what plan.shrink gives"}
Cuts: TypeAlias = dict[str, dict[int, np.ndarray]]
"""By path, then axis: the places that are kept."""


def cut_shapes(
    shapes: Mapping[str, tuple[int, ...]], cuts: Cuts
) -> dict[str, tuple[int, ...]]:
    """Shapes of what is kept, by path."""
    return {p: cut_shape(s, cuts.get(p, {})) for p, s in shapes.items()}


def cut_tree(tree: PyTree, cuts: Cuts) -> PyTree:
    """What is kept of the leaves with these paths."""
    return _mapped(tree, cuts, cut)


def mask_tree(tree: PyTree, cuts: Cuts) -> PyTree:
    """Zeros in place of what is not kept."""
    return _mapped(
        tree, cuts, lambda x, axes: jnp.where(_mask(x, axes), x, jnp.zeros((), x.dtype))
    )


def masks_of(tree: PyTree, cuts: Cuts) -> PyTree:
    """Masks of the leaves that are cut, and `None` for others."""
    paths, leaves, treedef = _tree.flatten(tree)
    found = [
        jnp.broadcast_to(_mask(x, cuts[p]), jnp.shape(x)) if cuts.get(p) else None
        for p, x in zip(paths, leaves, strict=True)
    ]
    return treedef.unflatten(found)


def _mapped(tree: PyTree, cuts: Cuts, f: Callable[..., Any]) -> PyTree:
    paths, leaves, treedef = _tree.flatten(tree)
    return treedef.unflatten(
        [
            f(x, cuts[p]) if cuts.get(p) and not _tree.is_hole(x) else x
            for p, x in zip(paths, leaves, strict=True)
        ]
    )


def _mask(x: Any, axes: Mapping[int, np.ndarray]) -> Any:
    shape = jnp.shape(x)
    found = jnp.ones((1,) * len(shape), bool)
    for axis, places in axes.items():
        if places.ndim == 1:
            places = places.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        sizes = [shape[i] if i == axis else n for i, n in enumerate(places.shape)]
        kept = np.zeros(sizes, bool)
        np.put_along_axis(kept, places, True, axis)
        found &= kept
    return found


def cut_state(state: PyTree, params: PyTree, cuts: Cuts) -> PyTree:
    """Cuts each leaf of `state` that belongs to a leaf of `params`."""
    paths, leaves, _ = _tree.flatten(params)
    shapes = {
        p: jnp.shape(x)
        for p, x in zip(paths, leaves, strict=True)
        if not _tree.is_hole(x)
    }
    whole = jax.tree.structure(params)
    only = whole == jax.tree.structure(0)

    def like_params(x: Any) -> bool:
        return not only and jax.tree.structure(x) == whole

    parts, treedef = jax.tree.flatten(
        state, is_leaf=lambda x: like_params(x) or _is_packed(x)
    )
    if any(map(like_params, parts)):
        new = [_cut_subtree(x, shapes, cuts) if like_params(x) else None for x in parts]
        rest = _cut_named(treedef.unflatten([None if like_params(x) else x for x in parts]),
                          shapes, cuts)  # fmt: skip
        others = treedef.flatten_up_to(rest)
        return treedef.unflatten(
            [x if y is None else y for x, y in zip(others, new, strict=True)]
        )
    return _cut_named(state, shapes, cuts)


def _cut_subtree(
    tree: PyTree, shapes: Mapping[str, tuple[int, ...]], cuts: Cuts
) -> PyTree:
    """A tree with the paths of the parameters."""
    leaves, treedef = jax.tree.flatten(tree)
    new = [
        _cut_like(x, p, s, cuts)
        for x, (p, s) in zip(leaves, shapes.items(), strict=True)
    ]
    return treedef.unflatten(new)


def _cut_named(
    state: PyTree, shapes: Mapping[str, tuple[int, ...]], cuts: Cuts
) -> PyTree:
    """Leaves whose paths end with that of a parameter: parts of trees, packed masks."""
    paths, leaves, treedef = _tree.flatten(state, is_leaf=_is_packed)
    by_length = sorted(shapes, key=len, reverse=True)
    new = []
    for path, x in zip(paths, leaves, strict=True):
        owner = next(
            (p for p in by_length if f"/{path}".endswith(f"/{p}") or not p), None
        )
        if owner is None or _tree.is_hole(x):
            _check_not_below(path, x, shapes, cuts)
            new.append(x)
        elif isinstance(x, masks.PackedMask):
            axes = cuts.get(owner, {})
            new.append(masks.pack_leaf(cut(masks.as_bool(x), axes)) if axes else x)
        else:
            new.append(_cut_like(x, owner, shapes[owner], cuts))
    return treedef.unflatten(new)


def _check_not_below(
    path: str, x: Any, shapes: Mapping[str, tuple[int, ...]], cuts: Cuts
) -> None:
    """Refuses what a state keeps in parts for a parameter, if it may have to be cut."""
    for owner, axes in cuts.items():
        sizes = {shapes[owner][a] for a in axes}
        if f"/{owner}/" in f"/{path}/" and sizes.intersection(np.shape(x)):
            _refuse(path, owner, np.shape(x), shapes[owner])


def _is_packed(x: Any) -> bool:
    return isinstance(x, masks.PackedMask)


def _cut_like(x: Any, path: str, shape: tuple[int, ...], cuts: Cuts) -> Any:
    """A leaf that belongs to a parameter of this shape."""
    axes, own = cuts.get(path, {}), jnp.shape(x)
    if not axes or int(np.prod(own)) <= 1:
        return x
    ahead = len(own) - len(shape)
    if ahead >= 0 and own[ahead:] == shape:  # a history of them is stacked, say
        return cut(x, {a + ahead: _behind(places, ahead) for a, places in axes.items()})
    # Factored moments are a mean over one axis.
    gone = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == own]
    found = [
        {a - (a > i): places for a, places in axes.items() if a != i} for i in gone
    ]
    order = [np.argsort(s)[-2:].tolist() for s in (shape, cut_shape(shape, axes))]
    if (
        not found
        or any(places.ndim > 1 for places in axes.values())
        or order[0] != order[1]  # optax tells rows from columns by the larger size
        or any(not _same(found[0], other) for other in found[1:])
    ):
        _refuse(f"a leaf that belongs to {path}", path, own, shape)
    return cut(x, found[0])


def _behind(places: np.ndarray, ahead: int) -> np.ndarray:
    """The same for an array with axes ahead of those of the parameter."""
    return places if places.ndim == 1 else places.reshape((1,) * ahead + places.shape)


def _refuse(
    name: str, path: str, own: tuple[int, ...], shape: tuple[int, ...]
) -> NoReturn:
    raise ValueError(
        f"state: {name} has the shape {own}, and the parameter {path} has {shape}, so that "
        "it cannot be told what to remove. Take it out of the state, and initialise it from "
        "the shrunk parameters."
    )


def _same(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[i], b[i]) for i in a)


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    name: str,
    which: str,
) -> None:
    """Raises `ValueError` at the first path that differs."""
    for path, shape in wanted.items():
        if path not in found:
            raise ValueError(
                f"{name}: there is no leaf {path}, which the plan has with the shape {shape}. "
                "Pass the tree that was traced; masks and states that have fewer leaves go "
                f"through shrink_state. It has: {_tree.listing(list(found))}."
            )
        if tuple(found[path]) != tuple(shape):
            raise ValueError(
                f"{name}: {path} has the shape {tuple(found[path])}, and the {which} shape in "
                f"the plan is {tuple(shape)}. The plan is for another model, or for "
                f"parameters of another size: pass {_WANTED[which]}."
            )
    for path in found:
        if path not in wanted and name == "params":
            raise ValueError(
                f"{name}: the leaf {path} is not in the plan. The plan is for another model, "
                "or the tree holds more than was traced."
            )


def cuts_to_lists(cuts: Cuts) -> dict[str, dict[str, list[int]]]:
    """For JSON."""
    return {
        p: {str(a): places.tolist() for a, places in axes.items()}
        for p, axes in cuts.items()
    }


def cuts_from_lists(data: Mapping[str, Mapping[str, list[int]]]) -> Cuts:
    """Of `cuts_to_lists`."""
    return {
        p: {int(a): np.asarray(places, int) for a, places in axes.items()}
        for p, axes in data.items()
    }
