"""How often routers choose each expert, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (12, 6))
PARAMS = {
    "in": jax.random.normal(jax.random.key(1), (6, 6)),
    "router": {"kernel": jax.random.normal(jax.random.key(2), (6, 5))},
    "up": jax.random.normal(jax.random.key(3), (5, 6)),
}


def layer(params, x):
    x = jnp.tanh(x @ params["in"])
    gate, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]["kernel"]), 2)
    return x + jnp.einsum("tk,tkd->td", gate, params["up"][chosen])


def by_hand(params, x, weights=None):
    scores = np.asarray(
        jax.nn.softmax(jnp.tanh(x @ params["in"]) @ params["router"]["kernel"])
    )
    weights = np.ones(len(x)) if weights is None else weights
    chosen, score = np.zeros(5), np.zeros(5)
    for row, w in zip(scores, weights, strict=True):
        for e in np.argsort(-row)[:2]:
            chosen[e] += w
            score[e] += w * row[e]
    return chosen, score


def test_counts_and_scores_over_batches():
    found = jp.calibration.routing(layer, PARAMS, [X[:8], X[8:]], where="router/*")
    chosen, score = by_hand(PARAMS, X)
    assert list(found) == ["router/kernel"] and found["router/kernel"].tokens == 12
    np.testing.assert_array_equal(found["router/kernel"].chosen, chosen)
    np.testing.assert_allclose(found["router/kernel"].score, score, rtol=1e-5)
    first = jp.calibration.routing(layer, PARAMS, [X[:8]], where="router/*")
    again = jp.calibration.routing(
        layer, PARAMS, [X[8:]], where="router/*", initial=first
    )
    np.testing.assert_array_equal(again["router/kernel"].chosen, chosen)


def test_padding_does_not_count_even_where_it_is_no_number():
    weights = np.array([1.0] * 7 + [0.0] * 5)
    x = X.at[7:].set(jnp.nan).reshape(3, 4, 6)

    def fn(params, x, weights):
        return jax.vmap(layer, in_axes=(None, 0))(params, x)

    found = jp.calibration.routing(
        fn, PARAMS, [(x, jnp.array(weights))], where="router/*",
        token_weights=lambda x, weights: weights,
    )  # fmt: skip
    chosen, score = by_hand(PARAMS, X[:7])
    np.testing.assert_array_equal(found["router/kernel"].chosen, chosen)
    np.testing.assert_allclose(found["router/kernel"].score, score, rtol=1e-5)
    with pytest.raises(ValueError, match=r"token_weights: .*shape \(3,\).*\(3, 4\)"):
        jp.calibration.routing(
            fn, PARAMS, [(x, jnp.array(weights))], where="router/*",
            token_weights=lambda x, weights: weights[:3],
        )  # fmt: skip


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_scan_each_have_a_row(remat):
    second = jax.tree.map(lambda x: -x, PARAMS)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), PARAMS, second)

    def fn(params, x):
        body = jax.checkpoint(layer) if remat else layer
        return lax.scan(lambda x, p: (body(p, x), None), x, params)[0]

    found = jp.calibration.routing(fn, stacked, [X], where="router/*")["router/kernel"]
    wanted = [by_hand(PARAMS, X)[0], by_hand(second, layer(PARAMS, X))[0]]
    np.testing.assert_array_equal(found.chosen, wanted)
    np.testing.assert_array_equal(found.tokens, [12, 12])


def test_argmax_and_two_uses_of_one_router():
    def fn(params, x):
        first = jnp.argmax(x @ params["router"]["kernel"] + 1.0, axis=-1)
        second = jnp.argmax(-(x @ params["router"]["kernel"]).T, axis=0)
        return params["up"][first] + params["up"][second]

    found = jp.calibration.routing(fn, PARAMS, [X], where="router/*")["router/kernel"]
    logits = np.asarray(X @ PARAMS["router"]["kernel"])
    wanted = np.bincount(logits.argmax(1), minlength=5)
    wanted = wanted + np.bincount(logits.argmin(1), minlength=5)
    np.testing.assert_array_equal(found.chosen, wanted)
    assert found.tokens == 24


def test_what_cannot_be_counted_is_refused():
    def sorting(params, x):
        chosen = jnp.argsort(-(x @ params["router"]["kernel"]))[:, 0]
        return params["up"][chosen]

    with pytest.raises(ValueError, match="where: no top_k or argmax follows router/k"):
        jp.calibration.routing(sorting, PARAMS, [X], where="router/*")
    with pytest.raises(ValueError, match="where: no top_k or argmax follows in"):
        jp.calibration.routing(layer, PARAMS, [X], where=("in", "router/*"))
    with pytest.raises(ValueError, match="batches: there is none"):
        jp.calibration.routing(layer, PARAMS, [], where="router/*")


def test_a_choice_belongs_to_the_nearest_product_of_its_size():
    """Of two routers, one that sorts does not take the choice of the other."""
    params = {"a": PARAMS["router"]["kernel"], "b": 2 * PARAMS["router"]["kernel"]}

    def fn(params, x):
        first = jnp.argsort(x @ params["a"])[:, 0]
        return first + jnp.argmax(x @ params["b"], axis=1)

    with pytest.raises(ValueError, match="follows a,"):
        jp.calibration.routing(fn, params, [X], where="a")
    assert list(jp.calibration.routing(fn, params, [X], where="b")) == ["b"]
