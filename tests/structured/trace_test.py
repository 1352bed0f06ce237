"""What is frozen and why, ties, and how dimensions unify."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import structured
from jaxprune.structured._reading import _dims

P = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones((8, 3))}
X = jnp.ones((5, 4))


def fn(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def names(graph):
    return [g.name for g in graph.groups]


REASONS = {
    "sort": lambda h: jnp.sort(h, -1),
    "rev": lambda h: h[:, ::-1],
    "cumsum": lambda h: jnp.cumsum(h, -1),
    "scatter": lambda h: h.at[:, 2].set(0.0),
    "unknown primitive fft": lambda h: jnp.fft.fft(h).real,
    "pad": lambda h: (
        jnp.pad(h, ((0, 0), (0, 0)))[:, jax.lax.iota(int, 8)]
        + jax.lax.pad(h[:, :4], 0.0, ((0, 0, 0), (0, 1, 1)))
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_understood_is_frozen_with_a_reason(reason):
    f = REASONS[reason]
    graph = structured.trace(lambda p, x: f(x @ p["a"]) @ p["b"], P, X)
    frozen = {
        r for n, why in graph.frozen.items() if n[:2] in ("a:", "b:") for r in why
    }
    assert reason in frozen
    if reason.startswith("unknown"):
        assert graph.unknown == {"fft": 1}


def test_inputs_outputs_and_ignored_leaves_are_frozen():
    graph = structured.trace(fn, P, X)
    assert names(graph) == ["a:1", "b:1"]
    assert graph.frozen == {"a:0": ("input 0",), "c:1": ("output",)}
    graph = structured.trace(fn, P, X, ignore="b")
    assert names(graph) == []
    assert graph.frozen["a:1"] == ("ignored",)
    graph = structured.trace(fn, P, X, freeze_outputs=False)
    assert names(graph) == ["a:1", "b:1", "c:1"]


def test_some_outputs_may_become_smaller():
    def both(p, x):
        h = jax.nn.relu(x @ p["a"])
        return {"y": h @ p["c"], "statistics": {"mean": h.mean(0)}}

    assert names(structured.trace(both, P, X)) == []
    graph = structured.trace(both, P, X, freeze_outputs="y")
    assert names(graph) == ["a:1"] and graph.frozen["c:1"] == ("output",)
    plan = structured.planned(graph, {"a:1": [1, 3]})
    small = plan.rewrite(both)(plan.shrink(P), X)
    assert small["statistics"]["mean"].shape == (2,)
    assert plan.verify(both, P, X).equal
    with pytest.raises(ValueError, match="freeze_outputs: the pattern 'z'"):
        structured.trace(both, P, X, freeze_outputs="z")


def test_leaves_that_are_not_used_stay_as_they_are():
    graph = structured.trace(
        lambda p, x: jax.jit(fn)(p, x), {**P, "z": jnp.ones((8, 8))}, X
    )
    assert names(graph) == ["a:1", "b:1"]
    assert graph.frozen["z:0"] == graph.frozen["z:1"] == ("not used",)


def test_ties_couple_groups_that_the_function_does_not():
    graph = structured.trace(fn, P, X, tie=[("a:1", "b:1")])
    assert names(graph) == ["a:1"]
    assert [(m.path, m.axis) for m in graph["b:0"].members] == [
        ("a", 1), ("b", 0), ("b", 1), ("c", 0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="tie: no axis is called 'z:1'"):
        structured.trace(fn, P, X, tie=[("a:1", "z:1")])
    with pytest.raises(ValueError, match="tie: a:0 has 4 units and b:1 has 8"):
        structured.trace(fn, P, X, tie=[("a:0", "b:1")])


def test_what_depends_on_the_platform_and_prints():
    def fn(p, x):
        h = jax.lax.platform_dependent(x @ p["a"], cpu=jnp.tanh, default=jnp.sin)
        jax.debug.print("{}", h.sum())
        return jax.lax.reshape(h, (8, 5), dimensions=(1, 0)).T @ p["b"]

    p = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
    graph = structured.trace(fn, p, jnp.ones((5, 4)))
    assert graph["b:0"].size == 8 and not graph.unknown
    plan = structured.planned(graph, {"b:0": [1, 2]})
    assert plan.verify(fn, p, jnp.ones((5, 4))).equal


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="ignore: the pattern 'z' matches no leaf"):
        structured.trace(fn, P, X, ignore="z")
    with pytest.raises(ValueError, match="resizable_inputs: the pattern '4'"):
        structured.trace(fn, P, X, resizable_inputs="4")


def test_groups_are_found_by_name_and_printed():
    graph = structured.trace(fn, P, X)
    lines = str(graph).splitlines()
    assert lines[1].split() == ["a:1", "neuron", "8", "2"]
    assert "frozen: c:1: output" in lines
    with pytest.raises(KeyError, match="It is frozen: output"):
        graph["c:1"]
    with pytest.raises(KeyError, match="The groups are: a:1, b:1"):
        graph["z"]


def test_expressions_say_where_the_units_of_a_member_lie():
    def attention(p, x):
        q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(5, 3, 4, 2), 1, 0)
        scores = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k), -1)
        return jnp.einsum("hqk,khd->qhd", scores, v).reshape(5, 8) @ p["o"]

    p = {"qkv": jnp.ones((4, 24)), "o": jnp.ones((8, 3))}
    graph = structured.trace(attention, p, X)
    heads = next(g for g in graph.groups if g.kind == "head")
    member = {m.path: m for m in heads.members}
    assert member["o"].expression == "(o:0.0*2)"
    assert member["o"].units.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert member["qkv"].units.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3


def test_a_large_model_is_traced_from_shapes_alone():
    size, width, layers = 32000, 8192, 80

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    p = {
        "table": leaf(size, width), "up": leaf(layers, width, 4 * width),
        "down": leaf(layers, 4 * width, width), "head": leaf(width, size),
    }  # fmt: skip

    def model(p, ids):
        def step(x, layer):
            return x + jax.nn.silu(x @ layer["up"]) @ layer["down"], None

        x, _ = jax.lax.scan(step, p["table"][ids], {n: p[n] for n in ("up", "down")})
        return x @ p["head"]

    graph = structured.trace(model, p, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    sizes = {g.kind: g.size for g in graph.groups}
    assert sizes == {"embedding": 8192, "neuron": 32768, "layer": 80, "row": 32000}
    scores = {g.name: np.arange(g.size) for g in graph.groups}
    plan = structured.plan(graph, scores, ratio=0.5, round_to=128)
    assert plan.small_shapes["down"] == (80, 16384, 4096)
    assert plan.before.parameters == sum(np.prod(x.shape) for x in p.values())


@pytest.mark.parametrize("name", ["of inputs", "of units", "there and back"])
def test_a_thousand_pieces_are_no_chain(name):
    n = 1100

    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        if name == "of inputs":
            return sum(h[i] @ p["b"] for i in range(n))
        if name == "of units":
            return sum(h[:, i] for i in range(n))
        return jnp.concatenate(jnp.split(h, n, -1)[::-1], -1) @ p["b"]

    x = jnp.ones((n, 4) if name == "of inputs" else (3, 4))
    width = 6 if name == "of inputs" else n
    p = {"a": jnp.ones((4, width)), "b": jnp.ones((width, 2))}
    graph = structured.trace(fn, p, x)
    assert [g.size for g in graph.groups] == ([6] if name == "of inputs" else [])


def test_a_picture_shows_units_and_what_is_removed():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")

    def fn(p, x):
        h = (x @ p["a"]).reshape(5, 3, 2)
        return jnp.tanh(h).reshape(5, 6) @ p["b"]

    p = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2)), "s": jnp.ones(())}
    graph = structured.trace(fn, p, jnp.ones((5, 4)))
    assert [g.size for g in graph.groups] == [3, 2]
    plan = structured.planned(graph, {graph.groups[0].name: [0, 2]})
    ax = graph.plot(plan)
    (image,) = ax.images
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == [
        f"{graph.groups[0].name} ({graph.groups[0].kind}, 2 of 3)",
        f"{graph.groups[1].name} ({graph.groups[1].kind}, 2 of 2)",
        "stays whole",
    ]
    row = image.get_array()[8]  # of "a", in the layer of the first group
    assert (row[:120] == row[0]).all()  # frozen
    second = row[132:252].reshape(6, 20, 3)[:, 10]  # a place every 20 pixels
    white = (second == 1).all(-1)
    assert white.tolist() == [False, False, True, True, False, False]
    assert (second[0] == second[1]).all() and (second[0] != row[0]).any()
    lower = image.get_array()[16][132:252].reshape(6, 20, 3)[:, 10]
    assert (lower[0] != lower[1]).any() and (lower[0] == lower[4]).all()
    assert len(graph.plot(where="b").get_yticklabels()) == 1
    with pytest.raises(ValueError, match="where: the pattern 'z' matches no leaf"):
        graph.plot(where="z")
    pyplot.close("all")


def test_leaves_of_one_path_are_refused():
    p = {"x/a": jnp.ones((4, 8)), "x": {"a": jnp.ones((8, 3))}}
    with pytest.raises(ValueError, match="several leaves have the path x/a"):
        structured.trace(lambda p, x: x @ p["x/a"] @ p["x"]["a"], p, X)


def test_an_empty_batch():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    p = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
    graph = structured.trace(fn, p, X[:0])
    assert [g.size for g in graph.groups] == [8]
    plan = structured.planned(graph, {"a:1": [0, 1]})
    assert plan.rewrite(fn)(plan.shrink(p), X[:0]).shape == (0, 3)


# ---- dimensions


def leaf(n):
    return _dims.Dim(n)


def test_products_are_cut_at_common_factors():
    a, b = [leaf(4), leaf(6)], [leaf(2), leaf(12)]
    _dims.unify(_dims.product(a), _dims.product(b))
    assert _dims.describe(_dims.product(a)) == "((2*2)*6)" or [
        d.size for d in _dims.leaves(_dims.product(a))
    ] == [2, 2, 6]
    assert _dims.leaves(_dims.product(a)) == _dims.leaves(_dims.product(b))


def test_sums_are_cut_at_common_ends():
    a, b = [leaf(3), leaf(7)], [leaf(5), leaf(5)]
    _dims.unify(_dims.total(a), _dims.total(b))
    assert [d.size for d in _dims.leaves(_dims.total(a))] == [3, 2, 5]
    assert _dims.leaves(_dims.total(a)) == _dims.leaves(_dims.total(b))
    first, second = _dims.split(_dims.total(a), 4)
    assert [d.size for d in _dims.leaves(first)] == [3, 1]
    assert [d.size for d in _dims.leaves(second)] == [1, 5]


def test_a_sum_of_products_meets_a_product():
    inner = leaf(2)
    a = _dims.total([_dims.product([leaf(3), inner]), _dims.product([leaf(4), inner])])
    outer = leaf(7)
    b = _dims.product([outer, leaf(2)])
    _dims.unify(a, b)
    assert [d.size for d in _dims.leaves(outer)] == [3, 4]
    assert not any(d.frozen for d in _dims.leaves(a))


@pytest.mark.parametrize(
    ("a", "b"), [([4, 6], [3, 8]), ([6, 2], [4, 3])], ids=["4*6=3*8", "6*2=4*3"]
)
def test_what_does_not_align_is_frozen(a, b):
    a, b = (_dims.product([leaf(n) for n in sizes]) for sizes in (a, b))
    _dims.unify(a, b)
    assert all(
        "misaligned" in str(d.frozen) for d in (*_dims.leaves(a), *_dims.leaves(b))
    )


def test_reasons_follow_a_leaf_into_what_it_becomes():
    a, b = leaf(6), _dims.total([leaf(2), leaf(4)])
    _dims.freeze(a, "why")
    _dims.mark(a, "role")
    _dims.unify(a, b)
    assert all("why" in d.frozen and "role" in d.roles for d in _dims.leaves(b))


def test_the_room_comes_when_it_is_asked_for():
    assert jp.structured.trace is structured.trace
