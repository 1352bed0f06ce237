"""DHSPG: the adaptive penalty, the half-space step, and exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

UNITS = 10
OPTIONS = {"penalty": 0.02, "amplify": 1.5, "largest": 20.0}


def _params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "kernel": jax.random.normal(keys[0], (3, UNITS)) / 2,
        "bias": jax.random.normal(keys[1], (UNITS,)) / 2,
    }


def _groups():
    return jp.Groups.along({"units": {"kernel": 1, "bias": 0}}, _params())


def _matrix(params):
    """Units as rows."""
    return np.concatenate([params["kernel"], params["bias"][None]]).T.astype(np.float64)


def _by_hand(x, moved, penalised, epsilon):
    """One step of the units, a loop."""
    out = np.array(moved)
    for u in np.flatnonzero(penalised):
        d = x[u] - moved[u]
        norm = np.linalg.norm(x[u])
        strength = OPTIONS["penalty"]
        if x[u] @ d < 0:
            lower, upper = -(x[u] @ d) / norm, -(d @ d) * norm / (x[u] @ d)
            strength = np.clip(
                OPTIONS["amplify"] * lower, strength, OPTIONS["largest"] * strength
            )
            if strength >= upper:
                strength = (lower + upper) / 2
        trial = moved[u] - strength * x[u] / norm
        out[u] = 0 if trial @ x[u] < epsilon * norm**2 else trial
    return out


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_is_that_of_the_definition(seed, epsilon):
    rate = 0.1
    method = jp.dhspg(_groups(), 0.9, begin=0, end=9, epsilon=epsilon, **OPTIONS)
    tx = jp.masked(optax.sgd(rate), method)
    params = _params(seed)
    grads = jax.tree.map(lambda x: 2 * x, _params(seed + 50))
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    found = _matrix(optax.apply_updates(params, updates))
    x, g = _matrix(params), _matrix(grads)
    penalised = np.asarray(state.method.own.redundant)
    assert penalised.sum() == 9
    wanted = _by_hand(x, x - rate * g, penalised, epsilon)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    # The cases that the definition tells apart are all there.
    assert ((x * g).sum(1)[penalised] < 0).any()
    assert ((x * g).sum(1)[penalised] > 0).any()


def test_the_norm_falls_where_the_step_leads_away():
    """λ lies above `lower` unless it is cut; then x̂ is shorter along x than x was."""
    options = OPTIONS | {"largest": 1e6}
    method = jp.dhspg(_groups(), 0.6, begin=0, end=9, **options)
    tx = jp.masked(optax.sgd(0.01), method)
    params, grads = (
        _params(),
        jax.tree.map(lambda x, y: y - 3 * x, _params(), _params(7)),
    )
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    x, new = _matrix(params), _matrix(optax.apply_updates(params, updates))
    going = np.asarray(state.method.own.redundant)
    before, after = (np.linalg.norm(w, axis=1) for w in (x, new))
    assert (x * _matrix(grads)).sum(1).max() < 0
    assert (after[going] < before[going]).all()
    assert (after[~going] > before[~going]).all()


def test_redundant_units_are_small_ones_that_shrink():
    params = _params()
    grads = jax.tree.map(jnp.cos, _params(3))
    x, g = _matrix(params), _matrix(grads)
    norm = np.linalg.norm(x, axis=1)
    cosine = (x * g).sum(1) / norm / np.linalg.norm(g, axis=1)
    small = 1 / (norm / x.shape[1] + 1e-6)
    score = cosine / np.linalg.norm(cosine) + small / np.linalg.norm(small)
    tx = jp.masked(optax.sgd(0.1), jp.dhspg(_groups(), 0.4, begin=0, end=9))
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    found = np.flatnonzero(state.method.own.redundant)
    assert set(found) == set(np.argsort(-score)[:4])


def test_group_least_squares_finds_the_units_that_matter():
    """Convex: half of the units explain the data; the others are projected, and stay 0."""
    keys = jax.random.split(jax.random.key(0), 3)
    true = jax.random.normal(keys[0], (UNITS, 4)) * (jnp.arange(UNITS) % 2)[:, None]
    inputs = jax.random.normal(keys[1], (200, UNITS * 4))
    outputs = inputs @ true.reshape(-1)
    params = {"w": 0.1 * jax.random.normal(keys[2], (UNITS, 4))}
    groups = jp.Groups.along({"w": {"w": 0}}, params)

    def loss(params):
        return jnp.mean((inputs @ params["w"].reshape(-1) - outputs) ** 2)

    method = jp.dhspg(groups, 0.5, begin=200, end=300, penalty=1e-3)
    tx = jp.masked(optax.sgd(0.1), method)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    zeros = []
    for i in range(400):
        params, state = step(params, state)
        zero = ~np.asarray(groups.alive(params)["w"])
        zeros.append(zero)
        if i > 0:
            assert not (zeros[-2] & ~zero).any(), "a unit came back"
    np.testing.assert_array_equal(zeros[-1], np.arange(UNITS) % 2 == 0)
    # Projected on the way, not pruned at the end.
    assert zeros[299].sum() == 5 and zeros[250].sum() > 0
    assert jp.get_info(state)["kept"] == {"w": 20}
    np.testing.assert_allclose(params["w"], true, atol=1e-3)


def test_what_is_left_goes_at_the_end():
    params = _params()
    tx = jp.masked(optax.sgd(0.0), jp.dhspg(_groups(), 0.5, begin=1, end=4))
    state = tx.init(params)
    kept = []
    for _ in range(6):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(jp.get_info(state)["kept"]["bias"])
    assert kept == [10] * 4 + [5] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.0}, "epsilon: got 1.0"),
        ({"penalty": 0.0}, "penalty: got 0.0"),
        ({"amplify": -1.0}, "amplify: got -1.0"),
        ({"largest": float("inf")}, "largest: got inf"),
        ({"end": 0}, "end: got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jp.dhspg(_groups(), 0.5, **({"begin": 0, "end": 5} | options))
