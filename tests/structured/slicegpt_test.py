"""SliceGPT: turning the stream changes nothing, and principal axes lose least."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
WIDTH, HIDDEN, HEADS, VOCAB = 12, 20, 2, 30
IDS = jax.random.randint(KEY, (6, 7), 0, VOCAB)


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def layer(x, w):
    h = rms(x, w["n1"])
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, w[n]) for n in ("q", "k", "v"))
    x = x + jnp.einsum("bthe,hed->btd", jax.nn.dot_product_attention(q, k, v), w["o"])
    h = rms(x, w["n2"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"] + w["bias"]


def unrolled(p, ids):
    x = p["embed"][ids]
    for w in p["layers"]:
        x = layer(x, w)
    return rms(x, p["norm"]) @ p["head"]


def scanned(p, ids):
    x = jax.lax.scan(lambda x, w: (layer(x, w), None), p["embed"][ids], p["layers"])[0]
    return rms(x, p["norm"]) @ p["head"]


def params(stacked=False):
    keys = iter(jax.random.split(KEY, 100))

    def new(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    def one():
        attention = {n: new(WIDTH, HEADS, 4) for n in "qkv"}
        return {
            **attention, "o": new(HEADS, 4, WIDTH), "gate": new(WIDTH, HIDDEN),
            "up": new(WIDTH, HIDDEN), "down": new(HIDDEN, WIDTH), "bias": new(WIDTH),
            "n1": 1 + new(WIDTH), "n2": 1 + new(WIDTH),
        }  # fmt: skip

    layers = [one(), one()]
    if stacked:
        layers = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    low = new(VOCAB, 5) @ new(5, WIDTH)  # the stream begins in few directions
    ends = {"embed": 2 * low, "norm": 1 + new(WIDTH), "head": new(WIDTH, VOCAB)}
    return {**ends, "layers": layers}


MODELS = {"unrolled": (unrolled, params()), "scanned": (scanned, params(stacked=True))}


@pytest.mark.parametrize("name", MODELS)
def test_turning_changes_nothing(name):
    fn, p = MODELS[name]
    found = structured.slicegpt(fn, p, [IDS], ratio=0.0)
    np.testing.assert_allclose(fn(found.params, IDS), fn(p, IDS), rtol=1e-3, atol=1e-4)
    assert not np.allclose(found.params["head"], p["head"], 1e-2)
    assert (found.params["norm"] == 1).all()
    assert found.plan.after == found.plan.before
    assert (np.diff(found.values) <= 1e-6).all()


@pytest.mark.parametrize("name", MODELS)
def test_slicing_makes_it_smaller_and_equals_the_masked_model(name):
    fn, p = MODELS[name]
    found = structured.slicegpt(fn, p, [IDS[:3], IDS[3:]], ratio=0.3, round_to=4)
    assert found.plan.verify(fn, found.params, IDS).equal
    small = found.plan.shrink(found.params)
    assert small["head"].shape == (8, VOCAB) and small["embed"].shape == (VOCAB, 8)


def test_principal_axes_lose_less_than_others():
    fn, p = MODELS["unrolled"]
    y = fn(p, IDS)
    found = structured.slicegpt(fn, p, [IDS], ratio=0.25)
    graph = structured.trace(fn, p, IDS)
    (name,) = (g.name for g in graph.groups if g.kind == "embedding")
    folded = structured.fold_scales(graph, p, name)
    np.testing.assert_allclose(fn(folded, IDS), y, rtol=1e-3, atol=1e-4)

    def error(turned):
        small = found.plan.rewrite(fn)(found.plan.shrink(turned), IDS)
        return float(jnp.mean((small - y) ** 2))

    least = error(found.params)
    for seed in range(3):
        noise = jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH))
        q, _ = jnp.linalg.qr(noise)
        turned = structured.rotate(graph, folded, name, q)
        np.testing.assert_allclose(fn(turned, IDS), y, rtol=1e-2, atol=1e-3)
        assert least < 0.8 * error(turned)
    assert least < 0.8 * error(folded)


def test_each_part_of_the_stream_by_itself_loses_less():
    fn, p = MODELS["unrolled"]
    y = fn(p, IDS)
    new_fn, new = structured.add_skip_matrices(fn, p, IDS)

    def error(fn, found):
        assert found.plan.verify(fn, found.params, IDS).equal
        small = found.plan.shrink(found.params)
        return small, float(jnp.mean((found.plan.rewrite(fn)(small, IDS) - y) ** 2))

    one = structured.slicegpt(fn, p, [IDS], ratio=0.25)
    each = structured.slicegpt(new_fn, new, [IDS[:3], IDS[3:]], ratio=0.25)
    small, lost = error(new_fn, each)
    assert lost < 0.5 * error(fn, one)[1]
    assert [m.shape for m in small.matrices] == [(9, 9)] * 4
    assert each.values.shape == (5, WIDTH) and (np.diff(each.values) <= 1e-5).all()

    np.testing.assert_allclose(new_fn(each.params, IDS), y, rtol=1e-3, atol=1e-4)
    grads = jax.grad(lambda p: new_fn(p, IDS).sum())(each.params)
    assert all(float(jnp.abs(m).max()) > 1e-3 for m in grads.matrices)


def test_parts_are_turned_by_what_is_left_of_those_before():
    fn, p = structured.add_skip_matrices(*MODELS["unrolled"], IDS)
    whole = structured.slicegpt(fn, p, [IDS], ratio=0.0)
    ratios = [0.5, 0.5, 0.25, 0.25, 0.0]
    found = structured.slicegpt(fn, p, [IDS], ratio=ratios)
    np.testing.assert_allclose(found.values[0], whole.values[0], rtol=1e-4)
    assert not np.allclose(found.values[2], whole.values[2], rtol=0.05)
    small = found.plan.shrink(found.params)
    assert [m.shape for m in small.matrices] == [(6, 6), (6, 9), (9, 9), (9, 12)]
    assert small.params["head"].shape == (12, VOCAB)
    y = jax.jit(found.plan.rewrite(fn))(small, IDS[:2, :3])
    assert y.shape == (2, 3, VOCAB)


def test_what_does_not_go_with_a_rotation_is_refused():
    fn, p = MODELS["unrolled"]

    def centred(p, ids):
        x = p["embed"][ids]
        x = x - x.mean(-1, keepdims=True)
        return rms(x, p["norm"]) @ p["head"]

    few = {n: p[n] for n in ("embed", "norm", "head")}
    with pytest.raises(ValueError, match="outputs differ .* layer norm"):
        structured.slicegpt(centred, few, [IDS], ratio=0.5, group="embed:1")

    def tied(p, ids):
        x = layer(p["embed"][ids], p["layers"][0])
        return rms(x, p["norm"]) @ p["embed"].T

    with pytest.raises(
        ValueError, match="norm cannot be folded.*embed.*tied embedding"
    ):
        structured.slicegpt(tied, {**p, "head": None}, [IDS], ratio=0.5)
    ones = {**p, "norm": jnp.ones(WIDTH), "head": None}
    found = structured.slicegpt(tied, ones, [IDS], ratio=0.25)
    assert found.plan.verify(tied, found.params, IDS).equal

    def read_twice(p, ids):
        h = rms(p["embed"][ids], p["norm"])
        return h @ p["head"], jnp.tanh(h).sum(-1)

    with pytest.raises(ValueError, match=r"norm cannot be folded.*'None'.*'head'"):
        structured.slicegpt(read_twice, few, [IDS], ratio=0.5, group="embed:1")


def test_messages():
    fn, p = MODELS["unrolled"]
    graph = structured.trace(fn, p, IDS)
    (name,) = (g.name for g in graph.groups if g.kind == "embedding")
    with pytest.raises(ValueError, match="ratio, round_to: got 1.0"):
        structured.slicegpt(fn, p, [IDS], ratio=1.0)
    with pytest.raises(ValueError, match=r"ratio, round_to: got \[0.5, 0.5\].*1 parts"):
        structured.slicegpt(fn, p, [IDS], ratio=[0.5, 0.5])
    with pytest.raises(ValueError, match="batches: there is none"):
        structured.slicegpt(fn, p, [], ratio=0.5)
    with pytest.raises(ValueError, match=r"q: got the shape \(3, 3\)"):
        structured.rotate(graph, p, name, jnp.eye(3))
    with pytest.raises(ValueError, match="scales the stream, and is not 1"):
        structured.rotate(graph, p, name, jnp.eye(WIDTH))
    mlp = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 3))}
    with pytest.raises(ValueError, match=r"kind 'embedding' are \[\]"):
        structured.slicegpt(
            lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"],
            mlp,
            [jnp.ones((2, 4))],
            ratio=0.5,
        )


def test_skip_matrices_come_last():
    def fn(p, ids):
        x = p["embed"][ids]
        return (x + jnp.tanh(x @ p["up"]) @ p["down"]) @ p["embed"].T

    keys = jax.random.split(KEY, 3)
    shapes = {"embed": (5, 4), "up": (4, 8), "down": (8, 4)}
    p = {
        n: jax.random.normal(k, s)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    ids = jnp.array([[0, 1, 4]])
    fn, p = structured.add_skip_matrices(fn, p, ids)
    fn, p = structured.untie(fn, p, ids, where="embed")
    with pytest.raises(ValueError, match="params: got a Untied of SkipMatrices"):
        structured.slicegpt(fn, p, [ids], ratio=0.5)
