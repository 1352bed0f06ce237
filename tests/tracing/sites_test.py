"""Views of leaves, against NumPy; sites as matrices and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import tracing

pytestmark = pytest.mark.usefixtures("quick_compilation")


@st.composite
def views(draw):
    """A leaf, and moves of it, each a function of an array."""
    shape = tuple(
        draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4))
    )
    x = np.arange(np.prod(shape)).reshape(shape)
    moves = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(["transpose", "slice", "merge", "split", "squeeze"])
        )
        axis = draw(st.integers(0, x.ndim - 1))
        if kind == "transpose":
            order = draw(st.permutations(range(x.ndim)))
            moves.append(lambda a, order=order: a.transpose(order))
        elif kind == "slice":
            start = draw(st.integers(0, x.shape[axis] - 1))
            stop = draw(st.integers(start + 1, x.shape[axis]))
            step = draw(st.sampled_from([1, 1, 2]))
            where = (slice(None),) * axis + (slice(start, stop, step),)
            moves.append(lambda a, where=where: a[where])
        elif kind == "merge" and axis + 1 < x.ndim:
            new = (
                *x.shape[:axis],
                x.shape[axis] * x.shape[axis + 1],
                *x.shape[axis + 2 :],
            )
            moves.append(lambda a, new=new: a.reshape(new))
        elif kind == "split" and x.shape[axis] % 2 == 0:
            new = (*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
            moves.append(lambda a, new=new: a.reshape(new))
        elif kind == "squeeze" and x.shape[axis] == 1 and x.ndim > 1:
            moves.append(lambda a, axis=axis: a.squeeze(axis))
        else:
            continue
        x = moves[-1](x)
    return shape, moves, x


@given(views())
def test_any_view_is_the_matrix_or_is_reported(case):
    shape, moves, wanted = case

    def fn(params, x):
        w = params["w"]
        for move in moves:
            w = move(w)
        return jnp.tensordot(x, w, axes=((1,), (0,)))

    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    trace = tracing.sites(fn, {"w": leaf}, np.ones((3, wanted.shape[0]), np.float32))
    if not trace.sites:
        assert trace.untraced["w"]
        return
    (site,) = trace.sites
    assert trace.untraced == {}
    matrix = np.asarray(site.to_matrix(leaf))
    np.testing.assert_array_equal(
        matrix, wanted.reshape(1, 1, wanted.shape[0], -1).astype(np.float32)
    )
    # Writing back changes what is seen, and nothing else.
    back = np.asarray(site.from_matrix(matrix + 1000, leaf))
    seen = np.isin(leaf, matrix)
    np.testing.assert_array_equal(back, np.where(seen, leaf + 1000, leaf))


SIMPLE = [
    ("transposed", lambda w: w.T),
    ("merged", lambda w: w.reshape(4, 2, 6).transpose(1, 0, 2).reshape(8, 6)),
    ("every other", lambda w: w[::2]),
    ("a block", lambda w: w[2:5, 1:3]),
    ("a row", lambda w: w[3:4]),
    ("split", lambda w: jnp.split(w, 2, axis=1)[1]),
    ("unstacked", lambda w: jnp.stack(jnp.unstack(w, axis=1)[:4], 1)),
]


@pytest.mark.parametrize("move", [m for _, m in SIMPLE], ids=[n for n, _ in SIMPLE])
def test_views_that_must_be_followed(move):
    leaf = jnp.arange(48.0).reshape(8, 6)
    x = jnp.ones((3, len(move(leaf))))
    trace = tracing.sites(lambda p, x: x @ move(p["w"]), {"w": leaf}, x)
    assert trace.sites and trace.untraced == {}
    columns = [s.to_matrix(leaf)[0, 0] for s in trace.sites]
    np.testing.assert_array_equal(np.concatenate(columns, 1), move(leaf))


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (lambda w: w[::-1], "rev"),
        (lambda w: jnp.tile(w, (1, 2)), "tile"),
        (lambda w: w[jnp.array([1, 0, 2, 3, 4, 5, 6, 7])], "gather"),
        (lambda w: jnp.pad(w, ((0, 0), (0, 1))), "pad"),
        (lambda w: jnp.broadcast_to(w[None], (2, 8, 6))[0], "broadcast_in_dim"),
        (lambda w: jnp.sort(w), "sort"),
        (lambda w: w.at[0].set(0), "scatter"),
        (lambda w: jax.lax.dynamic_slice(w, (0, 0), (4, 6))[:4].repeat(2, 0),
         "broadcast_in_dim"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_views_that_end(move, reason):
    leaf = jnp.arange(48.0).reshape(8, 6)
    trace = tracing.sites(lambda p, x: x @ move(p["w"]), {"w": leaf}, jnp.ones((3, 8)))
    assert trace.sites == () and trace.untraced == {"w": (reason,)}


def test_sites_are_in_the_order_of_evaluation():
    def fn(p, x):
        x = jax.jit(lambda x: x @ p["c"])(x)
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, p["a"])[0]
        return x @ p["b"]

    p = {"a": jnp.ones((2, 4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 4))}
    found = tracing.sites(fn, p, jnp.ones((3, 4))).sites
    assert [s.path for s in found] == ["c", "a", "b"]
    places = [s.place for s in found]
    assert places == sorted(places)
    assert found[1].loops[0].place == places[1][:1] and found[1].times == 2


def test_matrices_and_leaves_that_do_not_fit():
    leaf = jnp.ones((4, 3))
    (site,) = tracing.sites(lambda p, x: x @ p["w"], {"w": leaf}, jnp.ones(4)).sites
    with pytest.raises(
        ValueError, match=r"leaf: got the shape \(3, 4\) for w, expected"
    ):
        site.to_matrix(leaf.T)
    with pytest.raises(
        ValueError, match=r"matrices: got the shape \(4, 3\) for w, exp"
    ):
        site.from_matrix(leaf, leaf)


def test_matrices_under_jit_and_in_the_dtype_of_the_leaf():
    leaf = jnp.arange(12, dtype=jnp.bfloat16).reshape(2, 3, 2)

    def fn(p, x):
        return jnp.einsum("td,hdk->thk", x, p["w"])

    (site,) = tracing.sites(fn, {"w": leaf}, jnp.ones((5, 3))).sites

    @jax.jit
    def double(leaf):
        matrix = site.to_matrix(leaf).astype(jnp.float32)
        return site.from_matrix(matrix * 2, leaf)

    assert double(leaf).dtype == jnp.bfloat16
    np.testing.assert_array_equal(double(leaf), leaf * 2)
    assert site.axes == ((), (), (1,), (0, 2))
    assert hash(site) == hash(dataclasses.replace(site, rows=7))
