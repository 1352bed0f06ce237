"""What a checkpoint holds, in JSON: the tree, its values, and the arrays by number."""

import base64
import dataclasses
import json
import math
import pathlib
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree, formats, masks
from jaxprune._tree import PyTree
from jaxprune.checkpoint import _geometry

VERSION = 1
_LONGEST = 1 << 10  # megabytes of a description
Path: TypeAlias = tuple[str, ...]
Node: TypeAlias = Any  # JSON

_PACKED = {
    "packed mask": masks.PackedMask,
    "BitmapArray": formats.BitmapArray,
    "BlockSparseArray": formats.BlockSparseArray,
    "NMArray": formats.NMArray,
}
_NAMES = {kind: name for name, kind in _PACKED.items()}
_INNER = {"dict", "list", "tuple", "fields"}  # what has nodes inside


class Contents(NamedTuple):
    """A tree taken apart.

    Attributes:
      tree: its containers, with the indices of arrays and values for leaves.
      arrays: all arrays, words in place of typed keys.
      values: all other leaves.
      leaves: arrays and values in the order of `jax.tree.leaves`, by their paths.
    """

    tree: Node
    arrays: list[Any]
    values: list[Any]
    leaves: dict[Path, Any]


def spell(path: Path) -> str:
    """A path in a message."""
    return "/".join(path) or "the tree"


def take_apart(tree: PyTree, name: str) -> Contents:
    """The contents of a tree of arrays, or of what stands for arrays.

    Args:
      tree: what is saved, or the template.
      name: of the caller's argument.

    Raises:
      TypeError: if something in it cannot be saved.
    """
    arrays, values, leaves = [], [], {}

    def node(x: Any, path: Path) -> Node:
        if x is None:
            return None
        if type(x) in _NAMES and _geometry.fits(x):
            own = dataclasses.fields(x)
            parts = [f.name for f in own if not f.metadata.get("static")]
            fixed = {
                f.name: getattr(x, f.name) for f in own if f.metadata.get("static")
            }
            return {
                "packed": _NAMES[type(x)],
                "fields": [[k, node(getattr(x, k), (*path, k))] for k in parts],
                "static": {k: _plain(v) for k, v in fixed.items()},
            }
        children, _ = jax.tree_util.tree_flatten_with_path(
            x, is_leaf=lambda y: y is not x
        )
        if [p for p, _ in children] == [()]:
            leaves[path] = x
            return leaf(x, path)
        if type(x) in (list, tuple):
            items = [node(y, (*path, str(i))) for i, (_, y) in enumerate(children)]
            return {type(x).__name__: items}
        keys = [_key(key, path, name) for (key,), _ in children]
        if len(set(map(type, keys))) > 1:  # no dict could be flattened
            keys = list(map(str, keys))
        items = zip(keys, children, strict=True)
        return {"dict": [[k, node(y, (*path, str(k)))] for k, (_, y) in items]}

    def leaf(x: Any, path: Path) -> Node:
        if _tree.is_key(x):
            if isinstance(x, jax.Array):
                impl = str(jax.random.key_impl(x))
                arrays.append(jax.random.key_data(x))
            else:
                impl = ""  # a template; it is looked at by its type
                arrays.append(x)
            return {"key": len(arrays) - 1, "impl": impl}
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            if jnp.dtype(x.dtype).kind not in "OSUMm":
                arrays.append(np.asarray(x) if isinstance(x, np.generic) else x)
                return {"array": len(arrays) - 1}
        elif isinstance(x, bool | int | float | complex | str | bytes):
            values.append(x)
            return {"value": len(values) - 1}
        raise TypeError(
            f"{name}: {spell(path)} is of type {type(x).__name__}; expected arrays, typed "
            "keys, numbers, strings, bytes, None, and containers of these. Leave it out, or "
            "turn it into data first, as with plan.to_dict()."
        )

    return Contents(node(tree, ()), arrays, values, leaves)


def put_together(tree: Node, leaf: Callable[[Node], Any]) -> PyTree:
    """The tree in dicts, lists and tuples, its packed leaves as they were."""
    if tree is None:
        return None
    if "dict" in tree:
        return {k: put_together(v, leaf) for k, v in tree["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in tree:
            return kind(put_together(x, leaf) for x in tree[kind.__name__])
    if "packed" in tree:
        own = {k: put_together(v, leaf) for k, v in tree["fields"]}
        return _PACKED[tree["packed"]](**own, **_static(tree["static"]))
    return leaf(tree)


def leaves(
    tree: Node, path: Path = (), *, whole: bool = False
) -> Iterator[tuple[Path, Node]]:
    """Arrays, keys and values, in order; packed leaves in parts, or whole."""
    if tree is None:
        return
    if "packed" in tree and whole or not tree.keys() & _INNER:
        yield path, tree
        return
    for key, x in tree.get("dict", tree.get("fields", ())):
        yield from leaves(x, (*path, str(key)), whole=whole)
    for i, x in enumerate(tree.get("list", tree.get("tuple", ()))):
        yield from leaves(x, (*path, str(i)), whole=whole)


def packed(tree: Node) -> dict[Path, Node]:
    """The packed leaves."""
    return {way: x for way, x in leaves(tree, whole=True) if "packed" in x}


def _key(key: Any, path: Path, name: str) -> str | int:
    found = getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))
    if type(found) not in (str, int):
        raise TypeError(
            f"{name}: {spell(path)} has the key {found!r}; expected strings or integers. "
            "Spell the key as a string."
        )
    return found


def _plain(x: Any) -> Any:
    """Static data as JSON."""
    return dataclasses.asdict(x) if isinstance(x, formats.Layout) else x


def _static(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
    }
    if "layout" in found:
        fields: dict[str, Any] = {
            k: None if v is None else tuple(v) for k, v in found["layout"].items()
        }
        found["layout"] = formats.Layout(**fields)
    return found


def encode(value: Any) -> Any:
    """A value as JSON, its type kept."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return value


def decode(data: Any) -> Any:
    """Undoes `encode`."""
    if isinstance(data, dict) and isinstance(data.get("bytes"), str):
        return base64.b64decode(data["bytes"], validate=True)
    if isinstance(data, dict) and isinstance(data.get("complex"), list):
        parts = data["complex"]
        if len(parts) == 2 and all(isinstance(x, int | float) for x in parts):
            return complex(*parts)
    if not isinstance(data, bool | int | float | str):
        raise ValueError(f"{data!r} is no value")
    return data


def sealed(body: dict[str, Any]) -> str:
    """JSON with a checksum of itself."""
    return json.dumps({**body, "crc32": crc(body)}, indent=1)


def crc(body: Any) -> int:
    """A checksum of JSON data."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())


def read(path: pathlib.Path) -> dict[str, Any]:
    """What `sealed` wrote.

    Raises:
      ValueError: if it is anything else.
    """
    try:
        body = json.loads(_text(path))
        if not isinstance(body, dict):
            raise ValueError("it is no JSON object")
        if body.pop("crc32", None) != crc(body):
            raise ValueError("its checksum is not that of its contents")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read ({e})") from e
    return body


def _text(path: pathlib.Path) -> bytes:
    """The bytes of a file of text; one that is none is not read to its end."""
    if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would never end
        raise ValueError("it is no file")
    blocks = []
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if b"\0" in block or len(blocks) >= _LONGEST:
                raise ValueError("it is no JSON, or too long")
            blocks.append(block)
    return b"".join(blocks)


def check(body: dict[str, Any]) -> None:
    """Raises `ValueError` unless this is a description of a checkpoint."""
    _require(body.get("format") == "jaxprune", "it is no checkpoint of jaxprune")
    if (found := body.get("version")) != VERSION:
        raise ValueError(
            f"its format has version {found!r}, and this jaxprune reads {VERSION}"
        )
    _require(_is_count(body.get("processes"), 1), "processes is no number of them")
    rows: Any = body.get("arrays")
    _require(isinstance(rows, list), "arrays is no list")
    for row in rows:
        _require(isinstance(row, dict), "an array is not described")
        _check_shape(row.get("shape"))
        _check_dtype(row.get("dtype"))
        _require(re.fullmatch("[0-9a-f]{16}", str(row.get("sum"))), "a sum is none")
        _require(row.get("host", True) is True, "host is not true")
    try:
        _check_node(body.get("tree"), rows)
    except RecursionError as e:
        raise ValueError("its tree is nested too deeply") from e
    used = [
        x.get("array", x.get("key"))
        for _, x in leaves(body["tree"])
        if "value" not in x
    ]
    _require(
        sorted(used) == list(range(len(rows))), "its arrays are not those of its tree"
    )
    values = [x["value"] for _, x in leaves(body["tree"]) if "value" in x]
    _require(
        sorted(values) == list(range(len(values))), "its values do not fit its tree"
    )
    paths = [path for path, _ in leaves(body["tree"])]
    _require(len(paths) == len(set(paths)), "two of its leaves have one path")


def check_part(part: dict[str, Any], body: dict[str, Any]) -> None:
    """Raises `ValueError` unless this is what one process adds to `body`."""
    _require(part.get("manifest") == crc(body), "its parts are of several checkpoints")
    count = sum("value" in x for _, x in leaves(body["tree"]))
    values: Any = part.get("values")
    files: Any = part.get("files")
    _require(isinstance(values, list) and len(values) == count, "values are missing")
    for x in values:
        decode(x)
    _require(isinstance(files, dict), "its files are not listed")
    for name, x in files.items():
        parts = pathlib.PurePosixPath(name).parts
        plain = parts and ".." not in parts and not name.startswith("/")
        _require(plain, f"{name!r} is no file inside it")
        pair = isinstance(x, list) and len(x) == 2 and all(_is_count(n, 0) for n in x)
        _require(pair, f"length and checksum of {name!r} are missing")


def _check_node(node: Node, rows: list[dict[str, Any]]) -> None:
    if node is None:
        return
    _require(isinstance(node, dict), "a node of its tree is no object")
    kinds = {
        ("dict",): lambda x: _check_pairs(x["dict"], rows),
        ("list",): lambda x: _check_items(x["list"], rows),
        ("tuple",): lambda x: _check_items(x["tuple"], rows),
        ("array",): lambda x: _check_index(x["array"], len(rows)),
        ("impl", "key"): lambda x: _check_keys(x, rows),
        ("value",): lambda x: _require(
            _is_count(x["value"], 0), "a value has no number"
        ),
        ("fields", "packed", "static"): lambda x: _check_packed(x, rows),
    }
    kind = tuple(sorted(node))
    _require(
        kind in kinds, f"a node of its tree has {', '.join(kind)[:80] or 'nothing'}"
    )
    kinds[kind](node)


def _check_pairs(pairs: Any, rows: list[dict[str, Any]]) -> None:
    _require(isinstance(pairs, list), "a dict of its tree is none")
    for pair in pairs:
        _require(
            isinstance(pair, list) and len(pair) == 2, "a dict of its tree is none"
        )
        _require(
            type(pair[0]) in (str, int), "a key of its tree is neither name nor number"
        )
        _check_node(pair[1], rows)
    _require(len({k for k, _ in pairs}) == len(pairs), "a key of its tree comes twice")
    alike = len({type(k) for k, _ in pairs}) < 2
    _require(alike, "a dict of its tree has both names and numbers")


def _check_items(items: Any, rows: list[dict[str, Any]]) -> None:
    _require(isinstance(items, list), "a list of its tree is none")
    for x in items:
        _check_node(x, rows)


def _check_index(index: Any, count: int) -> None:
    _require(_is_count(index, 0) and index < count, "an array has no number")


def _check_keys(node: Node, rows: list[dict[str, Any]]) -> None:
    _check_index(node["key"], len(rows))
    row = rows[node["key"]]
    try:
        words = jax.ShapeDtypeStruct(tuple(row["shape"]), jnp.dtype(row["dtype"]))
        jax.eval_shape(lambda w: jax.random.wrap_key_data(w, impl=node["impl"]), words)
    except Exception as e:  # JAX has many, and makes no promise
        raise ValueError(f"random keys cannot be made of {row}: {e}") from e


def _check_packed(node: Node, rows: list[dict[str, Any]]) -> None:
    """Whether the arrays of a packed leaf are those of its geometry."""
    kind: Any = _PACKED.get(node["packed"]) if isinstance(node["packed"], str) else None
    _require(kind is not None, f"{str(node['packed'])[:80]} is no packed leaf")
    _check_pairs(node["fields"], rows)
    own = dataclasses.fields(kind)
    parts = [f.name for f in own if not f.metadata.get("static")]
    inside = [x for _, x in leaves(node)]
    given = [k for k, _ in node["fields"]]
    whole = given == parts and len(inside) == len(parts)
    _require(whole and all("array" in x for x in inside), "a packed leaf lacks arrays")
    fixed = {f.name for f in own} - set(parts)
    static = node["static"]
    _require(
        isinstance(static, dict) and static.keys() == fixed, "a packed leaf lacks data"
    )
    shapes = {
        k: jax.ShapeDtypeStruct(
            tuple(rows[x["array"]]["shape"]), rows[x["array"]]["dtype"]
        )
        for k, x in node["fields"]
    }
    try:
        good = _geometry.fits(kind(**shapes, **_static(static)))
    except (TypeError, AttributeError, KeyError) as e:  # data of other types
        raise ValueError(f"a {node['packed']} of {str(static)[:200]}: {e}") from e
    _require(good, f"a {node['packed']} of {str(static)[:200]} has other arrays")


def _check_shape(shape: Any) -> None:
    is_shape = isinstance(shape, list) and all(_is_count(n, 0) for n in shape)
    _require(is_shape and math.prod(shape) < 1 << 62, f"{str(shape)[:80]} is no shape")


def _check_dtype(name: Any) -> None:
    try:
        known = isinstance(name, str) and str(jnp.dtype(name)) == name
    except TypeError:
        known = False
    _require(known and jnp.dtype(name).kind not in "OSUMm", f"{name!r} is no type")


def _is_count(x: Any, least: int) -> bool:
    return type(x) is int and x >= least


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
