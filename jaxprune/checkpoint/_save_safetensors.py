"""Writes trees of arrays and packed weights as safetensors files."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.checkpoint import _files as files
from jaxprune.checkpoint import _named_trees as named_trees
from jaxprune.checkpoint import _narrow as narrow
from jaxprune.checkpoint import _packed_tensors as packed_tensors
from jaxprune.checkpoint import _tensor_file as tensor_file

INDEX = "model.safetensors.index.json"
VERSION = 1
SAID, SUM = "jaxprune", "jaxprune.crc32"  # keys of a file's metadata


def save_safetensors(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    overwrite: bool = False,
    shard_bytes: int | None = None,
) -> None:
    """Saves a tree of arrays and packed weights as safetensors.

    An array is a tensor with its path for a name, such as `layers/0/attn/query/kernel`, so
    that every reader of the format finds it. A packed weight or mask is a tensor for each
    of its fields: `layers/0/mlp/up/kernel.values`, `layers/0/mlp/up/kernel.codes`. What
    else there is to know (sizes, lists, numbers, a checksum of each tensor) stands as JSON
    in the metadata of the file; the page on safetensors describes it.

    A file appears under its name only when it is complete: a process killed in the middle
    leaves one that ends in `.part`. Arrays are fetched one by one, and each is let go
    before the next.

    Args:
      path: the file, usually `model.safetensors`; with `shard_bytes`, a folder.
      tree: dicts, lists and tuples, to any depth, of arrays, packed weights and masks,
        Python numbers, strings and `None`; keys are strings without "/", or integers.
        Other containers (NNX states, modules, NamedTuples) come back as dicts of their
        fields, unless `load_safetensors` gets them as `like`.
      overwrite: whether what is there is replaced. A folder is set aside as
        `<path>.replaced` until the new one has its name.
      shard_bytes: the most bytes of tensors in a file of a folder, but for a leaf that is
        larger by itself. The folder gets `model.safetensors.index.json`, which says what
        lies in which file, as Hugging Face has it. By default all goes into one file.

    Raises:
      FileExistsError: if `path` exists and `overwrite` is False.
      ValueError: if two leaves have one name, a key cannot be part of a name, an array
        does not lie on this process's devices alone, or packed fields do not fit.
      TypeError: if a leaf is of a type that the format has no place for.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> w = jnp.eye(4, dtype=jnp.bfloat16)
      >>> packed = jp.formats.pack(w, w != 0, jp.NM(2, 4))
      >>> jp.checkpoint.save_safetensors(path, {"kernel": packed, "bias": jnp.ones(4)})
      >>> back = jp.checkpoint.load_safetensors(path)
      >>> (jp.formats.unpack(back["kernel"]) == w).all().item()
      True
    """
    path = pathlib.Path(path)
    if shard_bytes is not None and (type(shard_bytes) is not int or shard_bytes < 1):
        raise ValueError(
            f"shard_bytes: got {shard_bytes!r}; expected a number of bytes, such as "
            "5_000_000_000, or None for a single file."
        )
    _check_free(path, overwrite, folder=shard_bytes is not None)
    described = _describe(_tree.bare(tree))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    files.remove(part)  # in a container, processes get the same numbers again
    try:
        if shard_bytes is None:
            _write([part], [described.items], described)
        else:
            _write_folder(part, described, shard_bytes)
        if path.is_dir():
            files.publish(part, path, overwrite=True)
        else:
            os.replace(part, path)
    finally:
        files.remove(part)


class _Item(NamedTuple):
    """A tensor to be written."""

    leaf: str
    name: str
    value: Any
    dtype: np.dtype  # as it stands in the file
    shape: tuple[int, ...]  # there

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Described(NamedTuple):
    """A tree, taken apart."""

    items: list[_Item]
    leaves: dict[str, Any]  # what is said of leaves that are no plain tensors
    dtypes: dict[str, Any]  # of tensors of a type that the format lacks
    containers: dict[str, str]


def _describe(tree: PyTree) -> _Described:
    named, containers = named_trees.flatten(tree, "tree")
    found = _Described([], {}, {}, containers)
    for name, x in named.items():
        fields = {name: x}
        if named_trees.is_value(x):
            if isinstance(x, float) and not math.isfinite(x):
                raise ValueError(
                    f"tree: {name} is {x}; expected a finite number. Pass it as an array."
                )
            found.leaves[name] = {"kind": "value", "value": x}
            continue
        if packed_tensors.is_packed(x):
            _check_packed(name, x)
            found.leaves[name] = packed_tensors.geometry(x)
            fields = {f"{name}.{k}": v for k, v in packed_tensors.arrays(x).items()}
        found.items.extend(
            _item(name, key, v, found.dtypes) for key, v in fields.items()
        )
    counts = collections.Counter(x.name for x in found.items)
    counts.update(name for name, x in found.leaves.items() if x["kind"] == "value")
    if twice := [name for name, n in counts.items() if n > 1]:
        raise ValueError(
            f"tree: two tensors have the name {twice[0]!r}; expected one. Rename a leaf."
        )
    return found


def _check_packed(name: str, x: Any) -> None:
    places = {
        field: fetch(value)
        for field, value in packed_tensors.arrays(x).items()
        if field != "values"
    }
    try:
        packed_tensors.check(dataclasses.replace(x, **places))
    except ValueError as e:
        raise ValueError(
            f"tree: {name} is no sound {type(x).__name__}: {e}. Pack the weight again."
        ) from e


def _item(leaf: str, name: str, x: Any, dtypes: dict[str, Any]) -> _Item:
    if _tree.is_key(x):
        raise TypeError(
            f"tree: {leaf} holds random keys, for which safetensors has no type. Save "
            "jax.random.key_data of them, or save with jaxprune.checkpoint.save."
        )
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"tree: {leaf} is a {type(x).__name__}; expected an array.")
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"tree: {leaf} lies on devices of other processes too; expected arrays on those "
            "of this one. Save with jaxprune.checkpoint.save, which writes shard by shard."
        )
    dtype, shape = np.dtype(x.dtype), tuple(x.shape)
    if dtype.newbyteorder("=") in tensor_file.NAMES:
        return _Item(leaf, name, x, dtype.newbyteorder("="), shape)
    if dtype not in narrow.BITS:
        known = [d.name for d in (*tensor_file.NAMES, *narrow.BITS)]
        raise TypeError(
            f"tree: {leaf} has the type {dtype.name}, which safetensors has not; expected "
            f"one of {', '.join(known)}."
        )
    dtypes[name] = {"dtype": dtype.name, "shape": shape}
    return _Item(leaf, name, x, np.dtype(np.uint8), (narrow.size(dtype, shape),))


def fetch(x: Any) -> np.ndarray:
    """An array on the host, of which JAX keeps no copy as it does with `np.asarray`."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    whole = np.empty(x.shape, x.dtype)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(shard.data)
    return whole


def _bytes_of(item: _Item) -> np.ndarray:
    x = fetch(item.value)
    if x.dtype in narrow.BITS:
        return narrow.narrowed(x)
    return x.astype(item.dtype, copy=False)  # in the order of bytes of this machine


def _write(
    paths: list[pathlib.Path], parts: list[list[_Item]], described: _Described
) -> None:
    """Writes files that belong together; their headers last, when all sums are known."""
    placed = [
        tensor_file.placed([(x.name, x.dtype, x.shape) for x in part]) for part in parts
    ]

    def header(i: int, sums: Mapping[str, int], together: int) -> bytes:
        said = _said(described, parts[i], sums, (i + 1, len(parts)), together)
        text = json.dumps(said, separators=(",", ":"), allow_nan=False)
        # Libraries of Hugging Face read no file that has metadata but no format.
        metadata = {"format": "pt", SAID: text, SUM: spelled(zlib.crc32(text.encode()))}
        return tensor_file.header(placed[i], metadata)

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(path, "xb")) for path in paths]
        sums = []
        for i, (file, part) in enumerate(zip(opened, parts, strict=True)):
            room = len(header(i, dict.fromkeys(placed[i], 0), 0))
            if room > tensor_file.MOST_HEADER:
                raise ValueError(
                    f"tree: the header for its {len(part):,} tensors has {room:,} bytes; "
                    f"expected {tensor_file.MOST_HEADER:,} at most. Pass shard_bytes=."
                )
            items = {x.name: x for x in part}

            def fetched(name: str, items: Mapping[str, _Item] = items) -> np.ndarray:
                return _bytes_of(items[name])

            sums.append(tensor_file.write(file, placed[i], fetched, room))
        for i, file in enumerate(opened):
            tensor_file.write_header(file, header(i, sums[i], together(sums)))


def _said(
    described: _Described,
    part: list[_Item],
    sums: Mapping[str, int],
    file: tuple[int, int],
    together: int,
) -> dict[str, Any]:
    """What a file says of its tensors; and the first, of what has no tensor."""
    names, leaves = {x.name for x in part}, {x.leaf for x in part}
    first = file[0] == 1
    return {
        "version": VERSION,
        "file": file,
        "leaves": {
            name: x
            for name, x in described.leaves.items()
            if name in leaves or (first and x["kind"] == "value")
        },
        "dtypes": {name: x for name, x in described.dtypes.items() if name in names},
        "containers": described.containers if first else {},
        "crc32": {name: spelled(x) for name, x in sums.items()},
        "together": spelled(together),
    }


def together(sums: Iterable[Mapping[str, int]]) -> int:
    """A checksum of the checksums of files that belong together, in their order."""
    total = 0
    for file in sums:
        lines = "".join(f"{name} {spelled(x)}\n" for name, x in sorted(file.items()))
        total = zlib.crc32(lines.encode(), total)
    return total


def spelled(checksum: int) -> str:
    """Always as long, so that a header can be written before the sums are known."""
    return f"{checksum:08x}"


def _write_folder(folder: pathlib.Path, described: _Described, most: int) -> None:
    by_leaf = collections.defaultdict(list)
    for x in described.items:
        by_leaf[x.leaf].append(x)
    parts: list[list[_Item]] = [[]]
    size = 0
    for items in by_leaf.values():  # the fields of a leaf stay together
        nbytes = sum(x.nbytes for x in items)
        if parts[-1] and size + nbytes > most:
            parts.append([])
            size = 0
        parts[-1] += items
        size += nbytes
    of = len(parts)
    names = [f"model-{i + 1:05d}-of-{of:05d}.safetensors" for i in range(of)]
    folder.mkdir()
    _write([folder / name for name in names], parts, described)
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in described.items)},
        "weight_map": {
            x.name: name for name, part in zip(names, parts, strict=True) for x in part
        },
    }
    with open(folder / INDEX, "w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _check_free(path: pathlib.Path, overwrite: bool, *, folder: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"path: {path} exists already. Choose another name, or pass overwrite=True."
        )
    if path.is_dir() != folder:
        wanted, there = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(
            f"path: {path} is a {there}; expected a {wanted}, which would replace it. "
            "Choose another name."
        )
    if folder:
        other = [
            x.name
            for x in path.iterdir()
            if x.suffix != ".safetensors" and x.name != INDEX
        ]
        if other:
            raise ValueError(
                f"path: the folder {path} holds {_tree.listing(sorted(other), 5)} too, "
                "which would be lost; expected safetensors files alone. Choose another "
                "folder, and copy there afterwards what belongs to the model."
            )
