"""Targets of latency: by a model of the device, by timing, by any clock."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.ones((6, 4))
P = {"a": jnp.ones((4, 16)), "b": jnp.ones((16, 12)), "c": jnp.ones((12, 3))}


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


GRAPH = structured.trace(mlp, P, X)
SCORES = {g.name: np.arange(g.size) for g in GRAPH.groups}
HALF = structured.plan(GRAPH, SCORES, ratio=0.5)


def seconds(graph, plan, flops=math.inf, bandwidth=math.inf, tile=(1, 1, 1)):
    roofline = structured.Roofline(flops, bandwidth, tile)
    return structured.predicted(graph, roofline)(plan)


def test_a_product_takes_the_longer_of_work_and_traffic():
    work = 2 * 6 * (4 * 8 + 8 * 6 + 6 * 3)
    assert seconds(GRAPH, HALF, flops=2.0) == work / 2 == HALF.after.flops / 2
    moved = 4 * sum(6 * k + k * n + 6 * n for k, n in ((4, 8), (8, 6), (6, 3)))
    assert seconds(GRAPH, HALF, bandwidth=2.0) == moved / 2
    each = [
        max(2 * 6 * k * n / 3, 4 * (6 * k + k * n + 6 * n) / 2)
        for k, n in ((4, 8), (8, 6), (6, 3))
    ]
    assert seconds(GRAPH, HALF, 3.0, 2.0) == pytest.approx(sum(each))
    tiled = 2 * 8 * (4 * 8 + 8 * 8 + 8 * 8)
    assert seconds(GRAPH, HALF, flops=1.0, tile=(8, 2, 8)) == tiled - 2 * 8 * 2 * 8


def test_convolutions_scans_and_heads_are_counted_as_they_run():
    def fn(p, x):
        x = lax.conv_general_dilated(
            x @ p["in"], p["conv"], (1, 1), "SAME", feature_group_count=4,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = x.reshape(2, 25, 8)
        x, _ = lax.scan(lambda x, w: (x + x @ w, None), x, p["layers"])
        return jnp.einsum("bsf,btf->bst", x, x)

    p = {
        "in": jnp.ones((3, 8)), "conv": jnp.ones((3, 3, 2, 8)), "layers": jnp.ones((5, 8, 8))
    }  # fmt: skip
    graph = structured.trace(fn, p, jnp.ones((2, 5, 5, 3)))
    whole = structured.planned(graph, {})
    products = [
        (1, 1, 50, 3, 8), (1, 4, 50, 18, 2), (5, 1, 50, 8, 8), (2, 1, 25, 8, 25)
    ]  # fmt: skip
    flops = [2 * math.prod(x) for x in products]
    assert seconds(graph, whole, flops=1.0) == sum(flops) == whole.before.flops

    def up(n, t):
        return -(-n // t) * t

    tiled = [2 * t * g * up(m, 8) * up(k, 4) * up(n, 4) for t, g, m, k, n in products]
    assert seconds(graph, whole, flops=1.0, tile=(8, 4, 4)) == sum(tiled)
    groups = [g.name for g in graph.groups if any(m.path == "conv" for m in g.members)]
    plan = structured.planned(graph, {groups[0]: [0]})
    assert seconds(graph, plan, flops=1.0) == plan.after.flops < plan.before.flops


def test_a_predicted_target_is_met_and_not_missed_by_much():
    clock = structured.predicted(GRAPH, structured.Roofline(1.0, 0.5))
    target = structured.Target(latency=0.6, clock=clock)
    plan = structured.plan(GRAPH, SCORES, target=target)
    dense = clock(structured.planned(GRAPH, {}))
    assert 0.5 < clock(plan) / dense <= 0.6
    again = structured.plan(
        GRAPH, SCORES, target=structured.Target(seconds=0.6 * dense, clock=clock)
    )
    assert str(again) == str(plan)
    both = structured.Target(parameters=0.3, latency=0.6, clock=clock)
    small = structured.plan(GRAPH, SCORES, target=both)
    assert small.after.parameters <= 0.3 * small.before.parameters


def test_any_function_of_plans_is_a_clock_and_is_asked_rarely():
    asked = []

    def clock(plan):
        asked.append([len(g.kept) for g in plan.groups.values()])
        return 1.0 + sum(asked[-1])

    plan = structured.plan(
        GRAPH, SCORES, target=structured.Target(seconds=20.0, clock=clock)
    )
    kept = [len(g.kept) for g in plan.groups.values()]
    assert sum(kept) <= 19 and kept in asked
    assert len(asked) <= 13 and len({tuple(x) for x in asked[1:]}) == len(asked) - 1


def test_the_function_itself_is_timed():
    p = {"a": jnp.ones((256, 4096)), "b": jnp.ones((4096, 256))}
    x = jnp.ones((256, 256))

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    graph = structured.trace(fn, p, x)
    clock = structured.measured(fn, p, x, repeats=5)
    whole, small = ({"b:0": np.arange(n)} for n in (4096, 64))
    assert (
        0
        < clock(structured.planned(graph, small))
        < clock(structured.planned(graph, whole))
    )
    with pytest.raises(ValueError, match="repeats: got 0"):
        structured.measured(fn, p, x, repeats=0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"latency": 0.5}, "a latency or seconds need a clock"),
        ({"seconds": 0.5}, "a latency or seconds need a clock"),
        ({"flops": 0.5, "clock": len}, "a clock needs one of them"),
        ({"clock": len}, "at least one of parameters"),
        ({"latency": 1.5, "clock": len}, r"expected shares in \(0, 1\]"),
        ({"seconds": 0.0, "clock": len}, "seconds=0.0; expected more than 0"),
        (
            {"seconds": 1e-9, "clock": lambda _: 1.0},
            "these shares remain: .*seconds.*1.0",
        ),
    ],
)
def test_bad_targets_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        structured.plan(GRAPH, SCORES, target=structured.Target(**target))
