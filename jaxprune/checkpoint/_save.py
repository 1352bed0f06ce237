"""Saving a tree through Orbax, with what it takes to know it again."""

import concurrent.futures.thread
import functools
import itertools
import os
import pathlib
import threading
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.checkpoint import _files, _manifest, _sums

_NUMBERS = itertools.count()  # of barriers: no two may have one name
_PATIENCE = 3600  # seconds that processes wait for one another
_UNDERWAY: dict[pathlib.Path, "concurrent.futures.Future[None]"] = {}


def save(
    path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False
) -> None:
    """Saves a tree: parameters, masks, optimizer state, packed weights, plain data.

    The folder appears under its name only when it is complete: a process killed in the
    middle leaves a folder named `<path>.part`, which `restore` never reads and the next
    `save` removes. Arrays are written as they are sharded, each process its own part.
    Under `jax.distributed` all processes call this together, with one path on a file
    system that all of them see.

    Args:
      path: a folder that does not exist yet.
      tree: a pytree of arrays, typed keys, numbers, strings, bytes and `None`. Packed masks
        and packed weights stay packed; a structured plan goes in as `plan.to_dict()`, a
        data iterator as its `get_state()`. Arrays that each process has for itself must
        be the same in all of them; numbers, strings and bytes need not.
      overwrite: whether an existing checkpoint is replaced; nothing else ever is.

    Raises:
      FileExistsError: if the folder exists and `overwrite` is False.
      ValueError: if what is there is no checkpoint, or holds other files too.
      TypeError: if the tree holds what cannot be saved.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
      >>> jp.checkpoint.save(path, {"w": jnp.arange(3), "step": 7})
      >>> tree = jp.checkpoint.restore(path)
      >>> tree["w"].tolist(), tree["step"]
      ([0, 1, 2], 7)
    """
    _begin(path, tree, overwrite)()


def save_async(
    path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False
) -> "concurrent.futures.Future[None]":
    """Saves in the background; see `save`.

    The arrays are copied before this returns: they may be donated or overwritten at once.

    Args:
      path: a folder that does not exist yet. A save to the same path that is still under
        way is waited for.
      tree: see `save`.
      overwrite: see `save`.

    Returns:
      A future, whose `result()` waits until the checkpoint is complete and raises what went
      wrong. A program that comes to its end waits for its checkpoints, and prints what
      went wrong with them.

    Raises:
      FileExistsError: if the folder exists and `overwrite` is False.
      ValueError: if what is there is no checkpoint, or holds other files too.
      TypeError: if the tree holds what cannot be saved.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
      >>> saving = jp.checkpoint.save_async(path, {"w": jnp.arange(3)})
      >>> saving.result()
      >>> jp.checkpoint.restore(path)["w"].tolist()
      [0, 1, 2]
    """
    finish = _begin(path, tree, overwrite)
    _wait_at_the_end()
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    place = pathlib.Path(path).absolute()
    _UNDERWAY[place] = future

    def run() -> None:
        error = None
        try:
            finish()
        except BaseException as e:
            error = e
        del _UNDERWAY[place]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    threading.Thread(target=run, name=f"save {path}").start()
    return future


@functools.cache
def _wait_at_the_end() -> None:
    """Lets the program end only when nothing is under way."""

    def wait() -> None:
        for future in list(_UNDERWAY.values()):
            if error := future.exception():
                traceback.print_exception(error)

    # Orbax needs thread pools to write. Python ends these before it waits for threads, and
    # `atexit` comes later still. What is registered here last, after they were imported,
    # runs first; there is no public way.
    threading._register_atexit(wait)  # pyright: ignore[reportAttributeAccessIssue]


def _begin(
    path: str | os.PathLike[str], tree: PyTree, overwrite: bool
) -> Callable[[], None]:
    """Copies the arrays, and returns what does the rest."""
    from orbax.checkpoint import v1 as ocp  # slow to import, and few programs need it

    path = pathlib.Path(path).absolute()
    if earlier := _UNDERWAY.get(path):
        concurrent.futures.wait([earlier])  # it has the same folder for its files
    barriers = [f"jaxprune save {next(_NUMBERS)}" for _ in range(5)]
    exists, lost = path.exists(), _files.others(path)
    contents = _manifest.take_apart(tree, "tree")
    _check_types(contents)
    arrays = [_as_saved(x) for x in contents.arrays]
    sums = [_sums.start(x) for x in arrays]
    _wait(barriers[0])  # all have looked whether it exists
    if exists and not overwrite:
        raise FileExistsError(
            f"path: {path} exists already. Choose another folder, one for each step, or "
            "pass overwrite=True."
        )
    if lost:
        raise ValueError(
            f"path: {path} would be replaced, but is no checkpoint, or holds other things "
            f"too: {_tree.listing(lost, 5)}. Choose another folder, or remove them."
        )
    part = path.with_name(path.name + ".part")
    try:
        if _is_main():
            _files.remove(part)
            part.mkdir(parents=True)
    finally:
        _wait(barriers[1])
    response = None
    named = {str(i): x for i, x in enumerate(arrays) if x.size}  # Orbax takes no others
    if named:
        with _context():
            response = ocp.save_async(str(part / "arrays"), named)
    sums = [_sums.keep(s) for s in sums]  # the arrays may be gone when this is over

    def finish() -> None:
        try:
            if response is not None:
                response.result()
        finally:
            _wait(barriers[2])  # a file may be there only when all have written
        try:
            body = _body(contents, arrays, sums)
            _write_own(part, body, contents.values)
        finally:
            _wait(barriers[3])
        try:
            if _is_main():
                _check_others(part, body)
                _files.write(part / "manifest.json", _manifest.sealed(body))
                _files.publish(part, path, overwrite=overwrite)
        finally:
            _wait(barriers[4])
        if not path.exists():
            raise OSError(
                f"path: {path} was not written; another process has the reason."
            )

    return finish


def _context():
    """Orbax's options: values as they are, since compressing takes longer than writing."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    # Otherwise an error leaves threads behind that wait for the folder for minutes.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _check_types(contents: _manifest.Contents) -> None:
    """Raises `TypeError` where Orbax would write nothing, or nothing that it can read."""
    import tensorstore

    for leaf, x in contents.leaves.items():
        if not hasattr(x, "dtype") or _tree.is_key(x):
            continue
        try:
            tensorstore.dtype(np.dtype(x.dtype).newbyteorder("=").name)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"tree: {_manifest.spell(leaf)} has the type {x.dtype}, which Orbax has "
                "not. Convert it to another one, or save with save_safetensors."
            ) from e


def _as_saved(x: Any) -> Any:
    """An array that Orbax takes; what belongs to one process only goes to the host."""
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        return x.astype(x.dtype.newbyteorder("="), copy=False)
    if jax.process_count() > 1 and x.is_fully_addressable:
        return np.asarray(x)
    return x


def _body(contents: _manifest.Contents, arrays: list[Any], sums: list[Any]) -> dict:
    rows = []
    for x, was, s in zip(arrays, contents.arrays, sums, strict=True):
        row = {"shape": list(x.shape), "dtype": str(x.dtype), "sum": _sums.finish(s)}
        if not isinstance(was, jax.Array):
            row["host"] = True
        rows.append(row)
    return {
        "format": "jaxprune",
        "version": _manifest.VERSION,
        "processes": jax.process_count(),
        "tree": contents.tree,
        "arrays": rows,
    }


def _write_own(part: pathlib.Path, body: dict, values: list[Any]) -> None:
    """Writes what this process alone knows."""
    me, count = jax.process_index(), jax.process_count()
    folder = part / "arrays"
    own = [n for n in _files.names(folder) if _files.owner(n, count) == me]
    found = {
        "manifest": _manifest.crc(body),
        "sums": [row["sum"] for row in body["arrays"]] if count > 1 else [],
        "values": [_manifest.encode(x) for x in values],
        "files": _files.listing(folder, own),
    }
    _files.write(part / f"process_{me}.json", _manifest.sealed(found))


def _check_others(part: pathlib.Path, body: dict) -> None:
    """Raises `ValueError` if processes had other arrays where one copy is kept."""
    for i in range(1, jax.process_count()):
        other = _manifest.read(part / f"process_{i}.json")
        if other["manifest"] == _manifest.crc(body):
            continue
        for leaf, x in _manifest.leaves(body["tree"]):
            at = x.get("array", x.get("key"))
            if at is not None and other["sums"][at] != body["arrays"][at]["sum"]:
                raise ValueError(
                    f"tree: {_manifest.spell(leaf)} has other values in process {i} than in "
                    "process 0, and is no array of all devices. Make one array of them on "
                    "a mesh, or save what is the same everywhere."
                )
        raise ValueError(
            f"tree: process {i} has another tree than process 0; expected the same."
        )


def _is_main() -> bool:
    return jax.process_index() == 0


def _wait(barrier: str) -> None:
    """Waits for all processes; no device takes part, so that any thread may."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=barrier, timeout_ms=1000 * _PATIENCE)
