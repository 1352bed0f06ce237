"""HESSO and its cycle: what fades, what does not, and which units are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.training import _units

pytestmark = pytest.mark.usefixtures("quick_compilation")

UNITS, BEGIN, END = 12, 3, 11


def _params(seed=0):
    """An MLP of two hidden layers, of 8 and 4 units."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (5, 8)), "bias": jnp.ones(8)},
        "b": {"kernel": jax.random.normal(keys[1], (8, 4)), "bias": jnp.ones(4)},
        "c": {"kernel": jax.random.normal(keys[2], (4, 3)), "bias": jnp.ones(3)},
    }


def _groups(readers=False):
    first = {"a/kernel": 1, "a/bias": 0} | ({"b/kernel": 0} if readers else {})
    second = {"b/kernel": 1, "b/bias": 0} | ({"c/kernel": 0} if readers else {})
    return jp.Groups.along({"first": first, "second": second}, _params())


def _gradients(step):
    """Of no particular loss, the same whatever the weights are."""
    return jax.tree.map(lambda p: jnp.sin(3 * p + step), _params(9))


def _run(method, steps, inner=None, gradients=lambda params, i: _gradients(i)):
    tx = jp.masked(inner or optax.sgd(0.0), method)
    params = _params()
    state = tx.init(params)
    update = jax.jit(tx.update)
    moments = [(params, state)]
    for i in range(steps):
        updates, state = update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
        moments.append((params, state))
    return moments


def _redundant(state):
    return np.asarray(state.method.own.redundant)


def _by_unit(params, groups):
    """The norm of each unit."""
    squares = jax.tree.map(jnp.square, params)
    return np.sqrt(np.concatenate(list(groups.sums(squares).values())))


@pytest.mark.parametrize("readers", [False, True])
def test_redundant_units_fade_on_a_line_and_others_stand(readers):
    groups = _groups(readers)
    moments = _run(jp.hesso(groups, 0.5, begin=BEGIN, end=END, periods=1), END + 3)
    start = moments[0][0]
    going = _redundant(moments[-1][1])
    assert going.sum() == 6
    kept = groups.masks(start, _units.split(groups, ~jnp.asarray(going)))
    for i, (params, _) in enumerate(moments):
        left = np.clip((END + 1 - i) / (END + 1 - BEGIN), 0, 1)

        def check(w, w0, k, left=left):
            wanted = np.where(True if k is None else k, w0, left * w0)
            np.testing.assert_allclose(w, wanted, rtol=1e-5, atol=1e-7)

        jax.tree.map(check, params, start, _holes_filled(kept, start))
    zero = _by_unit(moments[-1][0], groups) == 0
    np.testing.assert_array_equal(zero, going)


def _holes_filled(kept, params):
    return jax.tree.map(
        lambda k, x: np.ones(x.shape, bool) if k is None else k,
        kept, params, is_leaf=lambda x: x is None,
    )  # fmt: skip


def test_important_units_take_the_steps_of_the_optimizer():
    groups = _groups()
    inner = optax.adamw(0.05, weight_decay=0.1)
    moments = _run(
        jp.hesso(groups, 0.5, begin=BEGIN, end=END, periods=1), END + 4, inner
    )
    params = _params()
    state = inner.init(params)
    for i in range(END + 4):
        updates, state = inner.update(_gradients(i), state, params)
        params = optax.apply_updates(params, updates)
    going = jnp.asarray(_redundant(moments[-1][1]))
    kept = groups.masks(params, _units.split(groups, ~going))
    jax.tree.map(
        lambda w, w0, k: np.testing.assert_allclose(w[k], w0[k], rtol=1e-5),
        moments[-1][0], params, _holes_filled(kept, params),
    )  # fmt: skip


def test_periods_add_to_what_is_redundant():
    groups = _groups()
    method = jp.hesso(groups, 0.75, begin=BEGIN, end=END, periods=3)
    moments = _run(method, END + 2, optax.sgd(0.1))
    found = [_redundant(state) for _, state in moments]
    # Choices at steps 3, 5 and 8, of 3, 6 and 9 units; masks at 5, 8 and 11.
    counts = [0] * 4 + [3] * 2 + [6] * 3 + [9] * 5
    assert [int(x.sum()) for x in found] == counts
    for a, b in zip(found, found[1:], strict=False):
        assert not (a & ~b).any()
    pruned = [
        UNITS - sum(int(x.sum()) for x in groups.alive(params).values())
        for params, _ in moments
    ]
    assert pruned == [0] * 6 + [3] * 3 + [6] * 3 + [9] * 2


def test_the_score_is_the_sum_of_normalised_criteria():
    groups, params, grads = _groups(), _params(), _gradients(0)
    rows = []
    for name in ("a", "b"):
        w, g = (
            np.concatenate([t[name]["kernel"], t[name]["bias"][None]])
            for t in (params, grads)
        )
        norm, slope = (np.linalg.norm(x, axis=0) for x in (w, g))
        product = (w * g).sum(0)
        rows.append(
            [norm, norm / len(w), 1 - product / norm / slope, abs(product),
             product**2 / 2]
        )  # fmt: skip
    table = np.concatenate(rows, axis=1)  # [criteria, units]
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    found = _units.saliency(groups, params, grads, _units.CRITERIA)
    np.testing.assert_allclose(found, table.sum(0), rtol=1e-4)
    found = _units.saliency(groups, params, grads, ("taylor",))
    np.testing.assert_allclose(found, table[3], rtol=1e-4)
    first = np.argsort(table.sum(0))[:6]
    (_, state), *_ = _run(jp.hesso(groups, 0.5, begin=0, end=5, periods=1), 1)[1:]
    assert set(np.flatnonzero(_redundant(state))) == set(first)


METHODS = {
    "hesso": lambda g: jp.hesso(g, 0.5, begin=1, end=4, periods=1),
    "hesso_cric": lambda g: jp.hesso_cric(g, 0.5, begin=1, end=6, samples=2, cycles=2),
    "dhspg": lambda g: jp.dhspg(g, 0.5, begin=1, end=4),
}


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_chooses_the_units_of_one_device(name, kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"up": jax.random.normal(keys[0], (8, 24)),
              "down": jax.random.normal(keys[1], (16, 8))}  # fmt: skip
    # Units of the first are three columns each, and one row of what reads them.
    up = jp.structures.Member("up", 1, [i // 3 for i in range(24)])
    down = jp.structures.Member("down", 0, [i % 8 for i in range(16)])
    groups = jp.Groups((jp.structures.Group("hidden", 8, (up, down)),))
    tx = jp.masked(optax.adam(0.1), METHODS[name](groups))

    def run(params):
        state = tx.init(params)
        for i in range(8):
            grads = jax.tree.map(lambda w, i=i: jnp.cos(5 * w + i), params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, jp.get_masks(state), _redundant(state)

    update = jax.jit(tx.update)
    alone = run(params)
    sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
    with jax.set_mesh(mesh):
        together = run(jax.tree.map(lambda w: jax.device_put(w, sharding), params))
    assert together[0]["up"].sharding.is_equivalent_to(sharding, 2)
    assert alone[2].sum() == 4
    jax.tree.map(np.testing.assert_array_equal, together[1:], alone[1:])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        together[0], alone[0],
    )  # fmt: skip


def test_each_group_keeps_its_best_unit():
    groups = _groups()
    scores = jnp.concatenate([jnp.arange(8.0), 100 + jnp.arange(4.0)])
    found = np.asarray(_units.lowest(groups, scores, 10))
    np.testing.assert_array_equal(np.flatnonzero(~found), [7, 11])
    found = np.asarray(_units.lowest(groups, scores.at[3].set(jnp.nan), 1))
    np.testing.assert_array_equal(np.flatnonzero(found), [3])


def _cycle_by_hand(score, number, samples, cycles, tolerance, weights, rate):
    """The cycle as the authors' program has it, on units of one weight each.

    `score(w)` gives scores and gradients. Returns what was tried in each cycle, and the
    redundant units.
    """
    origin, w = weights.copy(), weights.copy()
    tried, suspected, trying = set(), set(), set()
    total, count, order, cycle = np.zeros(len(w)), 0, [], 0
    for step in range(samples * cycles + 1):
        scores, gradient = score(w)
        total, count = total + scores, count + 1
        low = set(np.argsort(scores, kind="stable")[:number])
        back = False
        if step % samples == 0:
            trying = low if cycle == 0 else suspected - tried
            back = cycle > 0
            if cycle == cycles or (cycle > 0 and len(trying) <= tolerance):
                redundant = np.argsort(total / count, kind="stable")[:number]
                return order, set(redundant), step
            cycle += 1
            order.append(trying)
            tried |= trying
        suspected = (suspected | low) - tried
        w = origin.copy() if back else w - rate * gradient
        t = step % samples
        w[list(trying)] *= (samples - t - 1) / (samples - t)
    raise AssertionError


@pytest.mark.parametrize(
    ("seed", "tolerance", "cycles", "run"),
    [(1, 0, 5, 2), (3, 0, 5, 4), (3, 0, 2, 2), (3, 1, 5, 2), (6, 1, 5, 3)],
)
def test_the_cycle_tries_what_comes_among_the_lowest(seed, tolerance, cycles, run):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=16).astype(np.float32)
    mix = rng.normal(size=(16, 16)).astype(np.float32)
    hessian = mix @ mix.T / 16
    aim = rng.normal(size=16).astype(np.float32)

    def gradient(w):
        return hessian @ (w - aim)

    def score(w):
        g = gradient(w)
        x = np.abs(w * g)
        return x / (np.linalg.norm(x) + 1e-8), g

    samples = 4
    order, redundant, last = _cycle_by_hand(
        score, 5, samples, cycles, tolerance, weights, 0.3
    )
    assert len(order) == run
    params = {"w": jnp.asarray(weights)}
    groups = jp.Groups.along({"w": {"w": 0}}, params)
    method = jp.hesso_cric(
        groups, 5 / 16, begin=0, end=60, samples=samples, cycles=cycles,
        tolerance=tolerance, criteria=("taylor",),
    )  # fmt: skip
    tx = jp.masked(optax.sgd(0.3), method)
    state = tx.init(params)
    update = jax.jit(tx.update)
    seen = []
    for step in range(64):
        updates, state = update({"w": gradient(params["w"])}, state, params)
        params = optax.apply_updates(params, updates)
        own = state.method.own
        if step % samples == 0 and not own.settled:
            seen.append(set(np.flatnonzero(own.trying)))
        if step < last:
            assert not own.settled
        if step == last:  # the weights of the first step, and the first of the fading
            assert own.settled
            kept = np.ones(16, np.float32)
            kept[list(redundant)] = (60 - step) / (60 - step + 1)
            np.testing.assert_allclose(params["w"], weights * kept, rtol=1e-5)
    assert seen == order
    assert set(np.flatnonzero(_redundant(state))) == redundant
    assert set(np.flatnonzero(np.asarray(params["w"]) == 0)) == redundant


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g: jp.hesso("g", 0.5, begin=0, end=15), TypeError, "as_groups"),
        (lambda g: jp.hesso(g, 1.0, begin=0, end=15), ValueError, "sparsity: got 1.0"),
        (
            lambda g: jp.hesso(g, 0.9, begin=0, end=15),
            ValueError,
            "expected at most 10",
        ),
        (lambda g: jp.hesso(g, 0.5, begin=5, end=5), ValueError, "end: got 5"),
        (lambda g: jp.hesso(g, 0.5, begin=0, end=3, periods=4), ValueError, "each per"),
        (lambda g: jp.hesso(g, 0.5, begin=0.5, end=3), TypeError, "begin: got 0.5"),
        (
            lambda g: jp.hesso(g, 0.5, begin=0, end=3, criteria=("size",)),
            ValueError,
            "criteria: got",
        ),
        (
            lambda g: jp.hesso_cric(g, 0.5, begin=0, end=40, samples=4),
            ValueError,
            "expected at least 41, behind 10 cycles",
        ),
        (
            lambda g: jp.hesso_cric(g, 0.5, begin=0, end=40, samples=0),
            ValueError,
            "samples: got 0",
        ),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(_groups())


def test_groups_say_which_leaves():
    method = jp.hesso(_groups(), 0.5, begin=0, end=15)
    with pytest.raises(ValueError, match="where: the groups of the method"):
        jp.masked(optax.sgd(0.1), method, where="*/kernel")
    found = jp.get_masks(jp.masked(optax.sgd(0.1), method).init(_params()))
    assert found["a"]["bias"].shape == (8,) and found["c"]["kernel"] is None
    with pytest.raises(ValueError, match="'a/bias' matches no"):
        jp.masked(optax.sgd(0.1), method).init({"a": {"kernel": jnp.ones((5, 8))}})
    other = _params() | {"a": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}}
    with pytest.raises(ValueError, match="expected 8 places along axis 1"):
        jp.masked(optax.sgd(0.1), method).init(other)
