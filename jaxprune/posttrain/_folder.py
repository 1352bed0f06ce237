"""Blocks that are done, on disk, so that a run that was killed goes on."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, Bool

from jaxprune import checkpoint, masks
from jaxprune._tree import PyTree
from jaxprune.checkpoint._folder import checksum, open_folder
from jaxprune.posttrain._report import Row


class Folder:
    """A folder for each block, complete or not there."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fn: Callable[..., Any],
        params: PyTree,
        batches: Sequence[tuple],
        settings: Mapping[str, Any],
    ):
        closed = jax.make_jaxpr(fn)(params, *batches[0])
        what = f"{zlib.crc32(_equations(closed).encode()):08x}"
        arrays = {"params": params, "batches": list(batches)}
        self.path = open_folder(directory, {**settings, "fn": what}, arrays)

    def saved(self, i: int, each: Iterable["Solved"]) -> Iterator["Solved"]:
        """Hands on what is found in block `i`, and keeps it; complete, or not there."""
        found = []
        for solved in each:
            found.append(solved)
            yield solved
        rows = [[list(row) for row in s.rows] for s in found]
        (self.path / f"block_{i}.json").write_text(json.dumps(rows))
        checkpoint.save(
            self.path / f"block_{i}", [(s.w, masks.pack_leaf(s.mask)) for s in found]
        )

    def restore(self, i: int, dense: Sequence[Array]) -> list["Solved"] | None:
        """What was found in block `i`, whose dense leaves these are, or `None`.

        Raises:
          ValueError: if it is there, but cannot be read.
        """
        path = self.path / f"block_{i}"
        if not path.exists():
            return None
        like = [(w, masks.pack_leaf(jnp.ones_like(w, bool))) for w in dense]
        try:
            tree = checkpoint.restore(path, like=like)
            rows = json.loads(path.with_suffix(".json").read_text())
        except Exception as e:  # Orbax has many
            raise ValueError(
                f"directory: {path} is there, but cannot be read ({e}). Remove it, and the "
                "block is pruned again."
            ) from e
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


def _equations(closed: ClosedJaxpr | Jaxpr) -> str:
    """A jaxpr in words that are the same in every process, and others for another function.

    Its own text is not: in it are addresses, and sets in any order.
    """
    is_closed = isinstance(closed, ClosedJaxpr)
    jaxpr = closed.jaxpr if is_closed else closed
    numbers: dict[Any, int] = {}

    def name(x: Any) -> str:
        if isinstance(x, Literal):
            return repr(x.val)
        return f"{numbers.setdefault(x, len(numbers))}:{x.aval}"

    def option(x: Any) -> str:
        if isinstance(x, ClosedJaxpr | Jaxpr):
            return _equations(x)
        return str(x) if isinstance(x, bool | int | float | None) else ""

    lines = [str(checksum(x)) for x in closed.consts] if is_closed else []
    for eqn in jaxpr.eqns:
        options = jax.tree.leaves(
            dict(eqn.params), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        )
        parts = [*map(name, (*eqn.invars, *eqn.outvars)), *map(option, options)]
        lines.append(f"{eqn.primitive.name} {' '.join(parts)}")
    return "\n".join([*lines, *map(name, jaxpr.outvars)])
