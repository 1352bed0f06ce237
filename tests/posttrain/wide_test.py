"""Statistics and weights in float64, where JAX makes them by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.calibration import Inputs

SOLVERS = {
    "wanda": posttrain.wanda().solve,
    "ria": posttrain.ria().solve,
    "sparsegpt": posttrain.sparsegpt().solve,
    "alps": posttrain.alps().solve,
    "obs": posttrain.obs,
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("structure", [jp.Unstructured(), jp.NM(2, 4)])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name, structure, dtype):
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 16))
    gram = jnp.asarray(x.T @ x / 64, dtype)
    inputs = Inputs(jnp.asarray(64, dtype), square=jnp.diagonal(gram), gram=gram)
    w = jnp.asarray(random.normal(size=(16, 6)), dtype)
    found = SOLVERS[name](w, inputs, 0.5, structure)
    assert found.w.dtype == dtype
    assert int(found.mask.sum()) == w.size // 2
    with jax.enable_x64(False):
        narrow = jax.tree.map(lambda a: a.astype("float32"), (w, inputs))
        np.testing.assert_array_equal(
            found.mask, SOLVERS[name](*narrow, 0.5, structure).mask
        )


def test_ties_go_to_the_lower_input():
    inputs = Inputs(jnp.ones(()), square=jnp.ones(6))
    found = posttrain.wanda().solve(jnp.ones((6, 2)), inputs, 0.5, jp.Unstructured())
    np.testing.assert_array_equal(found.mask.T, [[1, 1, 1, 0, 0, 0]] * 2)
