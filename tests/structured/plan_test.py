"""Scores, choices, and what a plan does with trees and functions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 4))


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"] + p["bias"])
    return jax.nn.relu(h @ p["b"]) @ p["c"]


def params():
    shapes = {"a": (4, 16), "bias": (16,), "b": (16, 12), "c": (12, 3)}
    keys = jax.random.split(KEY, len(shapes))
    return {
        n: jax.random.normal(k, s)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


P = params()
GRAPH = structured.trace(mlp, P, X)
SCORES = structured.score_groups(GRAPH, P)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- scores


def test_scores_sum_all_slices_of_a_unit():
    squares = (P["a"] ** 2).sum(0) + P["bias"] ** 2 + (P["b"] ** 2).sum(1)
    close(SCORES["a:1"], np.sqrt(squares))
    absolute = abs(P["a"]).sum(0) + abs(P["bias"]) + abs(P["b"]).sum(1)
    close(structured.score_groups(GRAPH, P, "l1")["a:1"], absolute)


def test_taylor_and_scores_of_weights():
    grads = jax.grad(lambda p: jnp.sum(mlp(p, X) ** 2))(P)
    found = structured.score_groups(GRAPH, P, "taylor", gradients=grads)
    each = {n: abs(P[n] * grads[n]) for n in P}
    close(found["b:1"], each["b"].sum(0) + each["c"].sum(1), 1e-4)
    again = structured.score_groups(GRAPH, P, each)
    close(found["a:1"], again["a:1"], 1e-4)


def test_parts_of_an_axis_are_scored_apart():
    def fn(p, x):
        q, k = jnp.split(x @ p["qk"], 2, -1)
        return jax.nn.relu(q) @ p["o"], jnp.tanh(k) @ p["o2"]

    p = {
        "qk": jnp.arange(32.0).reshape(4, 8),
        "o": jnp.zeros((4, 2)),
        "o2": jnp.zeros((4, 2)),
    }
    graph = structured.trace(fn, p, X)
    scores = structured.score_groups(graph, p, "l1")
    close(scores["o:0"], p["qk"].sum(0)[:4])
    close(scores["o2:0"], p["qk"].sum(0)[4:])


# ---- plans


def test_local_ratio_and_ties_to_the_lower_number():
    plan = structured.plan(
        GRAPH, {n: np.ones_like(s) for n, s in SCORES.items()}, ratio=0.25
    )
    assert plan.groups["a:1"].kept.tolist() == list(range(12))
    assert plan.groups["b:1"].kept.tolist() == list(range(9))


def test_the_best_are_kept_and_nan_loses():
    scores = {n: s.copy() for n, s in SCORES.items()}
    scores["a:1"][int(np.argmax(scores["a:1"]))] = np.nan
    best = np.sort(np.argsort(-np.nan_to_num(scores["a:1"], nan=-1))[:8])
    plan = structured.plan(GRAPH, scores, ratio=0.5)
    assert plan.groups["a:1"].kept.tolist() == best.tolist()


def test_global_ranks_units_of_all_groups():
    scores = {"a:1": np.arange(16.0), "b:1": 100 + np.arange(12.0)}
    plan = structured.plan(GRAPH, scores, ratio=0.5, scope="global", normalize=False)
    assert [len(plan.groups[n].kept) for n in ("a:1", "b:1")] == [2, 12]
    even = structured.plan(GRAPH, SCORES, ratio=0.5, scope="global")
    assert sum(len(g.kept) for g in even.groups.values()) == 14


def test_isomorphic_ranks_groups_of_one_form():
    def fn(p, x):
        for layer in p["layers"]:
            x = x + jax.nn.relu(x @ layer["u"]) @ layer["d"]
        return jax.nn.relu(x @ p["u"]) @ p["d"]

    def layer(n):
        return {"u": jnp.ones((4, n)), "d": jnp.ones((n, 4))}

    p = {"layers": [layer(8), layer(8)], **layer(6)}
    graph = structured.trace(fn, p, X)
    scores = {
        "layers/0/d:0": np.arange(8.0), "layers/1/d:0": 10 + np.arange(8.0),
        "d:0": np.arange(6.0),
    }  # fmt: skip
    plan = structured.plan(
        graph, scores, ratio=0.5, scope="isomorphic", normalize=False
    )
    kept = {n: len(g.kept) for n, g in plan.groups.items()}
    assert kept == {"layers/0/d:0": 1, "layers/1/d:0": 7, "d:0": 3} or kept == {
        "layers/0/d:0": 1, "layers/1/d:0": 8, "d:0": 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["parameters", "bytes", "flops"])
def test_targets_are_met_and_not_missed_by_much(name):
    target = structured.Target(**{name: 0.4})
    plan = structured.plan(GRAPH, SCORES, target=target)
    share = getattr(plan.after, name) / getattr(plan.before, name)
    assert 0.33 < share <= 0.4


def test_costs_are_those_of_the_small_function():
    plan = structured.plan(GRAPH, SCORES, ratio=0.5)
    small = plan.shrink(P)
    assert plan.after.parameters == sum(x.size for x in jax.tree.leaves(small))
    assert plan.after.bytes == 4 * plan.after.parameters
    assert plan.after.flops == 2 * 6 * (4 * 8 + 8 * 6 + 6 * 3)


def test_rounding_least_and_largest_shares_and_overrides():
    def kept(**options):
        plan = structured.plan(GRAPH, SCORES, **options)
        return [len(plan.groups[n].kept) for n in ("a:1", "b:1")]

    assert kept(ratio=0.4, round_to=4) == [8, 8]
    kind = GRAPH["a:1"].kind
    assert kept(ratio=0.4, round_to={kind: 4}) == [8, 8]
    assert kept(ratio=0.4, round_to={}) == [10, 7]
    assert kept(ratio=0.4, round_to={"expert": 4}) == kept(ratio=0.4) == [10, 7]
    assert kept(ratio=0.9, min_keep=3) == [3, 3]
    assert kept(ratio=0.9, max_ratio=0.5) == [8, 6]
    assert kept(ratio=0.5, overrides={"c": 0.0}) == [8, 12]
    assert kept(ratio=0.0, overrides={"a:1": 0.75}) == [4, 12]
    assert kept(ratio=0.0, overrides={"b*": 0.75}) == [16, 3]  # a:1 has b too
    assert kept(ratio=0.0, overrides={"b": 0.75}) == [4, 3]
    assert kept(ratio=0.5, kinds="neuron") == [8, 6]
    assert kept(ratio=0.5, kinds="channel", overrides={"c": 0.5}) == [16, 6]


def test_round_trip_through_json():
    plan = structured.plan(GRAPH, SCORES, ratio=0.5)
    again = structured.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert str(again) == str(plan)
    close(again.rewrite(mlp)(again.shrink(P), X), plan.rewrite(mlp)(plan.shrink(P), X))


# ---- trees


def test_masks_are_true_where_weights_are_kept():
    plan = structured.plan(GRAPH, SCORES, ratio=0.5)
    masks = plan.masks(P)
    masked = jp.masks.apply(P, masks)
    jax.tree.map(np.testing.assert_array_equal, masked, plan.mask(P))
    assert int(jp.masks.count(masks).kept) == plan.after.parameters


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "chain": optax.chain(optax.clip(1.0), optax.adam(1e-2), optax.ema(0.9)),
    "partition": optax.partition(
        {"x": optax.adam(1e-2), "y": optax.sgd(1e-2, momentum=0.9)},
        {"a": "x", "bias": "y", "b": "y", "c": "x"},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_masked_model(name):
    optimizer, plan = OPTIMIZERS[name], structured.plan(GRAPH, SCORES, ratio=0.5)
    target = jax.random.normal(jax.random.key(2), (6, 3))

    def step(fn, p, state, shrink):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((fn(p, X) - target) ** 2))(
            p
        )
        updates, state = optimizer.update(shrink(grads), state, p)
        return loss, shrink(optax.apply_updates(p, updates)), state

    dense, state = P, optimizer.init(P)
    for _ in range(3):
        _, dense, state = step(mlp, dense, state, lambda t: t)
    small, small_state = plan.shrink(dense), plan.shrink_state(state, dense)
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(
        jnp.shape, optimizer.init(small)
    )
    masked, small_fn = plan.mask(dense), plan.rewrite(mlp)
    for _ in range(5):
        a, masked, state = step(mlp, masked, state, plan.mask)
        b, small, small_state = step(small_fn, small, small_state, lambda t: t)
        close(a, b)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), plan.shrink(masked), small)


def test_factored_moments_lose_what_their_axes_lose():
    p = {"w": jnp.ones((256, 200)), "v": jnp.ones((200, 2))}

    def fn(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["v"]

    graph = structured.trace(fn, p, jnp.ones((3, 256)))
    plan = structured.plan(graph, structured.score_groups(graph, p), ratio=0.25)
    optimizer = optax.scale_by_factored_rms()
    found = plan.shrink_state(optimizer.init(p), p)
    expected = jax.eval_shape(optimizer.init, plan.shrink(p))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


def test_factored_moments_that_cannot_be_told_apart_are_refused():
    optimizer = optax.scale_by_factored_rms()
    for rows, kept in ((256, 200), (200, 128)):  # square; or columns become the shorter
        p = {"w": jnp.ones((rows, 256)), "v": jnp.ones((256, 2))}
        graph = structured.trace(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], p,
                                 jnp.ones((3, rows)))  # fmt: skip
        plan = structured.planned(graph, {"w:1": np.arange(kept)})
        with pytest.raises(ValueError, match="cannot be told what to remove"):
            plan.shrink_state(optimizer.init(p), p)


def test_a_history_of_moments_is_cut_and_parts_of_moments_are_refused():
    plan = structured.plan(GRAPH, SCORES, ratio=0.5)
    history = optax.scale_by_lbfgs(3)
    found = plan.shrink_state(history.init(P), P)
    expected = history.init(plan.shrink(P))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    with pytest.raises(ValueError, match="mu/a/1 has the shape .* cannot be told"):
        plan.shrink_state(optax.sm3(0.1).init(P), P)


def test_packed_masks_in_a_state():
    tx = jp.masked(optax.adam(1e-2), jax.tree.map(lambda x: jnp.abs(x) > 0.1, P))
    state, plan = tx.init(P), structured.plan(GRAPH, SCORES, ratio=0.5)
    small = plan.shrink_state(state, P)
    jax.tree.map(
        np.testing.assert_array_equal,
        jp.get_masks(small),
        plan.shrink(jp.get_masks(state)),
    )


def test_parameters_on_the_host_stay_there():
    host, plan = jax.tree.map(np.asarray, P), structured.plan(GRAPH, SCORES, ratio=0.5)
    small = plan.shrink(host)
    assert all(isinstance(x, np.ndarray) for x in small.values())
    jax.tree.map(np.testing.assert_array_equal, small, plan.shrink(P))


def test_abstract_parameters_are_enough():
    shapes = jax.eval_shape(lambda: P)
    graph = structured.trace(mlp, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype))
    plan = structured.plan(graph, SCORES, ratio=0.5)
    small = plan.shrink(shapes)
    assert small["b"].shape == (8, 6)
    assert jax.eval_shape(plan.rewrite(mlp), small, X).shape == (6, 3)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of them"),
        (
            {"ratio": 0.5, "target": structured.Target(flops=0.5)},
            "expected one of them",
        ),
        ({"ratio": 1.0}, r"ratio: got 1.0; expected a share in \[0, 1\)"),
        ({"target": structured.Target(flops=1.5)}, "target: got"),
        ({"target": structured.Target(flops=0.001)}, "these shares remain"),
        ({"ratio": 0.5, "scope": "all"}, "scope: got 'all'"),
        ({"ratio": 0.5, "round_to": 0}, "round_to: got 0; expected whole"),
        ({"ratio": 0.5, "round_to": 2.5}, "round_to: got 2.5; expected whole"),
        ({"ratio": 0.5, "round_to": None}, "round_to: got None; expected whole"),
        ({"ratio": 0.5, "min_keep": 0}, "min_keep: got 0; expected whole"),
        (
            {"ratio": 0.5, "round_to": {"head": 0}},
            "round_to: got {'head': 0}",
        ),
        ({"ratio": 0.5, "round_to": {"heads": 2}}, r"round_to: got \['heads'\]"),
        ({"ratio": 0.5, "max_ratio": 0.0}, "max_ratio: got 0.0"),
        ({"ratio": 0.5, "kinds": "head"}, "kinds: no group is of a kind in .* neuron"),
        ({"ratio": 0.5, "kinds": ("heads",)}, r"kinds: got \['heads'\]"),
        (
            {"ratio": 0.5, "overrides": {"z*": 0.1}},
            "the pattern 'z\\*' matches no group",
        ),
        ({"ratio": 0.5, "overrides": {"a": 1.5}}, "overrides: got 1.5 for 'a'"),
    ],
)
def test_bad_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        structured.plan(GRAPH, SCORES, **options)


def test_missing_scores_and_wrong_units_are_refused():
    with pytest.raises(ValueError, match="scores: the group b:1 has none"):
        structured.plan(GRAPH, {"a:1": SCORES["a:1"]}, ratio=0.5)
    with pytest.raises(ValueError, match="a:1 has 16 units, and scores of the shape"):
        structured.plan(GRAPH, {**SCORES, "a:1": np.ones(3)}, ratio=0.5)
    with pytest.raises(ValueError, match="criterion: got 'l3'"):
        structured.score_groups(GRAPH, P, "l3")
    with pytest.raises(
        ValueError, match="gradients: the criterion 'taylor' needs them"
    ):
        structured.score_groups(GRAPH, P, "taylor")
    with pytest.raises(ValueError, match="params: a has the shape"):
        structured.score_groups(GRAPH, {**P, "a": P["b"]})
    with pytest.raises(ValueError, match="kept: no group is called 'z'"):
        structured.planned(GRAPH, {"z": [0]})
    with pytest.raises(ValueError, match="at least 1 numbers from 0 to 15"):
        structured.planned(GRAPH, {"a:1": []})
    with pytest.raises(ValueError, match="at least 1 numbers from 0 to 15"):
        structured.planned(GRAPH, {"a:1": [16]})
    with pytest.raises(ValueError, match=r"got an array of float64 and shape \(2,\)"):
        structured.planned(GRAPH, {"a:1": [0.5, 1.5]})
    with pytest.raises(ValueError, match=r"got an array of bool and shape \(2,\)"):
        structured.planned(GRAPH, {"a:1": [True, False]})
    with pytest.raises(ValueError, match="of which other units are kept"):
        structured.planned(GRAPH, {"a:1": [0, 1], "bias:0": [0, 2]})
    with pytest.raises(ValueError, match="it has no groups to prune.*output"):
        structured.plan(structured.trace(lambda p: p, P), {}, ratio=0.5)


def test_units_may_be_given_as_booleans():
    kept = np.arange(16) % 3 == 0
    plan = structured.planned(GRAPH, {"a:1": kept})
    assert plan.groups["a:1"].kept.tolist() == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int4, jnp.int8, jnp.bfloat16])
def test_weights_of_any_type_are_scored(dtype):
    p = jax.tree.map(lambda x: (2 * x).astype(dtype), P)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    close(
        structured.score_groups(GRAPH, p)["a:1"],
        structured.score_groups(GRAPH, wide)["a:1"],
    )


def test_a_plan_for_another_model_is_refused_with_the_first_path_that_differs():
    plan = structured.plan(GRAPH, SCORES, ratio=0.5)
    with pytest.raises(ValueError, match=r"params: b has the shape \(16, 5\)"):
        plan.shrink({**P, "b": jnp.ones((16, 5))})
    with pytest.raises(ValueError, match="params: there is no leaf bias"):
        plan.mask({n: x for n, x in P.items() if n != "bias"})
    with pytest.raises(ValueError, match="the leaf z is not in the plan"):
        plan.shrink({**P, "z": X})
    with pytest.raises(ValueError, match=r"the shrunk shape in the plan is \(4, 8\)"):
        plan.rewrite(mlp)(P, X)
    for data in ({**plan.to_dict(), "format": 9}, [1]):
        with pytest.raises(ValueError, match="expected 1"):
            structured.Plan.from_dict(data)
    with pytest.raises(ValueError, match="'cuts', 'groups'.* are missing"):
        structured.Plan.from_dict({"format": 1})


def test_a_state_leaf_of_another_shape_is_refused():
    plan = structured.plan(GRAPH, SCORES, ratio=0.5)
    with pytest.raises(ValueError, match=r"belongs to a has the shape \(5, 5\)"):
        plan.shrink_state({"mu": {**P, "a": jnp.ones((5, 5))}}, P)


def test_what_is_zero_goes_in_each_layer_its_own_units():
    def fn(p, x):
        def layer(x, w):
            return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (2, 5, 8)),
        "down": jax.random.normal(keys[1], (2, 8, 5)),
    }
    for i, dead in enumerate(([0, 3, 7], [1, 2])):
        params["up"] = params["up"].at[i, :, jnp.array(dead)].set(0)
        params["down"] = params["down"].at[i, jnp.array(dead)].set(0)
    x = jax.random.normal(keys[2], (4, 5))
    graph = structured.trace(fn, params, x)
    plan = structured.without_zeros(graph, params, kinds="neuron")
    kept = plan.groups["down:1"].kept
    # The first layer has five live units, and a dead one beside them.
    assert kept.shape == (2, 6)
    assert {1, 2, 4, 5, 6} < set(kept[0].tolist())
    assert kept[1].tolist() == [0, 3, 4, 5, 6, 7]
    small = plan.shrink(params)
    np.testing.assert_allclose(plan.rewrite(fn)(small, x), fn(params, x), rtol=1e-5)
    with pytest.raises(ValueError, match=r"kinds: no group is of a kind in \['head'\]"):
        structured.without_zeros(graph, params, kinds="head")


def test_statistics_may_be_left_out_of_what_is_zero():
    def fn(p, x):
        y = x @ p["up"]
        y = (y - p["stats"]["mean"]) / jnp.sqrt(p["stats"]["var"] + 1e-3) * p["scale"]
        return jax.nn.relu(y) @ p["down"]

    alive = jnp.array([1.0, 0, 0, 1])
    p = {
        "up": jnp.ones((2, 4)) * alive, "scale": alive,
        "down": jnp.ones((4, 3)) * alive[:, None],
        "stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }  # fmt: skip
    graph = structured.trace(fn, p, jnp.ones((5, 2)))
    (name,) = (g.name for g in graph.groups)
    assert structured.without_zeros(graph, p).groups[name].left == 4
    plan = structured.without_zeros(graph, p, ignore="stats/*")
    assert plan.groups[name].kept.tolist() == [0, 3]
    with pytest.raises(ValueError, match="ignore"):
        structured.without_zeros(graph, p, ignore="batch_stats/*")
    with pytest.raises(ValueError, match=r"kinds: got \['neurons'\]"):
        structured.without_zeros(graph, p, kinds="neurons")
