"""Wanda, RIA and contrast against their formulas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import calibration, posttrain, scores

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _case(shape=(6, 5)):
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(20, shape[-2])).astype(np.float32)
    return w, np.broadcast_to((x**2).mean(0), shape[:-1])


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formulas(shape, dtype):
    w, square = _case(shape)
    w = jnp.asarray(w, dtype)
    size = np.abs(np.asarray(w, np.float64))
    norm = np.sqrt(square)[..., None]
    found = jax.jit(scores.wanda)(w, square)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, size * norm, rtol=1e-5)
    relative = size / size.sum(-2, keepdims=True) + size / size.sum(-1, keepdims=True)
    found = jax.jit(scores.ria)(w, square)
    np.testing.assert_allclose(found, relative * np.sqrt(norm), rtol=1e-5)


def test_pruned_rows_and_columns_score_nothing():
    w, square = _case()
    w[1], w[:, 2] = 0, 0
    found = np.asarray(scores.ria(w, square))
    assert (found[1] == 0).all() and (found[:, 2] == 0).all()
    assert np.isfinite(found).all()


def test_contrast_prunes_the_planted_weights():
    rng = np.random.default_rng(0)
    secret = rng.normal(size=(8, 4)) * 3  # the target data live in inputs 0 to 7
    w = np.concatenate([secret, rng.normal(size=(24, 4))]).astype(np.float32)
    lives = np.arange(32) < 8
    x = rng.normal(size=(50, 32)) * np.where(lives, 2.0, 0.1)
    other = rng.normal(size=(50, 32)) * np.where(lives, 0.05, 1.0)
    target, reference = (
        calibration.Inputs(
            jnp.float32(50), square=jnp.asarray((a**2).mean(0), jnp.float32)
        )
        for a in (x, other)
    )
    mask = posttrain.contrast_mask(jnp.asarray(w), target, reference, share=0.2)
    assert mask[8:].all()
    np.testing.assert_array_equal(mask.sum(0), 32 - 6)
    pruned = np.where(mask, w, 0)
    assert np.linalg.norm(x @ (w - pruned)) > 0.7 * np.linalg.norm(x @ w)
    assert np.linalg.norm(other @ (w - pruned)) < 0.15 * np.linalg.norm(other @ w)
    by_score = scores.contrast(
        *(scores.wanda(w, i.square) for i in (target, reference))
    )
    _, again = jp.prune(jnp.asarray(w), 24 / 128, score=by_score, where=lambda *_: True)
    assert again[8:].all()
    assert (~np.asarray(again)).sum() == 24


def test_contrast_prunes_only_what_the_target_needs_more():
    w, square = _case()
    same = calibration.Inputs(jnp.float32(1), square=jnp.asarray(square))
    assert posttrain.contrast_mask(jnp.asarray(w), same, same, share=0.9).all()
    more = same._replace(square=4 * same.square)
    mask = jax.jit(lambda *a: posttrain.contrast_mask(*a, share=0.5))(
        jnp.asarray(w), more, same
    )
    expected = np.argsort(np.argsort(-scores.wanda(w, square), axis=0), axis=0) >= 3
    np.testing.assert_array_equal(mask, expected)
    assert posttrain.contrast_mask(jnp.asarray(w), more, same, share=0.1).all()
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), (jnp.asarray(w), more, same))
    both = posttrain.contrast_mask(*stack, share=0.5)
    np.testing.assert_array_equal(both, np.stack([expected] * 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w: scores.wanda(w, jnp.ones(3)),
            "wanda: square has the shape (3,); expected (6,) for weights",
        ),
        (lambda w: scores.ria(w[0], jnp.ones(())), "ria: square has the shape ()"),
        (
            lambda w: scores.contrast(w, w[:2]),
            "contrast: target has the shape (6, 5) and reference (2, 5)",
        ),
        (
            lambda w: posttrain.contrast_mask(
                w, *[calibration.Inputs(jnp.ones(()))] * 2
            ),
            "contrast_mask: inputs.square is None",
        ),
        (
            lambda w: posttrain.contrast_mask(
                w, *[calibration.Inputs(jnp.ones(()), square=jnp.ones(6))] * 2, share=1
            ),
            "share: got 1; expected",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(jnp.asarray(_case()[0]))
