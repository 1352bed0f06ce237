"""Sparsities learned on the error of a block's output."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import allocation
from jaxprune.allocation import _block_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {"gain": 16 * 24, "up": 16 * 24, "down": 24 * 16}


def _block(params, x):
    hidden = jax.nn.relu(x @ params["up"]) + 0.05 * (x @ params["gain"])
    return {"out": hidden @ params["down"] + params["bias"]}


def _case(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"gain": (16, 24), "up": (16, 24), "down": (24, 16)}
    params = {
        p: jax.random.normal(k, s, dtype)
        for k, (p, s) in zip(keys, shapes.items(), strict=False)
    }
    params["bias"] = jnp.ones(16, dtype)
    x = jax.random.normal(keys[3], (64, 16), dtype)
    scores = {p: jnp.abs(w) if w.ndim == 2 else None for p, w in params.items()}
    return params, scores, x


def _error(params, x, sparsities):
    masks = {}
    for p, w in params.items():
        if w.ndim == 2:
            ranks = np.argsort(np.argsort(np.abs(w), axis=0), axis=0)
            masks[p] = ranks >= round(float(sparsities[p]) * w.shape[0])
    pruned = {p: w * masks[p] if p in masks else w for p, w in params.items()}
    out, target = _block(pruned, x)["out"], _block(params, x)["out"]
    return float(jnp.sum((out - target) ** 2))


def test_less_error_than_uniform_at_the_same_budget():
    params, scores, x = _case()
    found = allocation.by_block_error(_block, params, scores, x, sparsity=0.5, steps=60)
    assert set(found) == set(SIZES)
    assert sum(found[p] * n for p, n in SIZES.items()) == Fraction(
        sum(SIZES.values()), 2
    )
    assert found["gain"] > max(found["up"], found["down"])
    even = _error(params, x, dict.fromkeys(SIZES, 0.5))
    assert _error(params, x, found) < 0.8 * even
    _, masks = jp.prune(params, 0.5, allocation=found)
    total = sum(int(m.sum()) for m in jax.tree.leaves(masks))
    assert abs(total - sum(SIZES.values()) / 2) <= 3


def test_bfloat16_and_another_optimizer():
    params, scores, x = _case(jnp.bfloat16)
    found = allocation.by_block_error(
        _block, params, scores, x, sparsity=0.3, steps=10, optimizer=optax.sgd(1.0)
    )
    assert sum(found[p] * n for p, n in SIZES.items()) == Fraction(3, 10) * sum(
        SIZES.values()
    )


def test_mask_is_hard_forward_and_soft_backward():
    grid = jnp.arange(1, 5, dtype=jnp.float32) / 4
    w = jnp.array([[1.0], [4.0], [2.0], [3.0]])
    ranks = _block_error._ranks(jnp.abs(w))
    assert ranks.ravel().tolist() == [0, 3, 1, 2]
    logits = jnp.log(jnp.array([0.1, 0.6, 0.2, 0.1]))
    f = lambda b: _block_error._masked(w, ranks, b, grid)  # noqa: E731
    assert f(logits).ravel().tolist() == [0, 4, 0, 3]  # 0.575 of 4 is 2
    # P(rank r is pruned) is the weight of the candidates above r / 4.
    kept = lambda b: 1 - jnp.cumsum(jax.nn.softmax(b)[::-1])[::-1]  # noqa: E731
    expected = jax.jacobian(kept)(logits)[ranks.ravel()] * w
    np.testing.assert_allclose(jax.jacobian(f)(logits)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.02, 0.3, 0.5, 0.77, 0.95])
def test_start_mixes_to_the_sparsity(sparsity):
    grid = jnp.arange(1, 101, dtype=jnp.float32) / 100
    logits = _block_error._start(grid, sparsity)
    np.testing.assert_allclose(jax.nn.softmax(logits) @ grid, sparsity, atol=2e-3)


@given(
    st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=5),
    st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    st.fractions(Fraction(1, 100), Fraction(99, 100), max_denominator=500),
)
def test_budget_is_exact(found, sizes, sparsity):
    found = {str(i): x for i, x in enumerate(found)}
    sizes = dict(zip(found, sizes, strict=False))
    out = _block_error._onto_budget(found, sizes, sparsity)
    assert sum(out[p] * sizes[p] for p in out) == sparsity * sum(sizes.values())
    assert all(0 <= x < 1 for x in out.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0}, "sparsity: got 0; expected a number above 0"),
        ({"steps": 0}, "steps: got 0; expected at least 1"),
        ({"scores": {"up": None}}, "scores: the structure is not that of params"),
        (
            {"scores": dict.fromkeys(["up", "down", "gain", "bias"])},
            "scores: all are None",
        ),
        (
            {"scores": {**_case()[1], "bias": jnp.ones(16)}},
            "scores: got the shape (16,) for bias of (16,)",
        ),
        (
            {"x": jnp.full((2, 16), jnp.nan)},
            "sum to nan; expected a finite number above 0",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_refused(change, message):
    params, scores, x = _case()
    given = {"sparsity": 0.5, "steps": 1, "scores": scores, "x": x, **change}
    scores, x = given.pop("scores"), given.pop("x")
    with pytest.raises(ValueError, match=re.escape(message)):
        allocation.by_block_error(_block, params, scores, x, **given)
