"""Blocks that are done, on disk, so that a run that was killed goes on."""

import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune import _tree, checkpoint, masks
from jaxprune._tree import PyTree
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
        self.path = pathlib.Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)
        now = {name: _spelled(x) for name, x in settings.items()}
        now |= {"params": _sum(params), "batches": _sum(list(batches))}
        file = self.path / "settings.json"
        then = json.loads(file.read_text()) if file.exists() else now
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                shown = then.get(name)
                shown = "other values" if name in ("params", "batches") else shown
                raise ValueError(
                    f"{name}: {directory} was begun with {shown}. Go on with the same "
                    "arguments, or choose another directory."
                )
        part = file.with_suffix(".part")
        part.write_text(json.dumps(now))
        part.replace(file)

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


def _spelled(x: Any) -> str:
    """The same in every process: functions by their names, not their addresses."""
    return getattr(x, "__qualname__", None) or repr(x)


def _row(values: Sequence[Any]) -> Row:
    row = Row(*values)
    return row._replace(shape=tuple(row.shape))


def _sum(tree: PyTree) -> list[int]:
    """A checksum of all leaves."""
    found = []
    for x in _tree.flatten(tree)[1]:
        if not _tree.is_hole(x):
            x = np.asarray(x)
            found.append(
                zlib.crc32(x.tobytes(), zlib.crc32(f"{x.dtype}{x.shape}".encode()))
            )
    return found
