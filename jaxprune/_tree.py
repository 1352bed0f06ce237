"""Paths of leaves, spelled alike for every library, and the choice among them."""

import collections
import fnmatch
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

PyTree: TypeAlias = Any
Where: TypeAlias = Callable[[str, Any], bool] | str | Sequence[str] | None
T = TypeVar("T")

# Names of leaves that shift, scale or normalise: never pruned by default.
_NOT_WEIGHTS = re.compile(
    r"b|bias|biases|scale|gamma|beta|offset|mean|var|running_mean|running_var"
    r"|.+_(bias|scale)"
)
# Embedding tables, by their own name or, where that is `weight`, by their owner's.
_TABLES = re.compile(r".*embed.*|(.+_)?emb|wte|wpe")
_NORMS = re.compile(r".*norm.*|(.+_)?(ln|bn)(_?\w)?")


def is_hole(x: Any) -> bool:
    """Whether `x` stands where an array could stand but holds none."""
    return x is None or isinstance(x, optax.MaskedNode)


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] = lambda x: False
) -> tuple[list[str], list[Any], Any]:
    """Flattens `tree` to paths, leaves and a treedef; holes count as leaves.

    Paths read `layers/0/attn/query/kernel` for every library: a leading `params/`
    (linen) is dropped, and so is a trailing `/value` where that attribute is all its
    owner holds (NNX variables, linen's partitioned boxes).
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_hole(x) or is_leaf(x)
    )
    paths = [tuple(path) for path, _ in keyed]
    boxes = {p[:-1] for p in paths if len(p) > 1 and _is_value(p[-1])}
    owned = collections.Counter(
        p[:i] for p in paths for i in range(len(p)) if p[:i] in boxes
    )
    paths = [
        p[:-1] if p and _is_value(p[-1]) and owned[p[:-1]] == 1 else p for p in paths
    ]
    return [_spell(p) for p in paths], [x for _, x in keyed], treedef


def _is_value(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


def _spell(path: tuple[Any, ...]) -> str:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(names[1:] if len(names) > 1 and names[0] == "params" else names)


def map_leaves(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f` over the arrays of `tree`; holes of `tree` stay as they are.

    Where `tree` has an array, a tree of `rest` may hold a subtree, as a packed mask is.
    """
    return jax.tree.map(
        lambda x, *xs: x if is_hole(x) else f(x, *xs), tree, *rest, is_leaf=is_hole
    )


def map_with_path(f: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `f(path, leaf)` over the arrays of `tree`; holes stay as they are."""
    names, leaves, treedef = flatten(tree)
    return treedef.unflatten(
        [x if is_hole(x) else f(p, x) for p, x in zip(names, leaves, strict=True)]
    )


def is_float(leaf: Any) -> bool:
    """Whether `leaf` is an array of floating-point numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def selection(tree: PyTree, where: Where) -> list[bool]:
    """Says for each leaf of `flatten(tree)` whether it may be pruned.

    Args:
      tree: parameters, or shapes of them.
      where: `None` for the default choice; a function `(path, leaf) -> bool`; or one or
        several glob patterns on the path, of which the last that matches decides and a
        leading `!` excludes. `*` also matches across `/`. If the first pattern
        excludes, they change the default choice: `"!head/*"` leaves out the head.

    Raises:
      ValueError: if a pattern matches no floating-point leaf, or nothing is selected.
      TypeError: if `where` is of another type.
    """
    paths, leaves, _ = flatten(tree)
    trainable = _trainable(tree)
    usable = [is_float(x) and t for x, t in zip(leaves, trainable, strict=True)]
    weights = [
        u and _is_weight(p, x) for p, x, u in zip(paths, leaves, usable, strict=True)
    ]
    if where is None:
        chosen = weights
    elif callable(where):
        chosen = [
            u and bool(where(p, x))
            for p, x, u in zip(paths, leaves, usable, strict=True)
        ]
    elif isinstance(where, Sequence) and all(isinstance(w, str) for w in where):
        patterns = [where] if isinstance(where, str) else where
        chosen = _by_patterns(paths, usable, weights, patterns)
    else:
        raise TypeError(
            f"where: got {where!r}; expected None, a function (path, leaf) -> bool, or "
            "glob patterns such as '*/kernel' and '!head/*'."
        )
    if not any(chosen):
        names = [p for p, u in zip(paths, usable, strict=True) if u]
        raise ValueError(
            f"where={where!r} selects no leaf to prune. The floating-point leaves are: "
            f"{listing(names)}. Pass where= as a glob pattern or a function "
            "(path, leaf) -> bool that selects some of them."
        )
    return chosen


def paths(tree: PyTree) -> list[str]:
    """Paths of the leaves that are no holes."""
    names, leaves, _ = flatten(tree)
    return [p for p, x in zip(names, leaves, strict=True) if not is_hole(x)]


def select(tree: PyTree, where: Where) -> PyTree:
    """Returns `tree` with `None` in place of each leaf that `where` does not select."""
    _, leaves, treedef = flatten(tree)
    chosen = selection(tree, where)
    return treedef.unflatten(
        [
            x if c or isinstance(x, optax.MaskedNode) else None
            for x, c in zip(leaves, chosen, strict=True)
        ]
    )


def align(tree: PyTree, like: PyTree, is_leaf: Callable[[Any], bool]) -> PyTree:
    """Gives `tree` the containers of `like` if the paths of their leaves are the same.

    So a tree with NNX variables fits one without, and a hole fits a whole subtree, such
    as `optax.partition` cuts out. A tree that does not fit is returned as it is.
    """
    paths, leaves, treedef = flatten(like)
    names, parts, _ = flatten(tree, is_leaf)
    found = dict(zip(names, parts, strict=True))
    if list(found) == paths:
        return treedef.unflatten(found.values())
    new, used = [], set()
    for path, x in zip(paths, leaves, strict=True):
        met = {
            p for p, y in found.items()
            if p == path
            or (is_hole(x) and p.startswith(path + "/"))
            or (is_hole(y) and path.startswith(p + "/"))
        }  # fmt: skip
        if not met and not is_hole(x):
            return tree
        used |= met
        new.append(x if is_hole(x) else found.get(path))
    return tree if len(used) < len(names) else treedef.unflatten(new)


def bare(tree: PyTree) -> PyTree:
    """Takes NNX variables off what they hold."""
    nnx = sys.modules.get("flax.nnx")  # no NNX tree can exist before it is imported
    return tree if nnx is None else nnx.as_pure(tree)


def lookup(path: str, table: Mapping[str, T]) -> T | None:
    """Returns the value of the last glob pattern of `table` that matches `path`."""
    found = [v for pattern, v in table.items() if fnmatch.fnmatchcase(path, pattern)]
    return found[-1] if found else None


def check_patterns(
    paths: Sequence[str], table: Mapping[str, Any], *, name: str
) -> None:
    """Raises `ValueError` if a pattern of `table` matches none of `paths`."""
    for pattern in table:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"{name}: the pattern {pattern!r} matches no leaf. The paths are: "
                f"{listing(paths)}."
            )


def matching(
    paths: Sequence[str], patterns: str | Sequence[str], *, name: str
) -> frozenset[str]:
    """Paths that a pattern matches; raises `ValueError` for one that matches none."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    wanted: dict[str, bool] = dict.fromkeys(patterns, True)
    check_patterns(paths, wanted, name=name)
    return frozenset(p for p in paths if lookup(p, wanted))


def listing(paths: Sequence[str], limit: int = 12) -> str:
    """Joins paths for an error message, a long list cut short."""
    shown = ", ".join(paths[:limit]) or "(none)"
    return shown + (f", and {len(paths) - limit} more" if len(paths) > limit else "")


def _is_weight(path: str, leaf: Any) -> bool:
    # Tensors of other libraries keep their dots in a dict of names.
    *owners, name = re.split("[/.]", path.lower())
    if name == "value" and owners:  # what held it came back from a file as a dict
        *owners, name = owners
    if leaf.ndim < 2 or _NOT_WEIGHTS.fullmatch(name) or _TABLES.fullmatch(name):
        return False
    # Equinox and PyTorch spell tables `embedding/weight`, and scales `norm/weight`.
    owner = owners[-1] if owners and name == "weight" else ""
    return not (_TABLES.fullmatch(owner) or _NORMS.fullmatch(owner))


def _by_patterns(
    paths: Sequence[str],
    usable: Sequence[bool],
    weights: Sequence[bool],
    patterns: Sequence[str],
) -> list[bool]:
    excludes = bool(patterns) and patterns[0].startswith("!")
    chosen = list(weights) if excludes else [False] * len(paths)
    for pattern in patterns:
        keep = not pattern.startswith("!")
        regex = re.compile(fnmatch.translate(pattern.removeprefix("!")))
        hits = [i for i, p in enumerate(paths) if usable[i] and regex.match(p)]
        if not hits:
            names = [p for p, u in zip(paths, usable, strict=True) if u]
            raise ValueError(
                f"where: the pattern {pattern!r} matches no floating-point leaf. The "
                f"paths are: {listing(names)}."
            )
        for i in hits:
            chosen[i] = keep
    return chosen


def _trainable(tree: PyTree) -> list[bool]:
    """False for leaves inside an NNX variable that is no `Param` (statistics, keys)."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return [True] * len(jax.tree.leaves(tree, is_leaf=is_hole))

    def stop(x):
        return is_hole(x) or isinstance(x, nnx.Variable)

    out = []
    for x in jax.tree.leaves(tree, is_leaf=stop):
        is_other = isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param)
        out += [not is_other] * len(jax.tree.leaves(x, is_leaf=is_hole))
    return out
