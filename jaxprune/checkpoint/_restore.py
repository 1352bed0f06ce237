"""Reading a checkpoint back, and nothing but what was written."""

import dataclasses
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import masks
from jaxprune._tree import PyTree, is_key
from jaxprune.checkpoint import _files, _manifest, _place, _sums


@dataclasses.dataclass(frozen=True)
class PerProcess:
    """A value that was another one in each process that saved it.

    It comes back like this where there are more or fewer processes now, such as the place
    of a data iterator in each process's own data.

    Attributes:
      values: those of all processes, in order.
    """

    values: tuple[Any, ...]


class LeafRow(NamedTuple):
    """One leaf of a checkpoint.

    Attributes:
      path: `layers/0/kernel`.
      kind: `"array"`, `"key"`, `"packed mask"`, `"BitmapArray"`, `"NMArray"`,
        `"BlockSparseArray"` or `"value"`.
      shape: of the leaf as it is unpacked; `()` for values.
      dtype: of its values; for values the name of their type.
      nbytes: bytes of its arrays; 0 for values.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Metadata(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      version: of the format.
      leaves: a row for each leaf.
      processes: how many wrote it.
    """

    version: int
    leaves: tuple[LeafRow, ...]
    processes: int


def restore(path: str | os.PathLike[str], *, like: PyTree = None) -> PyTree:
    """Restores what `save` wrote, after checking that it is what was written.

    The checksum of every file is compared before anything else reads it, and that of every
    array when it has reached its device. Processes share the files among them.

    Args:
      path: the folder.
      like: a tree of the same structure, of arrays or of `jax.ShapeDtypeStruct`s, such as
        `(params, tx.init(params))` or the `jax.eval_shape` of it. Arrays come back with
        its dtypes and, where it has them, its shardings. Another mesh is welcome: masks
        packed along another axis there are packed anew. By default everything comes back
        as it was saved, in dicts, lists and tuples, arrays on the default device.

    Raises:
      FileNotFoundError: if there is no complete checkpoint at `path`.
      ValueError: if `like` has another structure or other shapes than what was saved; if
        the version is unknown; or if anything in the folder is not as it was saved.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
      >>> jp.checkpoint.save(path, {"w": jnp.arange(3)})
      >>> jp.checkpoint.restore(path, like={"w": jnp.zeros(3, int)})["w"].tolist()
      [0, 1, 2]
    """
    path = pathlib.Path(path).absolute()
    read = _read(path)
    wanted = None
    if like is not None:
        wanted = _manifest.take_apart(like, "like")
        _check_like(read.body, wanted, path)
    _check_files(path, read)
    targets = _targets(read.body, wanted)
    arrays = _load(path, read.body["arrays"], targets)
    _check_sums(path, read.body, arrays)
    if wanted is None:
        return _as_saved_tree(read, arrays)
    return _as_like(read, arrays, like, wanted)


def metadata(path: str | os.PathLike[str]) -> Metadata:
    """What a checkpoint holds, leaf by leaf; no array is read.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: if there is no complete checkpoint at `path`.
      ValueError: if the version is unknown, or the description is damaged.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
      >>> jp.checkpoint.save(path, {"w": jnp.ones((2, 3)), "step": 7})
      >>> for row in jp.checkpoint.metadata(path).leaves:
      ...     print(row)
      LeafRow(path='step', kind='value', shape=(), dtype='int', nbytes=0)
      LeafRow(path='w', kind='array', shape=(2, 3), dtype='float32', nbytes=24)
    """
    read = _read(pathlib.Path(path).absolute())
    found = [
        _row(_manifest.spell(leaf), node, read)
        for leaf, node in _manifest.leaves(read.body["tree"], whole=True)
    ]
    return Metadata(read.body["version"], tuple(found), read.body["processes"])


def _row(leaf: str, node: Any, read: "_Read") -> LeafRow:
    rows = read.body["arrays"]
    if "value" in node:
        name = type(read.values[node["value"]]).__name__
        return LeafRow(leaf, "value", (), name, 0)
    if "packed" in node:
        own = [rows[x["array"]] for _, x in _manifest.leaves(node)]
        x = _manifest.put_together(node, lambda n: _struct(rows[n["array"]]))
        dtype = "bool" if isinstance(x, masks.PackedMask) else str(x.dtype)
        nbytes = sum(map(_nbytes, own))
        return LeafRow(leaf, node["packed"], tuple(x.shape), dtype, nbytes)
    kind = "key" if "key" in node else "array"
    row = rows[node[kind]]
    return LeafRow(leaf, kind, tuple(row["shape"]), row["dtype"], _nbytes(row))


class _Read(NamedTuple):
    """The description of a checkpoint.

    Attributes:
      body: what all processes that wrote it agree on.
      values: leaves that are no arrays, of this process.
      files: length and checksum of each file of its arrays.
    """

    body: dict[str, Any]
    values: list[Any]
    files: _files.Listing


def _read(path: pathlib.Path) -> _Read:
    if not (path / "manifest.json").is_file():
        old = path.with_name(path.name + ".replaced")
        fix = "Pass a folder that jaxprune.checkpoint.save wrote."
        if not path.exists() and (old / "manifest.json").is_file():
            fix = f"{old} is the one that was being replaced; rename it."
        raise FileNotFoundError(f"path: {path} is no complete checkpoint. {fix}")
    try:
        body = _manifest.read(path / "manifest.json")
        _manifest.check(body)
        parts = [
            _manifest.read(path / f"process_{i}.json") for i in range(body["processes"])
        ]
        for part in parts:
            _manifest.check_part(part, body)
    except (ValueError, OSError) as e:
        raise _damaged(path, e) from e
    files = {name: x for part in parts for name, x in part["files"].items()}
    nbytes = sum(map(_nbytes, body["arrays"]))
    if nbytes > sum(length for length, _ in files.values()):
        raise _damaged(path, f"its arrays would take {nbytes} bytes, its files do not")
    return _Read(body, _values(path, body, parts), files)


def _damaged(path: pathlib.Path, why: object) -> ValueError:
    return ValueError(
        f"path: {path} is not as it was saved: {why}. Restore another checkpoint, or copy "
        "this one again from where it was saved."
    )


def _values(path: pathlib.Path, body: dict, parts: list[dict]) -> list[Any]:
    """The values of this process; those of all where there are other processes now."""
    own = [[_manifest.decode(x) for x in part["values"]] for part in parts]
    if jax.process_count() == len(parts):
        return own[jax.process_index()]
    return [
        each[0] if all(x == each[0] for x in each) else PerProcess(each)
        for each in zip(*own, strict=True)
    ]


def _check_files(path: pathlib.Path, read: _Read) -> None:
    """Raises `ValueError`, in all processes, if a file is not as it was saved."""
    folder, me, count = path / "arrays", jax.process_index(), jax.process_count()
    wrong = None
    try:
        _files.check_lengths(folder, read.files)
        own = sorted(read.files)[me::count]
        _files.check(folder, read.files, own)
    except (ValueError, OSError) as e:
        wrong = e
    if count > 1:
        from jax.experimental import multihost_utils

        found = multihost_utils.process_allgather(np.int32(wrong is not None))
        if wrong is None and found.any():
            wrong = f"process {int(np.argmax(found))} found other files"
    if wrong is not None:
        raise _damaged(path, wrong)


def _check_like(body: dict, wanted: _manifest.Contents, path: pathlib.Path) -> None:
    """Raises `ValueError` unless the template has the leaves that are there."""
    there = dict(_manifest.leaves(body["tree"]))
    for some, others, verb in (
        (wanted.leaves, there, f"{path} holds no"),
        (there, wanted.leaves, "it lacks"),
    ):
        if lost := sorted(map(_manifest.spell, some.keys() - others.keys())):
            names = ", ".join(lost[:5]) + (" and others" if len(lost) > 5 else "")
            raise ValueError(
                f"like: {verb} {names}{f', which {path} holds' * (some is there)}. Restore "
                "with the same optimizer and method that were saved."
            )
    saved, like = _manifest.packed(body["tree"]), _manifest.packed(wanted.tree)
    for leaf in saved.keys() | like.keys():
        a, b = saved.get(leaf), like.get(leaf)
        if a is None or b is None or _geometry(a) != _geometry(b):
            raise ValueError(
                f"like: {_manifest.spell(leaf)} is {_kind(b)}, but {path} holds "
                f"{_kind(a)}. Restore without like=, or with what was saved."
            )
    bits = _bits(body, wanted)
    for leaf, node in there.items():
        if "array" not in node or leaf in bits:
            continue
        x, found = wanted.leaves[leaf], tuple(body["arrays"][node["array"]]["shape"])
        if tuple(np.shape(x)) != found or is_key(x):
            raise ValueError(
                f"like: {_manifest.spell(leaf)} has shape {tuple(np.shape(x))}, but {path} "
                f"holds {found}. Restore with the sizes that were saved."
            )
    for leaf, node in there.items():
        if ("key" in node) and not is_key(wanted.leaves[leaf]):
            raise ValueError(
                f"like: {_manifest.spell(leaf)} is no typed key, but {path} holds one. "
                "Restore with a key of jax.random.key there."
            )


def _geometry(node: Any) -> tuple:
    """What must be the same; a mask may be packed along another axis."""
    static = dict(node["static"])
    if node["packed"] == "packed mask":
        del static["axis"]
    return node["packed"], _manifest.crc(static)


def _kind(node: Any) -> str:
    return "not packed" if node is None else f"a {node['packed']} {node['static']}"


def _targets(body: dict, wanted: _manifest.Contents | None) -> list[Any]:
    """What Orbax is to load for each array."""
    rows = body["arrays"]
    found = [_place.target(r["shape"], r["dtype"], None) for r in rows]
    if wanted is None:
        return found
    bits = _bits(body, wanted)
    for leaf, node in _manifest.leaves(body["tree"]):
        if "array" in node:
            row, x = rows[node["array"]], wanted.leaves[leaf]
            if leaf in bits:
                x = _place.like_bits(row["shape"], bits[leaf][0], bits[leaf][1])
            found[node["array"]] = _place.target(row["shape"], row["dtype"], x)
    return found


def _bits(
    body: dict, wanted: _manifest.Contents
) -> dict[_manifest.Path, tuple[masks.PackedMask, int | None]]:
    """The masks of the template that are packed along another axis than was saved."""
    saved, found = _manifest.packed(body["tree"]), {}
    for leaf, node in _manifest.packed(wanted.tree).items():
        if node["packed"] != "packed mask":
            continue
        axis, mine = saved[leaf]["static"]["axis"], node["static"]
        if axis != mine["axis"]:
            bits = wanted.leaves[(*leaf, "bits")]
            mask = masks.PackedMask(bits, tuple(mine["shape"]), mine["axis"])
            found[(*leaf, "bits")] = mask, axis
    return found


def _load(path: pathlib.Path, rows: list[dict], targets: list[Any]) -> list[Any]:
    from orbax.checkpoint import v1 as ocp

    named = {str(i): x for i, x in enumerate(targets) if 0 not in x.shape}
    try:
        there = ocp.load(str(path / "arrays"), named) if named else {}
    except Exception as e:  # Orbax has many
        raise _damaged(path, e) from e
    found = [
        there.pop(str(i), np.zeros(x.shape, x.dtype)) for i, x in enumerate(targets)
    ]
    for i, (x, row) in enumerate(zip(found, rows, strict=True)):
        if [*x.shape] != row["shape"] or str(x.dtype) != row["dtype"]:
            raise _damaged(path, f"an array is {x.dtype}{[*x.shape]}, and not {row}")
        if isinstance(x, np.ndarray) and not row.get("host"):
            found[i] = _place.on_device(x)
    return found


def _check_sums(path: pathlib.Path, body: dict, arrays: list[Any]) -> None:
    sums = [_sums.start(x) for x in arrays]
    for leaf, node in _manifest.leaves(body["tree"]):
        at = node.get("array", node.get("key"))
        if at is not None and _sums.finish(sums[at]) != body["arrays"][at]["sum"]:
            raise _damaged(path, f"{_manifest.spell(leaf)} has other values")


def _as_saved_tree(read: _Read, arrays: list[Any]) -> PyTree:
    rows = read.body["arrays"]

    def leaf(node: Any) -> Any:
        if "value" in node:
            return read.values[node["value"]]
        if "key" in node:
            return _place.keys(arrays[node["key"]], node["impl"], None)
        x = arrays[node["array"]]
        if rows[node["array"]].get("host"):
            return x if x.ndim else x[()]
        if not isinstance(x, jax.Array):
            raise ValueError(
                f"path: it holds {x.dtype}, which JAX would cut to 32 bits. Enable "
                "jax_enable_x64, or pass like= with an np.ndarray there."
            )
        return x

    return _manifest.put_together(read.body["tree"], leaf)


def _as_like(
    read: _Read, arrays: list[Any], like: PyTree, wanted: _manifest.Contents
) -> PyTree:
    there = dict(_manifest.leaves(read.body["tree"]))
    bits = _bits(read.body, wanted)

    def leaf(path: _manifest.Path, x: Any) -> Any:
        node, name = there[path], _manifest.spell(path)
        if "value" in node:
            return _place.value(read.values[node["value"]], x, name)
        if "key" in node:
            return _place.keys(arrays[node["key"]], node["impl"], x)
        found = arrays[node["array"]]
        if path in bits:
            mask, axis = bits[path]
            found = masks.PackedMask(found, mask.shape, axis)
            return _place.repacked(found, mask).bits
        return _place.settled(found, x, name)

    leaves = [leaf(path, x) for path, x in wanted.leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _struct(row: dict) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(row["shape"]), row["dtype"])


def _nbytes(row: dict) -> int:
    return math.prod(row["shape"]) * np.dtype(row["dtype"]).itemsize
