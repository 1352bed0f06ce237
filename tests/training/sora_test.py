"""SoRA: the proximal step, gates that come back, and ranks that are cut out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _run(tx, params, steps, gradient):
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        updates, state = update(gradient(params, i), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def test_a_step_is_the_closed_form():
    """The minimum of |x - (g - η s)|² / 2 + λ |x|, gate by gate."""
    gate = jnp.array([1.0, 0.3, 0.05, -0.02, -0.6])
    slope = jnp.array([1.0, -1.0, 0.2, 0.1, 3.0])
    schedule = jp.schedules.linear(0.2, 0, 2, initial=0.1)
    tx = jp.masked(optax.sgd(0.1), jp.sora(schedule, end=9), where="gate")
    want = np.asarray(gate, np.float64)
    runs = _run(tx, {"gate": gate}, 3, lambda p, i: {"gate": slope})
    for i, (params, _) in enumerate(runs):
        moved = want - 0.1 * np.asarray(slope)
        want = np.sign(moved) * np.maximum(np.abs(moved) - (0.1, 0.15, 0.2)[i], 0)
        np.testing.assert_allclose(params["gate"], want, rtol=1e-5, atol=1e-6)


def test_gates_come_back_until_the_end():
    def gradient(params, i):
        return {"gate": jnp.array([1.0 - (i > 0) - (i > 2), -1.0])}

    tx = jp.masked(optax.sgd(0.2), jp.sora(0.05, end=8), where="gate")
    found = [np.asarray(p["gate"]) for p, _ in _run(tx, {"gate": jnp.ones(2) / 4}, 12,
                                                    gradient)]  # fmt: skip
    assert found[0][0] == 0 and found[6][0] > 0
    tx = jp.masked(optax.sgd(0.2), jp.sora(0.05, end=2), where="gate")
    *_, (params, state) = _run(tx, {"gate": jnp.ones(2) / 4}, 12, gradient)
    assert params["gate"].tolist()[0] == 0 < params["gate"].tolist()[1]
    assert jp.get_info(state)["kept"] == {"gate": 1}


def test_ranks_are_dropped_and_cut_out():
    """A target of rank 2 leaves two gates; without the others the function is the same."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    frozen = draw(6, 5)
    target = frozen + draw(6, 2) @ draw(2, 5)
    x = draw(64, 6)

    def fn(params, x):
        low = (x @ params["a"]) * params["gate"]
        return x @ frozen + low @ params["b"]

    def loss(params):
        return jnp.mean((fn(params, x) - x @ target) ** 2)

    params = {"a": draw(6, 4) / 2, "b": draw(4, 5) / 2, "gate": jnp.ones(4)}
    tx = jp.masked(optax.adam(0.02), jp.sora(4e-3, end=700), where="gate")
    *_, (params, _) = _run(tx, params, 900, lambda p, i: jax.grad(loss)(p))
    kept = np.flatnonzero(params["gate"])
    assert 2 <= len(kept) < 4
    assert loss(params) < 0.05 * jnp.mean((x @ (target - frozen)) ** 2)
    graph = jp.structured.trace(fn, params, x)
    (group,) = graph.groups
    assert (group.kind, group.size) == ("rank", 4)
    plan = jp.structured.planned(graph, {group.name: kept})
    small = plan.shrink(params)
    assert small["a"].shape == (6, len(kept))
    np.testing.assert_allclose(fn(small, x), fn(params, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": -1.0}, "threshold: got -1.0"), ({"end": 0}, "end: got 0")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jp.sora(**({"threshold": 0.1, "end": 5} | options))
