"""Saving and restoring parameters, masks and optimizer state through Orbax."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
        its dtypes and, where it has them, its shardings: another mesh is welcome.

    Raises:
      FileNotFoundError: if there is no complete checkpoint at `path`.
      ValueError: if `like` has another structure or other shapes than what was saved.
    """
    from orbax.checkpoint import v1 as ocp

    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f"path: {path} is no folder. Pass one that jaxprune.checkpoint.save wrote."
        )
    _check(ocp.metadata(str(path)).metadata, like, path)
    return ocp.load(str(path), jax.tree.map(_abstract, like))


def _abstract(x: Any) -> Any:
    if not hasattr(x, "shape") or isinstance(x, np.ndarray):
        return x
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding = getattr(x, "sharding", None) or device
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _check(saved: PyTree, like: PyTree, path: pathlib.Path) -> None:
    def leaves(tree):
        return {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    there, wanted = leaves(saved), leaves(like)
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


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", None) or ())


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
