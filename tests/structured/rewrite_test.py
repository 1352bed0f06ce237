"""Functions at new sizes: signatures, transforms, own derivatives, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS = iter(jax.random.split(jax.random.key(0), 100))


def normal(*shape):
    return 0.5 * jax.random.normal(next(KEYS), shape)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def two_layers(f):
    return lambda p, x: f(x @ p["a"]) @ p["b"]


P = {"a": normal(4, 8), "b": normal(8, 3)}
X = normal(5, 4)


def test_other_batch_sizes_though_the_size_is_written_in_the_code(half):
    def fn(p, x):
        x = x.reshape(x.shape[0], 4, 6) @ p["w"]
        token = jnp.tile(p["token"], (x.shape[0], 1, 1))
        x = jnp.concatenate([token, x], 1).reshape(-1, 5, 8)
        return jax.nn.gelu(x[:, 0] @ p["a"]) @ p["b"]

    p = {
        "w": normal(6, 8),
        "token": normal(1, 1, 8),
        "a": normal(8, 12),
        "b": normal(12, 3),
    }
    plan = half(structured.trace(fn, p, normal(2, 24)))
    small_fn = plan.rewrite(fn)
    for n in (1, 2, 7):
        x = normal(n, 24)
        close(small_fn(plan.shrink(p), x), fn(plan.mask(p), x))


def test_jit_grad_vmap_and_scan(half):
    fn = two_layers(jnp.tanh)
    plan = half(structured.trace(fn, P, X))
    small, small_fn = plan.shrink(P), plan.rewrite(fn)
    expected = fn(plan.mask(P), X)
    close(jax.jit(small_fn)(small, X), expected)
    close(jax.vmap(small_fn, (None, 0))(small, X[:, None])[:, 0], expected)
    close(lax.map(lambda x: small_fn(small, x[None])[0], X), expected)
    hessian = jax.hessian(lambda x: small_fn(small, x[None]).sum())(X[0])
    close(hessian, jax.hessian(lambda x: fn(plan.mask(P), x[None]).sum())(X[0]), 1e-4)


def test_a_function_is_read_anew_where_its_precision_is_another(half):
    fn = two_layers(jnp.tanh)
    plan = half(structured.trace(fn, P, X))
    small, small_fn = plan.shrink(P), plan.rewrite(fn)
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in str(jax.make_jaxpr(small_fn)(small, X))
    assert "HIGHEST" not in str(jax.make_jaxpr(small_fn)(small, X))


def test_sizes_without_a_number_are_refused(half):
    fn = two_layers(jnp.tanh)
    plan = half(structured.trace(fn, P, X))
    shape = jax.export.symbolic_shape("b, 4")
    with pytest.raises(ValueError, match="export it once for each"):
        jax.eval_shape(
            plan.rewrite(fn), plan.shrink(P), jax.ShapeDtypeStruct(shape, float)
        )


def test_another_function_of_the_same_parameters(half):
    fn = two_layers(jnp.tanh)
    plan = half(structured.trace(fn, P, X))

    def loss(p, x, y):
        return jnp.mean((fn(p, x) - y) ** 2)

    y = normal(5, 3)
    close(plan.rewrite(loss)(plan.shrink(P), X, y), loss(plan.mask(P), X, y))


def test_values_that_the_function_closes_over_do_not_leak(half):
    plan = half(structured.trace(two_layers(jnp.tanh), P, X))

    @jax.jit
    def outer(x, c):
        def fn(p, x):
            return jnp.tanh(x @ p["a"]) @ p["b"] * c

        small_fn = plan.rewrite(fn)
        return small_fn(plan.shrink(P), x) + jax.checkpoint(small_fn)(plan.shrink(P), x)

    close(outer(X, 2.0), 4 * two_layers(jnp.tanh)(plan.mask(P), X))
    close(outer(X, 3.0), 6 * two_layers(jnp.tanh)(plan.mask(P), X))


def _on_a_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    return mesh, lambda *names: jax.NamedSharding(mesh, jax.P(*names))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_arrays_on_a_mesh(kind, half):
    mesh, on = _on_a_mesh(jax.sharding.AxisType[kind])
    fn = two_layers(lambda h: jnp.tanh(h).reshape(8, 2, 8).reshape(8, 16))
    p = {"a": normal(4, 16), "b": normal(16, 3)}
    plan = half(structured.trace(fn, p, normal(8, 4)))
    x = normal(8, 4)
    expected = fn(plan.mask(p), x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            plan.shrink(p), {"a": on(None, "model"), "b": on("model")}
        )
        if kind == "Explicit":
            placed = jax.device_put(plan.shrink(p), on())
        found = jax.jit(plan.rewrite(fn))(placed, jax.device_put(x, on("data")))
    close(found, expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("n", [8, 6], ids=["divides", "not"])
def test_leaves_on_a_mesh_stay_where_they_are(kind, n):
    mesh, on = _on_a_mesh(jax.sharding.AxisType[kind])
    out = {"out_sharding": jax.P("data")} if kind == "Explicit" else {}

    def fn(p, x):
        return jnp.einsum("bi,ij->bj", jnp.tanh(x @ p["a"]), p["b"], **out)

    whole = {"a": jnp.sin(jnp.arange(64.0)).reshape(4, 16), "b": jnp.ones((16, 3))}
    with jax.set_mesh(mesh):
        places = {"a": on(None, "model"), "b": on("model")}
        p, x = (
            jax.device_put(whole, places),
            jax.device_put(jnp.ones((8, 4)), on("data")),
        )
        graph = structured.trace(fn, p, x)
        scores = structured.score_groups(graph, p)
        close(scores["a:1"] ** 2, (whole["a"] ** 2).sum(0) + 3, 1e-4)
        plan = structured.planned(graph, {"a:1": np.arange(n)})
        assert plan.verify(fn, p, x).equal
        small = plan.shrink(p)
        close(small["a"], whole["a"][:, :n])
        assert n == 6 or small["a"].sharding.is_equivalent_to(places["a"], 2)
        if kind == "Explicit":
            assert jax.jit(plan.shrink)(p)["a"].sharding == small["a"].sharding


@jax.custom_jvp
def _doubled(x, n):
    return jnp.maximum(x, 0) * n


@_doubled.defjvp
def _doubled_rule(primals, tangents):
    x, n = primals
    return _doubled(x, n), 7 * tangents[0] + jnp.tanh(x)


@jax.custom_vjp
def _scaled(x, w):
    return jnp.tanh(x) * w


def _scaled_back(residuals, g):
    x, w = residuals
    return 3 * g * w, 2 * (g * jnp.cos(x)).sum(0)


_scaled.defvjp(lambda x, w: (_scaled(x, w), (x, w)), _scaled_back)


@pytest.mark.parametrize(
    "f",
    [lambda h, _: _doubled(h, 3), lambda h, p: _scaled(h, p["w"])],
    ids=["jvp", "vjp"],
)
def test_derivatives_of_its_own_are_kept(f, half):
    def fn(p, x):
        return f(x @ p["a"], p) @ p["b"]

    p = {**P, "w": normal(8)}
    plan = half(structured.trace(fn, p, X))
    small_fn = plan.rewrite(fn)
    close(small_fn(plan.shrink(p), X), fn(plan.mask(p), X))
    found = jax.grad(lambda p: small_fn(p, X).sum())(plan.shrink(p))
    masked = jax.grad(lambda p: fn(plan.mask(p), X).sum())(p)
    jax.tree.map(functools.partial(close, tolerance=1e-4), found, plan.shrink(masked))
    if "jvp" in str(f) or f(jnp.ones((1, 8)), p).shape:
        plain = jax.grad(lambda p: (jnp.tanh(X @ p["a"]) @ p["b"]).sum())(p)
        assert not np.allclose(plan.shrink(plain)["a"], found["a"])


def test_a_derivative_that_mixes_units_is_refused(half):
    @jax.custom_vjp
    def f(x):
        return jnp.tanh(x)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (jnp.sort(g, -1),))
    fn = two_layers(f)
    plan = half(structured.trace(fn, P, X))
    small, small_fn = plan.shrink(P), plan.rewrite(fn)
    close(small_fn(small, X), fn(plan.mask(P), X))
    for _ in range(2):  # what a refused rule couples must not stay
        with pytest.raises(
            ValueError, match="derivative rule .* cannot be run .* sort"
        ):
            jax.grad(lambda p: small_fn(p, X).sum())(small)
    close(small_fn(small, X), fn(plan.mask(P), X))


def test_a_derivative_that_couples_operands_is_refused(half):
    @jax.custom_vjp
    def f(x, w):
        return jnp.tanh(x) * w.sum()

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda r, g: (g * r[1], (g * r[0]).sum(0)))

    def fn(p, x):
        return f(x @ p["a"], p["w"]) @ p["b"]

    p = {**P, "w": jnp.arange(8.0)}
    graph = structured.trace(fn, p, X)
    for names in (["b:0"], ["w:0"], ["b:0", "w:0"]):
        plan = half(graph, [graph[n].name for n in names])
        small, small_fn = plan.shrink(p), plan.rewrite(fn)
        for _ in range(2):
            close(small_fn(small, X), fn(plan.mask(p), X))
            with pytest.raises(ValueError, match="it couples units"):
                jax.grad(lambda p, f=small_fn: f(p, X).sum())(small)


def _normed(p, x):
    h = x @ p["in"]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * p["scale"] + jax.nn.softmax(h, -1)
    return h @ p["out"]


def test_absent_units_are_those_of_a_model_built_smaller(half):
    p = {"in": normal(4, 8), "scale": normal(8), "out": normal(8, 3)}
    plan = half(structured.trace(_normed, p, X))
    small = plan.shrink(p)
    close(plan.rewrite(_normed)(small, X), _normed(plan.mask(p), X))
    absent = plan.rewrite(_normed, removed="absent")(small, X)
    close(absent, _normed(small, X))
    assert not np.allclose(absent, _normed(plan.mask(p), X), atol=1e-3)
    with pytest.raises(ValueError, match="removed: got 'gone'"):
        plan.rewrite(_normed, removed="gone")


MOE = {
    "router": normal(6, 4), "w1": normal(4, 6, 8), "w2": normal(4, 8, 6), "head": normal(6, 3)
}  # fmt: skip


def moe_one_hot(p, x, shift=0.0):
    weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"] + shift, -1), 2)
    gates = (jax.nn.one_hot(chosen, 4) * weights[..., None]).sum(-2)
    h = jax.nn.relu(jnp.einsum("te,xef->txf", x, p["w1"]))
    return jnp.einsum("txf,xfe,tx->te", h, p["w2"], gates) @ p["head"]


def moe_gathered(p, x, shift=0.0):
    weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"] + shift, -1), 2)
    h = jax.nn.relu(jnp.einsum("te,tkef->tkf", x, p["w1"][chosen]))
    return jnp.einsum("tkf,tkfe,tk->te", h, p["w2"][chosen], weights) @ p["head"]


@pytest.mark.parametrize("fn", [moe_one_hot, moe_gathered])
def test_routers_choose_among_the_experts_that_are_kept(fn):
    x = normal(5, 6)
    graph = structured.trace(fn, MOE, x)
    experts = graph["w2:0"]
    assert experts.kind == "expert" and experts.minimum == 2
    assert {m.path for m in experts.members} == {"router", "w1", "w2"}
    assert "top_k" in experts.notes[0]
    plan = structured.planned(graph, {"w2:0": [0, 2, 3]})
    shift = jnp.array([0, -jnp.inf, 0, 0])
    found = plan.rewrite(fn, removed="absent")(plan.shrink(MOE), x)
    close(found, fn(MOE, x, shift))
    report = plan.verify(fn, MOE, x)
    assert not report.equal and "top_k" in report.reasons[0]


def test_numbers_of_chosen_units_are_those_that_they_had():
    def fn(p, x):
        return jnp.argmax(x @ p["a"], -1), lax.top_k(x @ p["a"], 2)[1]

    p = {"a": jnp.abs(normal(4, 8))}
    x = jnp.abs(X)
    plan = structured.planned(structured.trace(fn, p, x), {"a:1": [1, 4, 5, 7]})
    for a, b in zip(
        plan.rewrite(fn)(plan.shrink(p), x), fn(plan.mask(p), x), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_rows_of_a_table_are_asked_for_by_the_numbers_they_had(mode):
    def fn(p, i):
        return jnp.tanh(p["table"].at[i].get(mode=mode, fill_value=0)) @ p["out"]

    p, ids = {"table": normal(9, 4), "out": normal(4, 3)}, jnp.array([0, 3, 8, 11, -2])
    plan = structured.planned(structured.trace(fn, p, ids), {"table:0": [0, 2, 3, 7]})
    assert plan.groups["table:0"].kind == "row"
    close(plan.rewrite(fn)(plan.shrink(p), ids), fn(plan.mask(p), ids))


def test_a_cache_as_an_input_becomes_smaller(half):
    def fn(p, x, cache, position):
        k = (x @ p["k"]).reshape(2, 1, 4, 8)
        cache = lax.dynamic_update_slice(cache, k, (0, position, 0, 0))
        q = (x @ p["q"]).reshape(2, 1, 4, 8)
        return jnp.einsum("bqhd,bshd->bqs", q, cache), cache

    p = {"k": normal(16, 32), "q": normal(16, 32)}
    args = normal(2, 1, 16), normal(2, 6, 4, 8), 2
    graph = structured.trace(fn, p, *args)
    assert not graph.groups and "input 1" in graph.frozen["k:1.0"]
    graph = structured.trace(fn, p, *args, resizable_inputs="1")
    plan = half(graph)
    small_args = plan.shrink_inputs(*args)
    assert small_args[1].shape == (2, 6, 2, 4)
    scores, cache = plan.rewrite(fn)(plan.shrink(p), *small_args)
    close(scores, fn(plan.mask(p), *plan.mask_inputs(*args))[0])
    assert cache.shape == (2, 6, 2, 4)
    assert plan.verify(fn, p, *args).equal
    with pytest.raises(ValueError, match=r"Pass plan.shrink_inputs\(\*args\)"):
        plan.rewrite(fn)(plan.shrink(p), *args)


def test_what_differs_is_reported_with_a_reason(half):
    def weight_norm(p, x):
        return x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0)) @ p["b"]

    plan = half(structured.trace(weight_norm, P, X))
    report = plan.verify(weight_norm, P, X)
    assert not report.equal and "NaN" in str(report) and "div of 0" in str(report)

    def maxout(p, x):
        return (x @ p["a"]).reshape(5, 2, 4).cumsum(1).max(-1) @ p["b"][:2]

    graph = structured.trace(maxout, P, X)
    assert any("reduce_max" in str(g.notes) or not g.notes for g in graph.groups)


def test_infinite_outputs_may_be_equal(half):
    def fn(p, x):
        return jnp.where(x[:, :1] > 0, -jnp.inf, jnp.tanh(x @ p["a"]) @ p["b"])

    graph = structured.trace(fn, P, X)
    assert not jnp.isfinite(fn(P, X)).all()
    assert half(graph).verify(fn, P, X).equal


def test_a_function_that_couples_more_than_the_plan_is_refused(half):
    plan = half(structured.trace(two_layers(jnp.tanh), P, X))
    with pytest.raises(ValueError, match="cannot do without: sort"):
        plan.rewrite(two_layers(lambda h: jnp.sort(h, -1)))(plan.shrink(P), X)

    def coupled(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h + h[:, ::-1] * 0) @ p["b"]

    with pytest.raises(ValueError, match="cannot do without: rev"):
        plan.rewrite(coupled)(plan.shrink(P), X)


def test_own_primitives_have_rules():
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    scale_p = Primitive("scale_units")
    scale_p.def_abstract_eval(lambda x, w, *, units: x)
    scale_p.def_impl(lambda x, w, *, units: x * w[:units])
    mlir.register_lowering(
        scale_p,
        mlir.lower_fun(lambda x, w, *, units: x * w[:units], multiple_results=False),
    )

    def fn(p, x):
        return scale_p.bind(x @ p["a"], p["w"], units=8) @ p["b"]

    p = {**P, "w": normal(8)}
    graph = structured.trace(fn, p, X)
    assert graph.unknown == {"scale_units": 1} and not graph.groups
    assert graph.frozen["w:0"] == ("unknown primitive scale_units",)
    rules = {
        "scale_units": structured.Rule(
            axes=lambda params, x, w: ([("b", "n"), ("n",)], [("b", "n")]),
            run=lambda params, x, w: scale_p.bind(x, w, units=w.shape[0]),
        )
    }
    graph = structured.trace(fn, p, X, rules=rules)
    plan = structured.planned(graph, {"b:0": [1, 2, 6]})
    assert plan.verify(fn, p, X, rules=rules).equal
    wrong = {
        "scale_units": structured.Rule(
            lambda params, x, w: ([("b",), ("n",)], [("b",)])
        )
    }
    with pytest.raises(ValueError, match="gives the axes .* of rank 2"):
        structured.trace(fn, p, X, rules=wrong)
