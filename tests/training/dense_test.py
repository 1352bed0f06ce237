"""Methods whose weights stay dense: STE, SR-STE, PGF, Top-KAST, tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make(shape=(16, 8), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def train(method, steps, inner=None):
    """Trains through the forward view; the weights and state after each step."""
    tx = jp.masked(optax.sgd(0.05) if inner is None else inner, method)
    params = {"kernel": make()}
    state = jax.jit(tx.init)(params)
    step = stepper(tx, lambda params, i: jnp.sum((params["kernel"] - goal(i)) ** 2))
    out = [(params, state)]
    for i in range(steps):
        out.append(step(*out[-1], i))
    return out


def stepper(tx, loss):
    """A step of training through the forward view, under jit."""

    @jax.jit
    def step(params, state, i):
        grads = jax.grad(lambda p: loss(jp.sparse_params(p, state), i))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def goal(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(100), step), (16, 8))


def top(w, count):
    order = np.argsort(-np.abs(np.asarray(w)).ravel(), kind="stable")[:count]
    mask = np.zeros(w.size, bool)
    mask[order] = True
    return mask.reshape(w.shape)


def test_ste_masks_are_those_of_the_weights_at_hand():
    for params, state in train(jp.ste(0.75), 6):
        wanted = top(params["kernel"], params["kernel"].size // 4)
        np.testing.assert_array_equal(jp.get_masks(state)["kernel"], wanted)
        seen = jp.sparse_params(params, state)["kernel"]
        np.testing.assert_array_equal(seen, np.where(wanted, params["kernel"], 0))
    assert (np.asarray(params["kernel"]) != 0).all()


def test_ste_is_gradient_descent_with_the_gradient_at_the_masked_weights():
    w = make()
    for step, (params, state) in enumerate(train(jp.ste(structure=jp.NM(2, 4)), 5)):
        # Under jit products and sums are fused: a few ulps of the largest weights.
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-5, atol=1e-6)
        w = params["kernel"]
        groups = np.abs(np.asarray(w)).reshape(4, 4, 8)
        ranks = (-groups).argsort(1, kind="stable").argsort(1)
        seen = np.where((ranks < 2).reshape(w.shape), w, 0)
        np.testing.assert_array_equal(jp.get_masks(state)["kernel"], seen != 0)
        w = w - 0.05 * 2 * (seen - goal(step))


def test_sr_ste_adds_the_decay_of_pruned_weights():
    (first, state), (second, _) = train(jp.sr_ste(0.5, decay=0.5), 1)
    w, mask = first["kernel"], jp.get_masks(state)["kernel"]
    gradient = 2 * (jnp.where(mask, w, 0) - goal(0))
    wanted = w - 0.05 * (gradient + 0.5 * jnp.where(mask, 0, w))
    np.testing.assert_allclose(second["kernel"], wanted, rtol=1e-5, atol=1e-7)


def test_masks_stand_still_between_two_decisions():
    changed = [
        bool(jp.get_info(state)["changed"])
        for _, state in train(jp.ste(0.5, every=3), 8)
    ]
    assert changed == [False, True, False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("leak", "other"),
    [(1.0, jp.static(0.0)), (0.0, jp.ste(0.75))],
    ids=["dense", "ste"],
)
def test_mask_decay_at_1_is_dense_and_at_0_is_ste(leak, other):
    # From the first step on the schedule is at its end.
    constant = jp.schedules.linear(leak, begin=0, end=0, initial=1.0)
    ours, theirs = (train(m, 6) for m in (jp.mdgf(0.75, leak=constant), other))
    for (a, state), (b, like) in zip(ours, theirs, strict=True):
        # The runs agree but for fusion; what the loss sees of the same weights, and
        # what it sends back, is the same to the bit.
        np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-5, atol=1e-6)
        (seen, pull), (wanted, push) = (
            jax.vjp(lambda p, s=s: jp.sparse_params(p, s), a) for s in (state, like)
        )
        if leak == 0:
            np.testing.assert_array_equal(
                jp.get_masks(state)["kernel"], jp.get_masks(like)["kernel"]
            )
        np.testing.assert_array_equal(seen["kernel"], wanted["kernel"])
        np.testing.assert_array_equal(pull(a)[0]["kernel"], push(a)[0]["kernel"])


def test_mask_decay_lets_the_leak_through():
    leak = jp.schedules.linear(0.0, begin=0, end=4, initial=1.0)
    for step, (params, state) in enumerate(train(jp.mdgf(0.5, leak=leak), 5)):
        w, mask = params["kernel"], jp.get_masks(state)["kernel"]
        seen = jp.sparse_params(params, state)["kernel"]
        wanted = jnp.where(mask, w, (1 - step / 4) * w if step < 4 else 0)
        np.testing.assert_allclose(seen, wanted, rtol=1e-6)
        _, pull = jax.vjp(lambda p, s=state: jp.sparse_params(p, s), params)
        np.testing.assert_array_equal(pull(params)[0]["kernel"], params["kernel"])


@pytest.mark.parametrize(
    ("decay", "stages"),
    [("stepwise", [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]),
     ("geometric", [(8, 128), (4, 64), (2, 32), (1, 16)])],
)  # fmt: skip
def test_structure_decay_goes_through_its_stages(decay, stages):
    params = {"kernel": make((128, 4))}
    method = jp.sdgf(jp.NM(1, 16), begin=2, end=14, decay=decay)
    tx = jp.masked(optax.sgd(0.0), method)
    state = tx.init(params)
    update = jax.jit(tx.update)
    changes = [2 + -(-i * 12 // (len(stages) - 1)) for i in range(len(stages))]
    for step in range(18):
        _, state = update(params, state, params)
        mask = np.asarray(jp.get_masks(state)["kernel"])
        number = sum(step >= c for c in changes) - 1
        if number < 0:
            assert mask.all()
            continue
        n, m = stages[number]
        assert (mask.reshape(-1, m, 4).sum(1) == n).all(), step


def test_top_kast_sets():
    """A lies in B; what is outside B keeps its value, to the bit, under Adam too."""
    method = jp.top_kast(0.75, backward=0.5, every=2)
    history = train(method, 9, optax.adamw(0.1, weight_decay=0.1))
    for (before, old), (after, new) in zip(history, history[1:], strict=False):
        used = np.asarray(jp.get_masks(old)["kernel"])
        learns = np.asarray(jp.masks.unpack(old.method.own[0]))
        assert used.sum() == used.size // 4 and learns.sum() == used.size // 2
        assert (learns | ~used).all()
        moved = np.asarray(before["kernel"] != after["kernel"])
        np.testing.assert_array_equal(moved, learns)
        if jp.get_info(new)["changed"]:
            count = used.size // 4
            wanted = top(after["kernel"], count)
            np.testing.assert_array_equal(jp.get_masks(new)["kernel"], wanted)
    assert (history[0][0]["kernel"] != history[-1][0]["kernel"]).mean() > 0.5


def test_top_kast_regularises_by_density():
    (first, state), (second, _) = train(jp.top_kast(0.75, backward=0.5, decay=0.2), 1)
    w = first["kernel"]
    used, learns = jp.get_masks(state)["kernel"], jp.masks.unpack(state.method.own[0])
    gradient = 2 * (jnp.where(used, w, 0) - goal(0))
    pull = 0.2 * jnp.where(used, w, w / 0.25)
    wanted = jnp.where(learns, w - 0.05 * (gradient + pull), w)
    np.testing.assert_allclose(second["kernel"], wanted, rtol=1e-5, atol=1e-7)


def test_top_kast_stops_exploring():
    history = train(jp.top_kast(0.75, backward=0.5, every=2, until=4), 9)
    *_, (_, state) = history
    used = jp.get_masks(state)["kernel"]
    np.testing.assert_array_equal(used, jp.masks.unpack(state.method.own[0]))
    np.testing.assert_array_equal(used, jp.get_masks(history[5][1])["kernel"])


def test_a_later_task_leaves_earlier_ones_as_they_were():
    params = {"kernel": make()}
    x = make((5, 16), 3)
    bank, answers = [], []
    for number in range(3):
        _, mask = jp.prune(
            params, 0.5, score=jp.scores.random(params, key=jax.random.key(number))
        )
        method = jp.training.task(mask, earlier=bank)
        tx = jp.masked(optax.adamw(0.1, weight_decay=0.1), method)
        state, before = tx.init(params), params
        step = stepper(tx, lambda p, i: jnp.sum(p["kernel"] * goal(i)))
        for i in range(5):
            params, state = step(params, state, i)
        used = np.any([np.asarray(jp.masks.unpack(m)["kernel"]) for m in bank], 0)
        free = np.asarray(mask["kernel"]) & ~used
        np.testing.assert_array_equal(params["kernel"] != before["kernel"], free)
        bank.append(jp.masks.pack(mask))
        answers.append(x @ jp.masks.apply(params, mask)["kernel"])
        for old, answer in zip(bank, answers, strict=True):
            again = x @ jp.masks.apply(params, old)["kernel"]
            np.testing.assert_array_equal(again, answer)


def test_masks_of_a_task_outlive_a_donated_state():
    """Also where they are too small to be packed, and kept as they are."""
    mask = {"scale": jnp.array(True)}
    tx = jp.masked(optax.sgd(0.1), jp.training.task(mask), where="scale")
    params = {"scale": jnp.float32(2.0)}
    for _ in range(2):
        state = tx.init(params)
        jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
    assert mask["scale"]


def test_tasks_name_what_they_cannot_protect():
    params = {"kernel": make(), "embedding": make(), "bias": jnp.ones(8)}
    ones = jax.tree.map(lambda x: jnp.ones_like(x, bool), params)
    only = ones | {"embedding": None, "bias": None}
    with pytest.raises(ValueError, match="a task has a mask for embedding"):
        jp.masked(optax.sgd(0.1), jp.training.task(ones | {"bias": None})).init(params)
    with pytest.raises(TypeError, match="earlier: got a dict; expected a sequence"):
        jp.training.task(only, earlier=only)
    nothing = jp.training.task(dict.fromkeys(params))
    with pytest.raises(ValueError, match="found: every leaf is None"):
        jp.masked(optax.sgd(0.1), nothing).init(params)
    with pytest.raises(ValueError, match="a task has a mask for embedding"):
        jp.masked(
            optax.sgd(0.1),
            jp.training.task(only, earlier=[ones | {"kernel": None, "bias": None}]),
        ).init(params)
    # A task without a mask uses all weights, so that none is left to learn.
    tx = jp.masked(optax.sgd(0.1), jp.training.task(only, earlier=[{"kernel": None}]))
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates["kernel"].any() and updates["embedding"].all()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: jp.sr_ste(0.5, decay=-1), "decay: got -1"),
        (lambda: jp.sr_ste(0.5, decay="small"), "decay: got 'small'"),
        (lambda: jp.top_kast(0.5, backward=0.2, decay=None), "decay: got None"),
        (lambda: jp.mdgf(0.5, leak=0.5), "leak: got 0.5; expected a schedule"),
        (
            lambda: jp.mdgf(0.5, leak=jp.schedules.linear(0.0, begin=0, end=9)),
            "Give initial=1.0",
        ),
        (lambda: jp.top_kast(0.5, backward=0.2, until=-1), "until: got -1"),
        (lambda: jp.top_kast(0.5, backward=0.2, allocation={"*": 0.5}), "mapping"),
        (lambda: jp.sdgf(jp.Block(2, 2), end=9), "expected NM"),
        (lambda: jp.sdgf(jp.NM(1, 4), end=9, decay="slow"), "decay: got 'slow'"),
        (lambda: jp.top_kast(0.5, backward=0.8), "at most sparsity=0.5"),
        (lambda: jp.top_kast(0.5, backward=0.2, structure=jp.NM(2, 4)), "N:M does not"),
        (lambda: jp.schedules.exponential(0, end=9), "rate: got 0"),
    ],
)
def test_bad_options_are_refused(factory, message):
    with pytest.raises((ValueError, TypeError), match=message):
        factory()


def test_top_kast_learns_all_that_it_uses():
    """Also where the allocation gives a leaf more forward than backward."""

    def allocation(shapes, sparsity):
        return dict.fromkeys(shapes, 0.2 if sparsity > 0.5 else 0.9)

    method = jp.top_kast(0.9, backward=0.4, every=2, allocation=allocation)
    tx = jp.masked(optax.sgd(0.1), method)
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        used = jp.get_masks(state)["kernel"]
        (learns,) = (jp.masks.unpack(m) for m in state.method.own)
        assert bool(jnp.all(learns | ~used))
        assert int(used.sum()) == 102
