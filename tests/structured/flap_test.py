"""FLAP: fluctuations, one threshold for all groups, and biases that take over."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 5, 4))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
        return nn.Dense(8)(nn.relu(nn.Dense(12)(x)))


MODEL = Attention()
PARAMS = MODEL.init(KEY, X)
GRAPH = structured.trace(MODEL.apply, PARAMS, X)
STATS = jp.calibrate(
    MODEL.apply, PARAMS, [X[:2], X[2:]], statistics=("square", "variance")
)
HEADS = "MultiHeadDotProductAttention_0/key/kernel:1"
NEURONS = "Dense_1/kernel:0"


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["low"]) @ p["down"] + p["high"]


def mlp_params(neurons=6):
    up, down, low, high = jax.random.split(KEY, 4)
    return {
        "up": jax.random.normal(up, (4, neurons)), "low": jax.random.normal(low, (neurons,)),
        "down": jax.random.normal(down, (neurons, 3)), "high": jax.random.normal(high, (3,)),
    }  # fmt: skip


def hidden(p, x):
    return jax.nn.relu(x @ p["up"] + p["low"]).reshape(-1, p["up"].shape[1])


# ---- scores


def test_fluctuation_is_the_variance_times_the_squared_norm():
    p = mlp_params()
    graph = structured.trace(mlp, p, X)
    stats = jp.calibrate(mlp, p, [X[:2], X[2:]], statistics=("variance",))
    found = structured.fluctuation(graph, p, stats)["down:0"]
    h = hidden(p, X)
    norms = (p["down"] ** 2).sum(1)
    np.testing.assert_allclose(found, h.var(0) * norms, rtol=1e-4)
    alone = structured.fluctuation(graph, p, stats, form="ifv")["down:0"]
    np.testing.assert_allclose(alone, h.var(0), rtol=1e-4)


def test_fluctuation_is_what_a_mean_in_place_of_the_unit_costs():
    p = mlp_params()
    graph = structured.trace(mlp, p, X)
    stats = jp.calibrate(mlp, p, [X], statistics=("variance",))
    scores = structured.fluctuation(graph, p, stats)["down:0"]
    y = mlp(p, X).reshape(-1, 3)
    for i, score in enumerate(scores):
        kept = [j for j in range(6) if j != i]
        plan = structured.planned(graph, {"down:0": kept})
        small = plan.shrink(structured.compensate(graph, plan, p, stats))
        error = plan.rewrite(mlp)(small, X).reshape(-1, 3) - y
        np.testing.assert_allclose((error**2).sum(1).mean(), score, rtol=1e-3)


def test_heads_sum_their_inputs():
    found = structured.fluctuation(GRAPH, PARAMS, STATS, form="wifn")[HEADS]
    ((site, inputs),) = STATS["MultiHeadDotProductAttention_0/out/kernel"]
    out = PARAMS["params"]["MultiHeadDotProductAttention_0"]["out"]["kernel"]
    each = jnp.sqrt(inputs.square[0, 0].reshape(4, 2)) * abs(out).mean(-1)
    np.testing.assert_allclose(found, each.sum(1), rtol=1e-5)


def test_layers_of_a_scan_are_summed():
    def fn(p, x):
        def layer(x, w):
            return x + jax.nn.relu(x @ w["u"]) @ w["d"], None

        return jax.lax.scan(layer, x, p)[0]

    p = {"u": jax.random.normal(KEY, (2, 4, 6)), "d": jax.random.normal(KEY, (2, 6, 4))}
    graph = structured.trace(fn, p, X)
    stats = jp.calibrate(fn, p, [X], statistics=("variance",))
    found = structured.fluctuation(graph, p, stats)["d:1"]
    x, total = X, 0
    for u, d in zip(p["u"], p["d"], strict=True):
        h = jax.nn.relu(x @ u)
        total += h.reshape(-1, 6).var(0) * (d**2).sum(1)
        x = x + h @ d
    np.testing.assert_allclose(found, total, rtol=1e-4)


# ---- the plan


def test_the_budget_is_met_to_the_cost_of_a_unit():
    costs = structured._methods._flap.unit_costs(GRAPH)
    assert costs[NEURONS] == 8 + 1 + 8
    assert costs[HEADS] == 4 * 8 * 2 + 3 * 2
    total = 12 * costs[NEURONS] + 4 * costs[HEADS]
    for ratio in (0.0, 0.2, 0.5, 0.8):
        plan = structured.flap(GRAPH, PARAMS, STATS, ratio=ratio)
        gone = plan.before.parameters - plan.after.parameters
        assert abs(gone - ratio * total) <= max(costs.values())
        assert plan.verify(MODEL.apply, PARAMS, X).equal
    assert len(plan.groups[HEADS].kept) >= 1 and len(plan.groups[NEURONS].kept) >= 1


def test_rounded_groups_keep_their_best():
    plain, rounded = (
        structured.flap(GRAPH, PARAMS, STATS, ratio=0.5, round_to=step)
        for step in (1, {"neuron": 8})
    )
    assert rounded.groups[NEURONS].left == 8 != plain.groups[NEURONS].left
    assert rounded.groups[HEADS].kept.tolist() == plain.groups[HEADS].kept.tolist()
    scores = structured.fluctuation(GRAPH, PARAMS, STATS)[NEURONS]
    assert set(rounded.groups[NEURONS].kept) == set(np.argsort(-scores)[:8])


def test_standardised_scores_are_ranked_together():
    # The second layer fluctuates a hundred times as much, and loses no less for it.
    def fn(p, x):
        a = jax.nn.relu(x @ p["a"]) @ p["b"]
        return a, jax.nn.relu(100 * x @ p["c"]) @ p["d"]

    a = jax.random.normal(KEY, (4, 10))
    b = jax.random.normal(jax.random.key(1), (10, 3))
    p = {"a": a, "b": b, "c": a, "d": b}
    graph = structured.trace(fn, p, X)
    stats = jp.calibrate(fn, p, [X], statistics=("variance",))
    plan = structured.flap(graph, p, stats, ratio=0.5)
    one, two = (plan.groups[n].kept.tolist() for n in ("a:1", "c:1"))
    assert one == two and len(one) == 5


# ---- biases


def test_a_constant_unit_is_replaced_without_loss():
    p = mlp_params()
    p["up"] = p["up"].at[:, 2].set(0.0)
    p["low"] = p["low"].at[2].set(1.5)
    graph = structured.trace(mlp, p, X)
    stats = jp.calibrate(mlp, p, [X], statistics=("variance",))
    assert np.argmin(structured.fluctuation(graph, p, stats)["down:0"]) == 2
    plan = structured.planned(graph, {"down:0": [0, 1, 3, 4, 5]})
    new = structured.compensate(graph, plan, p, stats)
    other = jax.random.normal(jax.random.key(9), (7, 4))
    small = plan.rewrite(mlp)(plan.shrink(new), other)
    np.testing.assert_allclose(small, mlp(p, other), rtol=1e-5, atol=1e-5)
    assert not np.allclose(
        plan.rewrite(mlp)(plan.shrink(p), other), mlp(p, other), 1e-3
    )


def test_mean_outputs_of_attention_stay():
    plan = structured.planned(GRAPH, {HEADS: [0, 3]})
    new = structured.compensate(GRAPH, plan, PARAMS, STATS)

    def attention(p, x):  # the part in front of everything that is not linear
        class Part(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(8)(x)
                return nn.MultiHeadDotProductAttention(num_heads=4)(x)

        return Part().apply(p, x)

    y, z, without = (
        attention(p, X).mean((0, 1))
        for p in (PARAMS, plan.mask(new), plan.mask(PARAMS))
    )
    np.testing.assert_allclose(y, z, atol=1e-5)
    assert not np.allclose(y, without, atol=1e-3)
    assert plan.verify(MODEL.apply, new, X).equal


def test_convolutions_and_stacks_have_biases_too():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3))(x))
            return nn.Conv(5, (3, 3), padding="VALID")(x)

    x = jax.random.normal(KEY, (2, 6, 6, 3))
    net = Net()
    p = net.init(KEY, x)["params"]
    p["Conv_0"]["kernel"] = p["Conv_0"]["kernel"].at[..., 1].set(0.0)
    p["Conv_0"]["bias"] = p["Conv_0"]["bias"].at[1].set(2.0)

    def fn(p, x):
        return net.apply({"params": p}, x)

    graph = structured.trace(fn, p, x)
    stats = jp.calibrate(fn, p, [x], statistics=("mean",))
    plan = structured.planned(graph, {"Conv_0/kernel:3": [0, 2, 3, 4, 5]})
    new = structured.compensate(graph, plan, p, stats)
    small = plan.rewrite(fn)(plan.shrink(new), x)
    np.testing.assert_allclose(small, fn(p, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scanned", [False, True])
def test_products_without_a_bias_get_one(scanned):
    def layer(x, w):
        return x + jax.nn.relu(jnp.einsum("btd,hd->bth", x, w["u"]) + 1) @ w["d"], None

    def fn(p, x):
        if scanned:
            return jax.lax.scan(jax.checkpoint(layer), x, p)[0]
        return layer(x, p)[0]

    shapes = {"u": (6, 4), "d": (6, 4)}
    p = {
        n: jax.random.normal(KEY, ((2, *s) if scanned else s))
        for n, s in shapes.items()
    }
    p["u"] = p["u"].at[..., 3, :].set(0.0)  # relu(0 + 1) is constant
    plain = structured.trace(fn, p, X)
    name = "d:1" if scanned else "d:0"
    plan = structured.planned(plain, {name: [0, 1, 2, 4, 5]})
    stats = jp.calibrate(fn, p, [X], statistics=("mean",))
    with pytest.raises(ValueError, match="d loses inputs.*add_biases.*where='d'"):
        structured.compensate(plain, plan, p, stats)

    new_fn, new = structured.add_biases(fn, p, X, where=("d",))
    np.testing.assert_allclose(new_fn(new, X), fn(p, X), rtol=1e-6)
    assert new.biases["d"].shape == ((2, 4) if scanned else (4,))
    graph = structured.trace(new_fn, new, X)
    group = next(g for g in graph.groups if g.kind == "neuron")
    plan = structured.planned(graph, {group.name: [0, 1, 2, 4, 5]})
    stats = jp.calibrate(new_fn, new, [X], statistics=("mean",))
    better = structured.compensate(graph, plan, new, stats)
    other = X[:1, :3]
    small = jax.jit(plan.rewrite(new_fn))(plan.shrink(better), other)
    np.testing.assert_allclose(small, fn(p, other), rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: new_fn(p, X).sum())(better)
    assert float(jnp.abs(grads.biases["d"]).min()) > 0


def test_a_shared_or_a_late_bias_is_none():
    def fn(p, x):
        a = jax.nn.relu(x @ p["a"])
        b = (a @ p["b"]) * 2 + p["late"]
        c = a @ p["c"] + p["shared"]
        return b, c, a @ p["d"] + p["shared"], a @ p["e"] + p["own"]

    p = {n: jnp.ones((4, 4)) for n in "abcde"}
    p |= {n: jnp.ones(4) for n in ("late", "shared", "own")}
    found = structured._methods._biases.biases(structured.trace(fn, p, X))
    assert found == {"e": "own"}


# ---- bad input


def test_messages():
    p = mlp_params()
    graph = structured.trace(mlp, p, X)
    stats = jp.calibrate(mlp, p, [X], statistics=("square",))
    with pytest.raises(ValueError, match="wifv needs 'variance'"):
        structured.flap(graph, p, stats, ratio=0.5)
    with pytest.raises(ValueError, match="form: got 'x'"):
        structured.fluctuation(graph, p, stats, form="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ratio: got 1.0"):
        structured.flap(graph, p, stats, ratio=1.0, form="wifn")
    with pytest.raises(ValueError, match="min_keep: got 0"):
        structured.flap(graph, p, stats, ratio=0.5, form="wifn", min_keep=0)
    with pytest.raises(
        ValueError, match="no product with statistics sums over.*down:0"
    ):
        structured.fluctuation(graph, p, stats, form="wifn", kinds=("expert",))
    with pytest.raises(
        ValueError, match="no product with statistics sums over.*down:0"
    ):
        structured.flap(graph, p, stats, ratio=0.5, kinds=("expert",))
    plan = structured.planned(graph, {"down:0": np.array([0, 1])})
    some = jp.calibrate(mlp, p, [X], statistics=("mean",), where="up")
    with pytest.raises(
        ValueError, match="down loses inputs, and there are no statistics"
    ):
        structured.compensate(graph, plan, p, some)
    with pytest.raises(ValueError, match="where: low is used by add"):
        structured.add_biases(mlp, p, X, where="low")
