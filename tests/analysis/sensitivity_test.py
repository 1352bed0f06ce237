"""PQ Index, sensitivity by leaf, and the knee of one-shot pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

NORMS = [(0.5, 1.0), (1.0, 2.0)]


@pytest.mark.parametrize(("p", "q"), NORMS)
@given(seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e3), copies=st.integers(1, 4))
def test_the_index_ignores_scale_and_copies(p, q, seed, scale, copies):
    w = jax.random.normal(jax.random.key(seed), (12,))
    index = jp.analysis.pq_index(w, p=p, q=q)
    assert 0 <= index < 1
    again = jp.analysis.pq_index(jnp.tile(w * scale, copies), p=p, q=q)
    np.testing.assert_allclose(index, again, atol=2e-6)


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_the_index_at_its_ends(p, q):
    np.testing.assert_allclose(
        jp.analysis.pq_index(jnp.full(9, -3.0), p=p, q=q), 0, atol=1e-6
    )
    one = jnp.zeros(9).at[4].set(7.0)
    wanted = 1 - 9 ** (1 / q - 1 / p)
    np.testing.assert_allclose(jp.analysis.pq_index(one, p=p, q=q), wanted, rtol=1e-6)
    assert float(jp.analysis.pq_index(jnp.zeros(4), p=p, q=q)) == 0


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_the_index_of_many_weights(p):
    """Against float64: nothing overflows."""
    w = jax.random.normal(jax.random.key(0), (20_000,))
    sizes = np.abs(np.asarray(w, np.float64))
    wanted = 1 - np.mean(sizes**p) ** (1 / p) / np.mean(sizes)
    np.testing.assert_allclose(jp.analysis.pq_index(w, p=p), wanted, rtol=1e-4)
    assert np.isnan(jp.analysis.pq_index(w.at[3].set(jnp.nan), p=p))


def test_the_index_counts_what_is_kept():
    w, mask = jnp.array([1.0, 5.0, 2.0]), jnp.array([True, False, True])
    np.testing.assert_allclose(
        jp.analysis.pq_index(w, mask), jp.analysis.pq_index(jnp.array([1.0, 2.0])),
        rtol=1e-6,
    )  # fmt: skip
    assert float(jp.analysis.pq_index(w, jnp.zeros(3, bool))) == 0


def params():
    return {
        "big": {"kernel": jnp.array([[9.0, 8.0], [7.0, 6.0]])},
        "small": {"kernel": jnp.array([[0.1, 0.2], [0.3, 0.4]])},
        "out": {"bias": jnp.ones(2)},
    }


def total(params):
    return sum(jnp.sum(x) for x in jax.tree.leaves(params))


def test_pq_index_of_a_tree_is_that_of_all_its_weights():
    keys = jax.random.split(jax.random.key(0), 4)
    tree = {
        "a": jax.random.normal(keys[0], (5, 3)),
        "b": jax.random.normal(keys[1], (7,)),
    }
    masks = {
        k: jax.random.bernoulli(key, 0.5, tree[k].shape)
        for k, key in zip(tree, keys[2:], strict=True)
    }
    flat, kept = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (tree, masks)
    )
    for mask, one in ((None, None), (masks, kept)):
        np.testing.assert_allclose(
            jp.analysis.pq_index(tree, mask), jp.analysis.pq_index(flat, one), rtol=1e-5
        )
    with pytest.raises(ValueError, match=r"mask: got leaves of the shapes \[\(7,\)\]"):
        jp.analysis.pq_index(tree, masks["b"])


def test_sensitivity_prunes_one_leaf_at_a_time():
    found = jp.analysis.sensitivity(lambda p: -total(p), params(), (0.25, 0.5))
    assert found.dense == pytest.approx(-33)
    assert set(found.losses) == {"big/kernel", "small/kernel"}
    np.testing.assert_allclose(found.losses["big/kernel"], [-27, -20])
    np.testing.assert_allclose(found.losses["small/kernel"], [-32.9, -32.7], rtol=1e-6)
    lines = str(found).splitlines()
    assert lines[0].split() == ["leaf", "25%", "50%"]
    assert lines[1].split() == ["big/kernel", "-27", "-20"]  # the most sensitive first
    assert lines[-1].split() == ["dense", "-33"]


def test_sensitivity_draws_a_line_for_each_leaf():
    pytest.importorskip("matplotlib").use("Agg")
    found = jp.analysis.sensitivity(lambda p: -total(p), params(), (0.25, 0.5))
    axes = found.plot()
    assert [line.get_label() for line in axes.lines] == [*found.losses, "dense"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), found.losses["big/kernel"])
    assert found.plot(axes) is axes


def test_sensitivity_takes_structures_and_paths():
    found = jp.analysis.sensitivity(
        lambda p: -total(p), params(), (0.5,), structure=jp.Channel(), where="big/*"
    )
    assert found.losses == {"big/kernel": pytest.approx((-33 + 14,))}


def planted():
    """Ten weights that count and thirty that do not."""
    key = jax.random.key(0)
    noise = 1e-4 * jax.random.normal(key, (30,))
    return {"kernel": jnp.concatenate([jnp.ones(10), noise]).reshape(5, 8)}


def test_the_knee_is_where_it_was_planted():
    grid = [i / 20 for i in range(1, 20)]
    found = jp.analysis.essential_sparsity(
        lambda p: jnp.abs(p["kernel"]).sum(), planted(), grid
    )
    assert found.sparsity == 0.75
    assert len(found.sparsities) == len(found.measures) == 20
    dense = jp.analysis.essential_sparsity(
        lambda p: p["kernel"].sum(), planted(), [0.9]
    )
    assert dense.sparsity == 0


def test_the_knee_with_nm():
    column = jnp.array([[1.0], [0.001], [1.0], [0.0]])
    found = jp.analysis.essential_sparsity(
        lambda p: jnp.abs(p["kernel"]).sum(), {"kernel": jnp.tile(column, (2, 3))},
        [0.5], structure=jp.NM(2, 4), allocation="uniform",
    )  # fmt: skip
    assert found.sparsity == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jp.analysis.pq_index(jnp.ones(2), p=1.0, q=0.5), "p, q: got 1.0, 0.5"),
        (lambda: jp.analysis.sensitivity(total, params(), ()), "sparsities: got none"),
        (lambda: jp.analysis.essential_sparsity(total, params(), (0.5, 0.2)), "rising"),
        (lambda: jp.analysis.essential_sparsity(lambda p: 0.0, params()), "above 0"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
