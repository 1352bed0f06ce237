"""Train, prune, rewind, and again: the loop that all methods in rounds share."""

import operator
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _prune, _tree, checkpoint
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.checkpoint import _folder
from jaxprune.structures import Structure


class Train(Protocol):
    """Trains parameters under masks; what the caller of a method in rounds writes.

    `start` and `stop` are steps of one training run: a round that rewinds to step 500
    starts there, in its learning rates and its data. `stop` is `None` for the whole run.
    Weights that the masks prune must be 0 when it returns, as `jaxprune.masked` leaves
    them.
    """

    def __call__(
        self, params: PyTree, masks: PyTree, *, start: int, stop: int | None
    ) -> PyTree: ...


class Rounds(NamedTuple):
    """What comes out of a loop of rounds.

    Attributes:
      params: as trained in the last round, pruned weights at 0.
      masks: of the last round.
      start: the weights that each round was rewound to, dense; without rewinding those
        that the first one started from.
      sparsities: share of pruned weights in each round; 0 in the first.
    """

    params: PyTree
    masks: PyTree
    start: PyTree
    sparsities: tuple[float, ...]


def run(
    train: Train,
    params: PyTree,
    choose: Callable[[PyTree, PyTree, int], PyTree],
    *,
    rounds: int,
    rewind: int | None,
    where: _tree.Where,
    directory: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
) -> Rounds:
    """Trains densely, then prunes and trains again in each round.

    Args:
      train: see `Train`.
      params: at initialisation.
      choose: gives the masks of a round from trained parameters, the masks so far and
        the number of the round, from 1.
      rounds: how often is pruned.
      rewind: step that each round starts from again; `None` goes on with what was
        trained.
      where: which leaves are pruned.
      directory: where each round is saved, and found again after a stop.
      settings: further arguments that must be the same then.
    """
    at_least("rounds", rounds, 1)
    if rewind is not None:
        at_least("rewind", rewind, 0)
    chosen = _tree.select(params, where)
    settings = dict(settings) | {"rewind": rewind}
    folder = open_folder(directory, params, chosen, settings)
    masks = _tree.map_leaves(lambda x: jnp.ones_like(x, bool), chosen)
    begin = rewind or 0

    def rewound():
        if not begin:
            return params
        return train(_copy(params), masks, start=0, stop=begin)

    start = kept(folder, "start", params, rewound)
    everything = masks
    found = kept(
        folder,
        "round_0",
        params,
        lambda: train(_copy(start), everything, start=begin, stop=None),
    )
    sparsities = [0.0]
    for i in range(1, rounds + 1):
        masks = _bools(choose(found, masks, i), masks)
        first = found if rewind is None else start
        begun = mask_trees.apply(first, masks)
        found = kept(
            folder,
            f"round_{i}",
            params,
            lambda p=begun, m=masks: train(_copy(p), m, start=begin, stop=None),
        )
        _check(found, masks, i)
        sparsities.append(mask_trees.sparsity(masks))
    return Rounds(found, masks, start, tuple(sparsities))


def plan_all(
    chosen: PyTree,
    sparsities: Sequence[Fraction],
    structure: Structure,
    allocation: Allocation,
) -> None:
    """Raises what a later round would raise, before the first one has trained."""
    for sparsity in sparsities:
        _prune.plan(
            chosen, sparsity=sparsity, structure=structure, allocation=allocation
        )


def open_folder(
    directory: str | os.PathLike[str] | None,
    params: PyTree,
    chosen: PyTree,
    settings: Mapping[str, Any],
) -> pathlib.Path | None:
    """The folder of a loop, whose settings are those that it was begun with.

    Args:
      directory: where it is, or `None`.
      params: at initialisation.
      chosen: the leaves that may be pruned.
      settings: all else that decides what comes out.

    Raises:
      ValueError: naming what differs.
    """
    if directory is None:
        return None
    pruned = [
        p for p, x in zip(*_tree.flatten(chosen)[:2], strict=True)
        if not _tree.is_hole(x)
    ]  # fmt: skip
    settings = {**settings, "where": pruned}
    return _folder.open_folder(directory, settings, {"params": params})


def at_least(name: str, value: Any, least: int) -> None:
    """Raises `ValueError` unless `value` is a whole number, and large enough."""
    _prune.require(
        name,
        value,
        lambda x: operator.index(x) >= least,
        f"a whole number of at least {least}",
    )


def kept(folder: pathlib.Path | None, name: str, like: PyTree, make) -> PyTree:
    """What `make` gives, or what it gave before the process was stopped."""
    if folder is None:
        return make()
    path = folder / name
    if path.exists():
        return checkpoint.restore(path, like=like)
    made = make()
    checkpoint.save(path, made)
    return made


def check_key(key: Any) -> None:
    """Raises `TypeError` unless `key` is one."""
    if not jnp.issubdtype(getattr(key, "dtype", jnp.int32), jax.dtypes.prng_key):
        raise TypeError(f"key: got {key!r}; expected one made by jax.random.key(0).")


def _copy(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, params)  # `train` may donate what it is given


def _bools(new: PyTree, old: PyTree) -> PyTree:
    """Masks that prune nothing less than before."""
    return jax.tree.map(
        lambda a, b: a if _tree.is_hole(a) else a & b, new, old, is_leaf=_tree.is_hole
    )


def _check(params: PyTree, masks: PyTree, number: int) -> None:
    paths, leaves, treedef = _tree.flatten(params)
    aligned = treedef.flatten_up_to(mask_trees.check(params, masks))
    for path, w, m in zip(paths, leaves, aligned, strict=True):
        if not _tree.is_hole(m) and (pruned := np.asarray(w)[~np.asarray(m)]).any():
            raise ValueError(
                f"train: after round {number} {path} has {np.count_nonzero(pruned)} "
                "pruned weights that are not 0. Train with jaxprune.masked(optimizer, "
                "masks), and return the parameters it updates."
            )
