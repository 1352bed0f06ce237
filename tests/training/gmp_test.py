"""What `gmp` does beyond the promises of every method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _kept_after(method, params, steps):
    tx = jp.masked(optax.set_to_zero(), method)
    state = tx.init(params)
    update = jax.jit(tx.update)
    history = [jp.get_info(state)["kept"]]
    for _ in range(steps):
        _, state = update(params, state, params)
        history.append(jp.get_info(state)["kept"])
    return history


def _two_leaves():
    a, b = jax.random.split(jax.random.key(0))
    return {
        "body": {"kernel": jax.random.normal(a, (10, 10))},
        "head": {"kernel": jax.random.normal(b, (10, 10))},
    }


def test_a_mapping_says_what_leaves_end_with():
    method = jp.gmp(0.8, end=2, initial=0.2, allocation={"head/*": 0.4})
    history = _kept_after(method, _two_leaves(), 3)
    # Half of the time is seven eighths of the way, on the cubic.
    assert history == [
        {"body/kernel": 80, "head/kernel": 80},
        {"body/kernel": 80, "head/kernel": 80},
        {"body/kernel": 80 - 53, "head/kernel": 80 - 18},  # halves rounded up
        {"body/kernel": 20, "head/kernel": 60},
    ]


def test_the_smallest_weights_go():
    params = _two_leaves()
    tx = jp.masked(optax.set_to_zero(), jp.gmp(0.7, end=0, allocation="global"))
    _, state = tx.update(params, tx.init(params), params)
    found = jp.get_masks(state)
    sizes = np.concatenate([np.abs(x).ravel() for x in jax.tree.leaves(params)])
    kept = np.concatenate([np.ravel(m) for m in jax.tree.leaves(found)])
    assert sizes[kept].min() > sizes[~kept].max()
    assert kept.sum() == 60


def test_a_schedule_stands_for_its_own_options():
    schedule = jp.schedules.one_shot(0.5, 3)
    history = _kept_after(jp.gmp(schedule), _two_leaves(), 5)
    assert [x["head/kernel"] for x in history] == [100] * 4 + [50] * 2
    with pytest.raises(ValueError, match=r"sparsity: got a Schedule together with"):
        jp.gmp(schedule, end=7)


def test_a_mapping_needs_the_sparsity_of_the_others():
    with pytest.raises(ValueError, match=r"sparsity: got None.*With a mapping"):
        jp.gmp(end=3, allocation={"*": 0.5})


def test_end_is_needed():
    with pytest.raises(ValueError, match=r"end: got None; expected the step"):
        jp.gmp(0.5)


def test_a_leaf_does_not_grow_denser():
    """Its own sparsity may lie below the initial one of the others."""
    params = {"a": jnp.arange(64.0).reshape(8, 8), "c": jnp.ones((8, 8))}
    method = jp.gmp(0.9, initial=0.6, end=4, allocation={"a": 0.25})
    tx = jp.masked(optax.sgd(0.0), method)
    state = jax.jit(tx.init)(params)
    kept = [jp.get_info(state)["kept"]]
    for _ in range(6):
        _, state = jax.jit(tx.update)(params, state, params)
        kept.append(jp.get_info(state)["kept"])
    assert [k["a"] for k in kept] == [48] * 7
    assert (kept[0]["c"], kept[-1]["c"]) == (26, 6)
