"""Statistics of batch norms after pruning, against their definition."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
# Batches whose means lie apart.
X = jax.random.normal(KEY, (4, 32, 5)) + jnp.arange(4.0)[:, None, None]


class Net(nn.Module):
    decay: float = 0.99

    @nn.compact
    def __call__(self, x, train=False):
        for i, decay in enumerate((self.decay, 0.5)):
            x = nn.Dense(8, name=f"dense{i}")(x)
            norm = nn.BatchNorm(not train, momentum=decay, name=f"norm{i}")
            x = nn.relu(norm(x))
        return nn.Dense(3, name="head")(x)


NET = Net()
V = NET.init(KEY, X[0])


def train(v, x):
    return NET.apply(v, x, train=True, mutable=["batch_stats"])[1]


def hidden(v, x, layer):
    """What goes into a norm, in training mode: every batch is normalized by itself."""
    p = v["params"][f"dense{layer}"]
    if layer:
        x = hidden(v, x, layer - 1)
        mean, var = x.mean(-2, keepdims=True), x.var(-2, keepdims=True)
        x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5))
    return x @ p["kernel"] + p["bias"]


def values(v, x, layer):
    h = np.asarray(hidden(v, x, layer), np.float64)
    return h.reshape(-1, h.shape[-1])


def test_statistics_are_those_of_all_values():
    new = structured.recalibrate(train, V, list(X))
    assert new["params"] == V["params"]
    for i in range(2):
        found, wanted = new["batch_stats"][f"norm{i}"], values(V, X, i)
        np.testing.assert_allclose(found["mean"], wanted.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["var"], wanted.var(0), rtol=1e-3)
        within = np.mean([values(V, x, i).var(0) for x in X], 0)
        assert i or (np.asarray(found["var"]) > 1.2 * within).all()
    again = structured.recalibrate(train, new, iter([(x,) for x in X]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), new, again)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_one_batch_makes_both_modes_the_same(decay):
    net = Net(decay)
    new = structured.recalibrate(
        lambda v, x: net.apply(v, x, True, mutable=["batch_stats"])[1], V, [X[0]]
    )
    wanted, _ = net.apply(V, X[0], True, mutable=["batch_stats"])
    found: Any = net.apply(new, X[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_small_model_has_statistics_of_its_own():
    v = structured.recalibrate(train, V, list(X))
    graph = structured.trace(NET.apply, v, X[0])
    names = [m.path for g in graph.groups for m in g.members]
    assert "batch_stats/norm1/mean" in names
    plan = structured.planned(graph, {g.name: [0, 3, 4] for g in graph.groups})
    small, small_fn = plan.shrink(v), plan.rewrite(NET.apply)
    new = structured.recalibrate(plan.rewrite(train), small, list(X))
    assert new["batch_stats"]["norm1"]["mean"].shape == (3,)
    masked = structured.recalibrate(train, plan.mask(v), list(X))
    wanted = plan.shrink(masked)["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        new["batch_stats"], wanted,
    )  # fmt: skip
    # The first norm sees what it saw, the second less than before.
    first, second = (
        np.abs(new["batch_stats"][n]["var"] / small["batch_stats"][n]["var"] - 1).max()
        for n in ("norm0", "norm1")
    )
    assert first < 1e-3 < 0.1 < second
    assert small_fn(new, X[0]).shape == (32, 3)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.frozen = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.frozen(nnx.relu(self.norm(self.dense(x)))))


@pytest.mark.parametrize("every", [False, True], ids=["statistics", "all leaves"])
def test_nnx_and_norms_that_are_frozen(every):
    graphdef, state = nnx.split(NNXNet(nnx.Rngs(0)))

    def train(state, x):
        model = nnx.merge(graphdef, state)
        model.norm.use_running_average = False
        model(x)
        return nnx.state(model) if every else nnx.state(model, nnx.BatchStat)

    new = structured.recalibrate(train, state, list(X))
    model, old = nnx.merge(graphdef, new), nnx.merge(graphdef, state)
    values = np.asarray(old.dense(X), np.float64).reshape(-1, 8)
    np.testing.assert_allclose(
        model.norm.mean[...], values.mean(0), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(model.norm.var[...], values.var(0), rtol=1e-3)
    np.testing.assert_array_equal(model.frozen.var[...], old.frozen.var[...])
    np.testing.assert_array_equal(model.head.kernel[...], old.head.kernel[...])


def test_names_types_and_counters():
    def fn(p, x):
        new = {
            "running_mean": x.mean(0),
            "running_var": x.var(0),
            "square": (x * x).mean(0),
        }
        return {k: v.astype(p[k].dtype) for k, v in new.items()} | {
            "steps": p["steps"] + 1
        }

    p = dict.fromkeys(
        ("running_mean", "running_var", "square"), jnp.zeros(5, jnp.bfloat16)
    )
    p |= {"steps": jnp.zeros((), jnp.int32), "none": None}
    new = structured.recalibrate(fn, p, list(X))
    x = X.reshape(-1, 5)
    for name, wanted in (
        ("running_mean", x.mean(0)),
        ("running_var", x.var(0)),
        ("square", (x**2).mean(0)),
    ):
        assert new[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(new[name].astype(jnp.float32), wanted, rtol=1e-2)
    assert new["steps"] == 0 and new["none"] is None


def test_messages():
    def evaluated(v, x):
        return NET.apply(v, x, train=False, mutable=["batch_stats"])[1]

    def squared(v, x):
        return jax.tree.map(lambda a: a * a + 2.0, {"batch_stats": v["batch_stats"]})

    for fn, match in (
        (evaluated, "is what it was given; expected new .* Run the model in training"),
        (
            lambda v, x: train(v, x)["batch_stats"],
            "fn: it gives norm0/mean .* expected",
        ),
        (
            lambda v, x: {"head": {"kernel": x}},
            "head/kernel of shape .32, 5.; expected",
        ),
        (squared, "batch_stats/norm0/mean is no running average"),
        (lambda v, x: {}, "fn: what it gives, .none., is what"),
    ):
        with pytest.raises(ValueError, match=match):
            structured.recalibrate(fn, V, [X[0]])
    with pytest.raises(ValueError, match="batches: there is none"):
        structured.recalibrate(train, V, [])
    with pytest.raises(ValueError, match="norm0/mean is not finite over them"):
        structured.recalibrate(train, V, [X[0], X[1].at[0, 0].set(jnp.nan)])


def test_a_variance_needs_its_mean():
    batches = [jnp.array([[1.0], [3.0]]), jnp.array([[7.0], [9.0]])]

    def other(p, x):
        return {"mu": x.mean(0), "var": x.var(0)}

    with pytest.raises(
        ValueError, match="fn: var is a variance by its name, and its mean"
    ):
        structured.recalibrate(other, {"mu": jnp.ones(1), "var": jnp.ones(1)}, batches)

    def haiku(p, x):
        return {"mean_ema": {"average": x.mean(0)}, "var_ema": {"average": x.var(0)}}

    params = jax.tree.map(jnp.ones_like, haiku(None, batches[0]))
    new = structured.recalibrate(haiku, params, batches)
    assert new["var_ema"]["average"].tolist() == [10.0]
    assert new["mean_ema"]["average"].tolist() == [5.0]
