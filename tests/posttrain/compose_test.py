"""Refiners after any choice of masks: each takes what the others give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import calibration, posttrain, scores

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, ROWS = 24, 8, 120


def _case():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 6)) @ rng.normal(size=(6, K)) + 0.5
    x = jnp.asarray(x + 0.4 * rng.normal(size=(ROWS, K)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(K, N)), jnp.float32)
    inputs = calibration.Inputs(
        jnp.float32(ROWS),
        square=jnp.mean(x**2, axis=0),
        mean=jnp.mean(x, axis=0),
        variance=jnp.var(x, axis=0),
        gram=x.T @ x / ROWS,
    )
    return x, w, inputs


@pytest.mark.parametrize("structure", [jp.Unstructured(), jp.NM(2, 4)], ids=str)
def test_each_step_brings_the_outputs_nearer(structure):
    x, w, inputs = _case()
    score = scores.wanda(w, inputs.square)
    if isinstance(structure, jp.NM):
        mask = structure.best("w", score)
    else:
        mask = score >= jnp.median(score, axis=0)

    @jax.jit
    def refine(mask):
        swapped = posttrain.dsnot(w, mask, inputs, structure=structure)
        fitted = posttrain.pcg(w, jnp.where(swapped.mask, w, 0), swapped.mask, inputs)
        bias = posttrain.bias_correction(w, fitted.w, inputs)
        return swapped, fitted, bias

    swapped, fitted, bias = refine(mask)
    np.testing.assert_array_equal(swapped.mask.sum(0), mask.sum(0))
    np.testing.assert_array_equal(np.asarray(fitted.w == 0), ~np.asarray(swapped.mask))
    pruned = jnp.where(mask, w, 0)

    def error(new, bias=0):
        return float(jnp.mean((x @ w - x @ new - bias) ** 2))

    assert error(fitted.w, bias) <= error(fitted.w) < 0.5 * error(pruned)
    assert abs(float(jnp.mean(x @ w - x @ fitted.w - bias))) < 1e-5


def test_columns_may_lie_on_several_devices():
    _, w, inputs = _case()
    score = scores.wanda(w, inputs.square)
    mask = score >= jnp.median(score, axis=0)
    mesh = jax.make_mesh((8,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "n"))

    @jax.jit
    def refine(w, mask):
        swapped = posttrain.dsnot(w, mask, inputs)
        return swapped.mask, posttrain.pcg(w, jnp.where(mask, w, 0), mask, inputs).w

    alone = refine(w, mask)
    spread = refine(*jax.device_put((w, mask), columns))
    np.testing.assert_array_equal(spread[0], alone[0])
    np.testing.assert_allclose(spread[1], alone[1], atol=1e-4)
