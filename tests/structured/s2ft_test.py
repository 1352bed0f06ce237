"""Units in another order, and slices of them that are fine-tuned."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))


def _traced():
    model, x = _Block(), jax.random.normal(jax.random.key(1), (3, 5, 8))
    params = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size)).reshape(
        w.shape), params)  # fmt: skip
    return model.apply, params, x, jp.structured.trace(model.apply, params, x)


HEADS, NEURONS = "MultiHeadDotProductAttention_0/key/kernel:1", "Dense_0/kernel:0"
OUT = "MultiHeadDotProductAttention_0/out/kernel"


def test_another_order_is_the_same_function():
    fn, params, x, graph = _traced()
    rng = np.random.default_rng(0)
    orders = {
        g.name: rng.permutation(g.size)
        for g in graph.groups
        if g.kind in ("head", "neuron", "head_dim")
    }
    assert len(orders) == 4
    other = jp.structured.permuted(graph, params, orders)
    changed = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    ]
    assert sum(changed) >= 9
    np.testing.assert_allclose(fn(other, x), fn(params, x), rtol=1e-5, atol=1e-5)
    back = {n: np.argsort(order) for n, order in orders.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        jp.structured.permuted(graph, other, back),
        params,
    )


def test_segments_and_factors_are_permuted_in_place():
    """A fused kernel of queries, keys and values, heads by heads."""

    def fn(params, x):
        q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:-1], 3, 2) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v)
        return y.reshape(*y.shape[:-2], 6) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"qkv": jax.random.normal(keys[0], (4, 18)),
              "out": jax.random.normal(keys[1], (6, 4))}  # fmt: skip
    x = jax.random.normal(keys[2], (2, 5, 4))
    graph = jp.structured.trace(fn, params, x)
    (heads,) = (g for g in graph.groups if g.kind == "head")
    other = jp.structured.permuted(graph, params, {heads.name: [2, 0, 1]})
    want = params["qkv"].reshape(4, 3, 3, 2)[:, :, jnp.array([2, 0, 1])].reshape(4, 18)
    np.testing.assert_array_equal(other["qkv"], want)
    np.testing.assert_allclose(fn(other, x), fn(params, x), rtol=1e-5, atol=1e-5)


def test_only_the_slices_learn():
    fn, params, x, graph = _traced()
    chosen = {HEADS: [2], NEURONS: [7, 3, 9]}
    moved, slices = jp.structured.s2ft(graph, params, chosen)
    np.testing.assert_allclose(fn(moved, x), fn(params, x), rtol=1e-5, atol=1e-5)
    fixed, trained = slices.split(moved)
    assert {p: w.shape for p, w in trained.items()} == {
        "Dense_0/kernel": (3, 8), OUT: (1, 2, 8),
    }  # fmt: skip
    np.testing.assert_array_equal(
        trained["Dense_0/kernel"],
        params["params"]["Dense_0"]["kernel"][jnp.array([7, 3, 9])],
    )
    jax.tree.map(np.testing.assert_array_equal, slices.merge(fixed, trained), moved)

    def loss(trained):
        return jnp.mean((fn(slices.merge(fixed, trained), x) - 1) ** 2)

    tx = optax.adam(0.05)
    state = tx.init(trained)
    # The moments are those of the slices: 2 (3 · 8 + 16) and a count.
    assert sum(w.size for w in jax.tree.leaves(state)) == 2 * (24 + 16) + 1
    before = loss(trained)
    for _ in range(20):
        updates, state = tx.update(jax.jit(jax.grad(loss))(trained), state)
        trained = optax.apply_updates(trained, updates)
    assert loss(trained) < before
    after = slices.merge(fixed, trained)
    change = jax.tree.map(lambda a, b: a - b, after, moved)["params"]
    down = change["Dense_0"]["kernel"]
    assert (down[:3] != 0).all() and (down[3:] == 0).all()
    assert np.linalg.matrix_rank(down) <= 3
    out = change["MultiHeadDotProductAttention_0"]["out"]["kernel"]
    assert (out[0] != 0).all() and (out[1:] == 0).all()
    others = [c for p, c in jax.tree_util.tree_leaves_with_path(change)
              if "Dense_0" not in str(p) and "out" not in str(p)]  # fmt: skip
    assert len(others) > 8 and not any(c.any() for c in others)


def test_other_leaves_learn_if_asked():
    _, params, _, graph = _traced()
    _, slices = jp.structured.s2ft(graph, params, {NEURONS: [1]}, train="Dense_1/*")
    assert slices.lengths == {"Dense_1/bias": (0, 1), "Dense_1/kernel": (1, 1)}


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        ({"nothing": [0]}, {}, "no group is called 'nothing'"),
        ({NEURONS: [12]}, {}, "different numbers from 0 to 11"),
        ({NEURONS: [1, 1]}, {}, "different numbers from 0 to 11"),
        ({NEURONS: [1]}, {"train": "LayerNorm*"}, "leaves no slice to train"),
    ],
)
def test_bad_choices_are_refused(chosen, options, message):
    _, params, _, graph = _traced()
    with pytest.raises(ValueError, match=message):
        jp.structured.s2ft(graph, params, chosen, **options)


def test_slices_must_stand_side_by_side():
    """Widths of heads lie apart from one another where heads and widths are one axis."""

    def fn(params, x):
        y = jax.nn.relu((x @ params["up"]).reshape(-1, 3, 4)) * params["gain"]
        return y.reshape(-1, 12) @ params["down"]

    params = {"up": jnp.ones((2, 12)), "gain": jnp.ones(4), "down": jnp.ones((12, 2))}
    graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="do not stand side by side in down"):
        jp.structured.s2ft(graph, params, {"gain:0": [1, 2]})


def test_an_order_has_each_unit_once():
    _, params, _, graph = _traced()
    with pytest.raises(ValueError, match="expected each number from 0 to 3 once"):
        jp.structured.permuted(graph, params, {HEADS: [0, 1, 2, 2]})

    def stack(params, x):
        step = lambda x, w: (jax.nn.relu(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, params["layers"])[0]

    layers = {"layers": jnp.ones((4, 3, 3))}
    graph = jp.structured.trace(stack, layers, jnp.ones((2, 3)))
    (name,) = (g.name for g in graph.groups if g.kind == "layer")
    with pytest.raises(ValueError, match="order that matters"):
        jp.structured.permuted(graph, layers, {name: range(4)})
