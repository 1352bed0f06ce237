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


def sorts_one(params, x):
    """Of two routers, one that sorts."""
    first = jnp.argsort(x @ params["a"])[:, 0]
    return first + jnp.argmax(x @ params["b"], axis=1)


def of_tokens(params, x):
    """Experts choose, as many as there are tokens."""
    gate, tokens = lax.top_k(jax.nn.softmax(x @ params["a"]).T, 2)
    return jnp.einsum("ek,ekd->d", gate, x[tokens])


def of_something_else(params, x):
    first = jnp.argsort(x @ params["a"])[:, 0]
    return first + jnp.argmax(x[:, :5], axis=1)


def of_one_branch(params, x):
    logits = lax.cond(x[0, 0] > 0, lambda: x @ params["a"], lambda: x @ params["b"])
    return jnp.argmax(logits, axis=1)


@pytest.mark.parametrize("fn", [sorts_one, of_tokens, of_something_else, of_one_branch])
def test_a_choice_of_something_else_is_not_taken(fn):
    router = PARAMS["router"]["kernel"]
    with pytest.raises(ValueError, match="where: no top_k or argmax follows a,"):
        jp.calibration.routing(fn, {"a": router, "b": 2 * router}, [X[:5]], where="a")


def test_several_routers_side_by_side_are_refused():
    params = {"a": jnp.stack([PARAMS["router"]["kernel"]] * 2)}

    def fn(params, x):
        return jax.vmap(lambda w, x: lax.top_k(x @ w, 2))(params["a"], x)

    with pytest.raises(ValueError, match="side by side"):
        jp.calibration.routing(fn, params, [X.reshape(2, 6, 6)], where="a")


def test_a_product_of_the_noise_stands_between():
    params = {**PARAMS, "noise": PARAMS["router"]["kernel"] / 3}

    def fn(params, x, key):
        logits = x @ params["router"]["kernel"]
        scale = jax.nn.softplus(x @ params["noise"])
        return lax.top_k(logits + scale * jax.random.normal(key, logits.shape), 2)

    args = X, jax.random.key(3)
    found = jp.calibration.routing(fn, params, [args], where="router/*")
    score, chosen = (np.asarray(x) for x in fn(params, *args))
    wanted = np.bincount(chosen.ravel(), minlength=5)
    np.testing.assert_array_equal(found["router/kernel"].chosen, wanted)
    wanted = np.bincount(chosen.ravel(), score.ravel(), minlength=5)
    np.testing.assert_allclose(found["router/kernel"].score, wanted, rtol=1e-5)


def of_grouped_experts(params, x):
    """The best two of six experts, of the best one of two groups."""
    scores = jax.nn.sigmoid(x @ params["router"])
    groups = (scores + params["bias"]).reshape(-1, 2, 3)
    best = lax.top_k(lax.top_k(groups, 2)[0].sum(-1), 1)[1]
    mask = jax.nn.one_hot(best[:, 0], 2)[:, :, None]
    return lax.top_k(jnp.where(mask > 0, groups, -jnp.inf).reshape(-1, 6), 2)


def test_groups_of_experts():
    key = jax.random.key(4)
    params = {"router": jax.random.normal(key, (6, 6)), "bias": jnp.arange(6.0) / 50}
    found = jp.calibration.routing(of_grouped_experts, params, [X], where="router")
    _, chosen = of_grouped_experts(params, X)
    wanted = np.bincount(np.asarray(chosen).ravel(), minlength=6)
    np.testing.assert_array_equal(found["router"].chosen, wanted)


@pytest.mark.parametrize("loop", ["fori", "slices", "pairs"])
def test_layers_that_are_taken_out_of_a_leaf_each_have_a_row(loop):
    trees = [jax.tree.map(lambda x, f=f: f * x, PARAMS) for f in (1.0, -1.0, 0.5, 2.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def at(params, i):
        return jax.tree.map(lambda x: x[i], params)

    def fn(params, x):
        if loop == "fori":
            return lax.fori_loop(0, 4, lambda i, x: layer(at(params, i), x), x)
        if loop == "slices":
            for i in range(4):
                x = layer(at(params, i), x)
            return x
        params = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), params)
        two = lambda x, p: (layer(at(p, 1), layer(at(p, 0), x)), None)  # noqa: E731
        return lax.scan(two, x, params)[0]

    found = jp.calibration.routing(fn, stacked, [X], where="router/*")["router/kernel"]
    wanted, x = [], X
    for tree in trees:
        wanted.append(by_hand(tree, x)[0])
        x = layer(tree, x)
    np.testing.assert_array_equal(found.chosen.reshape(4, 5), wanted)
    np.testing.assert_array_equal(found.tokens.reshape(4), [12] * 4)


def test_a_choice_in_another_loop_than_its_product():
    """One token after the other; of layers that are scanned, it would mix them."""

    def rows(params, x):
        return lax.map(lambda row: lax.top_k(row, 2)[1], x @ params["a"])

    def behind(params, x):
        logits = lax.scan(lambda x, w: (x, x @ w), x, params["a"])[1]
        return lax.top_k(logits, 2)[1]

    router = PARAMS["router"]["kernel"]
    found = jp.calibration.routing(rows, {"a": router}, [X], where="a")
    wanted = np.bincount(np.ravel(rows({"a": router}, X)), minlength=5)
    np.testing.assert_array_equal(found["a"].chosen, wanted)
    with pytest.raises(ValueError, match="follows a,"):
        params = {"a": jnp.stack([router, -router])}
        jp.calibration.routing(behind, params, [X], where="a")


def test_weights_and_initial_that_do_not_fit_are_refused():
    def fn(params, x):  # time first
        return lax.top_k(jnp.swapaxes(x, 0, 1) @ params["router"]["kernel"], 1)

    x = X.reshape(3, 4, 6)
    options = {"where": "router/*", "token_weights": lambda x: jnp.ones(x.shape[:2])}
    with pytest.raises(ValueError, match=r"token_weights: .*\(3, 4\).*\(4, 3\)"):
        jp.calibration.routing(fn, PARAMS, [x], **options)
    found = jp.calibration.routing(fn, PARAMS, [x], where="router/*")
    with pytest.raises(ValueError, match="initial: got shapes"):
        jp.calibration.routing(
            fn, PARAMS, [x], where="router/*", initial={"b": found["router/kernel"]}
        )
