"""Which leaf plays which part in a transformer: the path patterns that NeuroPrune reads."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree

Patterns = str | Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """Names the matrices of a transformer's layers by glob patterns on their paths.

    What `*` stands for links the leaves of one layer: `layers/*/mlp/up/kernel` and
    `layers/*/mlp/down/kernel` belong together where it is the same text. Kernels are
    `[in, out]`, with heads as an axis of their own (`[d, heads, head_dim]`, `[heads,
    head_dim, d]`) or not, and with a first axis of stacked layers or not.

    Args:
      mlp_in: expanding matrices; several patterns for a gated MLP.
      mlp_out: contracting matrices.
      query: query kernels, `[d, heads * head_dim]`.
      key: key kernels, `[d, kv_heads * head_dim]`.
      value: value kernels, likewise.
      qkv: fused kernels instead of those three, `[d, (heads + 2 kv_heads) * head_dim]`
        in the order query, key, value, or `[d, 3, heads, head_dim]`.
      out: output projections of the attention, `[heads * head_dim, d]`.
      degree: further matrices to sparsify like those of the MLP, such as `out`, which the
        paper leaves dense.
      heads: query heads a layer.
      kv_heads: key and value heads, where fewer (grouped-query attention).

    Raises:
      ValueError: if attention patterns and head counts do not go together.

    Example:
      >>> roles = jp.Roles(
      ...     mlp_in="layers/*/mlp/up/kernel", mlp_out="layers/*/mlp/down/kernel",
      ...     query="layers/*/attn/query/kernel", key="layers/*/attn/key/kernel",
      ...     value="layers/*/attn/value/kernel", out="layers/*/attn/out/kernel", heads=12)
    """

    mlp_in: Patterns = ()
    mlp_out: Patterns = ()
    query: str | None = None
    key: str | None = None
    value: str | None = None
    qkv: str | None = None
    out: str | None = None
    degree: Patterns = ()
    heads: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        separate = [self.query, self.key, self.value]
        if any(separate) and (self.qkv or not all(separate)):
            raise ValueError(
                f"Roles: got query={self.query!r}, key={self.key!r}, value={self.value!r}, "
                f"qkv={self.qkv!r}; expected all three of query, key, value, or qkv alone."
            )
        attends = self.qkv is not None or all(separate)
        if attends and self.heads is None:
            raise ValueError(
                f"Roles: heads={self.heads}; expected the number of query heads a layer, "
                "since it cannot be read from a fused kernel."
            )
        for name, count in (("heads", self.heads), ("kv_heads", self.kv_heads)):
            if count is not None and not (isinstance(count, int) and count > 0):
                raise ValueError(
                    f"Roles: {name}={count!r}; expected a whole number > 0."
                )
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"Roles: heads={self.heads}, kv_heads={self.kv_heads}; expected heads to "
                "be a multiple of kv_heads."
            )

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads or 0


class Layer(NamedTuple):
    """Paths of the leaves of one layer (or one stack of layers)."""

    link: tuple[str, ...]  # what the wildcards stood for
    mlp_in: tuple[str, ...]
    mlp_out: str | None
    qkv: tuple[str, ...]  # query, key, value; or the fused kernel alone; or nothing
    out: str | None

    @property
    def name(self) -> str:
        """The layer, for reports."""
        return "/".join(self.link)


def layers(roles: Roles, paths: Sequence[str]) -> list[Layer]:
    """Finds the layers, in the order of the tree.

    Raises:
      ValueError: if a pattern matches nothing, or a layer lacks one of its parts.
    """
    mlp_in = [_match(p, paths, "mlp_in") for p in _patterns(roles.mlp_in)]
    mlp_out = [_match(p, paths, "mlp_out") for p in _patterns(roles.mlp_out)]
    fused = [roles.qkv] if roles.qkv else [roles.query, roles.key, roles.value]
    qkv = [_match(p, paths, "query, key, value or qkv") for p in fused if p]
    out = [_match(roles.out, paths, "out")] if roles.out else []
    links = dict.fromkeys(
        link for table in (*mlp_in, *mlp_out, *qkv, *out) for link in table
    )
    if not links:
        raise ValueError(
            "roles: no pattern is given; expected at least mlp_in or query."
        )
    found = []
    for link in links:
        parts = [
            tuple(t[link] for t in tables if link in t) for tables in (mlp_in, qkv)
        ]
        for name, tables, part in (
            ("mlp_in", mlp_in, parts[0]),
            ("qkv", qkv, parts[1]),
        ):
            if part and len(part) < len(tables):
                raise ValueError(
                    f"roles: layer {'/'.join(link)!r} has only {_tree.listing(part)} of the "
                    f"{len(tables)} leaves that {name} names; expected all or none."
                )
        ends = [next((t[link] for t in tables if link in t), None)
                for tables in (mlp_out, out)]  # fmt: skip
        for name, end, other, part, given in (
            ("mlp_out", ends[0], "mlp_in", parts[0], mlp_in),
            ("out", ends[1], "query, key, value or qkv", parts[1], qkv),
        ):
            if end and not part:
                raise ValueError(
                    f"roles: {name} matches {end!r}, but {other} "
                    f"{'matches no leaf of its layer' if given else 'is not given'}. What "
                    "the wildcards stand for links the leaves of a layer: for "
                    "'layers/*/mlp/down/kernel' write 'layers/*/mlp/up/kernel'."
                )
        found.append(Layer(link, parts[0], ends[0], parts[1], ends[1]))
    return found


def degree_paths(roles: Roles, paths: Sequence[str]) -> list[str]:
    """Paths of all matrices under Eq. (1), in the order of the tree."""
    patterns = [
        *_patterns(roles.mlp_in),
        *_patterns(roles.mlp_out),
        *_patterns(roles.degree),
    ]
    hits = {
        p for pattern in patterns for p in _match(pattern, paths, "degree").values()
    }
    return [p for p in paths if p in hits]


def split_heads(x: Array, heads: int, *, explicit: bool) -> Array:
    """Views a query, key or value kernel as `[stack, d, heads, head_dim]`."""
    if not explicit:
        x = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    return x[None] if x.ndim == 3 else x


def split_out(x: Array, heads: int, *, explicit: bool) -> Array:
    """Views an output projection as `[stack, heads, head_dim, d]`."""
    if not explicit:
        x = x.reshape(*x.shape[:-2], heads, x.shape[-2] // heads, x.shape[-1])
    return x[None] if x.ndim == 3 else x


def join_out(x: Array, like: Any, *, explicit: bool) -> Array:
    """Undoes `split_out`; head counts may have changed."""
    # First of all: on explicit meshes a reshape may not merge a stack of one as well.
    x = x if like.ndim > (3 if explicit else 2) else x[0]
    rows = x.shape[-3] * x.shape[-2]
    return x if explicit else x.reshape(*x.shape[:-3], rows, x.shape[-1])


def has_head_axis(x: Any, heads: int) -> bool:
    """Whether a query or fused kernel has heads as an axis of its own."""
    return x.ndim >= 3 and x.shape[-2] == heads


def split_qkv(
    kernels: Sequence[Array], roles: Roles, *, explicit: bool
) -> tuple[Array, Array, Array]:
    """Query, key and value as `[stack, d, heads, head_dim]` each.

    Raises:
      ValueError: if a kernel cannot be divided so.
    """
    heads, groups = roles.heads or 0, roles.groups
    first = kernels[0]
    if len(kernels) == 3:
        counts = (heads, groups, groups)
        if explicit:
            fits = all(x.shape[-2] == n for x, n in zip(kernels, counts, strict=True))
        else:
            fits = not first.shape[-1] % heads and all(
                x.shape[-1] * heads == first.shape[-1] * groups for x in kernels[1:]
            )
        if not fits:
            shapes = ", ".join(str(x.shape) for x in kernels)
            raise ValueError(
                f"roles: query, key and value of the shapes {shapes} do not divide into "
                f"{heads}, {groups} and {groups} heads; check heads and kv_heads."
            )
        parts = [
            split_heads(x, n, explicit=explicit)
            for x, n in zip(kernels, counts, strict=True)
        ]
        return parts[0], parts[1], parts[2]
    if explicit:  # [..., d, 3, heads, head_dim]
        x = first if first.ndim == 5 else first[None]
        return x[..., 0, :, :], x[..., 1, :, :], x[..., 2, :, :]
    total = heads + 2 * groups
    if first.shape[-1] % total:
        raise ValueError(
            f"roles: the fused kernel of shape {first.shape} does not divide into {heads} "
            f"query and 2 x {groups} key and value heads; check heads and kv_heads."
        )
    x = split_heads(first, total, explicit=False)
    q, k, v = jnp.split(x, [heads, heads + groups], axis=-2)
    return q, k, v


def join_qkv(
    parts: tuple[Array, Array, Array], like: Sequence[Any], *, explicit: bool
) -> list[Array]:
    """Undoes `split_qkv`; head counts and head sizes may have changed."""
    stacked = like[0].ndim > (2 if not explicit else 3 if len(like) == 3 else 4)
    if not stacked:
        parts = (parts[0][0], parts[1][0], parts[2][0])
    flat = [x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]) for x in parts]
    if len(like) == 3:
        return list(parts) if explicit else flat
    return [jnp.stack(parts, -3) if explicit else jnp.concatenate(flat, -1)]


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree that are no holes, by path."""
    paths, leaves, _ = _tree.flatten(tree)
    return {p: x for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)}


def _patterns(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _match(pattern: str, paths: Sequence[str], name: str) -> dict[tuple[str, ...], str]:
    regex = re.compile("(.*)".join(re.escape(p) for p in pattern.split("*")))
    found = {m.groups(): p for p in paths if (m := regex.fullmatch(p))}
    if not found:
        raise ValueError(
            f"roles: {name} pattern {pattern!r} matches none of the leaves to prune: "
            f"{_tree.listing(paths)}. Correct the pattern, or widen where=."
        )
    return found
