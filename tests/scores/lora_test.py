"""The score of LoRAPrune: its gradient, its formula, and whom it ranks as the full one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import scores

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _case(stack=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((6, 5), (6, 2), (2, 5))
    return [jnp.asarray(rng.normal(size=stack + s), jnp.float32) for s in shapes]


def _loss(w, a, b, x, y, scale):
    return jnp.mean((x @ (w + scale * a @ b) - y) ** 2)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_gradient_is_what_a_step_takes_from_the_product(stack):
    """With w - a b in the place of w, scores are the gradient itself, but for its sign."""
    w, a, b = _case(stack)
    da, db = _case(stack, 1)[1:]
    taken = a @ b - (a - da) @ (b - db)
    ones = jnp.ones_like(w) - a @ b
    found = jax.jit(scores.lora_taylor)(ones, a, b, gradients=(da, db))
    np.testing.assert_allclose(found, jnp.abs(taken), rtol=1e-4, atol=1e-5)
    found = scores.lora_taylor(w, a, b, gradients=(da, db), scale=0.5)
    np.testing.assert_allclose(
        found, jnp.abs(taken * (w + 0.5 * a @ b)), rtol=1e-4, atol=1e-5
    )


def test_it_ranks_much_as_the_full_gradient_does():
    """The gradient by a b, projected on what the adapter can see, still orders weights."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(12, 10)), jnp.float32)
    a = jnp.asarray(rng.normal(size=(12, 6)) / 4, jnp.float32)
    b = jnp.asarray(rng.normal(size=(6, 10)) / 4, jnp.float32)
    x, y = (jnp.asarray(rng.normal(size=(50, n)), jnp.float32) for n in (12, 10))
    full, *slopes = jax.grad(_loss, (0, 1, 2))(w, a, b, x, y, 1.0)
    found = scores.lora_taylor(w, a, b, gradients=tuple(0.01 * g for g in slopes))
    wanted = jnp.abs(full * (w + a @ b))
    ranks = [np.argsort(np.argsort(np.ravel(s))) for s in (found, wanted)]
    assert np.corrcoef(*ranks)[0, 1] > 0.5


def test_shapes_that_do_not_fit_are_refused():
    w, a, b = _case()
    with pytest.raises(ValueError, match="Transpose adapters"):
        scores.lora_taylor(w, a.T, b.T, gradients=(a, b))
    with pytest.raises(ValueError, match="gradients: got the shapes"):
        scores.lora_taylor(w, a, b, gradients=(b, a))
