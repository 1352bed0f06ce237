"""AMP: what each head gives to the output, and how large neurons are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 5, 8))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(x)
        return x + nn.Dense(8, name="down")(nn.silu(nn.Dense(12, name="up")(x)))


MODEL = Block()
PARAMS = MODEL.init(KEY, X)
GRAPH = structured.trace(MODEL.apply, PARAMS, X)
HEADS = next(g.name for g in GRAPH.groups if g.kind == "head")
NEURONS = next(g.name for g in GRAPH.groups if g.kind == "neuron")


def heads(params, x):
    """What each head gives to the output of attention, `[heads, batch, tokens, features]`."""
    p = params["params"]["attn"]
    q, k, v = (
        jnp.einsum("btd,dhe->bthe", x, p[n]["kernel"]) + p[n]["bias"]
        for n in ("query", "key", "value")
    )
    out = jax.nn.dot_product_attention(q, k, v)
    return jnp.einsum("bthe,hed->hbtd", out, p["out"]["kernel"])


def test_heads_by_what_they_give_to_the_output():
    each = heads(PARAMS, X)
    attention = nn.MultiHeadDotProductAttention(num_heads=4)
    whole = attention.apply({"params": PARAMS["params"]["attn"]}, X)
    bias = PARAMS["params"]["attn"]["out"]["bias"]
    np.testing.assert_allclose(each.sum(0) + bias, whole, atol=1e-5)
    found = structured.amp(GRAPH, MODEL.apply, PARAMS, [X[:2], X[2:]])
    wanted = abs(each).sum(-1).mean((1, 2))
    np.testing.assert_allclose(found[HEADS], wanted, rtol=1e-4)


def test_neurons_by_their_mean_size():
    p = PARAMS["params"]
    x = X + heads(PARAMS, X).sum(0) + p["attn"]["out"]["bias"]
    h = nn.silu(x @ p["up"]["kernel"] + p["up"]["bias"])
    found = structured.amp(GRAPH, MODEL.apply, PARAMS, [X], kinds=("neuron",))
    assert found.keys() == {NEURONS}
    np.testing.assert_allclose(found[NEURONS], abs(h).mean((0, 1)), rtol=1e-4)


def test_padding_does_not_count():
    real = jnp.arange(5) < 3

    def fn(p, x):  # attention does not look at padding, but its rows are there
        mask = jnp.broadcast_to(real, (1, 1, 5, 5))
        attn = nn.MultiHeadDotProductAttention(num_heads=4)
        x = x + attn.apply({"params": p["attn"]}, x, mask=mask)
        h = nn.silu(x @ p["up"]["kernel"] + p["up"]["bias"])
        return x + h @ p["down"]["kernel"] + p["down"]["bias"]

    p = PARAMS["params"]
    graph = structured.trace(fn, p, X)
    weights = jnp.broadcast_to(real, (6, 5))
    found = structured.amp(
        graph, fn, p, [X.at[:, 3:].set(1e4)], token_weights=lambda x: weights
    )
    short = structured.amp(GRAPH, MODEL.apply, PARAMS, [X[:, :3]])
    wanted = [short[HEADS], short[NEURONS]]
    for a, b in zip(sorted(found.values(), key=len), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_unit_that_gives_nothing_scores_0():
    params = jax.tree.map(lambda x: x, PARAMS)
    out = params["params"]["attn"]["out"]
    out["kernel"] = out["kernel"].at[2].set(0.0)
    found = structured.amp(GRAPH, MODEL.apply, params, [X])[HEADS]
    assert found[2] == 0 and (np.delete(found, 2) > 0).all()
    plan = structured.plan(GRAPH, {HEADS: found}, ratio=0.25, kinds=("head",))
    small = plan.rewrite(MODEL.apply)(plan.shrink(params), X)
    np.testing.assert_allclose(small, MODEL.apply(params, X), atol=1e-5)


def test_layers_of_a_scan_and_interleaved_heads():
    def layer(x, w):
        q = (x @ w["q"]).reshape(*x.shape[:2], 2, 3)  # [..., width, heads]
        a = jax.nn.softmax(jnp.einsum("bqeh,bkeh->bhqk", q, q))
        y = jnp.einsum("bhqk,bkeh->bqeh", a, q).reshape(*x.shape[:2], 6)
        return x + y @ w["o"], (y, x)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (layer(x, w)[0], None), x, p)[0]

    p = {"q": jax.random.normal(KEY, (2, 8, 6)), "o": jax.random.normal(KEY, (2, 6, 8))}
    graph = structured.trace(fn, p, X)
    (group,) = (g for g in graph.groups if g.kind == "head")
    assert group.size == 3
    found = structured.amp(graph, fn, p, [X[:4], X[4:]])[group.name]
    x, wanted = X, 0
    for i in range(2):
        w = jax.tree.map(lambda x: x[i], p)  # noqa: B023
        new, (y, _) = layer(x, w)
        split = y.reshape(*y.shape[:2], 2, 3)
        each = jnp.einsum("bteh,ehd->bthd", split, w["o"].reshape(2, 3, 8))
        wanted, x = wanted + abs(each).sum(-1).mean((0, 1)), new
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_messages():
    with pytest.raises(ValueError, match="batches: there is none"):
        structured.amp(GRAPH, MODEL.apply, PARAMS, [])
    with pytest.raises(ValueError, match="kinds: no product sums over.*expert"):
        structured.amp(GRAPH, MODEL.apply, PARAMS, [X], kinds=("expert",))

    def conv(p, x):
        x = jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME")
        return jax.lax.conv_general_dilated(jax.nn.relu(x), p["b"], (1, 1), "SAME")

    p = {"a": jnp.ones((6, 3, 3, 3)), "b": jnp.ones((2, 6, 3, 3))}
    x = jnp.ones((1, 3, 5, 5))
    with pytest.raises(ValueError, match="b is used in a conv_general_dilated"):
        structured.amp(structured.trace(conv, p, x), conv, p, [x])
