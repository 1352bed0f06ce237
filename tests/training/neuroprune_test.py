"""NeuroPrune on every layout of attention kernels: counts, heads, folds, shrinking."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.training import _heads

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, HEADS, HEAD_DIM, FF = 16, 4, 8, 24
MLP = {"mlp_in": "*/up/kernel", "mlp_out": "*/down/kernel"}
OUT = "*/out/kernel"


class Layout(NamedTuple):
    """How one transformer layer stores its attention kernels."""

    roles: jp.Roles
    fused: bool
    explicit: bool
    stack: int  # 0: layers apart
    groups: int


def layout(*, fused=False, explicit=False, stack=0, groups=HEADS, degree=OUT):
    names = {"qkv": "*/qkv/kernel"} if fused else {
        n: f"*/{n}/kernel" for n in ("query", "key", "value")
    }  # fmt: skip
    kv = None if groups == HEADS else groups
    roles = jp.Roles(**MLP, **names, out=OUT, degree=degree, heads=HEADS, kv_heads=kv)
    return Layout(roles, fused, explicit, stack, groups)


LAYOUTS = [
    pytest.param(layout(), id="separate"),
    pytest.param(layout(explicit=True), id="dense-general"),
    pytest.param(layout(fused=True), id="fused"),
    pytest.param(layout(fused=True, explicit=True), id="fused-dense-general"),
    pytest.param(layout(groups=2), id="grouped-query"),
    pytest.param(layout(fused=True, groups=2), id="fused-grouped-query"),
    pytest.param(layout(stack=2), id="stacked"),
    pytest.param(layout(stack=3, fused=True), id="stacked-fused"),
    pytest.param(
        layout(stack=2, explicit=True, groups=2), id="stacked-dense-general-gqa"
    ),
]


def canonical(key, groups):
    """One layer as q, k, v `[d, heads, head_dim]`, out `[heads, head_dim, d]`, and MLP."""
    keys = iter(jax.random.split(key, 12))

    def draw(*shape):
        return 0.1 * jax.random.normal(next(keys), shape)

    return {
        "q": draw(D, HEADS, HEAD_DIM), "k": draw(D, groups, HEAD_DIM),
        "v": draw(D, groups, HEAD_DIM), "o": draw(HEADS, HEAD_DIM, D),
        "bq": draw(HEADS, HEAD_DIM), "bk": draw(groups, HEAD_DIM),
        "bv": draw(groups, HEAD_DIM), "bo": draw(D),
        "up": draw(D, FF), "bup": draw(FF), "down": draw(FF, D), "bdown": draw(D),
    }  # fmt: skip


def stored(c, form: Layout):
    """A canonical layer as a model would store it."""
    flat = (lambda x: x) if form.explicit else (lambda x: x.reshape(*x.shape[:-2], -1))
    if form.fused and form.explicit:
        attn = {"qkv": {"kernel": jnp.stack([c["q"], c["k"], c["v"]], 1),
                        "bias": jnp.stack([c["bq"], c["bk"], c["bv"]], 0)}}  # fmt: skip
    elif form.fused:
        kernels, biases = (
            [flat(c[n]) for n in ns] for ns in (("q", "k", "v"), ("bq", "bk", "bv"))
        )
        attn = {"qkv": {"kernel": jnp.concatenate(kernels, -1),
                        "bias": jnp.concatenate(biases, -1)}}  # fmt: skip
    else:
        attn = {
            name: {"kernel": flat(c[n]), "bias": flat(c["b" + n])}
            for name, n in (("query", "q"), ("key", "k"), ("value", "v"))
        }
    out = c["o"] if form.explicit else c["o"].reshape(-1, D)
    return attn | {
        "out": {"kernel": out, "bias": c["bo"]},
        "up": {"kernel": c["up"], "bias": c["bup"]},
        "down": {"kernel": c["down"], "bias": c["bdown"]},
    }


def make(form: Layout, seed=0, edit=lambda c, i: c):
    count = max(form.stack, 2)
    layers = [
        stored(edit(canonical(jax.random.key(seed + i), form.groups), i), form)
        for i in range(count)
    ]
    if form.stack:
        return {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
    return {"layers": {str(i): layer for i, layer in enumerate(layers)}}


def unstacked(params, form: Layout):
    if not form.stack:
        return list(params["layers"].values())
    return [
        jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(form.stack)
    ]


def forward(params, form: Layout, x):
    """The layers one after another; sizes are read off the arrays."""

    def step(x, layer):
        x = x + attention(layer, form, x)
        hidden = jax.nn.gelu(x @ layer["up"]["kernel"] + layer["up"]["bias"])
        return x + hidden @ layer["down"]["kernel"] + layer["down"]["bias"], None

    if form.stack:
        return jax.lax.scan(step, x, params["layers"])[0]
    for layer in params["layers"].values():
        x, _ = step(x, layer)
    return x


def removed(params, form: Layout, masks=None):
    """The plan of what is left after NeuroPrune, and the parameters that it leaves."""
    params = jp.neuroprune_fold(params, masks, roles=form.roles)
    graph = jp.structured.trace(
        lambda p, x: forward(p, form, x), params, jnp.ones((6, D))
    )
    kinds = ("head", "kv_group", "neuron")
    plan = jp.structured.without_zeros(graph, params, kinds=kinds)
    return plan, plan.shrink(params)


def heads_of(params, form: Layout):
    """Of each layer."""
    return [x["out"]["kernel"].reshape(-1, HEAD_DIM, D).shape[0]
            for x in unstacked(params, form)]  # fmt: skip


def attention(layer, form: Layout, x):
    out = layer["out"]["kernel"].reshape(-1, HEAD_DIM, D)
    heads = len(out)
    if form.fused and form.explicit:
        kernel, bias = layer["qkv"]["kernel"], layer["qkv"]["bias"]
        q, k, v = (
            jnp.einsum("td,dhe->the", x, kernel[:, i]) + bias[i] for i in range(3)
        )
    elif form.fused:
        y = (x @ layer["qkv"]["kernel"] + layer["qkv"]["bias"]).reshape(
            len(x), -1, HEAD_DIM
        )
        groups = (y.shape[1] - heads) // 2
        q, k, v = jnp.split(y, [heads, heads + groups], axis=1)
    else:
        q, k, v = (
            (x @ layer[n]["kernel"].reshape(D, -1) + layer[n]["bias"].reshape(-1))
            .reshape(len(x), -1, HEAD_DIM)
            for n in ("query", "key", "value")
        )  # fmt: skip
    repeat = heads // max(k.shape[1], 1)
    k, v = jnp.repeat(k, repeat, 1), jnp.repeat(v, repeat, 1)
    weights = jax.nn.softmax(jnp.einsum("the,she->hts", q, k) / HEAD_DIM**0.5)
    return jnp.einsum("hts,she,hed->td", weights, v, out) + layer["out"]["bias"]


def train(params, method, steps, lr=1e-2, noise=0.0):
    """Runs a method on a quadratic loss around the initial weights."""
    tx = jp.masked(optax.adam(lr), method)
    start = params

    @jax.jit
    def step(params, state, key):
        grads = jax.tree.map(lambda p, p0: p - p0, params, start)
        if noise:
            draws = jp.scores.random(params, key=key)
            grads = jax.tree.map(lambda g, d: g + noise * (d - 0.5), grads, draws)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params, state


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("form", [LAYOUTS[0], *LAYOUTS[3:6], LAYOUTS[-1]])
def test_the_count_at_the_end_is_exact(form, allocation):
    params = make(form)
    method = jp.neuroprune(
        0.7, roles=form.roles, end=8, every=2, allocation=allocation, head_every=None
    )
    params, state = train(params, method, 10, noise=0.1)
    masks = jp.get_masks(state)
    sizes = {p: m.size for p, m in named(masks).items()}
    if allocation == "uniform":
        pruned = {p: int((~m).sum()) for p, m in named(masks).items()}
        assert pruned == {p: (7 * n + 5) // 10 for p, n in sizes.items()}
    else:
        attends = {
            p for p in sizes if any(n in p for n in ("query", "key", "value", "qkv"))
        }
        for part in (attends, sizes.keys() - attends):
            total = sum(sizes[p] for p in part)
            pruned = sum(int((~named(masks)[p]).sum()) for p in part)
            assert pruned == (7 * total + 5) // 10
    for path, mask in named(masks).items():
        assert (np.asarray(named(params)[path])[~np.asarray(mask)] == 0).all()


def named(tree):
    from jaxprune import _tree

    paths, leaves, _ = _tree.flatten(tree)
    return {p: x for p, x in zip(paths, leaves, strict=True) if x is not None}


@pytest.mark.parametrize("form", LAYOUTS)
def test_equal_heads_are_folded_and_removed_without_changing_the_function(form):
    def twins(c, i):
        # Heads 0 and 1 (and, with grouped queries, their shared key and value) are equal.
        del i
        for name in ("q", "k", "v", "bq", "bk", "bv"):
            x, axis = c[name], (0 if name.startswith("b") else 1)
            if x.shape[axis] == HEADS:
                first = jnp.take(x, jnp.array([0]), axis)
                rest = jnp.take(x, jnp.arange(2, HEADS), axis)
                c = c | {name: jnp.concatenate([first, first, rest], axis)}
        return c

    params = make(form, edit=twins)
    method = jp.neuroprune(
        strengths=(0.0, 0.0),
        roles=form.roles,
        end=9,
        theta=0.0,
        head_every=1,
        eps=1e-30,
    )
    tx = jp.masked(optax.sgd(0.0), method)
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    folded = optax.apply_updates(params, updates)
    masks = jp.get_masks(state)
    for alive in state.method.own.alive.values():
        assert np.asarray(alive).tolist() == [[False, True, True, True]] * len(alive)
    x = jax.random.normal(jax.random.key(9), (5, D))
    want = forward(params, form, x)
    np.testing.assert_allclose(forward(folded, form, x), want, rtol=1e-5, atol=1e-5)
    _, small = removed(folded, form, masks)
    if form.groups == HEADS:
        assert set(heads_of(small, form)) == {3}
    np.testing.assert_allclose(forward(small, form, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", LAYOUTS)
def test_the_shrunk_model_computes_what_the_masked_one_does(form):
    def dying(c, i):
        c = c | {"up": c["up"].at[:, : 5 + i].set(0)}  # constant neurons
        c = c | {"down": c["down"].at[10 + i : 17].set(0)}  # neurons nobody reads
        c = c | {"o": c["o"].at[1].set(0)}  # a head nobody reads
        return c | {"v": c["v"].at[:, -1].set(0)}  # constant heads

    params = make(form, edit=dying)
    x = jax.random.normal(jax.random.key(3), (6, D))
    want = forward(params, form, x)
    plan, small = removed(params, form)
    fn = plan.rewrite(lambda p, x: forward(p, form, x))
    for got in (forward(small, form, x), fn(small, x)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if form.groups == HEADS:
        assert set(heads_of(small, form)) == {2}
    # The i-th layer has 5 + i dead neurons in front and 7 - i behind: 12 in each.
    assert {x["up"]["kernel"].shape[-1] for x in unstacked(small, form)} == {FF - 12}


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_a_stack_of_layers_is_treated_as_the_layers_apart(fused):
    apart, stacked = layout(fused=fused), layout(fused=fused, stack=2)
    options = {"end": 6, "every": 2, "theta_rel": 1.2, "theta": None, "head_every": 2}
    results = []
    for form in (apart, stacked):
        params, state = train(
            make(form), jp.neuroprune(0.6, roles=form.roles, **options), 8
        )
        alive = [np.asarray(a) for a in state.method.own.alive.values()]
        results.append((unstacked(params, form), np.concatenate(alive)))
    (one, alive_one), (two, alive_two) = results
    np.testing.assert_array_equal(alive_one, alive_two)
    assert not alive_one.all(), "the threshold must remove some head"
    chex_close(one, two)


def chex_close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
    )


def test_thresholds_are_spread_over_the_interval_and_follow_the_degree():
    # Unit 0 has 3 of 4 links missing, unit 1 none.
    kernel = jnp.array([[0.0, 0.4], [0.0, 0.3], [0.0, 0.2], [0.5, 0.1]])
    params = {"up": {"kernel": kernel}}
    roles = jp.Roles(mlp_in="up/kernel")
    method = jp.neuroprune(strengths=(0.1, 0.1), roles=roles, end=10, every=5)
    tx = jp.masked(optax.sgd(0.0), method)
    updates, _ = jax.jit(tx.update)({"up": {"kernel": jnp.zeros((4, 2))}},
                                    tx.init(params), params)  # fmt: skip
    new = optax.apply_updates(params, updates)["up"]["kernel"]
    # 0.1 * 3/4 off unit 0; unit 1 counts as half a link short: 0.1 * (1/2) / 4.
    np.testing.assert_allclose(new[3, 0], 0.5 - 0.075, rtol=1e-6)
    np.testing.assert_allclose(new[:, 1], kernel[:, 1] - 0.0125, rtol=1e-5)


def test_without_gradients_the_controller_follows_its_schedule():
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 96))}}
    roles = jp.Roles(mlp_in="up/kernel")
    schedule = jp.schedules.cubic(0.8, begin=0, end=40, every=5)
    method = jp.neuroprune(0.8, roles=roles, end=40, every=5, reading="uniform")
    tx = jp.masked(optax.sgd(0.0), method)
    step = jax.jit(tx.update)
    state, grads = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for i in range(40):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        if (i + 1) % 5 == 0:
            zeros = float((params["up"]["kernel"] == 0).mean())
            # Rounding in five soft thresholds may leave the last weight or two.
            assert abs(zeros - float(schedule(i + 1))) < 3 / (64 * 96)


def test_the_literal_fold_goes_into_the_rows_of_the_expanding_matrix():
    form = layout()
    params = make(form)
    method = jp.neuroprune(
        strengths=(0.0, 0.0), roles=form.roles, end=9, theta=9.0, head_every=1,
        fold="mlp", eps=1e-30,
    )  # fmt: skip
    tx = jp.masked(optax.sgd(0.0), method)
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    new = optax.apply_updates(params, updates)
    similar = jnp.ones((HEADS, HEADS), bool)
    want = _heads.fold_into_mlp(
        params["layers"]["0"]["up"]["kernel"], _heads.find_dominating(similar)
    )
    np.testing.assert_allclose(new["layers"]["0"]["up"]["kernel"], want, rtol=1e-6)


def test_a_head_once_removed_stays_removed():
    form = layout()
    method = jp.neuroprune(
        0.5, roles=form.roles, end=12, every=3, theta=None, theta_rel=1.3, head_every=3
    )
    tx = jp.masked(optax.adam(1e-2), method)
    params, step = make(form), jax.jit(tx.update)
    state, before = tx.init(params), None
    for _ in range(14):
        updates, state = step(jax.tree.map(jnp.sign, params), state, params)
        params = optax.apply_updates(params, updates)
        now = np.asarray(next(iter(state.method.own.alive.values())))
        assert before is None or not (now & ~before).any()
        assert now.any()
        before = now
    out = params["layers"]["0"]["out"]["kernel"].reshape(HEADS, -1)
    assert (np.asarray(out)[~before[0]] == 0).all()


def test_eq_1_polarises_degrees_and_uniform_l1_does_not():
    roles = jp.Roles(mlp_in="up/kernel")
    params = {"up": {"kernel": 0.1 * jax.random.normal(jax.random.key(1), (64, 128))}}
    deviation = {}
    for reading in ("missing", "uniform"):
        method = jp.neuroprune(0.7, roles=roles, end=30, every=3, reading=reading)
        trained, _ = train(params, method, 32, lr=1e-3)
        deviation[reading] = float(
            jp.analysis.degree_deviation(trained["up"]["kernel"])
        )
    assert deviation["missing"] > 2 * deviation["uniform"]


def test_fixed_strengths_go_to_their_own_equations():
    roles = layout(degree=()).roles
    attention = dataclasses.replace(roles, mlp_in=(), mlp_out=())
    thresholds = {}
    for name, some in (("both", roles), ("attention alone", attention)):
        method = jp.neuroprune(roles=some, end=9, strengths=(0.0, 0.01))
        tx, params = jp.masked(optax.sgd(0.1), method), make(layout())
        _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
        thresholds[name] = state.method.own.thresholds["layers/0/query/kernel"]
    assert (thresholds["both"] > 0).all()
    np.testing.assert_array_equal(thresholds["both"], thresholds["attention alone"])


@pytest.mark.parametrize(("heads", "size", "stack"), [(2, 8, 0), (4, 16, 3), (4, 2, 0)])
def test_degrees_of_an_output_projection_are_counted_by_unit(heads, size, stack):
    """`[heads, head_dim, d]` and `[heads * head_dim, d]` are the same matrix."""
    thresholds = []
    for explicit in (True, False):
        draw = functools.partial(jax.random.normal, jax.random.key(0))
        lead = (stack,) if stack else ()
        inner = (heads, size) if explicit else (heads * size,)
        params = {n: {"kernel": draw((*lead, 8, *inner))} for n in "qkv"}
        out = draw((*lead, heads * size, 8)) * (draw((8,)) > 0)
        params["o"] = {"kernel": out.reshape(*lead, *inner, 8)}
        names = {n: f"{n[0]}/kernel" for n in ("query", "key", "value", "out")}
        roles = jp.Roles(**names, degree="o/kernel", heads=heads)
        tx = jp.masked(optax.sgd(0.1), jp.neuroprune(0.5, roles=roles, end=9))
        _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
        thresholds.append(state.method.own.thresholds["o/kernel"].reshape(*lead, 8))
    np.testing.assert_array_equal(*thresholds)
    assert len(np.unique(thresholds[0])) > 1


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_layer_without_live_heads_keeps_a_dead_one(form):
    params = make(form, edit=lambda c, i: c | {"o": 0 * c["o"]})
    _, small = removed(params, form)
    assert set(heads_of(small, form)) == {1}  # a group keeps a unit
    x = jax.random.normal(jax.random.key(3), (6, D))
    np.testing.assert_allclose(
        forward(small, form, x), forward(params, form, x), rtol=1e-5, atol=1e-5
    )


def test_one_head_in_fused_stacks():
    kernel, bias = jnp.ones((2, 4, 9)), jnp.ones((2, 9))
    params = {
        "qkv": {"kernel": kernel, "bias": bias}, "o": {"kernel": jnp.ones((2, 3, 4))},
    }  # fmt: skip
    roles = jp.Roles(qkv="qkv/kernel", out="o/kernel", heads=1)
    folded = jp.neuroprune_fold(params, roles=roles)
    jax.tree.map(np.testing.assert_array_equal, folded, params)


def _init(params=None, **options):
    """What `init` says to NeuroPrune on two layers with separate kernels."""
    method = jp.neuroprune(0.5, end=9, **options)
    return jp.masked(optax.sgd(0.1), method).init(params or make(layout()))


NAMES = {n: f"*/{n}/kernel" for n in ("query", "key", "value")}
ATTENTION = jp.Roles(**NAMES, heads=HEADS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "erk"}, "allocation: got 'erk'; expected one of"),
        ({"reading": "mising"}, "reading: got 'mising'; expected one of"),
        ({"attention": "l2"}, "attention: got 'l2'"),
        ({"eps": -1}, "eps: got -1"),
        ({"roles": ATTENTION, "head_every": 3}, r"head_every: no layer has.*Give out="),
        (
            {
                "roles": dataclasses.replace(ATTENTION, out="*/out/kernel"),
                "head_every": 3, "fold": "mlp",
            },
            r"fold: 'mlp' needs mlp_in.*'layers/0'|fold: 'mlp' needs mlp_in.*layers/0",
        ),
        (
            {"roles": jp.Roles(mlp_in="*/up/kernel", mlp_out="*/0/down/kernel")},
            r"mlp_out matches 'layers/0/down/kernel', but mlp_in matches no leaf of its",
        ),
        (
            {"roles": jp.Roles(out="*/out/kernel")},
            r"out matches .*but query, key, value or qkv is not given",
        ),
        (
            {"roles": dataclasses.replace(ATTENTION, degree="*/query/kernel")},
            r"degree matches layers/0/query/kernel.*Take them out",
        ),
    ],
    ids=["allocation", "reading", "attention", "eps", "no-out", "no-mlp", "unlinked",
         "out-alone", "degree"],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        _init(**({"roles": layout().roles} | options))


@pytest.mark.parametrize("strengths", [(0.1,), (-1, 0.1), 0.01], ids=str)
def test_strengths_are_two_numbers(strengths):
    with pytest.raises(ValueError, match=r"strengths: got .*expected two numbers"):
        jp.neuroprune(roles=layout().roles, end=9, strengths=strengths)


def test_folding_does_not_guess_head_counts():
    params = make(layout(explicit=True, groups=1))
    with pytest.raises(ValueError, match=r"do not divide into 4, 4 and 4 heads"):
        jp.neuroprune_fold(params, roles=layout().roles)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jp.Roles(qkv="qkv", heads=4.0), "heads=4.0; expected a whole number"),
        (lambda: jp.Roles(qkv="q", heads=4, kv_heads=-2), "kv_heads=-2; expected a whole"),
        (lambda: jp.Roles(query="q", heads=2), "all three of query, key, value"),
        (lambda: jp.Roles(qkv="qkv"), "heads=None"),
        (lambda: jp.Roles(qkv="qkv", heads=4, kv_heads=3), "multiple of kv_heads"),
        (lambda: jp.neuroprune(roles=jp.Roles(mlp_in="*"), end=3), "one of the two"),
        (
            lambda: jp.neuroprune(0.5, roles=jp.Roles(mlp_in="*"), end=3, fold="x"),
            "fold: got 'x'",
        ),
        (
            lambda: jp.neuroprune(0.5, roles=jp.Roles(mlp_in="*"), end=3, head_every=0),
            "head_every: got 0",
        ),
        (lambda: jp.neuroprune(1.5, roles=jp.Roles(mlp_in="*"), end=3), r"in \[0, 1\)"),
        (
            lambda: jp.masked(
                optax.sgd(0.1), jp.neuroprune(0.5, roles=jp.Roles(mlp_in="x/*"), end=3)
            ).init({"up": {"kernel": jnp.ones((4, 4))}}),
            "matches none of the leaves",
        ),
        (
            lambda: jp.masked(
                optax.sgd(0.1), jp.neuroprune(0.5, roles=layout().roles, end=3)
            ).init(make(layout(groups=2))),
            "do not divide|cannot|shape",
        ),
    ],
    ids=["float-heads", "negative-kv-heads", "half-qkv", "no-heads", "kv-heads", "target",
         "fold", "head-every", "range", "no-match", "wrong-heads"],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
