"""Methods in rounds, on a small regression problem that trains in a moment."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 20


def params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "up": {"kernel": jax.random.normal(first, (8, 16)), "bias": jnp.zeros(16)},
        "down": {"kernel": jax.random.normal(second, (16, 4)) / 4},
    }


def loss(params, step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (32, 8))
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return jnp.mean((hidden @ params["down"]["kernel"] - jnp.sin(3 * x[:, :4])) ** 2)


@functools.partial(jax.jit, static_argnums=(2, 3))
def descend(params, masks, start, stop):
    tx = jp.masked(optax.adam(0.01), masks)
    state = tx.init(params)
    for step in range(start, stop):
        grads = jax.grad(loss)(params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jp.masks.apply(params, masks)


class Train:
    """Counts how often it is called."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def __call__(self, params, masks, *, start, stop):
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append((start, stop))
        return descend(params, masks, start, STEPS if stop is None else stop)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def lottery(rounds, rate):
    """The lottery ticket procedure, spelled out."""
    start = params()
    ones = jax.tree.map(lambda x: jnp.ones_like(x, bool) if x.ndim > 1 else None, start)
    masks, trained = ones, descend(start, ones, 0, STEPS)
    for i in range(1, rounds + 1):
        sizes = jnp.concatenate(
            [jnp.abs(trained[k]["kernel"]).ravel() for k in ("down", "up")]
        )
        left = 192 - math.floor((1 - (1 - rate) ** i) * 192 + 0.5)
        bound = jnp.sort(sizes)[-left]
        masks = jax.tree.map(
            lambda m, w, b=bound: None if m is None else jnp.abs(w) >= b, masks, trained,
            is_leaf=lambda x: x is None,
        )  # fmt: skip
        trained = descend(jp.masks.apply(start, masks), masks, 0, STEPS)
    return trained, masks


def test_imp_without_rewinding_steps_is_the_lottery_ticket_procedure():
    found = jp.rounds.imp(Train(), params(), rate=0.25, rounds=3)
    trained, masks = lottery(3, 0.25)
    equal(found.masks, masks)
    equal(found.params, trained)
    equal(found.start, params())
    np.testing.assert_allclose(found.sparsities, [0, 0.25, 0.4375, 0.578125])


def test_imp_rewinds_to_the_step_asked_for():
    train = Train()
    found = jp.rounds.imp(train, params(), rate=0.5, rounds=2, rewind=5)
    assert train.calls == [(0, 5), (5, None), (5, None), (5, None)]
    ones = jax.tree.map(lambda x: jnp.ones_like(x, bool), params())
    ones["up"]["bias"] = None
    equal(found.start, descend(params(), ones, 0, 5))
    begun = jp.masks.apply(found.start, found.masks)
    equal(found.params, descend(begun, found.masks, 5, STEPS))


def test_imp_without_rewinding_trains_on():
    found = jp.rounds.imp(Train(), params(), rate=0.5, rounds=1, rewind=None)
    dense = jp.rounds.imp(Train(), params(), rate=0.5, rounds=1)
    equal(found.masks, dense.masks)
    ones = jax.tree.map(lambda m: jnp.ones_like(m), found.masks)
    begun = jp.masks.apply(descend(params(), ones, 0, STEPS), found.masks)
    equal(found.params, descend(begun, found.masks, 0, STEPS))


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_imp_goes_on_where_it_was_stopped(stop_at, tmp_path):
    whole = jp.rounds.imp(Train(), params(), rate=0.5, rounds=3)
    with pytest.raises(KeyboardInterrupt):
        jp.rounds.imp(Train(stop_at), params(), rate=0.5, rounds=3, directory=tmp_path)
    train = Train()
    again = jp.rounds.imp(train, params(), rate=0.5, rounds=3, directory=tmp_path)
    assert len(train.calls) == 4 - stop_at
    equal(again.params, whole.params)
    equal(again.masks, whole.masks)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"rate": 0.3}, "rate"),
        ({"rewind": 2}, "rewind"),
        ({"where": "up/kernel"}, "where"),
    ],
)
def test_other_arguments_do_not_go_on_in_the_same_folder(changed, name, tmp_path):
    arguments = {"rate": 0.5, "rounds": 1, "directory": tmp_path}
    jp.rounds.imp(Train(), params(), **arguments)
    with pytest.raises(ValueError, match=f"{name}: .* was begun with"):
        jp.rounds.imp(Train(), params(), **(arguments | changed))
    other = jax.tree.map(lambda x: x + 1, params())
    with pytest.raises(ValueError, match="params: .* was begun with other values"):
        jp.rounds.imp(Train(), other, **arguments)
    more = jp.rounds.imp(Train(), params(), **(arguments | {"rounds": 2}))
    assert len(more.sparsities) == 3


def test_weights_that_come_back_are_refused():
    def train(params, masks, *, start, stop):
        return jax.tree.map(lambda x: x + 1, params)

    with pytest.raises(ValueError, match="pruned weights that are not 0"):
        jp.rounds.imp(train, params(), rounds=1)


@pytest.mark.parametrize("scope", ["global", "leaf", "neuron"])
def test_sap_prunes_what_the_index_says(scope):
    def train(params, masks, *, start, stop):
        return jp.masks.apply(params, masks)

    start = params()
    found = jp.rounds.sap(train, start, rounds=1, scope=scope, rewind=None)
    kernels = {k: np.asarray(start[k]["kernel"]) for k in ("down", "up")}
    if scope == "global":
        groups = [np.concatenate([x.ravel() for x in kernels.values()])]
        masks = [np.concatenate([np.ravel(found.masks[k]["kernel"]) for k in kernels])]
    else:
        groups = [x.T for x in kernels.values()]
        masks = [np.asarray(found.masks[k]["kernel"]).T for k in kernels]
        if scope == "leaf":
            groups, masks = ([x.ravel() for x in y] for y in (groups, masks))
        else:
            groups, masks = ([row for x in y for row in x] for y in (groups, masks))
    for w, mask in zip(groups, masks, strict=True):
        d, sizes = w.size, np.abs(w.astype(np.float64))
        index = 1 - np.sqrt(sizes).sum() ** 2 / sizes.sum() / d
        goes = min(d - math.ceil(d * (1 - index)), 9 * d // 10)
        assert mask.sum() == d - goes
        assert sizes[mask].min() >= sizes[~mask].max(initial=0)


def test_sap_follows_its_options():
    def train(params, masks, *, start, stop):
        return jp.masks.apply(params, masks)

    sparsities = {
        name: jp.rounds.sap(train, params(), rounds=1, rewind=None, **options).sparsities[1]
        for name, options in {
            "plain": {}, "slack": {"eta": 0.5}, "scaled": {"gamma": 1.5},
            "capped": {"eta": 9.0, "beta": 0.4},
        }.items()
    }  # fmt: skip
    assert sparsities["plain"] < sparsities["slack"]
    assert sparsities["plain"] < sparsities["scaled"]
    assert sparsities["capped"] == pytest.approx(math.floor(192 * 0.4) / 192)


def replica(params, masks, key):
    noise = jax.random.normal(key, ())

    def step(params, i):
        grads = jax.grad(loss)(params, jnp.int32(100 * noise) + i)
        return jp.masks.apply(
            jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), masks
        ), None

    return jax.lax.scan(step, params, jnp.arange(5))[0]


@pytest.mark.parametrize("greedy", [False, True])
def test_the_support_of_a_soup_lies_in_its_mask(greedy):
    found = jp.rounds.sparse_model_soups(
        replica, params(), 0.75, key=jax.random.key(3), replicas=4, rounds=2,
        evaluate=(lambda p: -float(loss(p, 999))) if greedy else None,
    )  # fmt: skip
    np.testing.assert_allclose(found.sparsities, [0, 0.5, 0.75])
    assert jp.masks.count(found.masks).kept == 48
    equal(found.params, jp.masks.apply(found.params, found.masks))


def test_a_greedy_soup_is_no_worse_than_its_best_replica():
    tastes = []

    def evaluate(params):
        tastes.append(-float(loss(params, 999)))
        return tastes[-1]

    found = jp.rounds.sparse_model_soups(
        replica, params(), 0.5, key=jax.random.key(3), replicas=4, evaluate=evaluate
    )
    assert -float(loss(found.params, 999)) >= max(tastes[:4]) - 1e-6


def test_a_soup_is_the_average_of_its_replicas():
    key = jax.random.key(3)
    found = jp.rounds.sparse_model_soups(replica, params(), 0.5, key=key, replicas=3)
    _, masks = jp.prune(params(), 0.5, allocation="global")
    begun = jp.masks.apply(params(), masks)
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    many = [replica(begun, masks, k) for k in keys]
    wanted = jax.tree.map(lambda *xs: sum(xs) / 3, *many)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found.params, wanted,
    )  # fmt: skip


def test_a_kept_weight_may_be_zero_in_one_replica():
    def train(params, masks, key):
        drop = jax.random.bernoulli(key, 0.5, (192,))
        kernel = jnp.where(drop[:128].reshape(8, 16), 0, params["up"]["kernel"])
        return jp.masks.apply(params | {"up": params["up"] | {"kernel": kernel}}, masks)

    found = jp.rounds.sparse_model_soups(
        train, params(), 0.5, key=jax.random.key(0), evaluate=lambda p: 1.0
    )
    equal(found.params, jp.masks.apply(found.params, found.masks))


def test_a_mapping_of_sparsities_is_refused():
    with pytest.raises(ValueError, match="allocation: got"):
        jp.rounds.imp(Train(), params(), rounds=1, allocation={"*": 0.2})


def test_a_search_without_a_finite_loss_says_so():
    with pytest.raises(ValueError, match="NaN or infinity for every mask"):
        jp.rounds.random_search(
            lambda p: jnp.float32(jnp.nan),
            params(),
            0.5,
            key=jax.random.key(0),
            trials=2,
        )


def test_a_search_wants_one_number():
    with pytest.raises(ValueError, match=r"loss: gives an array of shape \(16,\)"):
        jp.rounds.random_search(
            lambda p: p["up"]["kernel"][0], params(), 0.5, key=jax.random.key(0)
        )


def test_what_is_no_key_is_refused():
    with pytest.raises(TypeError, match="key: got 0"):
        jp.rounds.random_search(lambda p: 0.0, params(), 0.5, key=0)
    with pytest.raises(TypeError, match="key: got 0"):
        jp.rounds.sparse_model_soups(replica, params(), 0.5, key=0)


def test_soups_of_different_masks_are_refused():
    a, b = ({"kernel": jnp.array([x])} for x in ([1.0, 0.0], [0.0, 1.0]))
    with pytest.raises(ValueError, match="number 1 has 1 weights at kernel"):
        jp.rounds.soup([a, b])
    with pytest.raises(ValueError, match="weights: got"):
        jp.rounds.soup([a, a], weights=[0.5, 0.6])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 100),
        ({"budget": "flops"}, 400),
        ({"budget": "flops", "cap": 2}, 200),
        ({"budget": "flops", "flops": (30.0, 20.0)}, 150),
    ],
)
def test_scratch_trains_for_its_budget(options, steps):
    _, masks = jp.prune(params(), 0.75)
    seen = []

    def train(params, masks, steps):
        equal(params, jp.masks.apply(params, masks))
        seen.append(steps)
        return params

    found = jp.rounds.scratch(train, params(), masks, steps=100, **options)
    assert [found.steps] == seen == [steps]


def test_random_search_takes_the_best_of_what_it_drew():
    def error(params):
        return loss(params, 0)

    found = jp.rounds.random_search(
        error, params(), 0.5, key=jax.random.key(1), trials=16, where="up/kernel"
    )
    assert float(error(found.params)) == pytest.approx(float(found.losses.min()))
    assert found.losses.shape == (16,) and len(set(found.losses.tolist())) > 10
    columns = np.asarray(found.masks["up"]["kernel"])
    assert (columns.all(0) | ~columns.any(0)).all() and columns.any(0).sum() == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: jp.rounds.imp(t, params(), rounds=0), "rounds: got 0"),
        (lambda t: jp.rounds.imp(t, params(), rounds=2.5), "rounds: got 2.5"),
        (lambda t: jp.rounds.imp(t, params(), rounds=1, rewind=0.5), "rewind: got 0.5"),
        (lambda t: jp.rounds.imp(t, params(), rounds=1, rate=1.0), "rate: got 1.0"),
        (lambda t: jp.rounds.imp(t, params(), rounds=1, rewind=-1), "rewind: got -1"),
        (lambda t: jp.rounds.sap(t, params(), rounds=1, p=2.0), r"p, q: got \(2.0"),
        (
            lambda t: jp.rounds.sap(t, params(), rounds=1, scope="row"),
            "scope: got 'row'",
        ),
        (lambda t: jp.rounds.sap(t, params(), rounds=1, p="a"), "p, q: got"),
        (lambda t: jp.rounds.sap(t, params(), rounds=1, beta=2.0), "beta: got 2.0"),
        (lambda t: jp.rounds.sap(t, params(), rounds=1, eta=None), "eta: got None"),
        (lambda t: jp.rounds.sap(t, params(), rounds=1, gamma=0), "gamma: got 0"),
        (
            lambda t: jp.rounds.scratch(t, params(), {}, steps=1, cap="a"),
            "cap: got 'a'",
        ),
        (lambda t: jp.rounds.scratch(t, params(), {}, steps=0), "steps: got 0"),
        (lambda t: jp.rounds.scratch(t, params(), {}, steps=1, budget="x"), "budget"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Train())


def test_the_same_leaves_and_functions_go_on_in_the_same_folder(tmp_path):
    params = {"a": jnp.arange(1.0, 17.0).reshape(4, 4), "c": jnp.ones((4, 4))}
    runs = []

    def train(params, masks, *, start, stop):
        runs.append(start)
        return jp.masks.apply(params, masks)

    def allocation(shapes, sparsity):
        return dict.fromkeys(shapes, sparsity)

    for where in (lambda path, leaf: path == "a", ["a"], "a"):
        found = jp.rounds.imp(
            train, params, rounds=2, where=where, allocation=allocation,
            directory=tmp_path / "imp",
        )  # fmt: skip
        assert found.masks["c"] is None
    assert len(runs) == 3

    def partly(costs):
        """A function of its own each time, as in another process."""

        def filling(shapes, sparsity, *, costs):
            return jp.allocation.water_filling(shapes, sparsity, costs=costs)

        return functools.partial(filling, costs={"a": costs, "c": 1})

    def go_on(costs):
        jp.rounds.imp(
            train, params, rounds=1, allocation=partly(costs), directory=tmp_path / "p"
        )

    go_on(2)
    go_on(2)
    assert len(runs) == 5
    with pytest.raises(ValueError, match="allocation: .* was begun with"):
        go_on(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": jp.NM(2, 4)}, "contradicts NM"),
        ({"structure": jp.Block(3, 3)}, "does not divide"),
        ({"allocation": "eerk"}, "allocation: got 'eerk'"),
    ],
)
def test_what_a_later_round_would_refuse_is_refused_at_once(options, message):
    def train(params, masks, *, start, stop):
        raise AssertionError("nothing may be trained")

    def cook(params, masks, key):
        raise AssertionError("nothing may be trained")

    params = {"a": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=message):
        jp.rounds.imp(train, params, rounds=5, **options)
    with pytest.raises(ValueError, match=message):
        jp.rounds.sparse_model_soups(
            cook, params, 0.8, key=jax.random.key(0), rounds=3, **options
        )
