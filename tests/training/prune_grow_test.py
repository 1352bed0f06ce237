"""SET, RigL, GraNet and AC/DC against their definitions, spelled out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.training._prune_grow import exchange

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)


def masked(inner, method):
    """`jp.masked` under jit: in eager mode every step would compile its branches."""
    tx = jp.masked(inner, method)
    return optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update))


def make(shape=(24, 16), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def masks_of(state):
    return np.asarray(jp.get_masks(state)["kernel"])


def top(scores, count):
    """The `count` largest, ties to the lower index."""
    order = np.argsort(-scores.ravel(), kind="stable")[:count]
    mask = np.zeros(scores.size, bool)
    mask[order] = True
    return mask.reshape(scores.shape)


def oracle(mask, w, grown, share):
    """Drops the smallest of the active, then grows the best of all others."""
    kept = int(mask.sum())
    stay = top(np.where(mask, np.abs(w), -1), kept - int(np.floor(share * kept + 0.5)))
    return stay, top(np.where(stay, np.inf, grown), kept)


def test_rigl_exchanges_the_smallest_weights_for_the_largest_gradients():
    method = jp.rigl(0.75, key=KEY, end=100, every=10, drop=0.3)
    tx = masked(optax.sgd(0.0), method)
    params = {"kernel": make()}
    state = tx.init(params)
    updates, state = tx.update({"kernel": make(seed=9)}, state, params)
    for step in range(1, 32):
        params = optax.apply_updates(params, updates)
        before, w = masks_of(state), np.asarray(params["kernel"])
        grads = {"kernel": make(seed=step)}
        updates, state = tx.update(grads, state, params)
        if step % 10:
            assert not jp.get_info(state)["changed"]
            np.testing.assert_array_equal(masks_of(state), before)
            continue
        share = 0.15 * (1 + np.cos(np.pi * step / 100))
        _, wanted = oracle(before, w, np.abs(np.asarray(grads["kernel"])), share)
        np.testing.assert_array_equal(masks_of(state), wanted)
        assert (wanted != before).any()


def test_what_rigl_grows_starts_from_zero_with_fresh_moments():
    tx = masked(optax.adam(0.1), jp.rigl(0.5, key=KEY, end=100, every=3))
    params = {"kernel": make()}
    state = tx.init(params)
    for step in range(4):
        before, old = masks_of(state), params
        updates, state = tx.update({"kernel": make(seed=step)}, state, params)
        params = optax.apply_updates(params, updates)
    grown = masks_of(state) & ~before
    assert grown.any()
    np.testing.assert_array_equal(np.asarray(old["kernel"])[grown], 0)
    moments = np.asarray(state.inner[0].mu["kernel"])
    # One step of Adam from nothing: the first moment is a tenth of the gradient.
    np.testing.assert_allclose(
        moments[grown], 0.1 * np.asarray(make(seed=3))[grown], rtol=1e-5
    )


def test_set_grows_at_random():
    params = {"kernel": make((64, 64))}
    found = []
    for seed in (1, 2):
        method = jp.set_(0.75, key=jax.random.key(seed), every=1)
        tx = masked(optax.sgd(0.0), method)
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        seen = optax.apply_updates(params, updates)
        before = masks_of(state)
        _, state = tx.update(params, state, seen)
        after = masks_of(state)
        kept = 64 * 64 // 4
        stay, _ = oracle(before, np.asarray(seen["kernel"]), np.zeros((64, 64)), 0.3)
        assert (after & stay).sum() == stay.sum() == kept - round(0.3 * kept)
        assert after.sum() == kept
        found.append((before, after & ~stay, stay))
    assert (found[0][0] != found[1][0]).any()
    # Growth is uniform over what is not kept: as likely in either half, to 4 sigma.
    grown, stay = found[0][1], found[0][2]
    share = grown[:32].sum() / grown.sum()
    free = (~stay[:32]).sum() / (~stay).sum()
    assert abs(share - free) < 4 * np.sqrt(free * (1 - free) / grown.sum())


def test_set_without_end_goes_on_at_the_same_share():
    params = {"kernel": make((32, 32))}
    tx = masked(optax.sgd(0.0), jp.set_(0.5, key=KEY, every=1000, drop=0.5))
    state = tx.init(params)
    late = state.method._replace(step=jnp.int32(10_000_000))
    state = jp.training.MaskedState(state.inner, late, state.view)
    _, after = tx.update(params, state, params)
    churn = (masks_of(after) != masks_of(state)).sum()
    assert churn > 0.3 * 512


def test_granet_counts_are_those_of_gmp_and_it_grows_by_gradient():
    steps = {"begin": 2, "end": 20, "every": 3, "allocation": "global"}
    params = {"a": {"kernel": make()}, "b": {"kernel": 3 * make((16, 8), 4)}}
    runs = {
        "gmp": masked(optax.sgd(0.0), jp.gmp(0.8, **steps)),
        "granet": masked(optax.sgd(0.0), jp.granet(0.8, until=30, **steps)),
    }
    states = {name: tx.init(params) for name, tx in runs.items()}
    now = dict.fromkeys(runs, params)
    for step in range(32):
        grads = jax.tree.map(lambda x, s=step: jnp.sin(x * (s + 1)), params)
        before = jp.get_masks(states["granet"])
        for name, tx in runs.items():
            updates, states[name] = tx.update(grads, states[name], now[name])
            now[name] = optax.apply_updates(now[name], updates)
        kept = {n: sum(jp.get_info(s)["kept"].values()) for n, s in states.items()}
        assert kept["gmp"] == kept["granet"]
        if jp.get_info(states["granet"])["changed"]:
            last = step, before, jp.get_masks(states["granet"])
    # After `end` nothing is pruned any more: each leaf exchanges by itself.
    step, before, after = last
    assert step == 30
    share = 0.005
    grads = jax.tree.map(lambda x: jnp.sin(x * 31), params)
    for name in params:
        _, wanted = oracle(
            np.asarray(before[name]["kernel"]),
            np.asarray(now["granet"][name]["kernel"]),
            np.abs(np.asarray(grads[name]["kernel"])),
            share,
        )
        np.testing.assert_array_equal(after[name]["kernel"], wanted)


def test_granet_prunes_then_exchanges_in_each_leaf():
    """One update in the ramp, against both of its steps in NumPy."""
    w, g = make(seed=1), make(seed=2)
    tx = masked(optax.sgd(0.0), jp.granet(0.75, end=0, until=100, drop=0.4))
    state = tx.init({"kernel": w})
    _, state = tx.update({"kernel": g}, state, {"kernel": w})
    pruned = top(np.abs(np.asarray(w)), w.size // 4)
    _, wanted = oracle(pruned, np.asarray(w), np.abs(np.asarray(g)), 0.4)
    np.testing.assert_array_equal(masks_of(state), wanted)


@pytest.mark.parametrize(
    "structure", [jp.Block(4, 4), jp.Channel(), jp.NM(2, 4)], ids=repr
)
def test_exchange_keeps_the_structure(structure):
    w, g = make((32, 16), 1), make((32, 16), 2)
    _, masks = jp.prune({"kernel": w}, 0.5, structure=structure)
    found = exchange(
        "kernel", structure, masks["kernel"], w, jnp.abs, g, jnp.float32(0.4)
    )
    found = np.asarray(found)
    assert found.sum() == w.size // 2
    assert (found != np.asarray(masks["kernel"])).any()
    if isinstance(structure, jp.NM):
        assert (found.reshape(8, 4, 16).sum(1) == 2).all()
        return
    units = np.asarray(
        structure.scored("", lambda m: m * 1.0, jnp.asarray(found)).operands[0]
    )
    size = w.size // units.size
    assert set(np.unique(units)) == {0, size}


def test_exchange_of_nothing_changes_nothing():
    w = make((32, 16))
    for structure in (jp.Unstructured(), jp.NM(2, 4), jp.Block(8, 8)):
        _, masks = jp.prune({"kernel": w}, 0.5, structure=structure)
        found = exchange("k", structure, masks["kernel"], w, jnp.abs, w, jnp.float32(0))
        np.testing.assert_array_equal(found, masks["kernel"])


def test_nan_weights_are_exchanged_like_small_ones():
    w = make((16, 16)).at[3, 3].set(jnp.nan)
    mask = jnp.ones((16, 16), bool).at[:8].set(False).at[3, 3].set(True)
    found = exchange(
        "k", jp.Unstructured(), mask, w, jnp.abs, make((16, 16), 5), jnp.float32(0)
    )
    found = np.asarray(found)
    assert found.sum() == int(mask.sum())
    # What takes its place is the largest gradient of all that could grow.
    grown = np.argwhere(found & ~np.asarray(mask))
    assert len(grown) == 1 and not found[3, 3]
    free = np.where(np.asarray(mask), -1, np.abs(np.asarray(make((16, 16), 5))))
    assert tuple(grown[0]) == np.unravel_index(free.argmax(), free.shape)


@pytest.mark.parametrize(
    "allocation", [{"a/*": 0.75}, lambda s, _: dict.fromkeys(s, 0.75)]
)
def test_sparsities_by_leaf_may_stand_alone(allocation):
    """`sparsity=0` with a mapping: only these leaves are pruned."""
    params = {"a": {"kernel": make((16, 8))}, "b": {"kernel": make((16, 8))}}
    wanted = 32 if callable(allocation) else 128
    for method, first in (
        (jp.static(0.0, allocation=allocation), 32),
        (jp.rigl(0.0, key=KEY, end=9, allocation=allocation), 32),
        (jp.gmp(0.0, end=4, allocation=allocation), None),
    ):
        tx = masked(optax.sgd(0.1), method)
        state = tx.init(params)
        counts = [jp.get_info(state)["kept"]["a/kernel"]]
        for _ in range(6):
            _, state = tx.update(params, state, params)
            counts.append(jp.get_info(state)["kept"]["a/kernel"])
        assert counts[-1] == 32
        assert jp.get_info(state)["kept"]["b/kernel"] == wanted
        if first:
            assert set(counts) == {32}
        else:
            assert counts[0] == 128 and len(set(counts)) > 3


@pytest.mark.parametrize(
    ("begin", "every", "end", "sparse"),
    [
        pytest.param(10, 5, 85, [(10, 15), (20, 25), (30, 35), (40, 45), (50, 55),
                                 (60, 65), (70, 75), (85, 100)], id="imagenet"),
        pytest.param(10, 20, 170, [(10, 30), (50, 70), (90, 110), (130, 150),
                                   (170, 200)], id="cifar"),
    ],
)  # fmt: skip
def test_acdc_phases_are_those_of_the_paper(begin, every, end, sparse):
    tx = masked(optax.sgd(0.0), jp.acdc(0.5, begin=begin, every=every, end=end))
    params = {"kernel": make((8, 8))}
    state = tx.init(params)
    for step in range(sparse[-1][1]):
        _, state = tx.update(params, state, params)
        is_sparse = any(a <= step < b for a, b in sparse)
        assert jp.get_info(state)["density"] == (0.5 if is_sparse else 1.0), step


def test_acdc_starts_dense_phases_from_zero_with_fresh_moments():
    tx = masked(optax.adam(0.1), jp.acdc(0.5, begin=2, every=3, end=20))
    params = {"kernel": make()}
    state = tx.init(params)
    for step in range(6):
        before, old = masks_of(state), params
        updates, state = tx.update({"kernel": make(seed=step)}, state, params)
        params = optax.apply_updates(params, updates)
    assert masks_of(state).all() and not before.all()
    np.testing.assert_array_equal(np.asarray(old["kernel"])[~before], 0)
    moments = np.asarray(state.inner[0].mu["kernel"])[~before]
    np.testing.assert_allclose(
        moments, 0.1 * np.asarray(make(seed=5))[~before], rtol=1e-5
    )


def test_sparse_pretraining_and_dense_fine_tuning():
    tx = masked(optax.adam(0.1), jp.static(0.75, key=KEY, until=5))
    params = {"kernel": make()}
    state = tx.init(params)
    masks = masks_of(state)
    assert masks.sum() == masks.size // 4
    for step in range(8):
        old = params
        updates, state = tx.update({"kernel": make(seed=step)}, state, params)
        params = optax.apply_updates(params, updates)
        assert jp.get_info(state)["density"] == (0.25 if step < 5 else 1.0)
        if step == 5:  # the function is the same where it is handed over
            np.testing.assert_array_equal(np.asarray(old["kernel"])[~masks], 0)
    assert (np.asarray(params["kernel"]) != 0).all()


def test_static_random_masks_depend_on_the_key_alone():
    a, b, c = (
        jp.get_masks(
            masked(optax.sgd(1.0), jp.static(0.5, key=jax.random.key(k))).init(p)
        )["kernel"]
        for k, p in ((1, {"kernel": make()}), (1, {"kernel": make(seed=7)}),
                     (2, {"kernel": make()}))
    )  # fmt: skip
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_a_key_may_be_traced():
    """In a factory of `inject_hyperparams`, and mapped over seeds."""
    params = {"kernel": make()}

    def wrap(learning_rate):
        method = jp.rigl(0.5, key=KEY, end=9, every=2)
        return jp.masked(optax.sgd(learning_rate), method)

    tx = optax.inject_hyperparams(wrap)(learning_rate=0.1)
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        _, state = jax.jit(tx.update)(params, state, params)
    assert jp.get_info(state)["flipped"] > 0

    def masks_of_seed(key):
        method = jp.rigl(0.5, key=key, end=9, every=2)
        return jp.get_masks(jp.masked(optax.sgd(0.1), method).init(params))["kernel"]

    keys = jax.random.split(KEY, 3)
    found = jax.jit(jax.vmap(masks_of_seed))(keys)
    for mask, key in zip(found, keys, strict=True):
        np.testing.assert_array_equal(mask, masks_of_seed(key))


def test_infinite_gradients_grow_no_more_than_others():
    tx = masked(optax.sgd(0.0), jp.rigl(0.5, key=KEY, end=100, drop=0.1))
    params = {"kernel": make()}
    state = tx.init(params)
    before = masks_of(state)
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), params)
    _, state = tx.update(grads, state, params)
    lost = (before & ~masks_of(state)).sum()
    assert 0 < lost <= round(0.1 * before.sum())


@pytest.mark.parametrize("structure", [jp.Block(2, 2), jp.Channel()], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_gradients_of_whole_units_drop_no_others(structure, dtype):
    """Several add up in a unit: still no more than what stays."""
    w = make((16, 16)).astype(dtype)
    _, masks = jp.prune({"kernel": w}, 0.5, structure=structure)
    before = masks["kernel"]
    found = exchange(
        "k", structure, before, w, jnp.abs, jnp.full_like(w, jnp.inf), jnp.float32(0)
    )
    np.testing.assert_array_equal(found, before)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: jp.rigl(0.5, key=0, end=9), "key: got 0; expected one made by"),
        (lambda: jp.rigl(0.5, key=KEY, end=9, drop=1.5), "drop: got 1.5"),
        (lambda: jp.rigl(0.5, key=KEY, end=9, drop="a"), "drop: got 'a'"),
        (lambda: jp.rigl(key=KEY, end=9), "sparsity: got None"),
        (lambda: jp.rigl(0.5, key=KEY, end=9, allocation="eerk"), "got 'eerk'"),
        (lambda: jp.gmp(0.5, end=9, allocation="eerk"), "allocation: got 'eerk'"),
        (lambda: jp.gmp(0.5, end=2**31), "end: got 2147483648; expected below 2"),
        (lambda: jp.granet(0.5, end=9, key=KEY), "key: got one with initial=0"),
        (lambda: jp.rigl(1.5, key=KEY, end=9), "sparsity: got 1.5"),
        (lambda: jp.set_(0.5, key=KEY, begin=5, end=2), "0 <= begin <= end"),
        (lambda: jp.granet(0.5, end=9, until=5), "until: got 5"),
        (lambda: jp.granet(0.5, end=9, until=9.5), "until: got 9.5; expected a whole"),
        (lambda: jp.granet(0.5), "end: got None"),
        (
            lambda: jp.granet(0.5, initial=0.9, end=9),
            "initial: got 0.9; expected at most",
        ),
        (lambda: jp.static(0.5, until=0), "until: got 0"),
        (lambda: jp.static(0.5, key=0), "key: got 0"),
        (lambda: jp.acdc(0.5, begin=5, end=9, every=0), "every: got 0"),
    ],
)
def test_bad_options_are_refused(factory, message):
    with pytest.raises((ValueError, TypeError), match=message):
        factory()
