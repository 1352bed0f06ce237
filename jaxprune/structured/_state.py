"""Cuts trees at planned places: parameters, and whatever has subtrees like them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree, masks
from jaxprune._tree import PyTree

Cuts: TypeAlias = dict[str, dict[int, np.ndarray]]
"""By path, then axis: the places that are kept."""


def cut(x: Any, axes: Mapping[int, np.ndarray]) -> Any:
    """What is kept of an array, or the shape of it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(cut_shape(x.shape, axes), x.dtype)
    for axis, places in axes.items():
        x = jnp.take(x, places, axis=axis)
    return x


def cut_shape(shape: Sequence[int], axes: Mapping[int, np.ndarray]) -> tuple[int, ...]:
    """Of what is kept."""
    return tuple(len(axes[i]) if i in axes else n for i, n in enumerate(shape))


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
        kept = np.zeros(shape[axis], bool)
        kept[places] = True
        found &= kept.reshape([-1 if i == axis else 1 for i in range(len(shape))])
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
            new.append(x)
        elif isinstance(x, masks.PackedMask):
            axes = cuts.get(owner, {})
            new.append(masks.pack_leaf(cut(masks.as_bool(x), axes)) if axes else x)
        else:
            new.append(_cut_like(x, owner, shapes[owner], cuts))
    return treedef.unflatten(new)


def _is_packed(x: Any) -> bool:
    return isinstance(x, masks.PackedMask)


def _cut_like(x: Any, path: str, shape: tuple[int, ...], cuts: Cuts) -> Any:
    """A leaf that belongs to a parameter of this shape."""
    axes, own = cuts.get(path, {}), jnp.shape(x)
    if not axes or int(np.prod(own)) <= 1:
        return x
    if own == shape:
        return cut(x, axes)
    # Factored moments are a mean over one axis.
    gone = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == own]
    found = [
        {a - (a > i): places for a, places in axes.items() if a != i} for i in gone
    ]
    if not found or any(not _same(found[0], other) for other in found[1:]):
        raise ValueError(
            f"state: a leaf that belongs to {path} has the shape {own}, and the parameter has "
            f"{shape}, so that it cannot be told what to remove. Take it out of the state, "
            "and initialise it from the shrunk parameters."
        )
    return cut(x, found[0])


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
                f"Pass the tree that was traced. It has: {_tree.listing(list(found))}."
            )
        if tuple(found[path]) != tuple(shape):
            raise ValueError(
                f"{name}: {path} has the shape {tuple(found[path])}, and the {which} shape in "
                f"the plan is {tuple(shape)}. The plan is for another model, or for "
                "parameters of another size."
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
