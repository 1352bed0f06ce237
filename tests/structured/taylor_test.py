"""LLM-Pruner's importance against the true change of a loss; SPA's aggregation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 4))


def fn(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


PARAMS = {
    "up": jax.random.normal(KEY, (4, 6)), "bias": jnp.ones(6),
    "down": jax.random.normal(KEY, (6, 3)),
}  # fmt: skip
GRAPH = structured.trace(fn, PARAMS, X)
CURVATURE = jax.tree.map(lambda w: 0.1 + jnp.abs(jnp.sin(w * 9)), PARAMS)


def test_the_mixed_form_is_the_change_of_a_quadratic_loss():
    def loss(p):
        return sum(
            0.5 * jnp.sum(h * w * w)
            for h, w in zip(*map(jax.tree.leaves, (CURVATURE, p)), strict=True)
        )

    grads = jp.calibration.Gradients(jnp.ones(()), jax.grad(loss)(PARAMS), CURVATURE)
    scores = structured.taylor(GRAPH, PARAMS, grads)["down:0"]
    for i, score in enumerate(scores):
        plan = structured.planned(GRAPH, {"down:0": [j for j in range(6) if j != i]})
        np.testing.assert_allclose(
            loss(PARAMS) - loss(plan.mask(PARAMS)), score, rtol=1e-5
        )


def test_forms_by_hand():
    key = jax.random.key(3)
    g = jax.tree.map(lambda w: jax.random.normal(key, w.shape), PARAMS)
    grads = jp.calibration.Gradients(jnp.ones(()), g, CURVATURE)
    one = {n: g[n] * PARAMS[n] for n in PARAMS}
    two = {n: CURVATURE[n] * PARAMS[n] ** 2 for n in PARAMS}
    mixed = {n: abs(one[n] - two[n] / 2) for n in PARAMS}

    def members(terms):
        return [terms["bias"], terms["down"].sum(1), terms["up"].sum(0)]

    def check(form, wanted, **options):
        found = structured.taylor(GRAPH, PARAMS, grads, form=form, **options)["down:0"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4)

    check("vector", sum(map(abs, members(one))))
    check("first", sum(members(jax.tree.map(abs, one))))
    check("second", sum(members(two)))
    for reduction in ("sum", "mean", "max", "prod"):
        wanted = getattr(np, reduction)(np.stack(members(mixed)), axis=0)
        check("mixed", wanted, reduction=reduction)
    same = structured.score_groups(
        GRAPH, PARAMS, "taylor", gradients=g
    )  # of first order, weight by weight
    check("first", same["down:0"])


def test_layers_of_a_scan_are_vectors_of_their_own():
    def scanned(p, x):
        return jax.lax.scan(
            lambda x, w: (x + jnp.tanh(x @ w["u"]) @ w["d"], None), x, p
        )[0]

    p = {"u": jax.random.normal(KEY, (2, 4, 5)), "d": jax.random.normal(KEY, (2, 5, 4))}
    g = jax.tree.map(jnp.cos, p)
    graph = structured.trace(scanned, p, X)
    grads = jp.calibration.Gradients(jnp.ones(()), g, g)
    found = structured.taylor(graph, p, grads, form="vector")["d:1"]
    wanted = sum(
        abs((g["d"] * p["d"])[i].sum(1)) + abs((g["u"] * p["u"])[i].sum(0))
        for i in range(2)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_leaves_without_a_gradient_count_as_0():
    def loss(p, x):
        return jnp.sum(fn({**p, "down": p["down"] * p["scale"].astype(jnp.float32)}, x))

    p = {**PARAMS, "scale": jnp.ones(3, jnp.int8)}
    graph = structured.trace(loss, p, X)
    grads = jp.calibration.gradients(loss, p, [X], per_example=True)
    assert grads.mean["scale"] is None
    found = structured.taylor(graph, p, grads)["down:0"]
    assert (found > 0).any() and np.isfinite(found).all()


@pytest.mark.parametrize("normalize", ["none", "sum", "mean", "max", "gaussian"])
def test_aggregates_by_hand(normalize):
    size = jax.tree.map(jnp.abs, PARAMS)
    members = [size["bias"], size["down"].sum(1), size["up"].sum(0)]
    by = {
        "none": lambda x: x, "sum": lambda x: x / x.sum(), "mean": lambda x: x / x.mean(),
        "max": lambda x: x / x.max(), "gaussian": lambda x: (x - x.mean()) / (x.std() or 1),
    }[normalize]  # fmt: skip
    for reduction in ("sum", "mean", "max", "prod"):
        found = structured.aggregate(
            GRAPH, size, normalize=normalize, reduction=reduction
        )["down:0"]
        wanted = getattr(np, reduction)(np.stack([by(x) for x in members]), axis=0)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    plain = structured.aggregate(GRAPH, size, normalize="none")["down:0"]
    same = structured.score_groups(GRAPH, PARAMS, size)["down:0"]
    np.testing.assert_allclose(plain, same, rtol=1e-5)


def test_no_leaf_decides_alone():
    large = {**PARAMS, "up": 1e4 * PARAMS["up"]}
    size, other = (jax.tree.map(jnp.abs, p) for p in (PARAMS, large))
    a, b = (structured.aggregate(GRAPH, x)["down:0"] for x in (size, other))
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_messages():
    g = jp.calibration.Gradients(jnp.ones(()), PARAMS, PARAMS)
    with pytest.raises(ValueError, match="form: got 'param_mix'"):
        structured.taylor(GRAPH, PARAMS, g, form="param_mix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: got 'last'"):
        structured.taylor(GRAPH, PARAMS, g, reduction="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalize: got 'l2'"):
        structured.aggregate(GRAPH, PARAMS, normalize="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores: there is no leaf up"):
        structured.aggregate(GRAPH, {"down": PARAMS["down"], "bias": PARAMS["bias"]})
    bad = g._replace(mean={**PARAMS, "up": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"gradients: up has the shape \(2, 2\)"):
        structured.taylor(GRAPH, PARAMS, bad)
