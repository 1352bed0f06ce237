"""Trees of leaves with names such as `layers/0/kernel`, and back, nothing lost."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune._tree import PyTree
from jaxprune.checkpoint import _packed_tensors as packed_tensors

_DEEPEST = 100  # containers within containers
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_KINDS = ("dict", "dict of integers", "list", "tuple")


def is_leaf(x: Any) -> bool:
    """Leaves beside those of JAX."""
    return x is None or packed_tensors.is_packed(x)


def is_value(x: Any) -> bool:
    """Whether `x` is kept as JSON."""
    of_json = isinstance(x, bool | int | float | str)
    return x is None or (of_json and not isinstance(x, np.generic))


def flatten(tree: PyTree, argument: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Leaves by their names, in the order of JAX, and what the containers are.

    A container is spelled out unless it is a dict with strings for keys that holds
    something. Other containers of JAX count as such dicts, of their fields.

    Raises:
      ValueError: if keys make no names; in the words of the caller's `argument`.
      TypeError: if a leaf is no array, packed weight, number, string or `None`.
    """
    leaves: dict[str, Any] = {}
    containers: dict[str, str] = {}

    def walk(x: Any, path: tuple[str, ...]) -> None:
        name = "/".join(path)
        if is_leaf(x) or jax.tree_util.all_leaves([x]):
            _check_leaf(name, x, argument)
            leaves[name] = x
            return
        if len(path) >= _DEEPEST:
            raise ValueError(
                f"{argument}: there are more than {_DEEPEST} containers within each other "
                f"at {name[:80]}…; expected fewer."
            )
        children, _ = jax.tree_util.tree_flatten_with_path(
            x, is_leaf=lambda y: y is not x
        )
        keys = [_key(path[0]) for path, _ in children]
        if not isinstance(x, Mapping | list | tuple):  # such as the list of a module
            keys = [str(key) for key in keys]
        kind = _kind(x, keys)
        if kind != "dict" or not children:
            containers[name] = kind
        for key, (_, child) in zip(keys, children, strict=True):
            _check_key(name or "the tree", key, kind, argument)
            walk(child, (*path, str(key)))

    walk(tree, ())
    return leaves, containers


def nested(
    leaves: Mapping[str, Any], containers: Mapping[str, str], separator: str
) -> PyTree:
    """Undoes `flatten`; without a separator, the names are the keys of one dict.

    Raises:
      ValueError: if names and containers do not fit, without the name of the file.
    """
    if not separator:
        return dict(leaves)
    root = _Inner()
    for name in containers:
        _inner(root, name.split(separator) if name else [])
    for name, x in leaves.items():
        *owners, last = name.split(separator)
        at = _inner(root, owners)
        if last in at:
            raise ValueError(
                f"other names lie within {name!r}, which is a leaf; expected one or the "
                "other"
            )
        at[last] = x

    def build(x: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(x, _Inner):
            return x
        kind = containers.get(separator.join(path), "dict")
        found = {key: build(child, (*path, key)) for key, child in x.items()}
        if kind == "dict":
            return found
        name = separator.join(path) or "the tree"
        if kind not in _KINDS:
            raise ValueError(
                f"{name} is a {kind!r}; expected one of {', '.join(_KINDS)}"
            )
        if not all(_INTEGER.fullmatch(key) for key in found):
            raise ValueError(f"{name}, a {kind}, has other keys; expected integers")
        numbered = {int(key): child for key, child in found.items()}
        if kind == "dict of integers":
            return dict(sorted(numbered.items()))
        if sorted(numbered) != list(range(len(found))):
            raise ValueError(f"{name}, a {kind}, has gaps; expected 0, 1, 2 and so on")
        items = [numbered[i] for i in range(len(numbered))]
        return items if kind == "list" else tuple(items)

    return build(root, ())


class _Inner(dict):
    """A container that is being built; no leaf is one."""


def _inner(root: _Inner, path: list[str]) -> _Inner:
    if len(path) > _DEEPEST:
        raise ValueError(
            f"{path[0][:80]!r} holds {len(path)} containers within each other; expected "
            f"{_DEEPEST} at most"
        )
    at = root
    for part in path:
        at = at.setdefault(part, _Inner())
        if not isinstance(at, _Inner):
            raise ValueError(
                f"{part[:80]!r} is a leaf, and other names lie within it; expected one or "
                "the other"
            )
    return at


def _check_leaf(name: str, x: Any, argument: str) -> None:
    if not name:
        raise TypeError(
            f"{argument}: got a {type(x).__name__}; expected a dict, list or other tree, "
            "whose keys are the names. Put it into a dict."
        )
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    if not (is_leaf(x) or is_value(x) or is_array):
        raise TypeError(
            f"{argument}: {name} is a {type(x).__name__}; expected an array, a packed "
            "weight or mask, a number, a string or None."
        )


def _check_key(name: str, key: Any, kind: str, argument: str) -> None:
    if kind == "dict" and not isinstance(key, str):
        raise TypeError(
            f"{argument}: {name} has the key {key!r}; expected strings, or integers alone."
        )
    if not (part := str(key)) or "/" in part or part == "__metadata__":
        raise ValueError(
            f"{argument}: {name} has the key {key!r}; expected one that is not empty, not "
            "__metadata__, and without '/', which stands between keys in names. Nest the "
            "tree, or rename the key."
        )


def _kind(x: Any, keys: list[Any]) -> str:
    if type(x) is list:
        return "list"
    if type(x) is tuple:
        return "tuple"
    integers = bool(keys) and all(type(k) is int for k in keys)
    return "dict of integers" if isinstance(x, Mapping) and integers else "dict"


def _key(key: Any) -> Any:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return str(key)
