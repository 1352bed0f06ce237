"""Channels cut before training, by densities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTHS = (3, 16, 32, 64)


def _conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _cnn(params, x):
    for i in range(3):
        x = jax.nn.relu(_conv(x, params[f"conv_{i}"]))
    return x.mean((1, 2)) @ params["dense"]


def _params():
    found = {
        f"conv_{i}": jnp.ones((3, 3, a, b))
        for i, (a, b) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))
    }
    return found | {"dense": jnp.ones((64, 10))}


def _graph():
    x = jnp.ones((2, 6, 6, 3))
    return jp.structured.trace(_cnn, _params(), x), x


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_a_layer_puts_out_the_root_of_its_density(sparsity):
    graph, x = _graph()
    shapes = {p: s for p, s in graph.shapes.items() if p != "dense"}
    sparsities = jp.allocation.water_filling(shapes, sparsity)
    plan = jp.structured.precrop(graph, {p: 1 - s for p, s in sparsities.items()})
    small = plan.shrink(_params())
    for i, width in enumerate(WIDTHS[1:]):
        wanted = round(width * math.sqrt(1 - sparsities[f"conv_{i}"]))
        assert small[f"conv_{i}"].shape[3] == wanted
        np.testing.assert_array_equal(
            plan.groups[f"conv_{i}:3"].kept, np.arange(wanted)
        )
    assert small["dense"].shape == (small["conv_2"].shape[3], 10)
    assert _cnn(small, x).shape == (2, 10)
    # The first layer is small, and stays whole.
    assert sparsities["conv_0"] == 0 and small["conv_0"].shape == (3, 3, 3, 16)


def test_between_layers_of_one_density_a_kernel_has_it():
    graph, _ = _graph()
    densities = {p: 1 / 4 for p in graph.shapes if p != "dense"}
    small = jp.structured.precrop(graph, densities).shrink(_params())
    shares = {p: w.size / math.prod(graph.shapes[p]) for p, w in small.items()}
    # What the images have, and the classes, stays: the root of it is left there.
    assert shares == {"conv_0": 0.5, "conv_1": 0.25, "conv_2": 0.25, "dense": 0.5}


def test_the_densest_decides_along_a_stream():
    def fn(params, x):
        x = x @ params["in"]
        x = x + jax.nn.relu(x @ params["a"]) @ params["b"]
        return x @ params["out"]

    params = {"in": jnp.ones((3, 16)), "a": jnp.ones((16, 8)), "b": jnp.ones((8, 16)),
              "out": jnp.ones((16, 2))}  # fmt: skip
    graph = jp.structured.trace(fn, params, jnp.ones((5, 3)))
    plan = jp.structured.precrop(graph, {"in": 1 / 4, "b": 1 / 16})
    small = plan.shrink(params)
    assert small["in"].shape == (3, 8) and small["b"].shape == (8, 8)
    assert small["a"].shape == (8, 8)  # puts out nothing that has a density


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ({"conv_9": 0.5}, "there is no leaf conv_9"),
        ({"conv_1": 0.0}, "got 0.0 for conv_1"),
        ({"conv_1": 1.5}, "got 1.5 for conv_1"),
    ],
)
def test_bad_densities_are_refused(densities, message):
    with pytest.raises(ValueError, match=message):
        jp.structured.precrop(_graph()[0], densities)
