"""Clients that send a few gradients: merged, they are the centralised method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make(seed, shape=(12, 8)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_all_gradients_sent_make_the_centralised_step():
    params = {"kernel": make(0), "bias": jnp.ones(8)}
    method = jp.granet(0.5, end=0, until=9, drop=0.4)
    state = method.init({"kernel": params["kernel"], "bias": None})
    clients = [{"kernel": make(s), "bias": jnp.ones(8)} for s in (1, 2, 3)]
    found = {"kernel": jnp.zeros((12, 8), bool), "bias": None}
    sent = [jp.training.top_gradients(g, found, 96) for g in clients]
    merged = jp.training.merge_gradients(sent, params, weights=[1, 2, 3])
    assert merged["bias"] is None
    whole = sum(w * g["kernel"] for w, g in zip((1, 2, 3), clients, strict=True)) / 6
    np.testing.assert_allclose(merged["kernel"], whole, rtol=1e-5, atol=1e-6)
    ours, central = (
        method.update(
            {"kernel": g, "bias": None},
            state,
            {"kernel": params["kernel"], "bias": None},
        )
        for g in (merged["kernel"], whole)
    )
    np.testing.assert_array_equal(
        jp.masks.unpack(ours.masks)["kernel"], jp.masks.unpack(central.masks)["kernel"]
    )


def test_clients_send_the_largest_gradients_of_pruned_weights():
    grads, mask = {"kernel": make(1)}, {"kernel": make(2) > 0}
    (sent,) = jax.jit(lambda g, m: jp.training.top_gradients(g, m, 5))(
        grads, mask
    ).values()
    free = np.where(mask["kernel"], 0, grads["kernel"]).ravel()
    wanted = np.argsort(-np.abs(free))[:5]
    assert set(sent.places.tolist()) == set(wanted)
    np.testing.assert_array_equal(sent.values, free[np.asarray(sent.places)])


def test_too_few_pruned_weights_leave_places_empty():
    mask = {"kernel": jnp.array([[True, False], [True, True]])}
    grads = {"kernel": jnp.array([[9.0, 0.0], [8.0, 7.0]])}
    sent = jp.training.top_gradients(grads, mask, 3)
    assert sent["kernel"].places.tolist() == [1, 4, 4]
    merged = jp.training.merge_gradients([sent], grads)
    np.testing.assert_array_equal(merged["kernel"], 0)


def test_many_clients_of_two_bytes_add_up():
    """In bfloat16 a sum of 1 stands still at 256 parts or so."""
    part = jp.training.TopGradients(jnp.ones(1, jnp.bfloat16), jnp.array([3]))
    clients = [{"kernel": part, "bias": None}] * 1024 + [{"kernel": None, "bias": None}]
    params = {"kernel": jnp.zeros((2, 2), jnp.bfloat16), "bias": jnp.zeros(2)}
    weights = [1.0] * 1024 + [1024.0]
    merged = jp.training.merge_gradients(clients, params, weights=weights)
    assert merged["kernel"].dtype == jnp.bfloat16 and merged["bias"] is None
    assert merged["kernel"].tolist() == [[0.0, 0.0], [0.0, 0.5]]


def test_merged_moments_are_those_of_all_examples():
    parts = [3 * make(s, (n, 4)) + s for s, n in ((1, 5), (2, 17), (3, 2))]
    clients = [
        jp.training.Moments(jnp.float32(len(x)), x.mean(0), x.var(0)) for x in parts
    ]
    found = jax.jit(jp.training.merge_moments)(clients)
    everything = np.concatenate(parts)
    assert found.examples == 24
    np.testing.assert_allclose(found.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.var, everything.var(0), rtol=1e-4)


def test_examples_may_be_weights():
    halves = [jp.training.Moments(jnp.float32(0.25), jnp.float32(x), jnp.float32(0))
              for x in (1, 3)]  # fmt: skip
    nothing = jp.training.Moments(jnp.float32(0), jnp.float32(5), jnp.float32(1))
    found = jp.training.merge_moments([nothing, *halves, nothing])
    assert [float(x) for x in found] == [0.5, 2.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jp.training.top_gradients({"w": jnp.ones(2)}, {"w": jnp.ones(2, bool)}, 0),
         "k: got 0"),
        (lambda: jp.training.top_gradients({"w": jnp.ones(2)}, {"w": jnp.ones(2, bool)}, 0.5),
         "k: got 0.5"),
        (lambda: jp.training.merge_gradients([], {}), "sent: got nothing"),
        (lambda: jp.training.merge_moments([]), "sent: got nothing"),
        (lambda: jp.training.merge_gradients([{}], {}, weights=[1, 2]), "weights: got"),
        (lambda: jp.training.merge_gradients([{}] * 2, {}, weights=[-1, 2]),
         "none below 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
