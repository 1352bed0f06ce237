"""Cosines between inputs and outputs of blocks, against a loop by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import calibration

pytestmark = pytest.mark.usefixtures("quick_compilation")
W = jax.random.normal(jax.random.key(0), (3, 8, 8)) * 0.2
BATCHES = [jax.random.normal(jax.random.key(i), (2, 4 + i % 2, 8)) for i in range(3)]


def layer(x, w):
    return x + jnp.tanh(x @ w)


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0].sum()


def unrolled(p, x):
    for i in range(3):
        x = layer(x, p[f"layer{i}"]["w"])
    return x.sum()


@pytest.mark.parametrize("fn", [scanned, unrolled])
def test_cosines(fn):
    unrolls = fn is unrolled
    params = {f"layer{i}": {"w": w} for i, w in enumerate(W)} if unrolls else {"w": W}
    found = calibration.similarity(fn, params, BATCHES)
    cosines = []
    for x in BATCHES:
        each = []
        for w in W:
            a, x = np.asarray(x, np.float64), layer(x, w)
            b = np.asarray(x, np.float64)
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            each.append(((a * b).sum(-1) / norms).ravel())
        cosines.append(np.stack(each))
    np.testing.assert_allclose(
        found.cosine, np.concatenate(cosines, 1).mean(1), rtol=1e-5
    )
    wanted = ("layer{}" if unrolls else "w/{}").format
    assert found.names == tuple(map(wanted, range(3)))
    assert found.tokens == 26


def test_a_head_is_no_part_of_the_last_block():
    params = {f"layer{i}": {"w": w} for i, w in enumerate(W)}
    head = {"head": {"w": jnp.ones((8, 3))}, "norm": {"scale": jnp.ones(8)}}

    def fn(p, x):
        for i in range(3):
            x = layer(x, p[f"layer{i}"]["w"])
        return (x * p["norm"]["scale"]) @ p["head"]["w"]

    found = calibration.similarity(fn, {**params, **head}, BATCHES)
    wanted = calibration.similarity(unrolled, params, BATCHES)
    np.testing.assert_allclose(found.cosine, wanted.cosine, rtol=1e-6)
    assert found.names == wanted.names


def test_padding_is_left_out():
    x = BATCHES[1]
    padded = jnp.concatenate([x, 1e3 * jnp.ones((2, 3, 8))], axis=1)
    real = jnp.broadcast_to(jnp.arange(8) < 5, (2, 8))
    found = calibration.similarity(
        scanned, {"w": W}, [padded], token_weights=lambda x: real
    )
    wanted = calibration.similarity(scanned, {"w": W}, [x])
    np.testing.assert_allclose(found.cosine, wanted.cosine, rtol=1e-5)
    assert found.tokens == 10
    with pytest.raises(ValueError, match=r"token_weights: got the shape \(8,\); exp"):
        calibration.similarity(
            scanned, {"w": W}, [padded], token_weights=lambda x: real[0]
        )


def test_the_activation_may_be_chosen():
    def fn(p, x):
        def step(carry, w):
            return (layer(carry[0], w), carry[1] / 2), None

        return jax.lax.scan(step, (x, x), p["w"])[0]

    with pytest.raises(
        ValueError, match="select: between two blocks there are arrays of"
    ):
        calibration.similarity(fn, {"w": W}, BATCHES)
    found = calibration.similarity(
        fn, {"w": W}, BATCHES, select=lambda arrays: arrays[0]
    )
    again = calibration.similarity(scanned, {"w": W}, BATCHES)
    np.testing.assert_allclose(found.cosine, again.cosine, rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="batches: there is none"):
        calibration.similarity(scanned, {"w": W}, [])
    with pytest.raises(ValueError, match="fn: it has no blocks"):
        calibration.similarity(lambda p, x: x @ p["w"], {"w": W[0]}, BATCHES)

    def growing(p, x):
        x = layer(x, p["layer0"]["w"])
        x = jnp.concatenate([x, x], 1) @ p["layer1"]["w"]
        return layer(x, p["layer2"]["w"])

    params = {f"layer{i}": {"w": w} for i, w in enumerate(W)}
    with pytest.raises(ValueError, match=r"select: it gives shapes \(2, 4, 8\)"):
        calibration.similarity(growing, params, BATCHES)
