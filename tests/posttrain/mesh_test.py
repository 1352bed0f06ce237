"""Sharded weights, on meshes of either kind: the same masks, in the same places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.posttrain import _mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = {"up": P(None, None, "d"), "out": P(None, "d")}  # over heads, both times
WIDTH = {"up": P(None, "d"), "out": P(None, None, None, "d")}
METHODS = {
    "sparsegpt": {"sparsity": 0.5},
    "wanda 2:4": {"method": posttrain.wanda(), "structure": jp.NM(2, 4)},
    "refined": {
        "method": posttrain.wanda(),
        "sparsity": 0.5,
        "refine": lambda w, found, inputs: posttrain.refit(w, found.mask, inputs),
        "statistics": ("gram",),
    },
}


def model(params, x, *, explicit=False):
    rows = {"out_sharding": P("d")} if explicit else {}

    def layer(x, w):
        h = jnp.tanh(jnp.einsum("td,dhk->thk", x, w["up"], **rows))
        return x + jnp.einsum("thk,hkd->td", h, w["out"], **rows), None

    return jax.lax.scan(layer, x, params["layers"])[0]


@functools.cache
def arguments():
    random = np.random.default_rng(0)
    shapes = {"up": (2, 16, 8, 2), "out": (2, 8, 2, 16)}
    layers = {
        n: jnp.asarray(random.normal(size=s) / 4, "f4") for n, s in shapes.items()
    }
    mix = random.normal(size=(16, 16)) * np.arange(1, 17)
    batches = [jnp.asarray(random.normal(size=(64, 16)) @ mix, "f4") for _ in range(2)]
    return {"layers": layers}, batches


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("specs", [HEADS, WIDTH], ids=["heads", "width"])
@pytest.mark.parametrize("method", METHODS)
def test_sharded_weights(method, specs, kind):
    params, batches = arguments()
    run = functools.partial(posttrain.prune, **METHODS[method])
    one, masks, _ = run(model, params, batches)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    fn = functools.partial(model, explicit=kind == AxisType.Explicit)
    with jax.set_mesh(mesh):
        leaves = {
            name: jax.device_put(w, NamedSharding(mesh, specs[name]))
            for name, w in params["layers"].items()
        }
        rows = NamedSharding(mesh, P("d"))
        there = {"layers": leaves}, [jax.device_put(x, rows) for x in batches]
        many, others, _ = run(fn, *there)
        ratios = posttrain.outlier_ratios(fn, *there, multiple=2)
    for a, b in zip(*map(jax.tree.leaves, (masks, others)), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) <= 0.001
    for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    for name, w in many["layers"].items():
        own = leaves[name].sharding
        assert w.sharding.is_equivalent_to(own, w.ndim)
        assert others["layers"][name].sharding.is_equivalent_to(own, w.ndim)
    assert ratios == posttrain.outlier_ratios(model, params, batches, multiple=2)


def test_rows_are_brought_together_before_a_matrix_is_solved():
    """K becomes whole, and each device gets other columns for it."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec, n, wanted in (
        (P(None, None, "a", "b"), 16, P(None, None, None, ("b", "a"))),
        (P(None, None, ("a", "b")), 16, P(None, None, None, ("a", "b"))),
        (P(None, None, "a", "b"), 4, P(None, None, None, "b")),  # 4 columns, 8 devices
        (P("a", None, None, "b"), 16, P("a", None, None, "b")),
    ):
        plain = jnp.arange(2.0 * 8 * n).reshape(2, 1, 8, n)
        matrix = jax.device_put(plain, NamedSharding(mesh, spec))
        found = _mesh.columns(matrix)
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, wanted), 4)
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_no_device_holds_a_whole_matrix(kind):
    """While one is solved each has its columns: the weights, old and new, and the mask."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    others = jax.live_arrays()  # of other tests; held, so that no new one has their ids
    most = []

    def look(w, solution, inputs):
        del w, inputs
        before = set(map(id, others))
        found = [x for x in jax.live_arrays() if id(x) not in before]
        shapes = [tuple(n for n in x.shape if n > 1) for x in found]
        most.extend(
            x.addressable_shards[0].data.size / x.size
            for x, shape in zip(found, shapes, strict=True)
            if shape == (16, 48)
        )
        return solution

    def fn(params, x):
        w = params["kernel"]
        if kind == AxisType.Explicit:
            w = jax.reshard(w, P(None, "b"))
        return x @ w

    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((16, 48)), NamedSharding(mesh, P("a", "b")))
        x = jax.device_put(jnp.ones((32, 16)), NamedSharding(mesh, P("a")))
        posttrain.prune(fn, {"kernel": w}, [x], structure=jp.NM(2, 4), refine=look)
    assert most and set(most) == {1 / 8}
