"""The search of Týr-the-Pruner over variants of each group."""

import itertools
from typing import Any

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
NAMES = [f"layers/{i}/d:0" for i in range(4)]


def supernet(**options):
    options = {"ratio": 0.5, "step": 0.25, "levels": 5, "rounds": 4} | options
    return structured.supernet(GRAPH, fn, P, [X[:32], X[32:]], **options)


NET = supernet()


def test_variants_are_fitted_behind_layers_at_the_expected_ratio():
    assert NET.start == dict.fromkeys(NAMES, 2)
    assert NET.ratios == dict.fromkeys(NAMES, (0.0, 0.25, 0.5, 0.75))
    front = P  # the layers in front of the next one, pruned and fitted one by one
    for i, name in enumerate(NAMES):
        stats = jp.calibrate(fn, front, [X], statistics=("gram",))
        for level in (3, 1, 2):
            plan = structured.planned(GRAPH, {name: NET.kept[name][level]})
            wanted = plan.mask(structured.refit(plan, front, stats))
            np.testing.assert_allclose(
                NET.params(NET.start | {name: level}, P)["layers"][i]["d"],
                wanted["layers"][i]["d"], rtol=1e-3, atol=1e-4,
            )  # fmt: skip
        front = wanted
        assert [len(x) for x in NET.kept[name]] == [16, 12, 8, 4]
        for fewer, more in itertools.pairwise(NET.kept[name][::-1]):
            assert set(fewer) <= set(more)
    levels = dict(zip(NAMES, (0, 1, 2, 3), strict=True))
    plan, new = NET.plan(levels), NET.params(levels, P)
    np.testing.assert_array_equal(new["layers"][0]["d"], P["layers"][0]["d"])
    for i, n in enumerate((16, 12, 8, 4)):
        assert plan.shrink(new)["layers"][i]["u"].shape == (8, n)
    small = plan.rewrite(fn)(plan.shrink(new), X)
    np.testing.assert_allclose(small, fn(new, X), rtol=1e-4, atol=1e-5)


def test_later_layers_fit_what_reaches_them_better_than_those_of_the_full_model():
    full = supernet(ratio=0.0, levels=7)
    assert full.start == dict.fromkeys(NAMES, 0)
    stats = jp.calibrate(fn, P, [X], statistics=("gram",))
    for i, name in enumerate(NAMES):  # nothing is lost in front
        plan = structured.planned(GRAPH, {name: full.kept[name][2]})
        wanted = plan.mask(structured.refit(plan, P, stats))["layers"][i]["d"]
        found = full.leaves[name][2][f"layers/{i}/d"]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)

    x = X  # what goes into a layer behind layers at the expected ratio
    for i, (name, size) in enumerate(zip(NAMES, WEIGHTS, strict=True)):
        h, d = jax.nn.relu(x @ P["layers"][i]["u"]), P["layers"][i]["d"]
        behind, before = (
            jnp.mean((h @ (net.leaves[name][2][f"layers/{i}/d"] - d)) ** 2)
            for net in (NET, full)
        )
        assert behind < before or i == 0
        x = x + size * h @ NET.leaves[name][2][f"layers/{i}/d"]


def test_finer_levels_around_what_was_found():
    found = dict(zip(NAMES, (1, 2, 3, 2), strict=True))
    ratio = {n: NET.ratios[n][i] for n, i in found.items()}
    finer = supernet(ratio=ratio, step=0.125, levels=5)
    sizes = [[len(x) for x in finer.kept[n]] for n in NAMES]
    assert sizes == [
        [16, 14, 12, 10, 8],
        [12, 10, 8, 6, 4],
        [8, 6, 4, 2],
        [12, 10, 8, 6, 4],
    ]
    assert list(finer.start.values()) == [2, 2, 2, 2]
    assert finer.plan(finer.start).after == NET.plan(found).after
    fitness = structured.divergence(fn, P, [X])
    again = structured.search(
        finer, P, fitness, key=jax.random.key(2), generations=3, offspring=4
    )
    assert finer.plan(again.levels).after == NET.plan(found).after
    assert again.fitness <= fitness(finer.params(finer.start, P))
    some = supernet(ratio={NAMES[2]: 0.5, NAMES[0]: 0.25}, step=0.3)
    assert list(some.kept) == [NAMES[0], NAMES[2]]
    assert [len(x) for x in some.kept[NAMES[2]]] == [13, 8, 3]
    # One unit at least, so that a level is never the one before it.
    assert [len(x) for x in supernet(step=0.01).kept[NAMES[0]]] == [10, 9, 8, 7, 6]


def test_the_order_is_that_of_the_function_and_padding_has_no_weight():
    def backward(p, x):
        for i in reversed(range(4)):
            w = p["layers"][i]
            x = x + jax.nn.relu(x @ w["u"]) @ w["d"]
        return x @ p["head"]

    graph = structured.trace(backward, P, X)
    options: Any = {"ratio": 0.5, "step": 0.25, "levels": 3, "rounds": 1}
    net = structured.supernet(graph, backward, P, [X], **options)
    assert list(net.kept) == NAMES[::-1]
    padded = jnp.concatenate([X, 100 * jnp.ones((8, 8))])
    found = structured.supernet(
        graph, backward, P, [padded], **options,
        token_weights=lambda x: jnp.arange(len(x)) < len(X),
    )  # fmt: skip
    for name in NAMES:
        np.testing.assert_array_equal(net.kept[name][1], found.kept[name][1])


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

    options: Any = {"generations": 8, "offspring": 8}
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
    with pytest.raises(ValueError, match="levels: got .* layers/0/d:0: 0 to 3"):
        NET.plan({NAMES[0]: 7})
    with pytest.raises(ValueError, match="start: .* nothing can be moved"):
        structured.search(NET, P, fitness, start=dict.fromkeys(NAMES, 3), key=KEY)
    for wrong, match in (
        ({"step": 0}, "step: got 0; expected a share"),
        ({"levels": 4}, "levels: got 4; expected an odd number"),
        ({"ratio": 1.0}, "ratio: got 1.0 for layers/0/d:0"),
        ({"ratio": {"other": 0.5}}, "ratio: got other; expected some of the groups"),
        ({"ratio": {}}, "ratio: got .none.; expected some of the groups"),
        ({"kinds": ("head",)}, "no product with statistics sums over .* layers/0/u"),
        ({"damping": -1.0}, "damping: got -1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            supernet(**wrong)
    for call in (
        lambda: structured.divergence(fn, P, []),
        lambda: structured.supernet(GRAPH, fn, P, [], ratio=0.5),
    ):
        with pytest.raises(ValueError, match="batches: there is none"):
            call()

    def joined(p, x):
        h = jnp.concatenate([jax.nn.relu(x @ p["a"]), jnp.tanh(x @ p["b"])], -1)
        return h @ p["c"]

    p = {"a": P["head"], "b": P["head"], "c": jnp.ones((10, 3))}
    graph = structured.trace(joined, p, X)
    with pytest.raises(ValueError, match="graph: c reads .* and .*"):
        structured.supernet(graph, joined, p, [X], ratio=0.4)
    alone = structured.supernet(
        graph, joined, p, [X], ratio={graph.groups[0].name: 0.4}
    )
    assert len(alone.kept) == 1


def test_logits_that_are_never_and_numbers_that_are_none():
    def masked(p, x):
        return jnp.where(jnp.arange(5) < 4, fn(p, x), -jnp.inf)

    away = structured.divergence(masked, P, [X])
    assert away(P) == 0
    assert 0 < away(NET.params(NET.start, P)) < 10
    with pytest.raises(ValueError, match="fitness: it is nan at the start"):
        structured.search(NET, P, lambda p: np.nan, key=KEY)


def test_query_heads_go_with_their_keys():
    keys = jax.random.split(KEY, 4)
    p = {
        "q": jax.random.normal(keys[0], (8, 4, 2)), "k": jax.random.normal(keys[1], (8, 2, 2)),
        "v": jax.random.normal(keys[2], (8, 2, 2)), "o": jax.random.normal(keys[3], (4, 2, 8)),
    }  # fmt: skip

    def attend(p, x):
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
        return jnp.einsum(
            "bthe,hed->btd", jax.nn.dot_product_attention(q, k, v), p["o"]
        )

    x = X.reshape(4, 16, 8)
    graph = structured.trace(attend, p, x)
    net = structured.supernet(graph, attend, p, [x], ratio=0.5, step=0.5, levels=3)
    assert [graph[name].kind for name in net.kept] == ["kv_group"]
