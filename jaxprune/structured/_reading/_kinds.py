"""What the units of a group are, told from what is done along their dimension."""

from collections.abc import Sequence
from typing import Literal

from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim

Kind = Literal[
    "channel", "neuron", "head", "kv_group", "head_dim", "expert", "rank", "embedding",
    "layer", "row",
]  # fmt: skip
KINDS: tuple[Kind, ...] = (
    "channel", "neuron", "head", "kv_group", "head_dim", "expert", "rank", "embedding",
    "layer", "row",
)  # fmt: skip

_HEAD = "batch of activations"


def wanted(kinds: Kind | Sequence[Kind] | None) -> set[Kind]:
    """These kinds; by default all but layers and rows.

    Raises:
      ValueError: if one is none.
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if unknown := [k for k in kinds or () if k not in KINDS]:
        raise ValueError(f"kinds: got {unknown}; expected some of {KINDS}.")
    return set(kinds) if kinds else set(KINDS) - {"layer", "row"}


def kind(leaf: Dim, axes: Sequence[Dim]) -> Kind:
    """The kind of a group.

    Args:
      leaf: its dimension.
      axes: the axes of parameters that it stands in.
    """
    roles = leaf.roles
    if "length of a scan" in roles:
        return "layer"
    if _HEAD in roles:
        return "kv_group" if _is_shared(leaf, axes) else "head"
    stream = {"residual", "reduced", "contracted by weights"} <= roles
    if "width of a table" in roles or stream:
        return "embedding"
    if "convolved" in roles:
        return "channel"
    if "batch of weights" in roles or "batch of between weights" in roles:
        return "expert"
    if "contracted by activations" in roles or _is_attended(leaf):
        inside = "free again in activations" not in roles
        return "head_dim" if inside else "head"
    if "chosen" in roles or "scaled" in roles:
        return "expert"
    if "indexed" in roles:
        return "row"
    if "nonlinear" not in roles:
        return "rank"
    return "neuron"


def _is_shared(leaf: Dim, axes: Sequence[Dim]) -> bool:
    """Whether some axes have further heads for each of these, and others have none."""
    others = [{x for x in _dims.leaves(d) if _is_head(x)} - {leaf} for d in axes]
    return any(others) and not all(others)


def _is_head(leaf: Dim) -> bool:
    roles = leaf.roles
    return (
        _HEAD in roles or "free again in activations" in roles
    ) and "contracted by activations" not in roles


def _is_attended(leaf: Dim) -> bool:
    """Whether activations are weighted along an input, or beside heads, and this is kept."""
    beside = [x for d in leaf.beside for x in _dims.leaves(d) if x is not leaf]
    along = ([x.frozen for x in _dims.leaves(d)] for d in leaf.over)
    return not all(x.frozen for x in beside) or any(map(all, along))
