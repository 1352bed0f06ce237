"""PERP: a pruned model retrained through few parameters, merged with its zeros intact."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxprune import _tree
from jaxprune import masks as mask_trees
from jaxprune._lora import LoRA
from jaxprune._tree import PyTree
from jaxprune.posttrain import _given

Kind: TypeAlias = Literal["bias", "norm", "mask_lora", "scale_lora"]

_BIAS = re.compile(r"b|bias|biases|beta|.+_bias")
_SCALE = re.compile(r"scale|gamma|.+_scale")
_NORM = re.compile(r".*norm.*|(.+_)?(ln|bn)(_?\w)?")


def perp_init(
    params: PyTree,
    masks: PyTree,
    *,
    kind: Kind | Sequence[Kind] = ("bias", "norm", "mask_lora"),
    rank: int = 16,
    alpha: float = 32.0,
    key: Key[Array, ""] | None = None,
) -> dict[str, Array | LoRA]:
    """The few parameters to retrain, at which the model is what it was.

    Args:
      params: pruned parameters, which stay as they are.
      masks: their masks; `None` for leaves that were not pruned.
      kind: one or several: `"bias"`, all biases; `"norm"`, scales and biases of
        normalisation; `"mask_lora"`, `w + alpha / rank * mask * (a b)` for every pruned
        matrix; or `"scale_lora"`, `w * (a b)`. Both keep pruned weights at 0.
      rank: of the factors; 16 as the authors.
      alpha: of MaskLoRA; 32 as the authors.
      key: for the factors. MaskLoRA starts as LoRA does: `a` is uniform within `±1 / √K`,
        `b` is 0. So does ScaleLoRA, within ±1, but for the first rank, which is 1. The
        authors start it with all entries `1 / √rank`: there all ranks have the same
        gradient, and stay alike for ever, as one.

    Returns:
      Leaves, and `LoRA` factors, by path, in at least float32. Any other
      leaf may be added under its path, such as the kernel of a head; one with a mask
      obeys it.

    Raises:
      ValueError: if a kind selects nothing, the masks do not fit, both kinds of LoRA are
        asked for, `rank` is below 1, or the key is missing.

    Example:
      >>> params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "bias": jnp.zeros(2)}
      >>> masks = {"kernel": params["kernel"] != 0, "bias": None}
      >>> few = jp.posttrain.perp_init(
      ...     params, masks, kind=("bias", "mask_lora"), rank=1, key=jax.random.key(0)
      ... )
      >>> def loss(few):
      ...     new = jp.posttrain.perp_params(few, params, masks)
      ...     return jnp.sum((jnp.ones(2) @ new["kernel"] + new["bias"]) ** 2)
      >>> grads = jax.grad(loss)(few)
      >>> grads["bias"].tolist()
      [4.0, 2.0]
      >>> few = jax.tree.map(lambda p, g: p - 0.1 * g, few, grads)
      >>> jp.posttrain.perp_params(few, params, masks)["kernel"][0, 1].item()
      0.0

    References:
      Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs,
      arXiv 2312.15230. The authors give LoRA to the head as well, unmasked.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    _check_kinds(kinds, rank)
    paths, leaves, aligned = _leaves(params, masks)
    usable = _tree.selection(params, lambda path, leaf: True)
    few: dict[str, Array | LoRA] = {}
    for name in kinds:
        chosen = [
            (i, p)
            for i, (p, m, u) in enumerate(zip(paths, aligned, usable, strict=True))
            if u and _is_of(name, p, not _tree.is_hole(m))
        ]
        if not chosen:
            raise ValueError(
                f"perp_init: kind={name!r} selects nothing of {_tree.listing(paths)}. "
                "Leave it out, or add the leaves to what comes back by their paths."
            )
        for i, path in chosen:
            if name in ("bias", "norm"):
                few[path] = _given.wide(leaves[i])
            else:
                few[path] = lora_init(name, path, leaves[i], rank, alpha, key, i)
    return few


def perp_params(
    few: Mapping[str, Array | LoRA], params: PyTree, masks: PyTree
) -> PyTree:
    """The parameters with the retrained ones merged in: for the loss, and in the end.

    Both are the same computation, so that merging changes no output by a bit.

    Args:
      few: from `perp_init`, trained or not.
      params: as given to it.
      masks: as given to it.

    Returns:
      Parameters of the dtypes of `params`; pruned weights that are 0 there are 0.

    Raises:
      ValueError: if `few` has a path that `params` has not, or of another shape.

    Example:
      >>> params, masks = {"w": jnp.array([[1.0, 0.0]])}, {"w": jnp.array([[True, False]])}
      >>> few = {"w": jnp.array([[3.0, 4.0]])}
      >>> jp.posttrain.perp_params(few, params, masks)["w"].tolist()
      [[3.0, 0.0]]
    """
    paths, leaves, aligned = _leaves(params, masks)
    if unknown := sorted(set(few) - set(paths)):
        raise ValueError(
            f"perp_params: params has no leaf {_tree.listing(unknown)}; it has "
            f"{_tree.listing(paths)}. Give the parameters that perp_init was given."
        )
    new = []
    for path, x, m in zip(paths, leaves, aligned, strict=True):
        part = few.get(path)
        if part is None:
            new.append(x)
            continue
        mask = None if _tree.is_hole(m) else mask_trees.as_bool(m)
        if isinstance(part, LoRA):
            if mask is None:
                raise ValueError(
                    f"perp_params: masks has none for {path}, which has a LoRA. Give the "
                    "masks that perp_init was given."
                )
            _check_shape(path, (*part.a.shape[:-1], part.b.shape[-1]), x)
            new.append(part.merge(x, mask))
        else:
            _check_shape(path, jnp.shape(part), x)
            kept = part if mask is None else jnp.where(mask, part, 0)
            new.append(kept.astype(x.dtype))
    return _tree.flatten(params)[2].unflatten(new)


def lora_init(
    kind: Kind,
    path: str,
    w: Array,
    rank: int,
    alpha: float,
    key: Key[Array, ""] | None,
    place: int = 0,
) -> LoRA:
    """The factors with which a matrix, or a stack of them, is what it was."""
    if w.ndim < 2:
        raise ValueError(
            f"perp_init: {path} has the shape {tuple(w.shape)}; expected a matrix [K, N] or "
            "a stack of them, to give it a LoRA. Set its mask to None."
        )
    if key is None:
        raise ValueError(
            f"perp_init: kind={kind!r} draws its factors, but got key=None. Give "
            "key=jax.random.key(0), or another."
        )
    *stack, k, n = w.shape
    bound = 1.0 if kind == "scale_lora" else 1 / math.sqrt(k)
    a = jax.random.uniform(
        jax.random.fold_in(key, place), (*stack, k, rank), jnp.float32, -bound, bound
    )
    b = jnp.zeros((*stack, rank, n), jnp.float32)
    if kind == "scale_lora":
        return LoRA(a.at[..., 0].set(1), b.at[..., 0, :].set(1), None)
    return LoRA(a, b, alpha / rank)


def _check_kinds(kinds: tuple[str, ...], rank: int) -> None:
    known = ("bias", "norm", "mask_lora", "scale_lora")
    if not kinds or not set(kinds) <= set(known):
        raise ValueError(
            f"perp_init: got kind={kinds!r}; expected one or several of {known}."
        )
    if {"mask_lora", "scale_lora"} <= set(kinds):
        raise ValueError(
            "perp_init: got both mask_lora and scale_lora; expected one of them, since a "
            "matrix has one pair of factors."
        )
    if rank < 1:
        raise ValueError(f"perp_init: got rank={rank}; expected at least 1.")


def _is_of(kind: str, path: str, has_mask: bool) -> bool:
    """Whether a leaf is of that kind. Statistics of norms are of none."""
    *owners, name = path.lower().split("/")
    in_norm = bool(owners) and _NORM.fullmatch(owners[-1]) is not None
    is_bias = _BIAS.fullmatch(name) is not None
    if kind == "bias":
        return is_bias and not has_mask
    if kind == "norm":
        scales = _SCALE.fullmatch(name) is not None or (in_norm and name == "weight")
        return (scales or (in_norm and is_bias)) and not has_mask
    return has_mask


def _leaves(params: PyTree, masks: PyTree) -> tuple[list[str], list[Any], list[Any]]:
    """Paths, leaves, and the mask or hole of each leaf."""
    paths, leaves, treedef = _tree.flatten(params)
    return paths, leaves, treedef.flatten_up_to(mask_trees.check(params, masks))


def _check_shape(path: str, shape: tuple[int, ...], leaf: Array) -> None:
    if shape != tuple(leaf.shape):
        raise ValueError(
            f"perp_params: the parameters for {path} make the shape {shape}, but the leaf "
            f"has {tuple(leaf.shape)}. Give the parameters that perp_init was given."
        )
