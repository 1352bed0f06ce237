"""Matrices on skip connections: the identity changes nothing, and parts turn apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
IDS = jax.random.randint(KEY, (3, 4), 0, 9)
WIDTH = 6


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def block(x, w):
    return x + jax.nn.relu(rms(x) @ w["up"]) @ w["down"] + w["bias"]


def swapped(x, w):
    return (jax.nn.relu(rms(x) @ w["up"]) @ w["down"] + w["bias"]) + x


def cast(x, w):
    """The stream is read in one type, and added in another, and as another value."""
    h = rms(x.astype(jnp.float16).astype(jnp.float32)) @ w["up"]
    y = jax.nn.relu(h) @ w["down"] + w["bias"]
    return jax.lax.reshape(x, x.shape) + y


def parallel(x, w):
    h = rms(x)
    return x + jax.nn.relu(h @ w["up"]) @ w["down"] + jnp.sin(h @ w["up"]) @ w["down"]


def model(block):
    def fn(p, ids):
        x = p["embed"][ids]
        for w in p["layers"]:
            x = block(x, w)
        return rms(x) @ p["head"]

    return fn


def params():
    keys = iter(jax.random.split(KEY, 10))

    def new(*shape):
        return jax.random.normal(next(keys), shape) / 2

    layers = [
        {"up": new(WIDTH, 8), "down": new(8, WIDTH), "bias": new(WIDTH)}
        for _ in range(2)
    ]
    return {"embed": new(9, WIDTH), "layers": layers, "head": new(WIDTH, 5)}


def scaled(x, w):
    return 0.5 * x + jax.nn.relu(rms(x) @ w["up"]) @ w["down"] / 2


def summed_apart(x, w):
    """The sum is in a function of its own, which does not see what is made from what."""
    y = jax.nn.relu(rms(x) @ w["up"]) @ w["down"]
    return jax.jit(lambda a, b: b + a)(x, y + w["bias"])


BLOCKS = {
    "scaled": scaled,
    "summed apart": summed_apart,
    "plain": block,
    "swapped": swapped,
    "cast": cast,
    "parallel": parallel,
    "jit": jax.jit(block),
    "checkpoint": jax.checkpoint(block),
    "jit of checkpoint": jax.jit(jax.checkpoint(swapped)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_each_part_of_the_stream_turns_by_itself(name):
    fn, p = model(BLOCKS[name]), params()
    new_fn, new = structured.add_skip_matrices(fn, p, IDS)
    assert len(new.matrices) == 2
    for ids in (IDS, IDS[:1, :3]):
        np.testing.assert_allclose(new_fn(new, ids), fn(p, ids), rtol=1e-6, atol=1e-6)
    graph = structured.trace(new_fn, new, IDS)
    parts = [g.name for g in graph.groups if g.size == WIDTH]
    assert len(parts) == 3
    turned = new
    for i, part in enumerate(parts):
        noise = jax.random.normal(jax.random.key(i), (WIDTH, WIDTH))
        turned = structured.rotate(graph, turned, part, jnp.linalg.qr(noise)[0])
    y = jax.jit(new_fn)(turned, IDS)
    tolerance = 1e-2 if name == "cast" else 1e-4
    np.testing.assert_allclose(y, fn(p, IDS), rtol=tolerance, atol=tolerance)
    grads = jax.grad(lambda p: jnp.sum(new_fn(p, IDS) ** 2))(turned)
    assert all(float(jnp.abs(m).max()) > 1e-3 for m in grads.matrices)
    kept = {part: range(3 + i) for i, part in enumerate(parts)}
    plan = structured.planned(graph, {n: np.array(k) for n, k in kept.items()})
    assert plan.verify(new_fn, turned, IDS).equal
    assert [m.shape for m in plan.shrink(turned).matrices] == [(3, 5), (5, 4)]


def test_matrices_have_the_type_of_the_stream():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    _, new = structured.add_skip_matrices(model(block), half, IDS)
    assert {m.dtype for m in new.matrices} == {jnp.dtype(jnp.bfloat16)}


def test_messages():
    def scanned(p, ids):
        x, _ = jax.lax.scan(
            lambda x, w: (block(x, w), None), p["embed"][ids], p["layers"]
        )
        return rms(x) @ p["head"]

    p = params()
    stacked = {**p, "layers": jax.tree.map(lambda *x: jnp.stack(x), *p["layers"])}
    with pytest.raises(ValueError, match="fn: a skip connection stands in a scan"):
        structured.add_skip_matrices(scanned, stacked, IDS)

    def plain(p, ids):
        return rms(p["embed"][ids]) @ p["head"]

    with pytest.raises(ValueError, match="fn: along embed:1 no value is added to"):
        structured.add_skip_matrices(plain, p, IDS, group="head:0")

    def longer(p, ids):
        x = p["embed"][ids]
        for w in p["layers"] * (1 + (len(ids) == 1)):
            x = block(x, w)
        return rms(x) @ p["head"]

    fn, new = structured.add_skip_matrices(longer, p, IDS)
    with pytest.raises(ValueError, match="there are 2 matrices, and .* 4 skip"):
        fn(new, IDS[:1])
