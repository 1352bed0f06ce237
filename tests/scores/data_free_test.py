"""Scores that need no data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude(dtype):
    w = jnp.array([-2.0, 0.0, jnp.nan, -jnp.inf], dtype)
    scores = jp.scores.magnitude({"w": w, "n": None})
    assert scores["n"] is None and scores["w"].dtype == dtype
    found = np.asarray(scores["w"], np.float32)
    np.testing.assert_array_equal(found, [2, 0, np.nan, np.inf])


@pytest.mark.parametrize("dtype", DTYPES)
def test_saliency_is_computed_in_float32(dtype):
    w, g = jnp.array([-300.0, 1e-4], dtype), jnp.array([300.0, 1e-4], dtype)
    scores = jp.scores.saliency({"w": w, "n": None}, {"w": g, "n": None})["w"]
    assert scores.dtype == jnp.float32
    exact = np.abs(np.asarray(w, np.float64) * np.asarray(g, np.float64))
    np.testing.assert_allclose(scores, exact, rtol=2**-23)


def test_saliency_in_float64():
    with jax.enable_x64(True):
        w = jnp.array([1 + 2.0**-40])
        assert jp.scores.saliency(w, w).dtype == jnp.float64


def test_random():
    params = {"a": jnp.ones((50, 40), jnp.bfloat16), "n": None, "z": jnp.ones((50, 40))}
    scores = jp.scores.random(params, key=jax.random.key(3))
    assert scores["n"] is None
    assert scores["a"].dtype == jnp.float32 and scores["a"].shape == (50, 40)
    assert (scores["a"] >= 0).all() and (scores["a"] < 1).all()
    assert abs(float(scores["a"].mean()) - 0.5) < 0.05  # 8 standard errors
    assert not (scores["a"] == scores["z"]).any()  # leaves differ
    again = jp.scores.random(params, key=jax.random.key(3))
    np.testing.assert_array_equal(scores["a"], again["a"])
    other = jp.scores.random(params, key=jax.random.key(4))
    assert not (scores["a"] == other["a"]).any()


def test_random_keeps_the_sharding_of_explicit_meshes():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(np.ones((16, 8)), NamedSharding(mesh, P("x", None)))
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        scores = jp.scores.random({"w": w}, key=key)["w"]
    assert jax.typeof(scores).sharding.spec == P("x", None)
    plain = jp.scores.random({"w": np.ones((16, 8))}, key=key)["w"]
    np.testing.assert_array_equal(scores, plain)


def test_what_is_no_weight_stays():
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))  # holds functions
    for scores in (
        jp.scores.magnitude(model),
        jp.scores.random(model, key=jax.random.key(0)),
        jp.scores.saliency(model, model),
    ):
        assert scores.activation is model.activation
        assert jax.tree.structure(scores) == jax.tree.structure(model)
