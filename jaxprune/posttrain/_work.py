"""What one-shot pruning has to do: the blocks of a function, and the leaves in each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.tracing import Block, Blocks, Leaf
from jaxprune.tracing._blocks import joined
from jaxprune.tracing._trace import axes_by_leaf


class Work(NamedTuple):
    """A function in blocks, and what of it was chosen.

    Attributes:
      batches: tuples of arguments, of one set of shapes.
      blocks: of the function.
      names: of the chosen leaves, and of each layer of those that a scan runs over: as it
        would be called in an unrolled model, `"layers/3/up/kernel"`.
      shapes: of the same, by name.
      batch_axes: of the chosen leaves that have some.
      empty_rows: paths of the chosen leaves for which rows of zeros are none.
      last: the last block with one of them.
    """

    batches: list[tuple]
    blocks: Blocks
    names: dict[Leaf, str]
    shapes: dict[str, tuple[int, ...]]
    batch_axes: dict[str, frozenset[int]]
    empty_rows: frozenset[str]
    last: int

    def picked(self, block: Block) -> list[int]:
        """Which leaves of a block are chosen."""
        return [j for j, leaf in enumerate(block.leaves) if leaf in self.names]


def begin(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    where: _tree.Where,
    block_of: tracing.BlockOf,
    batch_axes: Mapping[str, int | tuple[int, ...]] | None,
    empty_rows: str | Sequence[str],
) -> Work:
    """Cuts the function; refuses what cannot be done, before anything is run."""
    listed = _listed(batches)
    paths, leaves, _ = _tree.flatten(_tree.select(params, where))
    chosen = {
        p: x.shape for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)
    }
    axes = axes_by_leaf(chosen, batch_axes or {})
    sparse = _tree.matching(list(chosen), empty_rows, name="empty_rows")
    found = tracing.blocks(fn, params, *listed[0], block_of=block_of)
    names: dict[Leaf, str] = {}
    users: dict[Leaf, list[str]] = {}
    last = -1
    for i, block in enumerate(found.blocks):
        for leaf in (x for x in block.leaves if x.path in chosen):
            users.setdefault(leaf, []).append(block.name)
            names[leaf] = _name(leaf, block)
            last = i
    _check(users, set(chosen))
    shapes = {
        name: chosen[leaf.path][leaf.layer is not None :]
        for leaf, name in names.items()
    }
    return Work(listed, found, names, shapes, axes, sparse, last)


def _listed(batches: Iterable[Any]) -> list[tuple]:
    listed = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not listed:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn. A generator that was used up gives nothing a second time."
        )
    spelled = [str(jax.tree.map(jax.typeof, args)) for args in listed]
    if odd := [i for i, x in enumerate(spelled) if x != spelled[0]]:
        raise ValueError(
            f"batches: batch {odd[0] + 1} is {spelled[odd[0]]}, and the first {spelled[0]}; "
            "expected one set of shapes. Pad, and leave padding out with token_weights=, or "
            "leave the odd batch out."
        )
    return listed


def _name(leaf: Leaf, block: Block) -> str:
    """`"layers/3/up/kernel"` for layer 3 of `"layers/up/kernel"`."""
    if leaf.layer is None:
        return leaf.path
    stem = block.name.rpartition("/")[0]
    return joined(block.name, leaf.path[len(stem) :].strip("/"))


def _check(users: dict[Leaf, list[str]], chosen: set[str]) -> None:
    """Each leaf must be used, in one block only, and as a whole or by layers."""
    for leaf, names in users.items():
        if len(names) > 1:
            raise ValueError(
                f"params: {leaf.path} is used in the blocks {', '.join(names)}, and cannot "
                "be pruned for one of them. Leave it out with where=, or make them one "
                "block with block_of=."
            )
    whole = {leaf.path: names for leaf, names in users.items() if leaf.layer is None}
    for leaf, names in users.items():
        if leaf.layer is not None and leaf.path in whole:
            raise ValueError(
                f"params: {leaf.path} is used layer by layer in the block {names[0]}, and "
                f"as a whole in {whole[leaf.path][0]}, and cannot be pruned for one of "
                "them. Leave it out with where=, or prune it without data by "
                "jaxprune.prune."
            )
    if unused := sorted(chosen - {leaf.path for leaf in users}):
        raise ValueError(
            f"params: {_tree.listing(unused)} {'is' if len(unused) == 1 else 'are'} not "
            "used by fn, so that nothing can be said of the inputs. Leave them out with "
            "where=."
        )
