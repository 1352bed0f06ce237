"""BDWP: both products see N:M weights, the gradient of the weights is dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

NM = jp.NM(2, 8)


def make(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def best(w, axis):
    groups = np.moveaxis(np.asarray(w), axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, 8)
    ranks = (-np.abs(groups)).argsort(-1, kind="stable").argsort(-1)
    kept = np.where(ranks < 2, groups, 0).reshape(np.moveaxis(w, axis, -1).shape)
    return np.moveaxis(kept, -1, axis)


@pytest.mark.parametrize("batch", [(5,), (2, 3), ()], ids=str)
def test_products(batch):
    x, w, dy = make((*batch, 16), 0), make((16, 24), 1), make((*batch, 24), 2)
    y, pull = jax.vjp(lambda x, w: jp.training.bdwp_matmul(x, w, NM), x, w)
    dx, dw = pull(dy)
    np.testing.assert_allclose(y, x @ best(w, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ best(w, 1).T, rtol=1e-4, atol=1e-5)
    rows = np.asarray(x).reshape(-1, 16).T @ np.asarray(dy).reshape(-1, 24)
    np.testing.assert_allclose(dw, rows, rtol=1e-4, atol=1e-5)


def test_under_jit_vmap_and_in_bfloat16():
    x, w = make((3, 5, 16), 0), make((3, 16, 24), 1)
    many = jax.jit(jax.vmap(lambda x, w: jp.training.bdwp_matmul(x, w, NM)))(x, w)
    for i in range(3):
        np.testing.assert_allclose(many[i], x[i] @ best(w[i], 0), rtol=1e-4, atol=1e-5)
    half = [a[0].astype(jnp.bfloat16) for a in (x, w)]
    grads = jax.grad(
        lambda x, w: jp.training.bdwp_matmul(x, w, NM).astype(jnp.float32).sum(), (0, 1)
    )(*half)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_learns():
    """2:8 both ways fits a linear map nearly as well as dense does."""
    x, true = make((256, 32), 0), make((32, 16), 1) * (make((32, 16), 2) > 0.7)
    w = jnp.zeros((32, 16))

    def loss(w, product):
        return jnp.mean((product(x, w) - x @ true) ** 2)

    start = loss(w, jnp.matmul)
    for _ in range(100):
        w = w - 2 * jax.grad(loss)(w, lambda x, w: jp.training.bdwp_matmul(x, w, NM))
    assert loss(w, lambda x, w: jp.training.bdwp_matmul(x, w, NM)) < 0.35 * start


@pytest.mark.parametrize("shape", [(12, 16), (16, 12)], ids=str)
def test_sizes_that_do_not_fit_are_refused(shape):
    def run(x, w):
        return jp.training.bdwp_matmul(x, w, NM).sum()

    with pytest.raises(ValueError, match="does not divide"):
        jax.grad(run, (0, 1))(jnp.ones((2, shape[0])), jnp.ones(shape))


def test_what_is_no_matrix_or_pattern_is_refused():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    with pytest.raises(TypeError, match="structure: got Unstructured"):
        jp.training.bdwp_matmul(x, w, jp.Unstructured())
    with pytest.raises(ValueError, match=r"w: got shape \(2, 8, 8\)"):
        jp.training.bdwp_matmul(x, jnp.stack([w, w]), NM)
