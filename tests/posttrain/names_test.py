"""Leaves are called, and their axes counted, as the caller does."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import posttrain

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batches():
    keys = jax.random.split(jax.random.key(5), 3)
    return [jax.random.normal(key, (64, 12)) for key in keys]


@pytest.mark.parametrize("leaves", ["dict", "tuple", "array"])
def test_names_of_layers_that_nothing_holds(leaves):
    w = jax.random.normal(jax.random.key(0), (2, 12, 12))
    params = {"dict": {"u": w, "v": w}, "tuple": (w, w), "array": w}[leaves]

    def fn(params, x):
        def layer(x, own):
            for w in jax.tree.leaves(own):
                x = jnp.tanh(x @ w)
            return x, None

        return jax.lax.scan(layer, x, params)[0]

    ratios = posttrain.outlier_ratios(fn, params, batches())
    names = {"dict": "uv", "tuple": "01", "array": [""]}[leaves]
    assert list(ratios) == [f"{i}/{n}".rstrip("/") for i in range(2) for n in names]
    _, _, report = posttrain.prune(
        fn, params, batches(), method=posttrain.magnitude(),
        allocation={"*": 0.5, "1*": 0.25},
    )  # fmt: skip
    assert [r.block for r in report.rows] == [x for x in "01" for _ in names]
    assert [r.sparsity for r in report.rows] == [
        x for x in (0.5, 0.25) for _ in names
    ]  # fmt: skip


@pytest.mark.parametrize("axes", [1, (0, 1), (-3, -4)])
def test_batch_axes_count_the_axis_of_layers(axes):
    params = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(
            {"up": (2, 12, 4, 6), "down": (2, 4, 6, 12)}.items()
        )
    }

    def fn(params, x):
        def layer(x, w):
            h = jnp.einsum("td,def->tef", x, w["up"])
            return x + jnp.einsum("tef,efd->td", h, w["down"]), None

        return jax.lax.scan(layer, x, params)[0]

    _, _, report = posttrain.prune(
        fn, params, batches(), method=posttrain.wanda(), sparsity=0.5,
        where="down", batch_axes={"down": axes},
    )  # fmt: skip
    assert [row.shape for row in report.rows] == [(4, 6, 12)] * 2
    with pytest.raises(ValueError, match=r"batch_axes: down has .* and no axis 4"):
        posttrain.prune(
            fn, params, batches(), sparsity=0.5, where="down", batch_axes={"down": 4}
        )


def test_errors_name_the_leaf():
    params = {"layers": {"w": jax.random.normal(jax.random.key(0), (2, 3, 18, 6))}}

    def fn(params, x):
        def layer(x, w):
            sizes = jnp.array([16, 16, 32])
            y = jax.lax.ragged_dot(jnp.tile(x, 3)[:, :18], w["w"], sizes)
            return x + jnp.tile(y, 2), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    run = functools.partial(posttrain.prune, fn, params, batches())
    for structure in (jp.NM(2, 4), jp.Block(4, 2)):
        with pytest.raises(ValueError, match=r"layers/w: .* where='!layers/w'"):
            run(structure=structure, sparsity=0.5)
    with pytest.raises(ValueError, match=r"layers/w\[0\]: inputs: no row other than 0"):
        posttrain.prune(fn, params, [0 * batches()[0]], sparsity=0.5)
    with pytest.raises(ValueError, match=r"the rows of layers/w\[0\] are sorted"):
        run(sparsity=0.5, token_weights=lambda x: jnp.ones(len(x)))
