"""Experts that a task needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
WIDTH, HIDDEN, EXPERTS, TOP = 8, 10, 6, 2
X = jax.random.normal(KEY, (4, 5, WIDTH))


def mixture(w, x):
    logits = x @ w["router"]
    values, chosen = jax.lax.top_k(logits, TOP)
    gates = jax.nn.softmax(values, -1)
    up, down = w["up"][chosen], w["down"][chosen]  # [..., k, width, hidden]
    h = jax.nn.silu(jnp.einsum("btd,btkdf->btkf", x, up))
    return jnp.einsum("btkf,btkfd,btk->btd", h, down, gates)


def dense(w, x):
    """The same, every expert computed for every token."""
    logits = x @ w["router"]
    least = jax.lax.top_k(logits, TOP)[0][..., -1:]
    gates = jax.nn.softmax(jnp.where(logits >= least, logits, -jnp.inf), -1)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["up"]))
    return jnp.einsum("btef,efd,bte->btd", h, w["down"], gates)


def fn(p, x):
    for w in p["layers"]:
        x = x + mixture(w, x)
    return x @ p["head"]


def params():
    keys = iter(jax.random.split(KEY, 20))

    def new(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    layers = [
        {
            "router": new(WIDTH, EXPERTS), "up": new(EXPERTS, WIDTH, HIDDEN),
            "down": new(EXPERTS, HIDDEN, WIDTH),
        }
        for _ in range(2)
    ]  # fmt: skip
    return {"layers": layers, "head": new(WIDTH, 3)}


P = params()
GRAPH = structured.trace(fn, P, X)
GROUPS = [g.name for g in GRAPH.groups if g.kind == "expert"]


def chosen_logits(logits, k, confidence=None):
    """By the definition, a token at a time."""
    found = np.zeros(logits.shape[-1])
    rows = np.asarray(logits).reshape(-1, logits.shape[-1])
    for row in rows:
        best = np.argsort(-row)[:k]
        shares = np.exp(row[best]) / np.exp(row[best]).sum()
        for e, share in zip(best, shares, strict=True):
            if confidence is None or share >= confidence:
                found[e] += row[e]
    return found / len(rows)


@pytest.mark.parametrize("confidence", [None, 0.6])
def test_premoe_by_the_definition(confidence):
    assert len(GROUPS) == 2
    found = structured.premoe(GRAPH, fn, P, [X[:1], X[1:]], confidence=confidence)
    x = X
    for name, w in zip(GROUPS, P["layers"], strict=True):
        wanted = chosen_logits(x @ w["router"], TOP, confidence)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)
        x = x + mixture(w, x)


def test_padding_does_not_count():
    weights = jnp.broadcast_to(jnp.arange(5) < 3, (4, 5))
    found = structured.premoe(
        GRAPH, fn, P, [X.at[:, 3:].set(jnp.nan)], token_weights=lambda x: weights
    )
    wanted = structured.premoe(GRAPH, fn, P, [X[:, :3]])
    for name in GROUPS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_layers_of_a_scan_are_summed():
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *P["layers"])

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (x + dense(w, x), None), x, p)[0]

    graph = structured.trace(scanned, stacked, X)
    (name,) = (g.name for g in graph.groups if g.kind == "expert")
    found = structured.premoe(graph, scanned, stacked, [X], k=TOP)[name]
    apart = structured.premoe(GRAPH, fn, P, [X])
    np.testing.assert_allclose(found, sum(apart[n] for n in GROUPS), rtol=1e-4)


def test_planted_specialists_are_found_and_serve_their_task_alone():
    p = jax.tree.map(lambda x: x, P)
    names = {"first": (0, 1, 2), "second": (3, 4, 5)}
    for w in p["layers"]:  # tokens of the second task have a large last feature
        sign = jnp.where(jnp.arange(EXPERTS) < 3, -8.0, 8.0)
        w["router"] = w["router"].at[-1].set(sign)
        w["down"] = w["down"].at[..., -1].set(0.0)
    tasks = {"first": X.at[..., -1].set(-1.0), "second": X.at[..., -1].set(1.0)}
    graph = structured.trace(fn, p, X)
    profiles = {}
    for task, x in tasks.items():
        scores = profiles[task] = structured.premoe(graph, fn, p, [x])
        plan = structured.plan(graph, scores, ratio=0.5, kinds=("expert",))
        for name in GROUPS:
            assert plan.groups[name].kept.tolist() == list(names[task])
        small = plan.rewrite(fn, removed="absent")(plan.shrink(p), x)
        np.testing.assert_allclose(small, fn(p, x), rtol=1e-4, atol=1e-5)
    query = structured.premoe(graph, fn, p, [tasks["second"][:1, :3]])
    assert structured.nearest_task(profiles, query) == "second"


def test_a_shrunk_router_is_one_that_never_chooses_what_is_gone():
    gone = jnp.array([1, 4])

    def without(p, x):
        for w in p["layers"]:
            logits = (x @ w["router"]).at[..., gone].set(-jnp.inf)
            values, chosen = jax.lax.top_k(logits, TOP)
            gates = jax.nn.softmax(values, -1)
            h = jax.nn.silu(jnp.einsum("btd,btkdf->btkf", x, w["up"][chosen]))
            x = x + jnp.einsum("btkf,btkfd,btk->btd", h, w["down"][chosen], gates)
        return x @ p["head"]

    plan = structured.planned(GRAPH, {n: np.array([0, 2, 3, 5]) for n in GROUPS})
    small = plan.rewrite(fn, removed="absent")(plan.shrink(P), X)
    np.testing.assert_allclose(small, without(P, X), rtol=1e-5, atol=1e-6)
    every = structured.planned(GRAPH, {n: np.arange(EXPERTS) for n in GROUPS})
    np.testing.assert_allclose(every.rewrite(fn)(P, X), fn(P, X), rtol=1e-6)


@pytest.mark.parametrize("layer", [mixture, dense])
def test_reap_by_the_definition(layer):
    w = P["layers"][0]
    found = structured.reap(layer, w, [X[:1], X[1:]], experts={"down": 0})
    values, chosen = jax.lax.top_k(X @ w["router"], TOP)
    gates = jax.nn.softmax(values, -1)
    each = jnp.einsum(
        "btef,efd->bted",
        jax.nn.silu(jnp.einsum("btd,edf->btef", X, w["up"])), w["down"],
    )  # fmt: skip
    norms = jnp.linalg.norm(each, axis=-1)
    for e in range(EXPERTS):
        gate = (gates * (chosen == e)).sum(-1)
        sent = (chosen == e).any(-1)
        wanted = (gate * norms[..., e]).sum() / max(int(sent.sum()), 1)
        np.testing.assert_allclose(found[e], wanted, rtol=1e-4)


def test_messages():
    with pytest.raises(ValueError, match="confidence: got 0"):
        structured.premoe(GRAPH, fn, P, [X], confidence=0)
    with pytest.raises(ValueError, match="k: got 9; expected a number from 1 to 6"):
        structured.premoe(GRAPH, fn, P, [X], k=9)
    with pytest.raises(ValueError, match="batches: there is none"):
        structured.premoe(GRAPH, fn, P, [])
    with pytest.raises(ValueError, match="no product without a bias gives a number"):
        structured.premoe(GRAPH, fn, P, [X], kinds=("head",))
    w = P["layers"][0]
    with pytest.raises(ValueError, match="experts: got the axis 0 of 'out'"):
        structured.reap(mixture, w, [X], experts={"out": 0})
    with pytest.raises(ValueError, match="experts: the axes have the sizes"):
        structured.reap(mixture, w, [X], experts={"down": 0, "up": 1})
    with pytest.raises(ValueError, match="batches: there is none"):
        structured.reap(mixture, w, [], experts={"down": 0})
    with pytest.raises(ValueError, match="profiles: got"):
        structured.nearest_task({}, {"moe": np.ones(2)})
