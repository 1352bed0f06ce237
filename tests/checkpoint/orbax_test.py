"""Saving and restoring, on one device and from mesh to mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _run(params):
    tx = jp.masked(optax.adam(0.1), jp.gmp(0.5, end=0))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    return tx, optax.apply_updates(params, updates), state


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_everything_comes_back(tmp_path):
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8)), "hole": None}
    tree = {"run": _run(params)[1:], "key": jax.random.key(3), "step": 7}
    jp.checkpoint.save(tmp_path / "a", tree)
    back = jp.checkpoint.restore(tmp_path / "a", like=tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert back["key"] == tree.pop("key")
    _equal({k: back[k] for k in tree}, tree)


@pytest.mark.parametrize("there", ["mesh", "one device"])
def test_masks_are_packed_for_the_mesh_they_come_to(tmp_path, there):
    """Along the first axis on one device; on the mesh that has too few bytes to share."""
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
    w = jax.random.normal(jax.random.key(0), (16, 64))
    whole = {"kernel": w}
    shared = {"kernel": jax.device_put(w, NamedSharding(mesh, P("x")))}
    first, second = (whole, shared) if there == "mesh" else (shared, whole)
    _, params, state = _run(first)
    jp.checkpoint.save(tmp_path / "a", (params, state))
    tx, _, _ = _run(second)
    like = (second, tx.init(second))
    axes = [s.method.masks["kernel"].axis for s in (state, like[1])]
    assert sorted(axes) == [0, 1]
    params, back = jp.checkpoint.restore(tmp_path / "a", like=like)
    assert jax.tree.structure(back) == jax.tree.structure(like[1])
    _equal(jp.get_masks(back), jp.get_masks(state))
    bits, wanted = (x.method.masks["kernel"].bits for x in (back, like[1]))
    assert bits.sharding.is_equivalent_to(wanted.sharding, bits.ndim)
    # And training goes on.
    updates, back = jax.jit(tx.update)(second, back, params)
    params = optax.apply_updates(params, updates)
    assert not jnp.any(params["kernel"][~jp.get_masks(back)["kernel"]])


def test_paths_that_are_refused(tmp_path):
    like = {"w": jnp.ones(3)}
    with pytest.raises(FileNotFoundError, match=r"path: .*missing is no complete"):
        jp.checkpoint.restore(tmp_path / "missing", like=like)
    with pytest.raises(FileNotFoundError, match="jaxprune.checkpoint.save wrote"):
        jp.checkpoint.restore(tmp_path, like=like)
    jp.checkpoint.save(tmp_path / "a", like)
    with pytest.raises(FileExistsError, match=r"a exists already.*overwrite=True"):
        jp.checkpoint.save(tmp_path / "a", like)
    jp.checkpoint.save(tmp_path / "a", {"w": jnp.zeros(3)}, overwrite=True)
    _equal(jp.checkpoint.restore(tmp_path / "a", like=like), {"w": jnp.zeros(3)})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"w": jnp.ones(3), "more": jnp.ones(3)},
            r"like: .* holds no more.*same optim",
        ),
        ({}, r"like: it lacks w, which .* holds"),
        ({"w": jnp.ones(4)}, r"like: w has shape \(4,\), but .* holds \(3,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_trees_that_do_not_fit(tmp_path, like, message):
    jp.checkpoint.save(tmp_path / "a", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=message):
        jp.checkpoint.restore(tmp_path / "a", like=like)
