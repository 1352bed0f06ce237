"""UDFC: channels that are like others are merged into them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 6, 6, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, norm=True):
        x = nn.Conv(8, (3, 3), name="a")(x)
        if norm:
            x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.Conv(6, (3, 3), strides=2, name="b")(nn.relu(x))
        return nn.Dense(4, name="head")(nn.relu(x).reshape(len(x), -1))


NET = Net()
CHANNELS = "a/kernel:3"


def variables(seed=1):
    keys = iter(jax.random.split(jax.random.key(seed), 100))

    def new(path, x):
        y = jax.random.normal(next(keys), x.shape) / 3
        return jnp.abs(y) + 0.5 if path[-1].key == "var" else y

    return jax.tree_util.tree_map_with_path(new, NET.init(KEY, X))


def features(v):
    a, norm, stats = v["params"]["a"], v["params"]["norm"], v["batch_stats"]["norm"]
    return structured.normalized_features(
        a["kernel"],
        norm["scale"],
        norm["bias"],
        stats["mean"] - a["bias"],
        stats["var"],
    )


def graph_of(v):
    graph = structured.trace(NET.apply, v, X)
    (name,) = (
        g.name for g in graph.groups if any(m.path == "norm/scale" for m in g.members)
    )
    return graph, name


def test_features_are_the_affine_map_of_a_channel():
    v = variables()
    one = jnp.zeros((1, 6, 6, 3)).at[0, 3, 3, 1].set(1.0)
    zero = jnp.zeros((1, 6, 6, 3))

    def norm(x):
        a = nn.Conv(8, (3, 3)).apply({"params": v["params"]["a"]}, x)
        bn = nn.BatchNorm(use_running_average=True)
        return bn.apply(
            {"params": v["params"]["norm"], "batch_stats": v["batch_stats"]["norm"]}, a
        )

    f = np.asarray(features(v))
    np.testing.assert_allclose(norm(zero)[0, 3, 3], f[:, -1], rtol=1e-4, atol=1e-5)
    kernel = f[:, :-1].reshape(8, 3, 3, 3)
    np.testing.assert_allclose(
        (norm(one) - norm(zero))[0, 3, 3], kernel[:, 1, 1, 1], rtol=1e-3, atol=1e-5
    )


def test_a_channel_that_is_another_one_scaled_is_merged_without_loss():
    v = variables()
    a, norm, stats = v["params"]["a"], v["params"]["norm"], v["batch_stats"]["norm"]
    # Channel 5 is half of channel 2, by other kernels and another norm.
    a["kernel"] = a["kernel"].at[..., 5].set(3 * a["kernel"][..., 2])
    a["bias"] = a["bias"].at[5].set(3 * a["bias"][2])
    stats["mean"] = stats["mean"].at[5].set(3 * stats["mean"][2])
    gain = norm["scale"] / jnp.sqrt(stats["var"] + 1e-5)
    norm["scale"] = (
        norm["scale"].at[5].set(0.5 / 3 * gain[2] * jnp.sqrt(stats["var"][5] + 1e-5))
    )
    norm["bias"] = norm["bias"].at[5].set(0.5 * norm["bias"][2])
    graph, name = graph_of(v)
    plan = structured.planned(graph, {name: [0, 1, 2, 3, 4, 6, 7]})
    new = structured.merge(graph, plan, v, features={name: features(v)}, ridge=0.0)
    small = plan.rewrite(NET.apply)(plan.shrink(new), X)
    np.testing.assert_allclose(small, NET.apply(v, X), rtol=1e-4, atol=1e-5)
    dropped = plan.rewrite(NET.apply)(plan.shrink(v), X)
    assert not np.allclose(dropped, NET.apply(v, X), 1e-2)


def test_shares_are_least_squares():
    v = variables()
    graph, name = graph_of(v)
    f = np.asarray(features(v), np.float64)
    kept = np.array([0, 1, 3, 4, 6])
    plan = structured.planned(graph, {name: kept})
    new = structured.merge(graph, plan, v, features={name: features(v)}, ridge=0.0)
    best, *_ = np.linalg.lstsq(f[kept].T, f[[2, 5, 7]].T, rcond=None)
    w = np.asarray(v["params"]["b"]["kernel"])
    wanted = w[:, :, kept] + np.einsum("jp,hwpo->hwjo", best, w[:, :, [2, 5, 7]])
    np.testing.assert_allclose(
        new["params"]["b"]["kernel"][:, :, kept], wanted, rtol=1e-3, atol=1e-5
    )


def test_channels_that_are_alike_lose_less_and_pictures_are_flattened():
    def fn(p, x):
        return NET.apply({"params": p}, x, norm=False)

    p = variables()["params"]
    del p["norm"]
    noise = jax.random.normal(jax.random.key(8), p["b"]["kernel"].shape[:3]) * 0.02
    for i in (1, 4):  # near to their neighbours, in the layer in front of the flat one
        p["b"]["kernel"] = (
            p["b"]["kernel"].at[..., i].set(p["b"]["kernel"][..., i - 1] + noise)
        )
        p["b"]["bias"] = p["b"]["bias"].at[i].set(p["b"]["bias"][i - 1])
    graph = structured.trace(fn, p, X)
    (name,) = (
        g.name for g in graph.groups if any(m.path == "head/kernel" for m in g.members)
    )
    assert graph[name].size == 6
    plan = structured.planned(graph, {name: [0, 2, 3, 5]})
    y = fn(p, X)

    def error(q):
        return float(jnp.mean((plan.rewrite(fn)(plan.shrink(q), X) - y) ** 2))

    assert error(structured.merge(graph, plan, p)) < 0.05 * error(p)


def test_messages():
    v = variables()
    graph, name = graph_of(v)
    plan = structured.planned(graph, {name: [0, 1]})
    with pytest.raises(ValueError, match="ridge: got -1"):
        structured.merge(graph, plan, v, ridge=-1)
    with pytest.raises(ValueError, match=r"features: got the shape \(3, 3\)"):
        structured.merge(graph, plan, v, features={name: jnp.ones((3, 3))})

    with pytest.raises(ValueError, match="features: .*norm/.* acts on the units of"):
        structured.merge(graph, plan, v)

    def scanned(p, x):
        return jax.lax.scan(
            lambda x, w: (x + jax.nn.relu(x @ w["u"]) @ w["d"], None), x, p
        )[0]

    p = {"u": jnp.ones((2, 3, 4)), "d": jnp.ones((2, 4, 3))}
    graph = structured.trace(scanned, p, X)
    plan = structured.planned(graph, {"d:1": [0]})
    with pytest.raises(
        ValueError, match="d:1 is made or read by d, .*expected one matrix"
    ):
        structured.merge(graph, plan, p)
