"""Moments of gradients, by batch and by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import calibration

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
PARAMS = {"w": jax.random.normal(KEY, (4, 3)), "b": jnp.zeros(3), "steps": jnp.int32(7)}
BATCHES = [
    (jax.random.normal(jax.random.key(i), (3 + i % 2, 4)), jnp.arange(3 + i % 2) % 3)
    for i in range(4)
]


def loss(params, x, labels):
    logits = jax.nn.log_softmax(x @ params["w"] + params["b"])
    return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))


def grad(x, labels):
    floats = {n: PARAMS[n] for n in "wb"}
    return jax.grad(loss)(floats, x, labels)


def check(found, grads):
    for name in "wb":
        each = np.stack([np.asarray(g[name], np.float64) for g in grads])
        np.testing.assert_allclose(found.mean[name], each.mean(0), atol=1e-6)
        np.testing.assert_allclose(found.square[name], (each**2).mean(0), atol=1e-6)
    assert found.mean["steps"] is None and found.square["steps"] is None
    assert found.samples == len(grads)


def test_by_batch():
    check(calibration.gradients(loss, PARAMS, BATCHES), [grad(*b) for b in BATCHES])


def test_by_example():
    found = calibration.gradients(loss, PARAMS, BATCHES, per_example=True)
    examples = [(x[i : i + 1], y[i : i + 1]) for x, y in BATCHES for i in range(len(x))]
    check(found, [grad(*e) for e in examples])


def test_it_goes_on_and_merges():
    whole = calibration.gradients(loss, PARAMS, BATCHES)
    a = calibration.gradients(loss, PARAMS, BATCHES[:3])
    b = calibration.gradients(loss, PARAMS, BATCHES[3:])
    on = calibration.gradients(loss, PARAMS, BATCHES[3:], initial=a)
    for found in (on, jax.jit(calibration.merge_gradients)(b, a)):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, whole
        )


def test_bfloat16_and_nnx_trees():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    graphdef, state = nnx.split(model)
    found = calibration.gradients(
        lambda s, x: jnp.mean(nnx.merge(graphdef, s)(x) ** 2), state, [BATCHES[0][0]]
    )
    assert jax.tree.structure(found.square) == jax.tree.structure(state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))


def test_what_is_refused():
    with pytest.raises(ValueError, match="batches: there is none"):
        calibration.gradients(loss, PARAMS, [])
    with pytest.raises(ValueError, match=r"per_example: .* shapes \[\(3, 4\), \(\)\]"):
        calibration.gradients(
            loss, PARAMS, [(BATCHES[0][0], jnp.int32(1))], per_example=True
        )
    bad = [BATCHES[0], (BATCHES[0][0] * jnp.nan, BATCHES[0][1])]
    with pytest.raises(
        ValueError, match="in batch 2, the gradient of b, w is not finite"
    ):
        calibration.gradients(loss, PARAMS, bad)
