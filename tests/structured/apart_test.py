"""Other units in each layer of a scan, and in each head."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jax.random.normal(jax.random.key(0), (4, 5, 6))
LAYERS, WIDTH = 3, 12


def values(shapes, seed=1):
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [0.5 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    )


P = values(
    {
        "in": (6, WIDTH), "out": (WIDTH, 3),
        "l": {"n": (LAYERS, WIDTH), "qkv": (LAYERS, WIDTH, 24), "o": (LAYERS, 8, WIDTH),
              "up": (LAYERS, WIDTH, 16), "down": (LAYERS, 16, WIDTH)},
    }
)  # fmt: skip


def model(p, x):
    def block(x, p):
        h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * p["n"]
        q, k, v = jnp.moveaxis((h @ p["qkv"]).reshape(4, 5, 3, 2, 4), 2, 0)
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(4, 5, 8) @ p["o"]
        return x + jax.nn.silu(x @ p["up"]) @ p["down"], None

    x, _ = lax.scan(block, x @ p["in"], p["l"])
    return x.mean(1) @ p["out"]


GRAPH = structured.trace(model, P, X)
NEURONS, HEADS, WIDTHS, STREAM = "l/down:1", "l/o:1.0", "l/o:1.1", "l/down:2"


def drawn(name, count, seed=0):
    random = np.random.default_rng(seed)
    group = GRAPH[name]
    sizes = [GRAPH[h].size for h in GRAPH.within(name)]
    rows = [random.permutation(group.size)[:count] for _ in range(int(np.prod(sizes)))]
    return np.stack(rows).reshape(*sizes, count)


def test_units_are_local_to_layers_and_heads():
    assert GRAPH.within(NEURONS) == ("l/down:0",)
    assert GRAPH.within(HEADS) == ("l/down:0",)
    assert GRAPH.within(WIDTHS) == ("l/down:0", HEADS)
    assert GRAPH.within(STREAM) == GRAPH.within("l/down:0") == ()


CHOICES = {
    "neurons": {NEURONS: drawn(NEURONS, 7)},
    "heads": {HEADS: drawn(HEADS, 1)},
    "widths": {WIDTHS: drawn(WIDTHS, 3)},
    "all": {
        NEURONS: drawn(NEURONS, 5), HEADS: drawn(HEADS, 1), WIDTHS: drawn(WIDTHS, 2),
        STREAM: [0, 1, 5, 6, 10],
    },
    "some the same": {NEURONS: [1, 2, 8], WIDTHS: drawn(WIDTHS, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_shrunk_equals_masked(name):
    plan = structured.planned(GRAPH, CHOICES[name])
    assert plan.verify(model, P, X).equal
    masks = plan.masks(P)
    jax.tree.map(np.testing.assert_array_equal, jp.masks.apply(P, masks), plan.mask(P))
    small = plan.shrink(P)
    assert sum(x.size for x in jax.tree.leaves(small)) == plan.after.parameters
    jax.tree.map(
        np.testing.assert_array_equal, small, plan.shrink(jax.tree.map(np.asarray, P))
    )
    again = structured.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    jax.tree.map(np.testing.assert_array_equal, small, again.shrink(P))
    assert str(again) == str(plan) and again.verify(model, P, X).equal


def test_gradients_and_states_are_those_of_the_masked_model():
    plan, optimizer = structured.planned(GRAPH, CHOICES["all"]), optax.adam(1e-2)

    def loss(p, x):
        return jnp.sum(jnp.sin(model(p, x)))

    found = jax.grad(plan.rewrite(loss))(plan.shrink(P), X)
    masked = jax.grad(loss)(plan.mask(P), X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        found, plan.shrink(masked),
    )  # fmt: skip
    state = optimizer.update(masked, optimizer.init(P), P)[1]
    small = plan.shrink_state(state, P)
    jax.tree.map(np.testing.assert_array_equal, small[0].mu, plan.shrink(state[0].mu))
    history = {"history": jax.tree.map(lambda x: jnp.stack([x, 2 * x]), P)}
    small = plan.shrink_state(history, P)["history"]["l"]["up"]
    np.testing.assert_array_equal(small[1], 2 * plan.shrink(P)["l"]["up"])


def test_weights_are_not_fitted_to_units_that_differ_from_layer_to_layer():
    """They would be those of other units, and nothing would say so."""
    plan = structured.planned(GRAPH, {NEURONS: drawn(NEURONS, 8)})
    stats = jp.calibrate(model, P, [X], statistics=("mean", "gram"))
    for fit in (
        lambda: structured.compensate(GRAPH, plan, P, stats),
        lambda: structured.refit(plan, P, stats),
        lambda: structured.merge(GRAPH, plan, P),
    ):
        with pytest.raises(ValueError, match="plan: l/down:1 keep other units in each"):
            fit()


def test_each_layer_keeps_its_best_units():
    scores = structured.score_groups(GRAPH, P, "l1", apart=True)
    up, down = abs(P["l"]["up"]), abs(P["l"]["down"])
    np.testing.assert_allclose(scores[NEURONS], up.sum(1) + down.sum(2), rtol=1e-4)
    together = structured.score_groups(GRAPH, P, "l1")
    for name, x in together.items():
        np.testing.assert_allclose(
            scores[name].reshape(-1, x.size).sum(0), x, rtol=1e-4
        )
    for scope in ("local", "global"):
        plan = structured.plan(GRAPH, scores, ratio=0.5, scope=scope, kinds="neuron")
        kept = plan.groups[NEURONS].kept
        best = np.sort(np.argsort(-scores[NEURONS])[:, : kept.shape[-1]])
        np.testing.assert_array_equal(kept, best)
        assert plan.groups[NEURONS].left == 8 and plan.verify(model, P, X).equal


def test_leaves_on_an_explicit_mesh():
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    plan = structured.planned(GRAPH, {NEURONS: drawn(NEURONS, 8)})
    with jax.set_mesh(mesh):
        spec = jax.NamedSharding(mesh, jax.P(None, None, "model"))
        p = {**P, "l": {**P["l"], "up": jax.device_put(P["l"]["up"], spec)}}
        small = plan.shrink(p)["l"]["up"]
    assert small.sharding.is_equivalent_to(spec, 3)
    np.testing.assert_array_equal(small, plan.shrink(P)["l"]["up"])


STACKED = values({"a": (LAYERS, 6, 8), "b": (LAYERS, 8, 6), "c": (8,), "h": (8, 8)})
ORDER = jnp.arange(8.0)


def carried(x, p):
    def step(x, w):
        h = jnp.tanh(x[0] @ w[0]) + x[1]
        return (x[0] + h @ w[1], h), None

    return lax.scan(step, (x, jnp.zeros((4, 5, 8))), (p["a"], p["b"]))[0][0]


def stepwise(h):
    def run(x, p):
        def step(x, w):
            return x + h(x @ w[0], p) @ w[1], None

        return lax.scan(step, x, (p["a"], p["b"]))[0]

    return run


def numbered(h, p):
    return h * ORDER


def shared(h, p):
    return h * p["c"]


def of_other_steps(h, p):
    return h * p["a"].sum((0, 1))


def between_layers(x, p):
    h = jnp.einsum("btd,ldf->lbtf", x, p["a"])
    return jnp.einsum("lbtf,mbtf,lfd->btd", h, h, p["b"])


NOT_LOCAL = {
    "carried": carried, "numbered": stepwise(numbered), "shared": stepwise(shared),
    "of other steps": stepwise(of_other_steps), "between": between_layers,
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_units_that_meet_or_have_numbers_are_not_local(name):
    graph = structured.trace(lambda p, x: NOT_LOCAL[name](x, p), STACKED, X)
    units = next(g for g in graph.groups if g.size == 8)
    assert graph.within(units.name) == ()
    with pytest.raises(
        ValueError, match=r"expected a list of whole numbers, or 8 booleans"
    ):
        structured.planned(graph, {units.name: [[0, 1], [1, 2], [3, 4]]})


def test_of_two_axes_one_may_differ_along_the_other():
    def fn(p, x):
        return x.sum() * jnp.tanh(p["w"]).sum()

    p = {"w": jnp.arange(12.0).reshape(3, 4) / 9}
    graph = structured.trace(fn, p, X)
    within = {g.size: graph.within(g.name) for g in graph.groups}
    assert within == {3: (), 4: ("w:0",)}
    plan = structured.planned(graph, {"w:0": [0, 2], "w:1": [[0, 1], [1, 2], [2, 3]]})
    assert plan.verify(fn, p, X).equal
    np.testing.assert_array_equal(
        plan.shrink(p)["w"], p["w"][[[0], [2]], [[0, 1], [2, 3]]]
    )


@pytest.mark.parametrize("order", ["bf->b", "fb->b"])
def test_units_that_lie_between_those_of_their_owners_keep_their_order(order):
    def fn(p, x):
        h = jnp.tanh(x @ p["w"]).reshape(4, 5, *((3, 4) if order[0] == "b" else (4, 3)))
        h = h.sum(-1 if order[0] == "b" else -2)
        return (h**2) @ p["o"]

    p = values({"w": (6, 12), "o": (3, 2)})
    graph = structured.trace(fn, p, X)
    units = next(g for g in graph.groups if g.size == 4)
    assert [graph[n].size for n in graph.within(units.name)] == [3]
    plan = structured.planned(graph, {units.name: [[0, 1], [3, 2], [0, 3]]})
    assert plan.verify(fn, p, X).equal
    both = {units.name: [[0, 1], [3, 2], [0, 3]], "o:0": [0, 2]}
    assert structured.planned(graph, both).verify(fn, p, X).equal


def test_ensembles_have_units_of_their_own(check):
    def fn(p, x):
        return jax.vmap(lambda a, b: jax.nn.relu(x @ a) @ b)(p["a"], p["b"]).mean(0)

    graph = structured.trace(fn, STACKED, X)
    units = next(g for g in graph.groups if g.size == 8)
    assert [graph[n].size for n in graph.within(units.name)] == [LAYERS]
    kept = np.array([[0, 1, 2], [5, 1, 2], [7, 6, 5]])
    plan = structured.planned(graph, {units.name: kept})
    assert plan.verify(fn, STACKED, X).equal
    np.testing.assert_array_equal(
        plan.shrink(STACKED)["a"][1], STACKED["a"][1][:, np.sort(kept[1])]
    )


def test_functions_that_relate_layers_are_refused():
    plan = structured.planned(GRAPH, CHOICES["neurons"])
    small = plan.shrink(P)

    def norm(p, x):
        return model(p, x).sum() + jnp.square(p["l"]["up"]).sum()

    expected = norm(plan.mask(P), X)
    np.testing.assert_allclose(plan.rewrite(norm)(small, X), expected, rtol=1e-5)
    for other in (
        lambda p, x: (p["l"]["up"].sum(0) * p["l"]["up"][1:].sum(0)).sum(),
        lambda p, x: jnp.square(p["l"]["up"].sum(0)).sum(),
        lambda p, x: p["l"]["up"],
    ):
        with pytest.raises(ValueError, match="l/down:1.* differ from layer to layer"):
            plan.rewrite(other)(small, X)


def two_branches(join):
    def fn(p, x):
        def branch(a, b):
            return jnp.einsum("btd,ldf->lbtf", x, p[a]), p[b]

        return join(branch("a", "b"), branch("c", "d"))

    return fn


def summed_apart(*branches):
    return sum(jnp.einsum("lbtf,lfd->btd", jnp.tanh(h), w) for h, w in branches)


@jax.custom_vjp
def _pair(h, k):
    return jnp.tanh(h), jnp.tanh(k)


_pair.defvjp(lambda h, k: (_pair(h, k), ()), lambda _, g: (g[0] + g[1], g[1]))


def test_groups_that_differ_in_other_ways_are_not_made_one():
    p = values({n: (LAYERS, 6, 8) if n in "ac" else (LAYERS, 8, 6) for n in "abcd"})
    fn = two_branches(summed_apart)
    graph = structured.trace(fn, p, X)
    kept = {"b:1": [[0, 1], [1, 2], [3, 4]], "d:1": [[5, 1], [7, 2], [6, 4]]}
    plan = structured.planned(graph, kept)
    assert plan.verify(fn, p, X).equal
    small = plan.shrink(p)

    def product(one, other):
        return (one[0] * other[0]).sum()

    with pytest.raises(ValueError, match="here are those of"):
        plan.rewrite(two_branches(product))(small, X)

    def paired(one, other):
        h, k = _pair(one[0], other[0])
        return summed_apart((h, one[1]), (k, other[1]))

    run = plan.rewrite(two_branches(paired))
    np.testing.assert_allclose(
        run(small, X), two_branches(paired)(plan.mask(p), X), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="couples units"):
        jax.grad(lambda p: run(p, X).sum())(small)


def test_a_derivative_that_relates_layers_is_refused():
    @jax.custom_vjp
    def f(h):
        return jnp.tanh(h)

    f.defvjp(lambda h: (f(h), h), lambda h, g: (g * h.sum(0),))

    def fn(p, x):
        h = f(jnp.einsum("btd,ldf->lbtf", x, p["a"]))
        return jnp.einsum("lbtf,lfd->btd", h, p["b"])

    graph = structured.trace(fn, STACKED, X)
    units = next(g for g in graph.groups if g.size == 8)
    plan = structured.planned(graph, {units.name: [[0, 1], [1, 2], [3, 4]]})
    assert plan.verify(fn, STACKED, X).equal
    with pytest.raises(ValueError, match="relates units of one layer or head"):
        jax.grad(lambda p: plan.rewrite(fn)(p, X).sum())(plan.shrink(STACKED))


def test_bad_numbers_are_refused():
    for kept, message in (
        (np.zeros((3, 2), int), "as many different numbers"),
        (np.zeros((2, 4), int), "for each unit of l/down:0"),
        (np.full((3, 1), 16), "numbers from 0 to 15"),
    ):
        with pytest.raises(ValueError, match=message):
            structured.planned(GRAPH, {NEURONS: kept})
