"""Saving and restoring parameters, masks and optimizer state through Orbax."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import masks
from jaxprune._tree import PyTree


def save(
    path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False
) -> None:
    """Saves a tree of arrays: parameters, packed masks, the state of `masked`, steps.

    The folder appears under its name only when it is complete: a process killed in the
    middle leaves a folder of another name, which `restore` never reads. Masks of
    optimizer states are packed already, one bit a weight.

    Args:
      path: a folder that does not exist yet.
      tree: any pytree whose leaves are arrays, Python numbers or `None`; typed keys too.
      overwrite: whether an existing folder is replaced.

    Raises:
      FileExistsError: if the folder exists and `overwrite` is False.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
      >>> jp.checkpoint.save(path, {"w": jnp.arange(3)})
      >>> jp.checkpoint.restore(path, like={"w": jnp.zeros(3, int)})["w"].tolist()
      [0, 1, 2]
    """
    from orbax.checkpoint import v1 as ocp  # slow to import, and few programs need it

    path = pathlib.Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"path: {path} exists already. Choose another folder, one for each step, or "
            "pass overwrite=True."
        )
    ocp.save(str(path), tree, overwrite=overwrite)


def restore(path: str | os.PathLike[str], *, like: PyTree) -> PyTree:
    """Restores what `save` wrote.

    Args:
      path: the folder.
      like: a tree of the same structure, of arrays or of `jax.ShapeDtypeStruct`s, such as
        `(params, tx.init(params))` or the `jax.eval_shape` of it. Arrays come back with
        its dtypes and, where it has them, its shardings. Another mesh is welcome: masks
        packed along another axis there are packed anew.

    Raises:
      FileNotFoundError: if there is no complete checkpoint at `path`.
      ValueError: if `like` has another structure or other shapes than what was saved.
    """
    from orbax.checkpoint import v1 as ocp

    path = pathlib.Path(path).absolute()
    try:
        saved = _by_name(ocp.metadata(str(path)).metadata)
    except (FileNotFoundError, ocp.errors.InvalidLayoutError) as e:
        raise FileNotFoundError(
            f"path: {path} is no complete checkpoint. Pass a folder that "
            "jaxprune.checkpoint.save wrote."
        ) from e
    there = jax.tree_util.tree_map_with_path(
        lambda p, x: _as_saved(x, saved.get(f"{_name(p)}/bits")),
        like,
        is_leaf=_is_packed,
    )
    _check(saved, there, path)
    found = ocp.load(str(path), jax.tree.map(_abstract, there))
    found = jax.tree.map(_as_packed, found, like, is_leaf=_is_packed)
    return jax.tree.map(_as_placed, found, like)


def _abstract(x: Any) -> Any:
    if not hasattr(x, "shape") or isinstance(x, np.ndarray):
        return x
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding = getattr(x, "sharding", None) or device
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _as_saved(x: Any, bits: Any) -> Any:
    """A packed mask of `like` as it lies in the checkpoint; anything else as it is."""
    if not _is_packed(x) or bits is None or tuple(bits.shape) == tuple(x.bits.shape):
        return x
    axis = _packed_axis(tuple(bits.shape), x.shape)
    there = jax.ShapeDtypeStruct(bits.shape, bits.dtype)
    return dataclasses.replace(x, bits=there, axis=axis)


def _packed_axis(packed: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """The axis along which bits of the shape `packed` hold a mask of `shape`."""
    for axis, length in enumerate(shape):
        if packed == (*shape[:axis], -(-length // 8), *shape[axis + 1 :]):
            return axis
    return None


def _as_packed(found: Any, like: Any) -> Any:
    """A mask packed along the axis that `like` has."""
    if not _is_packed(found) or found.axis == like.axis:
        return found
    mask = masks.repack(masks.as_bool(found), like)
    sharding = getattr(like.bits, "sharding", None)
    return mask if sharding is None else jax.device_put(mask, sharding)


def _as_placed(found: Any, like: Any) -> Any:
    """Free to go where other arrays are, if `like` is; a step beside a mesh, say."""
    if not isinstance(found, jax.Array) or _is_placed(like):
        return found
    if jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        words = jnp.asarray(np.asarray(jax.random.key_data(found)))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(found))
    return jnp.asarray(np.asarray(found))


def _is_placed(x: Any) -> bool:
    return getattr(x, "committed", getattr(x, "sharding", None) is not None)


def _is_packed(x: Any) -> bool:
    return isinstance(x, masks.PackedMask)


def _check(there: dict[str, Any], like: PyTree, path: pathlib.Path) -> None:
    wanted = _by_name(like)
    if missing := sorted(wanted.keys() - there.keys()):
        raise ValueError(
            f"like: {path} holds no {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}. Restore with the same optimizer "
            "and method that were saved."
        )
    if extra := sorted(there.keys() - wanted.keys()):
        raise ValueError(
            f"like: it lacks {', '.join(extra[:5])}"
            f"{' and others' if len(extra) > 5 else ''}, which {path} holds. Restore with "
            "the same optimizer and method that were saved."
        )
    for name, x in wanted.items():
        shape, found = _shape(x), _shape(there[name])
        dtype = getattr(x, "dtype", None)
        is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if shape != found and not is_key:  # a typed key is stored as its words
            raise ValueError(
                f"like: {name} has shape {shape}, but {path} holds {found}. Restore with "
                "the sizes that were saved."
            )


def _by_name(tree: PyTree) -> dict[str, Any]:
    return {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", None) or ())


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
