"""The leaves of a checkpoint one by one, so that only one of them is held."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.checkpoint import _load_safetensors as loading
from jaxprune.checkpoint import _manifest, _place, _restore, _sums
from jaxprune.checkpoint import _packed_tensors as packed_tensors
from jaxprune.checkpoint._restore import LeafRow


class Leaf(NamedTuple):
    """One leaf of a checkpoint.

    Attributes:
      row: what it is; nothing has been read for that.
      read: reads it, checked as `restore` and `load_safetensors` do; to be called before
        the iteration is over, which closes the files.
    """

    row: LeafRow
    read: Callable[[], Any]


def leaves(path: str | os.PathLike[str]) -> Iterator[Leaf]:
    """Goes through a checkpoint, or safetensors files of any library.

    Nothing is read of a leaf until it is asked for, and nothing is kept.

    Args:
      path: a folder of `save`; a safetensors file; or a folder of these with its index.

    Raises:
      FileNotFoundError: if there is neither.
      ValueError: if what is there is damaged.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
      >>> jp.checkpoint.save(path, {"bias": jnp.ones(3), "kernel": jnp.eye(3)})
      >>> for leaf in jp.checkpoint.leaves(path):
      ...     print(leaf.row.path, leaf.row.shape, leaf.read().sum())
      bias (3,) 3.0
      kernel (3, 3) 3.0
    """
    path = pathlib.Path(path).absolute()
    if (path / "manifest.json").is_file():
        return _of_orbax(path)
    return _of_safetensors(path)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether `save_safetensors` wrote these files."""
    with contextlib.ExitStack() as stack:
        return bool(loading._open(pathlib.Path(path), stack, "").crc32)


def _of_orbax(path: pathlib.Path) -> Iterator[Leaf]:
    description = _restore._read(path)
    checked = []

    def read(leaf: _manifest.Path, node: Any) -> Any:
        if not checked:
            _restore._check_files(path, description)
            checked.append(True)
        rows = description.body["arrays"]
        inside = dict(_manifest.leaves(node))
        found: dict[int, Any] = {}
        for part in inside.values():
            at = part.get("array", part.get("key"))
            if at is None:
                continue
            found[at] = _read_array(path, rows, at)
            if _sums.finish(_sums.start(found[at])) != rows[at]["sum"]:
                raise _restore._damaged(
                    path, f"{_manifest.spell(leaf)} has other values"
                )
        return _manifest.put_together(node, lambda x: _value(x, description, found))

    for leaf, node in _manifest.leaves(description.body["tree"], whole=True):
        row = _restore._row(_manifest.spell(leaf), node, description)
        yield Leaf(row, lambda leaf=leaf, node=node: read(leaf, node))


def _value(node: Any, description: Any, found: dict[int, Any]) -> Any:
    if "value" in node:
        return description.values[node["value"]]
    if "key" in node:
        return _place.keys(_place.on_device(found[node["key"]]), node["impl"], None)
    return found[node["array"]]


def _read_array(path: pathlib.Path, rows: list[dict], at: int) -> np.ndarray:
    from orbax.checkpoint import v1 as ocp

    shape, dtype = tuple(rows[at]["shape"]), rows[at]["dtype"]
    if 0 in shape:
        return np.zeros(shape, dtype)
    named = {str(i): ... for i, row in enumerate(rows) if 0 not in row["shape"]}
    named[str(at)] = _place.target(shape, dtype, None)
    try:
        return ocp.load(str(path / "arrays"), named)[str(at)]
    except Exception as e:  # Orbax has many
        raise _restore._damaged(path, e) from e


def _of_safetensors(path: pathlib.Path) -> Iterator[Leaf]:
    with contextlib.ExitStack() as stack:
        saved = loading._open(path, stack, "")
        for name in saved.names:
            yield Leaf(_row(saved, name), lambda name=name: loading._leaf(saved, name))


def _row(saved: Any, name: str) -> LeafRow:
    said = dict(saved.leaves.get(name, {"kind": "array"}))
    kind = said.pop("kind")
    if kind == "value":
        return LeafRow(name, "value", (), type(said["value"]).__name__, 0)
    if kind == "array":
        dtype, shape = saved.dtype_shape(name)
        nbytes = saved.files[name].tensors[name].nbytes
        return LeafRow(name, "array", shape, dtype.name, nbytes)
    shapes, nbytes = {}, 0
    for field in packed_tensors.array_names(packed_tensors.KINDS[kind]):
        dtype, shape = saved.dtype_shape(f"{name}.{field}")
        shapes[field] = jax.ShapeDtypeStruct(shape, dtype)
        nbytes += saved.files[f"{name}.{field}"].tensors[f"{name}.{field}"].nbytes
    x = packed_tensors.rebuilt(kind, said, shapes)
    if kind == "PackedMask":
        return LeafRow(name, "packed mask", x.shape, "bool", nbytes)
    return LeafRow(name, kind, tuple(x.shape), str(x.dtype), nbytes)
