"""Blocks that are done, on disk, so that a run that was killed goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxprune import checkpoint, masks
from jaxprune._tree import PyTree
from jaxprune.checkpoint._folder import open_folder
from jaxprune.posttrain._report import Row


class Folder:
    """A folder for each block, complete or not there."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        params: PyTree,
        batches: Sequence[PyTree],
        settings: Mapping[str, Any],
    ):
        self.path = open_folder(
            directory, settings, {"params": params, "batches": list(batches)}
        )

    def save(self, i: int, solved: Sequence["Solved"]) -> None:
        """Keeps what was found in block `i`; complete, or not there."""
        rows = [[list(row) for row in s.rows] for s in solved]
        (self.path / f"block_{i}.json").write_text(json.dumps(rows))
        tree = [(s.w, masks.pack_leaf(s.mask)) for s in solved]
        checkpoint.save(self.path / f"block_{i}", tree)

    def restore(self, i: int, dense: Sequence[Array]) -> list["Solved"] | None:
        """What was found in block `i`, whose dense leaves these are, or `None`."""
        path = self.path / f"block_{i}"
        if not path.exists():
            return None
        like = [(w, masks.pack_leaf(jnp.ones_like(w, bool))) for w in dense]
        tree = checkpoint.restore(path, like=like)
        rows = json.loads(path.with_suffix(".json").read_text())
        return [
            Solved(w, masks.as_bool(mask), list(map(_row, own)))
            for (w, mask), own in zip(tree, rows, strict=True)
        ]


class Solved(NamedTuple):
    """A leaf, or a layer of one, that is pruned."""

    w: Array
    mask: Bool[Array, "..."]
    rows: list[Row]


def _row(values: Sequence[Any]) -> Row:
    row = Row(*values)
    return row._replace(shape=tuple(row.shape))
