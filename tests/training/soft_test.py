"""Soft masks (PDP, soft top-k), soft shrinkage and chosen penalties (ISS-P, MaskSparsity)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make(shape=(16, 8), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def state_after(method, steps, params=None):
    """State and weights after some steps without learning."""
    tx = jp.masked(optax.sgd(0.0), method)
    params = {"kernel": make()} if params is None else params
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def pdp(tau=0.1, **options):
    steps = {"begin": 0, "end": 0, "harden": 9, "allocation": "uniform"}
    return jp.pdp(0.75, tau=tau, **(steps | options))


def test_pdp_is_a_half_at_the_threshold():
    params, state = state_after(pdp(), 1)
    w = np.sort(np.abs(np.asarray(params["kernel"])).ravel())
    t = (w[96] + w[95]) / 2
    np.testing.assert_allclose(state.method.own.thresholds[0], t**2, rtol=1e-6)
    probe = {"kernel": jnp.full((16, 8), t)}
    seen = jp.sparse_params(probe, state)["kernel"]
    np.testing.assert_allclose(seen / t, 0.5, atol=1e-5)


def test_pdp_sees_the_softly_masked_weights():
    params, state = state_after(pdp(), 1)
    w = params["kernel"]
    soft = jax.nn.sigmoid((w**2 - state.method.own.thresholds[0]) / 0.1)
    seen = jp.sparse_params(params, state)["kernel"]
    np.testing.assert_allclose(seen, w * soft, rtol=1e-5)


def test_pdp_at_no_temperature_is_top_k():
    params, state = state_after(pdp(tau=1e-12), 1)
    seen = jp.sparse_params(params, state)
    np.testing.assert_array_equal(
        seen["kernel"], jp.masks.apply(params, jp.get_masks(state))["kernel"]
    )


@pytest.mark.parametrize(
    "structure",
    [jp.Unstructured(), jp.Channel(), jp.Block(4, 4), jp.NM(1, 4)],
    ids=repr,
)
def test_pdp_gradients_are_those_of_the_formula(structure):
    params, state = state_after(pdp(tau=1.0, structure=structure), 1)
    check_grads(
        lambda p: jp.sparse_params(p, state)["kernel"], (params,), order=1,
        modes=["rev"], rtol=2e-2, atol=2e-2,
    )  # fmt: skip


def _value(params, state):
    seen = jp.sparse_params(params, state)
    return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(seen))


# Where training puts the derivative: the state comes in as an argument.
PLACES = {
    "jit": lambda p, s: jax.grad(jax.jit(_value))(p, s),
    "remat": lambda p, s: jax.jit(jax.grad(jax.checkpoint(_value)))(p, s),
    "scan": lambda p, s: jax.grad(
        lambda p: jax.lax.scan(lambda s, _: (s, _value(p, s)), s, jnp.arange(1))[1][0]
    )(p),
    "vmap": lambda p, s: jax.grad(
        lambda p: jax.vmap(_value, (None, 0))(p, jax.tree.map(lambda x: x[None], s))[0]
    )(p),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["pdp", "soft_top_k"])
def test_the_derivative_may_be_taken_outside(method, place):
    """Of the transformation inside which the loss takes the forward view."""
    params, state = state_after(pdp() if method == "pdp" else soft_top_k(), 1)
    wanted = jax.grad(_value)(params, state)
    assert jnp.isfinite(wanted["kernel"]).all() and wanted["kernel"].any()
    found = PLACES[place](params, state)
    np.testing.assert_allclose(found["kernel"], wanted["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("structure", [jp.Unstructured(), jp.Block(4, 4)], ids=repr)
@pytest.mark.parametrize("name", ["pdp", "soft_top_k"])
def test_a_weight_that_is_not_finite_spoils_itself_alone(name, structure, bad):
    """Though soft masks of a block, or of a leaf, depend on one another."""
    params = {"kernel": make().at[3, 5].set(bad)}
    method = pdp if name == "pdp" else soft_top_k
    params, state = state_after(method(structure=structure), 1, params)
    seen = jp.sparse_params(params, state)
    grads = jax.grad(_value)(params, state)
    for x in (seen["kernel"], grads["kernel"]):
        assert jnp.isfinite(x.at[3, 5].set(0)).all()


def test_pdp_has_products_with_the_hessian():
    """In reverse mode, and in forward mode over reverse mode."""
    params, state = state_after(pdp(tau=1.0), 1)
    along = {"kernel": make(seed=3)}

    def slope(p):
        return jax.grad(_value)(p, state)["kernel"]

    reverse = jax.grad(lambda p: jnp.vdot(slope(p), along["kernel"]))(params)["kernel"]
    _, forward = jax.jvp(slope, (params,), (along,))
    np.testing.assert_allclose(reverse, forward, rtol=1e-4, atol=1e-4)
    steps = [{"kernel": params["kernel"] + h * along["kernel"]} for h in (-1e-2, 1e-2)]
    differences = (slope(steps[1]) - slope(steps[0])) / 2e-2
    np.testing.assert_allclose(forward, differences, rtol=2e-2, atol=2e-1)


def test_pdp_with_nm_has_a_threshold_for_each_group():
    params, state = state_after(pdp(structure=jp.NM(1, 4)), 1)
    groups = np.sort(np.abs(np.asarray(params["kernel"])).reshape(4, 4, 8), axis=1)
    t = (groups[:, 3] + groups[:, 2]) / 2  # the first kept and the first pruned
    np.testing.assert_allclose(
        state.method.own.thresholds[0].reshape(4, 8), t**2, rtol=1e-5
    )


@pytest.mark.parametrize("structure", [jp.Channel(), jp.Block(4, 4)], ids=repr)
def test_pdp_of_groups_is_decided_by_norms(structure):
    params, state = state_after(pdp(structure=structure, tau=1e-9), 1)
    w = np.asarray(params["kernel"])
    squares = (w**2).reshape(4, 4, 2, 4).sum((1, 3)) if structure != jp.Channel() else (
        w**2).sum(0)  # fmt: skip
    kept = squares > np.asarray(state.method.own.thresholds[0])
    mask = np.asarray(jp.sparse_params(params, state)["kernel"]) != 0
    wide = (
        np.kron(kept, np.ones((4, 4))) if squares.ndim == 2 else np.tile(kept, (16, 1))
    )
    np.testing.assert_array_equal(mask, wide.astype(bool))


def test_pdp_becomes_hard():
    params, state = state_after(pdp(harden=3), 3)
    soft = jp.sparse_params(params, state)["kernel"]
    assert (soft != 0).all()
    params, state = state_after(pdp(harden=3), 4)
    hard = jp.sparse_params(params, state)["kernel"]
    assert (hard != 0).sum() == hard.size // 4
    grads = jax.grad(lambda p: jp.sparse_params(p, state)["kernel"].sum())(params)
    np.testing.assert_array_equal(grads["kernel"], hard != 0)


def test_pdp_before_it_begins_is_dense():
    method = jp.pdp(0.75, begin=5, end=9, harden=12)
    params, state = state_after(method, 3)
    seen = jp.sparse_params(params, state)
    np.testing.assert_array_equal(seen["kernel"], params["kernel"])


def soft_top_k(beta=4.0, **options):
    steps = {"begin": 0, "end": 0, "harden": 8, "allocation": "uniform"}
    return jp.soft_top_k(0.75, beta=beta, **(steps | options))


def masks_of(params, state):
    """The soft masks, for kept and pruned weights."""
    own = state.method.own
    return [
        np.asarray(jax.nn.sigmoid(own.beta * jnp.abs(w) + mu), np.float64)
        for w, mu in zip(jax.tree.leaves(params), own.offsets, strict=True)
    ]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_soft_masks_have_the_mass_of_the_budget(allocation):
    params = {"a": {"kernel": make()}, "b": {"kernel": 3 * make((8, 8), 1)}}
    params, state = state_after(soft_top_k(allocation=allocation), 4, params)
    found = [m.sum() for m in masks_of(params, state)]
    if allocation == "global":
        np.testing.assert_allclose(sum(found), (128 + 64) / 4, rtol=2e-5)
    else:
        np.testing.assert_allclose(found, [32, 16], rtol=2e-5)


def test_soft_top_k_sees_soft_weights_of_the_k_largest():
    params, state = state_after(soft_top_k(), 4)
    seen = np.asarray(jp.sparse_params(params, state)["kernel"])
    mask = np.asarray(jp.get_masks(state)["kernel"])
    assert mask.sum() == mask.size // 4
    wanted = np.where(mask, params["kernel"] * masks_of(params, state)[0], 0)
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)


def test_soft_top_k_gradient_is_that_of_masks_that_keep_their_mass():
    """Against finite differences that solve for the offset anew, in float64."""
    params, state = state_after(soft_top_k(), 4)
    beta = float(state.method.own.beta)
    slope = np.asarray(make(seed=5), np.float64)

    def value(w):
        low, high = -60.0, 60.0
        for _ in range(200):
            mu = (low + high) / 2
            mass = (1 / (1 + np.exp(-(beta * np.abs(w) + mu)))).sum()
            low, high = (mu, high) if mass < w.size / 4 else (low, mu)
        return (slope * w / (1 + np.exp(-(beta * np.abs(w) + mu)))).sum()

    grads = jax.grad(
        lambda p: jnp.sum(
            jp.sparse_params(p, state)["kernel"] * slope.astype(np.float32)
        )
    )(params)["kernel"]
    w = np.asarray(params["kernel"], np.float64)
    for place in [(0, 0), (3, 5), (15, 7), (8, 2), (11, 1)]:
        step = np.zeros_like(w)
        step[place] = 1e-6
        wanted = (value(w + step) - value(w - step)) / 2e-6
        np.testing.assert_allclose(grads[place], wanted, rtol=2e-3, atol=1e-3)


def test_sharp_soft_top_k_is_top_k():
    method = soft_top_k(beta=1e6, harden=4)
    params, state = state_after(method, 4)
    mask = np.asarray(jp.get_masks(state)["kernel"])
    # One weight at the boundary takes what mass is left.
    assert (np.abs(masks_of(params, state)[0] - mask) > 1e-3).sum() <= 2


def test_weights_take_up_the_soft_masks_when_they_become_hard():
    before, soft = state_after(soft_top_k(harden=6), 6)
    after, hard = state_after(soft_top_k(harden=6), 7)
    np.testing.assert_allclose(
        jp.sparse_params(after, hard)["kernel"], jp.sparse_params(before, soft)["kernel"],
        rtol=1e-5,
    )  # fmt: skip
    mask = np.asarray(jp.get_masks(hard)["kernel"])
    np.testing.assert_array_equal(
        jp.sparse_params(after, hard)["kernel"], np.where(mask, after["kernel"], 0)
    )


@pytest.mark.parametrize(("alpha", "every"), [(0.0, 1), (0.5, 1), (0.5, 4), (1.0, 1)])
def test_soft_shrinkage(alpha, every):
    """Without gradients what is picked shrinks by alpha a step, and nothing else."""
    w = make()
    order = np.argsort(-np.abs(np.asarray(w)).ravel(), kind="stable")
    picked = np.ones(w.size, bool)
    picked[order[:32]] = False
    for steps in (1, 3, 6):
        params, state = state_after(
            jp.iss_p(0.75, end=6, alpha=alpha, every=every), steps, {"kernel": w}
        )
        wanted = np.where(picked.reshape(w.shape), w * alpha**steps, w)
        np.testing.assert_allclose(params["kernel"], wanted, rtol=1e-6)
        assert jp.get_info(state)["density"] == 1.0
    params, state = state_after(
        jp.iss_p(0.75, end=6, alpha=alpha, every=every), 7, {"kernel": w}
    )
    np.testing.assert_array_equal(
        jp.get_masks(state)["kernel"], ~picked.reshape(w.shape)
    )


def test_soft_shrinkage_picks_anew():
    """A weight that grows is spared from the next choice on."""
    tx = jp.masked(optax.sgd(1.0), jp.iss_p(0.5, end=9, alpha=0.5))
    params = {"kernel": jnp.array([[1.0, 4.0]])}
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for grads, wanted in (
        ([[0.0, 0.0]], [[0.5, 4.0]]),  # the first is picked
        ([[-8.0, 0.0]], [[4.25, 4.0]]),  # picked still: (0.5 + 8) / 2
        ([[0.0, 0.0]], [[4.25, 2.0]]),  # now it is the second
    ):
        updates, state = update({"kernel": jnp.array(grads)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["kernel"], wanted)


def run_with(tx, steps):
    params = {"scale": make((32,)), "kernel": make()}
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        grads = jax.tree.map(lambda x, s=step: jnp.cos(3 * x + s), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_only_what_is_chosen_is_penalised(penalty):
    method = jp.mask_sparsity(0.5, begin=0, end=8, strength=0.1, penalty=penalty)
    tx = jp.masked(optax.sgd(0.1), method, where="scale")
    found, state = run_with(tx, 1)
    plain, _ = run_with(optax.sgd(0.1), 1)
    start = make((32,))
    order = np.argsort(-np.abs(np.asarray(start)), kind="stable")
    kept, pruned = order[:16], order[16:]
    np.testing.assert_array_equal(found["kernel"], plain["kernel"])
    np.testing.assert_array_equal(found["scale"][kept], plain["scale"][kept])
    pull = jnp.sign(start) if penalty == "l1" else start
    np.testing.assert_allclose(
        found["scale"][pruned], (plain["scale"] - 0.1 * 0.1 * pull)[pruned], rtol=1e-4,
        atol=1e-6,
    )  # fmt: skip
    found, state = run_with(tx, 9)
    assert set(np.flatnonzero(np.asarray(jp.get_masks(state)["scale"]))) == set(kept)
    np.testing.assert_array_equal(found["scale"][pruned], 0)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: jp.pdp(0.5, end=5, harden=3), "harden: got 3"),
        (lambda: jp.pdp(0.5, end=5, harden=8, tau=0), "tau: got 0"),
        (lambda: jp.pdp(0.5, end=5, harden=8, tau="low"), "tau: got 'low'"),
        (lambda: jp.soft_top_k(0.5, end=5, harden=3), "harden: got 3"),
        (lambda: jp.soft_top_k(0.5, end=5, harden=8, beta=-1), "beta: got -1"),
        (lambda: jp.soft_top_k(0.5, end=5, harden=8, beta=None), "beta: got None"),
        (lambda: jp.soft_top_k(end=5, harden=8, structure=jp.NM(2, 4)), "NM"),
        (lambda: jp.iss_p(0.5, end=5, alpha=1.5), "alpha: got 1.5"),
        (lambda: jp.iss_p(0.5, end=5, alpha="a"), "alpha: got 'a'"),
        (
            lambda: jp.mask_sparsity(0.5, begin=1, end=5, strength=-1),
            "strength: got -1",
        ),
        (
            lambda: jp.mask_sparsity(0.5, begin=1, end=5, strength=float("inf")),
            "strength: got inf",
        ),
        (
            lambda: jp.mask_sparsity(0.5, begin=1, end=5, penalty="l0"),
            "penalty: got 'l0'",
        ),
    ],
)
def test_bad_options_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (lambda: jp.pdp(0.5, end=2, harden=3.5), "harden: got 3.5"),
        (lambda: jp.soft_top_k(0.5, end=2, harden=None), "harden: got None"),
        (lambda: jp.iss_p(0.5, end=None), "end: got None"),
        (lambda: jp.mask_sparsity(0.5, begin=1, end=None), "end: got None"),
        (lambda: jp.acdc(0.5, begin=1, end=None, every=2), "end: got None"),
        (lambda: jp.rigl(0.5, key=jax.random.key(0), end=None), "end: got None"),
        (lambda: jp.static(0.5, until=2.5), "until: got 2.5"),
        (lambda: jp.top_kast(0.5, backward=0.4, until=2.5), "until: got 2.5"),
    ],
)
def test_steps_are_whole(factory, name):
    with pytest.raises(TypeError, match=f"{name}; expected a whole number"):
        factory()
