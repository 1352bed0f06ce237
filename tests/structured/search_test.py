"""The search of Týr-the-Pruner over variants of each group."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (64, 8))
WEIGHTS = (2.0, 1.0, 0.1, 0.05)  # how much the layers matter


def fn(p, x):
    for w, size in zip(p["layers"], WEIGHTS, strict=True):
        x = x + size * jax.nn.relu(x @ w["u"]) @ w["d"]
    return x @ p["head"]


def params():
    keys = iter(jax.random.split(KEY, 10))
    layers = [
        {
            "u": jax.random.normal(next(keys), (8, 16)) / 3,
            "d": jax.random.normal(next(keys), (16, 8)) / 4,
        }
        for _ in WEIGHTS
    ]
    return {"layers": layers, "head": jax.random.normal(next(keys), (8, 5))}


P = params()
GRAPH = structured.trace(fn, P, X)
STATS = jp.calibrate(fn, P, [X], statistics=("gram",))
NET = structured.supernet(GRAPH, P, STATS, ratios=(0.0, 0.25, 0.5, 0.75), rounds=4)
NAMES = [f"layers/{i}/d:0" for i in range(4)]


def test_variants_are_those_of_each_group_alone():
    for name in NAMES:
        assert [len(x) for x in NET.kept[name]] == [16, 12, 8, 4]
        for fewer, more in itertools.pairwise(NET.kept[name][::-1]):
            assert set(fewer) <= set(more)
    levels = dict(zip(NAMES, (0, 1, 2, 3), strict=True))
    plan, new = NET.plan(levels), NET.params(levels, P)
    np.testing.assert_array_equal(new["layers"][0]["d"], P["layers"][0]["d"])
    for i, n in enumerate((16, 12, 8, 4)):
        own = structured.planned(GRAPH, {NAMES[i]: plan.groups[NAMES[i]].kept})
        wanted = own.mask(structured.refit(own, P, STATS))["layers"][i]["d"]
        np.testing.assert_array_equal(new["layers"][i]["d"], wanted)
        assert plan.shrink(new)["layers"][i]["u"].shape == (8, n)
    small = plan.rewrite(fn)(plan.shrink(new), X)
    np.testing.assert_allclose(small, fn(new, X), rtol=1e-4, atol=1e-5)


def test_divergence_is_that_of_the_logits():
    fitness = structured.divergence(fn, P, [X[:32], X[32:]])
    assert abs(fitness(P)) < 1e-6
    other = {**P, "head": 2 * P["head"]}
    p, q = (jax.nn.softmax(fn(w, X)) for w in (P, other))
    np.testing.assert_allclose(
        fitness(other), (p * jnp.log(p / q)).sum(-1).mean(), rtol=1e-4
    )


def test_the_search_keeps_the_budget_and_beats_the_uniform_one():
    fitness = structured.divergence(fn, P, [X])
    seen = []

    def counted(p):
        seen.append(fitness(p))
        return seen[-1]

    options = {"start": 2, "generations": 8, "offspring": 8}
    found = structured.search(NET, P, counted, key=jax.random.key(1), **options)
    assert sum(found.levels.values()) == 2 * 4
    assert list(found.history) == sorted(found.history, reverse=True)
    assert found.history[0] == seen[0] and found.fitness == min(seen)
    np.testing.assert_allclose(fitness(NET.params(found.levels, P)), found.fitness)
    uniform = NET.plan(dict.fromkeys(NAMES, 2))
    assert NET.plan(found.levels).after.parameters == uniform.after.parameters
    assert found.fitness < 0.7 * found.history[0]
    best = min(
        (fitness(NET.params(dict(zip(NAMES, x, strict=True)), P)), x)
        for x in itertools.product(range(4), repeat=4)
        if sum(x) == 8
    )
    assert found.fitness <= 1.2 * best[0]
    again = structured.search(NET, P, fitness, key=jax.random.key(1), **options)
    assert again.levels == found.levels


def test_messages():
    fitness = structured.divergence(fn, P, [X])
    with pytest.raises(
        ValueError, match="levels: got .* expected a number from 0 to 3"
    ):
        NET.plan({NAMES[0]: 7})
    with pytest.raises(ValueError, match="start: .* nothing can be moved"):
        structured.search(NET, P, fitness, start=3, key=KEY)
    with pytest.raises(ValueError, match="ratios: got .* rise evenly"):
        structured.supernet(GRAPH, P, STATS, ratios=(0.0, 0.1, 0.5))
    with pytest.raises(ValueError, match="batches: there is none"):
        structured.divergence(fn, P, [])

    def joined(p, x):
        h = jnp.concatenate([jax.nn.relu(x @ p["a"]), jnp.tanh(x @ p["b"])], -1)
        return h @ p["c"]

    p = {"a": P["head"], "b": P["head"], "c": jnp.ones((10, 3))}
    graph = structured.trace(joined, p, X)
    stats = jp.calibrate(joined, p, [X], statistics=("gram",))
    with pytest.raises(ValueError, match="graph: c reads .* and .*"):
        structured.supernet(graph, p, stats, ratios=(0.0, 0.4))
