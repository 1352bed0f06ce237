"""Sparsities from outliers and similarities: their definitions, and exact budgets."""

import functools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import allocation

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {f"{i}/kernel": (8, 8) for i in range(4)}
FUNCTIONS = {
    "owl": functools.partial(allocation.owl, limit=0.1),
    "by_similarity": functools.partial(allocation.by_similarity, amplitude=0.1),
}
TABLE = {"owl": "outliers", "by_similarity": "similarities"}
BOTH = pytest.mark.parametrize("name", sorted(FUNCTIONS))


def _mean(found, shapes):
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    return sum(found[p] * sizes[p] for p in shapes) / Fraction(sum(sizes.values()))


def test_owl_by_hand():
    ratios = [6.0, 2.0, 3.0, 4.0]
    found = allocation.owl(
        SHAPES, 0.7, outliers={f"{i}/*": r for i, r in enumerate(ratios)}, limit=0.08
    )
    d = np.array(ratios)
    d = (d - d.min()) / (d.max() - d.min()) * 0.08 * 2
    expected = 1 - (d - d.mean() + (1 - 0.7))
    np.testing.assert_allclose([float(s) for s in found.values()], expected, rtol=1e-12)
    assert _mean(found, SHAPES) == Fraction(7, 10)


@BOTH
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6),
    st.lists(st.integers(1, 40), min_size=6, max_size=6),
    st.fractions(0, Fraction(89, 100), max_denominator=1000),
)
def test_budget_is_exact(name, values, sides, sparsity):
    shapes = {
        f"{i}/w": (n, 3) for i, (n, _) in enumerate(zip(sides, values, strict=False))
    }
    table = {f"{i}/*": v for i, v in enumerate(values)}
    try:
        found = FUNCTIONS[name](shapes, sparsity, **{TABLE[name]: table})
    except ValueError as e:
        assert "would leave nothing" in str(e)
        assume(False)
    assert _mean(found, shapes) == sparsity
    assert all(0 <= s < 1 for s in found.values())
    assert max(found.values()) - min(found.values()) <= Fraction(1, 5)


@BOTH
def test_equal_blocks_get_the_same(name):
    table = dict.fromkeys(["0/*", "1/*", "2/*", "3/*"], 0.25)
    found = FUNCTIONS[name](SHAPES, 0.3, **{TABLE[name]: table})
    assert set(found.values()) == {Fraction(3, 10)}


@BOTH
def test_order_of_the_blocks(name):
    table = {"0/*": 0.9, "1/*": 0.5, "2/*": 0.1, "3/*": 0.0}
    found = FUNCTIONS[name](SHAPES, 0.5, **{TABLE[name]: table})
    order = sorted(found, key=found.__getitem__, reverse=name == "by_similarity")
    assert order == list(SHAPES)


def test_nothing_passes_dense():
    table = {"0/*": 1.0, "1/*": 0.9, "2/*": 0.1, "3/*": 0.0}
    found = allocation.owl(SHAPES, 0.05, outliers=table, limit=0.2)
    assert found["0/kernel"] == 0
    assert _mean(found, SHAPES) == Fraction(1, 20)


def test_pruning_takes_it():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        str(i): {"kernel": jax.random.normal(k, (40, 40))} for i, k in enumerate(keys)
    }
    table = {"0/*": 4.0, "1/*": 3.0, "2/*": 2.0, "3/*": 0.0}
    divide = functools.partial(allocation.owl, outliers=table)
    _, masks = jp.prune(params, 0.5, allocation=divide)
    kept = [int(masks[str(i)]["kernel"].sum()) for i in range(4)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] - kept[3] == round(0.16 * 1600)
    assert abs(sum(kept) - 3200) <= 2  # each leaf rounds once
    shapes = {f"{i}/kernel": (40, 40) for i in range(4)}
    _, again = jp.prune(params, 0.5, allocation=divide(shapes, 0.5))
    jax.tree.map(np.testing.assert_array_equal, masks, again)


def test_outlier_ratio_is_over_all_matrices_of_a_block():
    rng = np.random.default_rng(0)
    a, b = rng.exponential(size=(7, 9)), 3 * rng.exponential(size=(5, 4))
    every = np.concatenate([a.ravel(), b.ravel()])
    expected = (every > 2 * every.mean()).mean()
    measure = jax.jit(functools.partial(allocation.outlier_ratio, multiple=2.0))
    np.testing.assert_allclose(
        measure({"a": jnp.asarray(a), "b": jnp.asarray(b)}), expected
    )
    half = {"a": jnp.asarray(a, jnp.bfloat16)}
    assert 0 < measure(half) < 1
    assert allocation.outlier_ratio(jnp.ones((3, 3))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: allocation.owl(SHAPES, 0.5, outliers={"9/*": 1.0}),
            "outliers: the pattern '9/*' matches no leaf",
        ),
        (
            lambda: allocation.owl(SHAPES, 0.5, outliers={"0/*": 1.0}),
            "outliers: no pattern of ['0/*'] matches 1/kernel",
        ),
        (
            lambda: allocation.owl(SHAPES, 0.5, outliers={"*": math.nan}),
            "outliers: got nan for 0/kernel",
        ),
        (
            lambda: allocation.owl(SHAPES, 0.5, outliers={"*": 1.0}, limit=-1),
            "limit: got -1; expected a finite number of 0 or more",
        ),
        (
            lambda: allocation.owl(SHAPES, 0.95, outliers={"*": 1.0, "0/*": 0.0}),
            "limit: 0.08 with sparsity 0.95 would leave nothing of 0/kernel",
        ),
        (
            lambda: allocation.by_similarity(SHAPES, 1.5, similarities={"*": 1.0}),
            "sparsity: got 1.5",
        ),
        (lambda: allocation.outlier_ratio({}), "scores: got no score"),
        (
            lambda: allocation.outlier_ratio(jnp.ones(2), multiple=0),
            "multiple: got 0; expected a finite number above 0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
