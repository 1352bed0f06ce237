"""Reads safetensors files, each number of them checked."""

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.checkpoint import _named_trees as named_trees
from jaxprune.checkpoint import _narrow as narrow
from jaxprune.checkpoint import _packed_tensors as packed_tensors
from jaxprune.checkpoint import _save_safetensors as saving
from jaxprune.checkpoint import _tensor_file as tensor_file

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_SAID = {
    "version": int, "file": list, "leaves": dict, "dtypes": dict, "containers": dict,
    "crc32": dict, "together": str,
}  # fmt: skip


def load_safetensors(
    path: str | os.PathLike[str],
    *,
    like: PyTree = None,
    separator: str | None = None,
) -> PyTree:
    """Loads what `save_safetensors` wrote, or what another library did.

    Everything is checked before it is returned: the header, the checksums of all tensors
    and of what is said of them, and whether the places in packed weights fit their sizes.

    Args:
      path: a file; or a folder with `model.safetensors.index.json`, or with one file.
      like: a tree of arrays or of `jax.ShapeDtypeStruct`, packed weights of these among
        them, in whose containers and with whose shardings everything comes back. An array
        with a sharding is read shard by shard: each device gets its own part of the file,
        and no process holds more of it than its devices do. By default, dicts, lists and
        tuples as they were saved, on the default device.
      separator: for files that other libraries wrote, which hold names and no containers:
        "" for a dict of their names as they are, "." (or "/") for dicts within dicts.
        Such files have no checksums, so that damaged numbers go unnoticed. None refuses
        them. Files of `save_safetensors` are read as they were saved in any case.

    Returns:
      The tree. Arrays of 64 bits are NumPy arrays unless JAX has `jax_enable_x64`, or it
      would cut them in half.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a file is damaged, cut off, of a later version or no safetensors file;
        or if `like` has other leaves, shapes or types than were saved.
      TypeError: if `separator` is no string.
    """
    if not (separator is None or isinstance(separator, str)):
        raise TypeError(f"separator: got {separator!r}; expected '', '.', '/' or None.")
    with contextlib.ExitStack() as stack:
        saved = _open(pathlib.Path(path), stack, separator)
        if like is None:
            leaves = {name: _leaf(saved, name) for name in saved.names}
            try:
                return named_trees.nested(leaves, saved.containers, saved.separator)
            except ValueError as e:
                tensor_file.refuse(saved.path, str(e).rstrip("."), "names of a tree")
        wanted, _ = named_trees.flatten(_tree.bare(like), "like")
        _check_names(saved, list(wanted))
        found = [_leaf_like(saved, name, x) for name, x in wanted.items()]
    treedef = jax.tree.structure(like, is_leaf=named_trees.is_leaf)
    return treedef.unflatten(found)


class _Saved(NamedTuple):
    """Files that are open, and what they say of themselves."""

    path: pathlib.Path
    files: dict[str, tensor_file.TensorFile]  # by the names of tensors
    names: list[str]  # of leaves
    leaves: Mapping[str, Any]
    dtypes: Mapping[str, Any]
    containers: Mapping[str, str]
    crc32: Mapping[str, str]  # of tensors; empty if another library wrote them
    separator: str

    def dtype_shape(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Of a tensor as it was saved."""
        tensor = self.files[name].tensors[name]
        said = self.dtypes.get(name)
        if said is None:
            return tensor.dtype, tensor.shape
        return narrow.NAMES[said["dtype"]], tuple(said["shape"])

    def read(self, name: str) -> np.ndarray:
        """A tensor as it was saved."""
        x, checksum = self.files[name].read(name)
        self._check(name, checksum)
        return narrow.widened(x, *self.dtype_shape(name)) if name in self.dtypes else x

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """The same, each device its own part of the file."""
        dtype, shape = self.dtype_shape(name)
        if name in self.dtypes:
            return jax.device_put(self.read(name), sharding)
        if sharding.addressable_devices:
            self._check(name, self.files[name].checksum(name))
        view = self.files[name].view(name)
        return jax.make_array_from_callback(
            shape, sharding, lambda at: np.array(view[at]), dtype=dtype
        )

    def _check(self, name: str, checksum: int) -> None:
        if self.crc32 and saving.spelled(checksum) != self.crc32[name]:
            tensor_file.refuse(
                self.files[name].path,
                f"{name!r} has the checksum {saving.spelled(checksum)}",
                f"{self.crc32[name]}, as when it was saved",
            )


def _open(
    path: pathlib.Path, stack: contextlib.ExitStack, separator: str | None
) -> _Saved:
    path, placed = _find(path)
    opened = [stack.enter_context(tensor_file.TensorFile(p)) for p in placed]
    files = {}
    for file, names in zip(opened, placed.values(), strict=True):
        if names is not None and names != file.tensors.keys():
            other = sorted(names ^ file.tensors.keys())
            tensor_file.refuse(
                path,
                f"{_tree.listing(other, 5)} is not said to lie in {file.path.name}, or is "
                "not there",
                "an index of the tensors in each file",
            )
        files |= dict.fromkeys(file.tensors, file)
    if not any(
        k in file.metadata for file in opened for k in (saving.SAID, saving.SUM)
    ):
        if separator is None:
            raise ValueError(
                f"path: {path} was not written by save_safetensors, or has lost its "
                "metadata; expected them. If another library wrote it, pass separator='' "
                "for a dict of its names, or separator='.' for dicts within dicts; there "
                "are no checksums then."
            )
        return _Saved(path, files, list(files), {}, {}, {}, {}, separator)
    return _ours(path, opened, files)


def _ours(
    path: pathlib.Path,
    opened: list[tensor_file.TensorFile],
    files: dict[str, tensor_file.TensorFile],
) -> _Saved:
    """Puts together what the files say, if nothing of it is damaged or missing."""
    said = [_said(file) for file in opened]
    numbers = [x["file"] for x in said]
    count = len(opened)
    if sorted(numbers) != [[i + 1, count] for i in range(count)]:
        tensor_file.refuse(
            path,
            f"there are the files {numbers} (number, of how many)",
            "each of them once",
        )
    said = sorted(said, key=lambda x: x["file"])
    merged = {
        part: {k: v for x in said for k, v in x[part].items()}
        for part in ("leaves", "dtypes", "containers", "crc32")
    }
    sums = saving.together(
        {name: int(x, 16) for name, x in file["crc32"].items()} for file in said
    )
    if {saving.spelled(sums)} != {x["together"] for x in said}:
        tensor_file.refuse(
            path, "there are files of several saves", "those of a single one"
        )
    leaves = merged["leaves"]
    fields = {
        f"{name}.{field}"
        for name, x in leaves.items()
        if x["kind"] in packed_tensors.KINDS
        for field in packed_tensors.array_names(packed_tensors.KINDS[x["kind"]])
    }
    plain = [name for name in files if name not in fields]
    if missing := sorted(fields - files.keys()):
        tensor_file.refuse(
            path, f"there is no {_tree.listing(missing, 5)}", "all fields of its leaf"
        )
    if both := sorted(set(plain) & leaves.keys()):
        tensor_file.refuse(
            path, f"{both[0]!r} is a tensor and something else too", "one of them"
        )
    names = [*plain, *leaves]
    return _Saved(path, files, names, **merged, separator="/")


def _said(file: tensor_file.TensorFile) -> dict[str, Any]:
    """What a file says of its tensors."""

    def refuse(came: str, wanted: str, fix: str = "") -> NoReturn:
        tensor_file.refuse(file.path, came, wanted, fix)

    text, checksum = (file.metadata.get(x) for x in (saving.SAID, saving.SUM))
    if text is None or checksum is None:
        refuse("a part of the metadata is missing", f"{saving.SAID} and {saving.SUM}")
    if (found := saving.spelled(zlib.crc32(text.encode()))) != checksum:
        refuse(
            f"the metadata have the checksum {found}", f"{checksum[:20]}, as when saved"
        )
    said = tensor_file.loads(file.path, text, "the metadata")
    version = said.get("version") if isinstance(said, dict) else None
    if version != saving.VERSION:
        refuse(
            f"the metadata have version {str(version)[:20]}",
            f"{saving.VERSION}",
            "Read it with the version of jaxprune that wrote it, or a later one.",
        )
    for name, kind in _SAID.items():
        if not isinstance(said.get(name), kind):
            refuse(
                f"the metadata have no {name}", f"a JSON value like a {kind.__name__}"
            )
    for name, x in said["leaves"].items():
        kind = x.get("kind") if isinstance(x, dict) else None
        if kind not in ("value", *packed_tensors.KINDS):
            refuse(f"{name!r} is of the kind {str(kind)[:40]!r}", "one that is known")
        if kind == "value" and not named_trees.is_value(x.get("value", ())):
            refuse(f"the value of {name!r} is none", "a number, a string or null")
    for name, x in said["dtypes"].items():
        _check_narrow(file, name, x)
    for name, kind in said["containers"].items():
        if not isinstance(kind, str):
            refuse(f"the container {name!r} is {str(kind)[:40]}", "the name of a kind")
    if said["crc32"].keys() != file.tensors.keys() or not all(
        _is_checksum(x) for x in said["crc32"].values()
    ):
        refuse("the checksums are not those of the tensors", "one for each")
    return said


def _check_narrow(file: tensor_file.TensorFile, name: str, said: Any) -> None:
    """Whether what is said of a tensor's own type fits its bytes."""
    tensor = file.tensors.get(name)
    known = isinstance(said, dict) and said.keys() == {"dtype", "shape"}
    dtype = narrow.NAMES.get(str(said["dtype"])) if known else None
    shape = tensor_file.sizes(said["shape"]) if known else None
    if (
        tensor is None or dtype is None or shape is None
        or (tensor.dtype, tensor.shape) != (np.uint8, (narrow.size(dtype, shape),))
    ):  # fmt: skip
        tensor_file.refuse(
            file.path,
            f"{name!r} is said to be {str(said)[:80]}",
            f"a type and shape of its bytes, one of {', '.join(narrow.NAMES)}",
        )


def _is_checksum(x: Any) -> bool:
    try:
        return isinstance(x, str) and saving.spelled(int(x, 16)) == x
    except ValueError:
        return False


def _find(
    path: pathlib.Path,
) -> tuple[pathlib.Path, dict[pathlib.Path, set[str] | None]]:
    """The files, and the tensors that each of them should hold if an index says so."""
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        indices = sorted(path.glob("*.safetensors.index.json"))
        if len(indices) == 1:
            path = indices[0]
        elif not indices and len(inside) == 1:
            path = inside[0]
        elif not indices and not inside and any(path.glob("*.bin")):
            tensor_file.refuse_pickle(path)
        else:
            found = [x.name for x in (*indices, *inside)]
            raise FileNotFoundError(
                f"path: the folder {path} holds {_tree.listing(found, 5)}; expected "
                f"{saving.INDEX} or one safetensors file. Name the file."
            )
    elif not path.exists():
        raise FileNotFoundError(f"path: there is no file {path}. Check the name.")
    if path.suffix in _PICKLES:
        tensor_file.refuse_pickle(path)
    if not path.name.endswith(".index.json"):
        return path, {path: None}
    if path.stat().st_size > tensor_file.MOST_HEADER:
        tensor_file.refuse(path, "the index is too long", "100 MB at most")
    index = tensor_file.loads(path, path.read_bytes(), "the index")
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        tensor_file.refuse(path, "there is no weight_map", "names and their files")
    placed: dict[pathlib.Path, set[str] | None] = {}
    for file in dict.fromkeys(map(str, weights.values())):
        if pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            tensor_file.refuse(path, f"it names {file[:80]!r}", "files beside it")
        if not (path.parent / file).is_file():
            raise FileNotFoundError(
                f"path: {path} names {file}, which is not there. Copy or download all files."
            )
        placed[path.parent / file] = {k for k, v in weights.items() if v == file}
    return path, placed


def _leaf(saved: _Saved, name: str) -> Any:
    said = saved.leaves.get(name)
    if said is None:
        return _on_device(saved.read(name))
    if said["kind"] == "value":
        return said["value"]
    x = _rebuilt(saved, name, saved.read)
    _check_packed(saved, name, x)
    return jax.tree.map(_on_device, x)


def _leaf_like(saved: _Saved, name: str, like: Any) -> Any:
    """A leaf with the type, shapes and sharding of `like`."""
    said = saved.leaves.get(name, {"kind": "array"})
    if packed_tensors.is_packed(like):
        wanted = type(like).__name__
    else:
        wanted = "value" if named_trees.is_value(like) else "array"
    if said["kind"] != wanted:
        raise ValueError(
            f"like: {name} is {_a(wanted)}, but {saved.path} holds {_a(said['kind'])}. "
            "Load it without like=, or make like of what was saved."
        )
    if wanted == "value":
        return said["value"]
    if wanted == "array":
        return _array_like(saved, name, like)
    geometry = json.loads(json.dumps(packed_tensors.geometry(like)))
    for key, x in geometry.items():
        if said.get(key) != x:
            raise ValueError(
                f"like: {name} has {key} {x}, but {saved.path} holds {said.get(key)}. Pack "
                "it as it was saved, or load it without like=."
            )
    fields = packed_tensors.arrays(like)
    x = _rebuilt(
        saved,
        name,
        lambda key: _array_like(saved, key, fields[key.removeprefix(f"{name}.")]),
    )
    _check_packed(saved, name, _rebuilt(saved, name, lambda key: _view(saved, key)))
    return x


def _view(saved: _Saved, name: str) -> np.ndarray:
    return saved.read(name) if name in saved.dtypes else saved.files[name].view(name)


def _array_like(saved: _Saved, name: str, like: Any) -> Any:
    dtype, shape = saved.dtype_shape(name)
    if (dtype, shape) != (like.dtype, tuple(like.shape)):
        raise ValueError(
            f"like: {name} is {like.dtype}{list(like.shape)}, but {saved.path} holds "
            f"{dtype.name}{list(shape)}. Load it as it was saved, and convert it then."
        )
    if isinstance(like, np.ndarray):
        return saved.read(name)
    sharding = getattr(like, "sharding", None)
    # What was on no device in particular may go where other arrays are.
    if sharding is None or not getattr(like, "committed", True):
        return _on_device(saved.read(name))
    return saved.read_sharded(name, sharding)


def _rebuilt(saved: _Saved, name: str, read: Any) -> Any:
    said = dict(saved.leaves[name])
    kind = said.pop("kind")
    names = packed_tensors.array_names(packed_tensors.KINDS[kind])
    found = {field: read(f"{name}.{field}") for field in names}
    try:
        return packed_tensors.rebuilt(kind, said, found)
    except ValueError as e:
        _unsound(saved, name, e)


def _check_packed(saved: _Saved, name: str, x: Any) -> None:
    try:
        packed_tensors.check(x)
    except ValueError as e:
        _unsound(saved, name, e)


def _unsound(saved: _Saved, name: str, e: ValueError) -> NoReturn:
    kind = saved.leaves[name]["kind"]
    raise ValueError(
        f"path: in {saved.path}, {name!r} is no sound {kind}: {e}. Save it anew."
    ) from e


def _on_device(x: np.ndarray) -> Any:
    wide = x.dtype in (np.int64, np.uint64, np.float64)
    return x if wide and not jax.config.read("jax_enable_x64") else jnp.asarray(x)


def _a(kind: str) -> str:
    return {"value": "a number, string or None", "array": "an array"}.get(kind, kind)


def _check_names(saved: _Saved, wanted: list[str]) -> None:
    if missing := [name for name in wanted if name not in set(saved.names)]:
        raise ValueError(
            f"like: {saved.path} holds no {_tree.listing(missing, 5)}. Make like of what "
            "was saved."
        )
    if extra := sorted(set(saved.names) - set(wanted)):
        raise ValueError(
            f"like: it lacks {_tree.listing(extra, 5)}, which {saved.path} holds. Make "
            "like of what was saved."
        )
