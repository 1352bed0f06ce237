"""Tied leaves made two: nothing changes but what products read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS = jax.random.split(jax.random.key(0), 5)
IDS = jax.random.randint(KEYS[0], (3, 4), 0, 10)


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def tied(p, ids):
    x = p["embed"].astype(jnp.float32)[ids]
    x = x + jax.nn.relu(rms(x, p["n1"]) @ p["up"]) @ p["down"]
    return rms(x, p["norm"]) @ p["embed"].T.astype(jnp.float32)


PARAMS = {
    "embed": jax.random.normal(KEYS[1], (10, 6)),
    "up": jax.random.normal(KEYS[2], (6, 8)),
    "down": jax.random.normal(KEYS[3], (8, 6)),
    "n1": jnp.linspace(0.5, 2, 6),
    "norm": jnp.linspace(2, 0.5, 6),
    "unused": None,
}


def test_products_read_a_copy_and_lookups_the_leaf():
    fn, p = structured.untie(tied, PARAMS, IDS, where="embed")
    assert list(p.copies) == ["embed"]
    for ids in (IDS, IDS[:1, :3]):
        np.testing.assert_allclose(jax.jit(fn)(p, ids), tied(PARAMS, ids), rtol=1e-5)
    zeros = p._replace(copies={"embed": jnp.zeros((10, 6))})
    assert (fn(zeros, IDS) == 0).all()

    def loss(fn, p):
        return jnp.sum(jnp.sin(fn(p, IDS)))

    grads = jax.grad(lambda p: loss(fn, p))(p)
    both = jax.grad(lambda p: loss(tied, p))(PARAMS)["embed"]
    parts = grads.params["embed"], grads.copies["embed"]
    assert all(float(jnp.abs(g).max()) > 0.1 for g in parts)
    np.testing.assert_allclose(sum(parts), both, rtol=1e-4, atol=1e-5)


def test_a_tied_and_scaled_model_can_be_sliced():
    with pytest.raises(ValueError, match=r"norm cannot be folded.*structured\.untie"):
        structured.slicegpt(tied, PARAMS, [IDS], ratio=0.5)
    fn, p = structured.untie(tied, PARAMS, IDS, where="embed")
    turned = structured.slicegpt(fn, p, [IDS], ratio=0.0).params
    y = tied(PARAMS, IDS)
    np.testing.assert_allclose(fn(turned, IDS), y, rtol=1e-5, atol=1e-5)
    assert not np.allclose(turned.params["embed"], turned.copies["embed"], 1e-2)
    found = structured.slicegpt(fn, p, [IDS], ratio=0.5)
    assert found.plan.verify(fn, found.params, IDS).equal
    small = found.plan.shrink(found.params)
    assert small.params["embed"].shape == small.copies["embed"].shape == (10, 3)
    assert jax.jit(found.plan.rewrite(fn))(small, IDS[:1]).shape == (1, 4, 10)


def test_products_in_loops_are_found():
    def chunked(p, ids):
        x = p["embed"][ids]
        return jax.lax.map(lambda x: x @ p["embed"].T, x)

    shapes = {"embed": jax.ShapeDtypeStruct((10, 6), jnp.bfloat16)}
    fn, new = structured.untie(chunked, shapes, IDS, where="*")
    assert new.copies["embed"].dtype == jnp.bfloat16
    table = PARAMS["embed"]
    p = structured.Untied({"embed": table}, {"embed": 2 * table})
    np.testing.assert_allclose(fn(p, IDS), 2 * chunked(p.params, IDS), rtol=1e-5)


def test_messages():
    with pytest.raises(ValueError, match=r"where: up is used by dot_general; expected"):
        structured.untie(tied, PARAMS, IDS, where="up")
    with pytest.raises(ValueError, match="where: norm is used by mul"):
        structured.untie(tied, PARAMS, IDS, where=("embed", "norm"))

    def reshaped(p, ids):
        return p["embed"][ids] @ p["embed"].reshape(5, 12).T[:6]

    with pytest.raises(ValueError, match="where: embed: some products .* not followed"):
        structured.untie(reshaped, PARAMS, IDS, where="embed")
