"""Optimal Brain Surgeon for units, against least squares."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (40, 5))


def fn(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


P = {
    "up": jax.random.normal(KEY, (5, 8)), "bias": jnp.ones(8) / 2,
    "down": jax.random.normal(jax.random.key(1), (8, 3)),
}  # fmt: skip
GRAPH = structured.trace(fn, P, X)
STATS = jp.calibrate(fn, P, [X[:10], X[10:]], statistics=("gram",))
H = np.asarray(jax.nn.relu(X @ P["up"] + P["bias"]), np.float64)
Y = H @ np.asarray(P["down"], np.float64)


def error(kept):
    """Of the best weights on these inputs, by the definition."""
    best, *_ = np.linalg.lstsq(H[:, kept], Y, rcond=None)
    return best, np.mean(np.sum((H[:, kept] @ best - Y) ** 2, axis=1))


def test_refit_is_least_squares():
    kept = [0, 2, 3, 7]
    plan = structured.planned(GRAPH, {"down:0": kept})
    new = structured.refit(plan, P, STATS, damping=1e-9)
    best, least = error(kept)
    np.testing.assert_allclose(
        np.asarray(new["down"])[kept], best, rtol=2e-4, atol=1e-5
    )
    small = plan.rewrite(fn)(plan.shrink(new), X)
    np.testing.assert_allclose(np.mean(np.sum((small - Y) ** 2, 1)), least, rtol=1e-4)
    plain = plan.rewrite(fn)(plan.shrink(P), X)
    assert np.mean(np.sum((plain - Y) ** 2, 1)) > 1.5 * least


def test_scores_are_the_error_that_is_left():
    scores = structured.obs_scores(GRAPH, P, STATS, damping=1e-9)["down:0"]
    for i, score in enumerate(scores):
        _, least = error([j for j in range(8) if j != i])
        np.testing.assert_allclose(score, least / 2, rtol=1e-3)


def test_steps_come_to_the_same_as_one_solution():
    local = structured._methods._obs.locals_of(GRAPH, P, STATS, 0.01, ("neuron",))[
        "down:0"
    ]
    for gone in ([1], [4, 5], [6]):
        local.remove(np.array(gone))
    kept = [0, 2, 3, 7]
    plan = structured.planned(GRAPH, {"down:0": kept})
    new = structured.refit(plan, P, STATS, damping=0.01)
    np.testing.assert_allclose(local.parts[0][0][kept], new["down"][jnp.array(kept)],
                               rtol=1e-4)  # fmt: skip


def test_of_two_equal_units_one_stays():
    twins = {**P, "up": P["up"].at[:, 1].set(P["up"][:, 0])}
    twins["down"] = P["down"].at[0].set(P["down"][1])
    graph = structured.trace(fn, twins, X)
    stats = jp.calibrate(fn, twins, [X], statistics=("gram",))
    options = {"ratio": 0.25, "damping": 1e-4}
    at_once = structured.obs_plan(graph, twins, stats, **options)
    by_round = structured.obs_plan(graph, twins, stats, rounds=9, **options)
    assert not {0, 1} & set(at_once.groups["down:0"].kept.tolist())
    assert len({0, 1} & set(by_round.groups["down:0"].kept.tolist())) == 1
    new = structured.refit(by_round, twins, stats, damping=1e-6)
    one = structured.planned(graph, {"down:0": [0, 2, 3, 4, 5, 6, 7]})
    lossless = structured.refit(one, twins, stats, damping=1e-6)
    np.testing.assert_allclose(
        one.rewrite(fn)(one.shrink(lossless), X), fn(twins, X), atol=1e-3
    )
    assert len(new["down"]) == 8


def test_heads_and_layers_of_a_scan():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=4)(x)

    x = jax.random.normal(KEY, (8, 6, 8))
    model = Model()
    p = model.init(KEY, x)
    graph = structured.trace(model.apply, p, x)
    stats = jp.calibrate(model.apply, p, [x], statistics=("gram",))
    plan = structured.obs_plan(graph, p, stats, ratio=0.5, kinds=("head",))
    new = structured.refit(plan, p, stats)
    y = model.apply(p, x)

    def distance(q):
        return float(jnp.mean((plan.rewrite(model.apply)(plan.shrink(q), x) - y) ** 2))

    assert distance(new) < 0.9 * distance(p)
    assert plan.verify(model.apply, new, x).equal

    def scanned(p, x):
        return jax.lax.scan(
            lambda x, w: (x + jax.nn.relu(x @ w["u"]) @ w["d"], None), x, p
        )[0]

    w = {"u": jax.random.normal(KEY, (2, 5, 6)), "d": jax.random.normal(KEY, (2, 6, 5))}
    graph = structured.trace(scanned, w, X)
    stats = jp.calibrate(scanned, w, [X], statistics=("gram",))
    plan = structured.planned(graph, {"d:1": [0, 1, 4]})
    new = structured.refit(plan, w, stats, damping=1e-7)
    h = jax.nn.relu(X @ w["u"][0])
    best, *_ = np.linalg.lstsq(h[:, [0, 1, 4]], h @ w["d"][0], rcond=None)
    np.testing.assert_allclose(
        new["d"][0][jnp.array([0, 1, 4])], best, rtol=1e-2, atol=1e-3
    )


def test_noise_in_place_of_data_is_better_than_no_update():
    """What OBSPA does where there are no data."""
    noise = jax.random.uniform(jax.random.key(4), (200, 5), minval=-1, maxval=1)
    stats = jp.calibrate(fn, P, [noise], statistics=("gram",))
    plan = structured.obs_plan(GRAPH, P, stats, ratio=0.25)
    new = structured.refit(plan, P, stats)

    def distance(q):
        return np.mean((plan.rewrite(fn)(plan.shrink(q), X) - Y) ** 2)

    assert distance(new) < distance(P)


def test_messages():
    plan = structured.planned(GRAPH, {"down:0": [0, 1]})
    with pytest.raises(ValueError, match="damping: got -1"):
        structured.refit(plan, P, STATS, damping=-1)
    few = jp.calibrate(fn, P, [X[:2]], statistics=("gram",))
    with pytest.raises(ValueError, match="inputs of down is not positive definite"):
        structured.obs_scores(GRAPH, P, few, damping=0.0)
    squares = jp.calibrate(fn, P, [X])
    with pytest.raises(ValueError, match="needs 'gram'"):
        structured.refit(plan, P, squares)
    with pytest.raises(ValueError, match="ratio: got 1.0 for down:0"):
        structured.obs_plan(GRAPH, P, STATS, ratio=1.0)
    with pytest.raises(ValueError, match="rounds, min_keep: got 0"):
        structured.obs_plan(GRAPH, P, STATS, ratio=0.5, rounds=0)
    with pytest.raises(ValueError, match="no product with statistics"):
        structured.obs_scores(GRAPH, P, STATS, kinds=("head",))

    def twice(p, x):
        h = jax.nn.relu(x @ p["up"])
        return h @ p["down"], jnp.tanh(h) @ p["down"]

    graph = structured.trace(twice, P, X, ignore="bias")
    stats = jp.calibrate(twice, P, [X], statistics=("gram",))
    plan = structured.planned(graph, {"down:0": [0, 1]})
    with pytest.raises(ValueError, match="down loses inputs in 2 products"):
        structured.refit(plan, P, stats)

    def scaled(p, x):
        return jax.nn.relu(x @ p["up"]) @ (p["down"] * p["scale"])

    for leaf, why in (
        (P["down"], "goes through mul"),
        (jnp.ones((8, 3), jnp.int8), "int8"),
    ):
        p = {**P, "down": leaf, "scale": jnp.ones(3)}
        graph = structured.trace(scaled, p, X)
        stats = jp.calibrate(scaled, p, [X], statistics=("gram",))
        name = next(g.name for g in graph.groups)
        plan = structured.planned(graph, {name: np.array([0, 1])})
        with pytest.raises(ValueError, match=f"down loses inputs and .*{why}"):
            structured.refit(plan, p, stats)
