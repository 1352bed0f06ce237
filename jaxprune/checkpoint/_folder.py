"""The folder of a long piece of work, which goes on with the arguments it began with."""

import dataclasses
import functools
import json
import os
import pathlib
import types
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree

_SHOWN = 500  # characters of a setting in a message


def open_folder(
    directory: str | os.PathLike[str],
    settings: Mapping[str, Any],
    arrays: Mapping[str, PyTree],
) -> pathlib.Path:
    """The folder, made if it is not there; its settings are those that it began with.

    Args:
      directory: where it is.
      settings: what decides the outcome, by the names of the caller's arguments.
      arrays: trees of arrays that do too; kept as checksums.

    Raises:
      ValueError: naming what differs from what was begun; or if that cannot be read.
    """
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    now = {name: spelled(x) for name, x in settings.items()}
    now |= {name: _sums(x) for name, x in arrays.items()}
    path = folder / "settings.json"
    try:
        then = json.loads(path.read_text()) if path.exists() else now
    except ValueError as e:
        raise ValueError(
            f"directory: {path} cannot be read ({e}), so it is not known what {folder} was "
            "begun with. Choose another directory, or remove this one."
        ) from e
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            shown = then.get(name)
            if name in arrays or len(str(shown)) > _SHOWN:
                shown = "other values"
            raise ValueError(
                f"{name}: {folder} was begun with {shown}. Go on with the same arguments, or "
                "choose another directory."
            )
    part = path.with_suffix(".part")
    part.write_text(json.dumps(now))
    part.replace(path)
    return folder


def spelled(x: Any) -> str:
    """The same in every process, and another for other settings.

    Functions are spelled by their names and what they do: their code, and what they close
    over. Functions that these call are not looked into.
    """
    return _spelled(x, frozenset())


def _spelled(x: Any, within: frozenset[int]) -> str:
    """`within`: functions that are being spelled, which may close over themselves."""

    def say(x: Any) -> str:
        return _spelled(x, within)

    if isinstance(x, functools.partial):
        return f"{say(x.func)}{say((x.args, x.keywords))}"
    if isinstance(x, types.FunctionType):
        if id(x) in within:
            return x.__qualname__
        within |= {id(x)}
        held = [c.cell_contents for c in x.__closure__ or ()]
        held += [x.__code__, x.__defaults__, x.__kwdefaults__]
        return f"{x.__qualname__}#{zlib.crc32(say(held).encode()):08x}"
    if isinstance(x, types.CodeType):
        return f"{x.co_code.hex()}{x.co_names}{say(x.co_consts)}"
    if isinstance(x, dict):
        return f"{{{', '.join(f'{k!r}: {say(v)}' for k, v in x.items())}}}"
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        own = [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
        return type(x).__qualname__ + say(dict(own))
    if isinstance(x, list | tuple):
        return f"({', '.join(map(say, x))})"
    if isinstance(x, set | frozenset):  # their order is not the same in every process
        return f"{{{', '.join(sorted(map(say, x)))}}}"
    if isinstance(x, np.ndarray | jax.Array):  # whose text leaves out the middle
        return f"{x.dtype}{list(x.shape)}#{checksum(x):08x}"
    if wrapped := getattr(x, "__wrapped__", None):  # as jax.jit leaves it
        return f"{type(x).__qualname__}({say(wrapped)})"
    text = repr(x)
    return type(x).__qualname__ if " at 0x" in text else text


def _sums(tree: PyTree) -> dict[str, int]:
    """A checksum of each leaf."""
    found = {}
    for path, x in zip(*_tree.flatten(tree)[:2], strict=True):
        if not _tree.is_hole(x):
            found[path] = checksum(x)
    return found


def checksum(x: Any) -> int:
    """Of an array: its values, dtype and shape."""
    x = np.asarray(jax.random.key_data(x) if _tree.is_key(x) else x)
    start = zlib.crc32(f"{x.dtype}{x.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(x).tobytes(), start)
