"""Running a jaxpr anew: what it computes stays the same, and views end where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.tracing import View, replay

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)


def run(fn, params, *args):
    """Replays `fn`, all leaves of `params` being views; what they were used for."""
    closed = jax.make_jaxpr(fn)(params, *args)
    uses = []

    def contract(x, view, x_axes, view_axes, *, times, **options):
        uses.append((view.path, tuple(view.axes[a] for a in view_axes), times))
        leaf = view.cast(view.value.transpose(view.axes))
        return jax.lax.dot_general(x, leaf, ((x_axes, view_axes), ((), ())), **options)

    def dense(view, primitive):
        uses.append((view.path, primitive))
        return view.cast(view.value.transpose(view.axes))

    views = [
        View(x, name, tuple(range(x.ndim)), x.ndim)
        for name, x in sorted(params.items())
    ]
    found = replay(
        closed, [*views, *jax.tree.leaves(args)], contract=contract, dense=dense
    )
    wanted = jax.tree.leaves(fn(params, *args))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert a.dtype == b.dtype
    return uses


def weight(*shape):
    return jax.random.normal(KEY, shape)


X = jax.random.normal(KEY, (5, 8))


def test_casts_and_transpositions():
    uses = run(
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].T.astype(jnp.bfloat16),
        {"w": weight(6, 8)}, X,
    )  # fmt: skip
    assert uses == [("w", (1,), 1)]


def test_from_the_left_into_two_axes():
    uses = run(
        lambda p, x: jnp.einsum("khd,mk->hmd", p["w"], x), {"w": weight(8, 2, 3)}, X
    )
    assert uses == [("w", (0,), 1)]


def test_two_contracted_axes():
    x = jax.random.normal(KEY, (5, 2, 3))
    uses = run(
        lambda p, x: jnp.einsum("mhd,hdk->mk", x, p["w"]), {"w": weight(2, 3, 4)}, x
    )
    assert [(u[0], sorted(u[1])) for u in uses] == [("w", [0, 1])]


def test_calls_checkpoints_and_custom_rules():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy, kept[1]))

    def fn(p, x):
        x = jax.jit(lambda w: x @ w)(p["a"])
        x = jax.checkpoint(lambda w: jax.nn.relu(x @ w))(p["b"])
        return product(x, p["c"])

    uses = run(fn, {n: weight(8, 8) for n in "abc"}, X)
    # What has a derivative of its own keeps it, and sees an array.
    assert uses == [("a", (0,), 1), ("b", (0,), 1), ("c", "custom_vjp_call")]


def test_casts_one_after_the_other():
    def fn(p, x):
        return x @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32)

    assert run(fn, {"w": weight(8, 6)}, X) == [("w", (0,), 1)]


def test_a_view_does_not_leave():
    uses = run(lambda p, x: (x @ p["w"], p["w"].T), {"w": weight(8, 6)}, X)
    assert uses == [("w", (0,), 1), ("w", "the output")]


def test_scans_nest():
    def fn(p, x):
        def outer(x, ws):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, ws)

        return jax.lax.scan(outer, x, p["w"])

    assert run(fn, {"w": weight(2, 3, 8, 8)}, X) == [("w", (0,), 6)]


def test_scan_with_a_leaf_that_stays():
    def fn(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)

    assert run(fn, {"w": weight(8, 8)}, X) == [("w", (0,), 3)]


def test_everything_else_sees_the_array():
    def fn(p, x):
        y = jnp.einsum("bmk,bkn->bmn", x[None], p["batched"][None])
        return y[0] + p["table"][jnp.arange(5)] + -p["negated"][:5]

    uses = run(fn, {n: weight(8, 8) for n in ("batched", "negated", "table")}, X)
    assert ("negated", "slice") in uses and ("table", "gather") in uses
    assert any(u[0] == "batched" for u in uses)
    assert not any(isinstance(u[1], tuple) for u in uses)


def test_branches_and_loops_are_entered():
    def fn(p, x):
        def step(state):
            i, x = state
            return i + 1, jax.lax.cond(
                i > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x @ p["b"].T, x
            )

        return jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]

    uses = run(fn, {n: weight(8, 8) for n in "ab"}, X)
    assert set(uses) == {("a", (0,), 1), ("b", (1,), 1)}


def test_views_end_where_a_branch_or_a_loop_ends():
    def fn(p, x):
        picked = jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w.T, p["a"])
        grown = jax.lax.while_loop(lambda w: w[0, 0] < 1, lambda w: w + 1, p["b"])
        return x @ picked @ grown

    uses = run(fn, {n: weight(8, 8) for n in "ab"}, X)
    assert set(uses) == {("a", "the end of a branch"), ("b", "the carry of a while")}


def test_gradients_through_branches():
    def fn(p, x):
        taken = jax.lax.cond(x[0, 0] > -9, lambda x: x @ p["w"], lambda x: x, x)
        return jnp.sum(jnp.square(taken))

    def again(p, x):
        closed = jax.make_jaxpr(fn)(p, x)
        view = View(p["w"], "w", (0, 1), 0)

        def contract(x, view, x_axes, view_axes, *, times, **options):
            return jax.lax.dot_general(x, view.value, ((x_axes, view_axes), ((), ())))

        return replay(
            closed, [view, x], contract=contract, dense=lambda v, name: v.value
        )[0]

    p = {"w": weight(8, 8)}
    np.testing.assert_allclose(
        jax.grad(again)(p, X)["w"], jax.grad(fn)(p, X)["w"], rtol=1e-5
    )
