"""Weights fitted on the Gram: never worse, zeros exact, and the optimum where it is known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import calibration, posttrain

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, ROWS = 24, 10, 200
KEY = jax.random.key(0)


def _case(seed=0, dtype=jnp.float32, rows=ROWS):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)) @ rng.normal(size=(6, K)) + 0.5 * rng.normal(
        size=(rows, K)
    )
    w = rng.normal(size=(K, N))
    mask = np.abs(w) >= np.median(np.abs(w), axis=0)
    inputs = calibration.Inputs(
        jnp.float32(rows), gram=jnp.asarray(x.T @ x / rows, jnp.float32)
    )
    w = jnp.asarray(w, dtype)
    return x, w, jnp.where(mask, w, 0), jnp.asarray(mask), inputs


def _errors(x, w_dense, w):
    return (
        (x @ (np.asarray(w_dense, np.float64) - np.asarray(w, np.float64))) ** 2
    ).mean(0)


FITS = {
    "pcg": jax.jit(posttrain.pcg, static_argnames="steps"),
    "mask_lora": jax.jit(
        lambda *a: posttrain.reconstruct(*a, kind="mask_lora", rank=8, key=KEY)
    ),
    "scale_lora": jax.jit(
        lambda *a: posttrain.reconstruct(*a, kind="scale_lora", rank=8, key=KEY)
    ),
}
EVERY = pytest.mark.parametrize("name", sorted(FITS))


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_errors_fall_and_zeros_stay(name, dtype):
    x, dense, w, mask, inputs = _case(dtype=dtype)
    found = FITS[name](dense, w, mask, inputs)
    assert found.w.dtype == dtype
    assert (np.asarray(found.w)[~np.asarray(mask)] == 0).all()
    assert (found.error <= found.initial_error).all()
    assert found.error.sum() < 0.6 * found.initial_error.sum()
    np.testing.assert_allclose(
        found.error, _errors(x, dense, found.w), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(found.initial_error, _errors(x, dense, w), rtol=1e-3)


@EVERY
def test_what_the_mask_prunes_is_0_whatever_came(name):
    _, dense, w, mask, inputs = _case()
    found, same = (FITS[name](dense, x, mask, inputs) for x in (dense, w))
    jax.tree.map(np.testing.assert_array_equal, found, same)
    assert (found.initial_error > 0).all()


def test_pcg_is_least_squares():
    x, dense, w, mask, inputs = _case()
    found = FITS["pcg"](dense, w, mask, inputs, steps=K)
    for n in range(N):
        kept = np.asarray(mask)[:, n]
        best, *_ = np.linalg.lstsq(x[:, kept], x @ np.asarray(dense)[:, n], rcond=None)
        np.testing.assert_allclose(np.asarray(found.w)[kept, n], best, atol=2e-3)


def test_lora_lies_between_its_start_and_the_optimum():
    _, dense, w, mask, inputs = _case()
    best = FITS["pcg"](dense, w, mask, inputs, steps=K).error.sum()
    for name in ("mask_lora", "scale_lora"):
        found = FITS[name](dense, w, mask, inputs)
        assert best * 0.999 <= found.error.sum() < found.initial_error.sum()


@EVERY
def test_scale_of_weights_and_inputs_does_not_matter(name):
    _, dense, w, mask, inputs = _case()
    found = FITS[name](dense, w, mask, inputs)
    larger = inputs._replace(gram=inputs.gram * 256.0)
    again = FITS[name](dense * 1024, w * 1024, mask, larger)
    np.testing.assert_allclose(again.w / 1024, found.w, atol=5e-3)


@EVERY
def test_fewer_rows_than_inputs(name):
    _, dense, w, mask, inputs = _case(rows=5)
    found = FITS[name](dense, w, mask, inputs)
    assert np.isfinite(np.asarray(found.w)).all()
    assert (found.error <= found.initial_error).all()


@EVERY
def test_a_good_start_is_kept(name):
    _, dense, _, _, inputs = _case()
    found = FITS[name](dense, dense, jnp.ones(dense.shape, bool), inputs)
    np.testing.assert_array_equal(found.w, dense)
    assert (found.error == 0).all()


@EVERY
def test_stacks_are_matrices_side_by_side(name):
    cases = [_case(seed)[1:] for seed in (0, 1)]
    found = FITS[name](*jax.tree.map(lambda *x: jnp.stack(x), *cases))
    assert found.w.shape == (2, K, N)
    assert found.error.shape == (2, N)
    assert (found.error.sum(1) < 0.6 * found.initial_error.sum(1)).all()
    if name == "pcg":  # the factors of the others are drawn for the stack
        np.testing.assert_allclose(found.w[1], FITS[name](*cases[1]).w, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: posttrain.pcg(*a, steps=0), "pcg: got steps=0"),
        (
            lambda d, w, m, i: posttrain.pcg(d[:2], w, m, i),
            "pcg: w_dense has the shape (2, 10), but w has (24, 10)",
        ),
        (
            lambda d, w, m, i: posttrain.pcg(d, w, m, i._replace(gram=None)),
            "pcg: inputs.gram is None",
        ),
        (
            lambda d, w, m, i: posttrain.pcg(d, w, m, i._replace(gram=jnp.eye(3))),
            "pcg: inputs.gram has the shape (3, 3); expected (24, 24)",
        ),
        (
            lambda *a: posttrain.reconstruct(*a, kind="bias", key=KEY),
            "reconstruct: got kind='bias'; expected 'mask_lora' or 'scale_lora'",
        ),
        (
            lambda *a: posttrain.reconstruct(*a, rank=0, key=KEY),
            "reconstruct: got rank=0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*_case()[1:])
