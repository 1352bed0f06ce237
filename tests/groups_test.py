"""Coupled groups as data: sums, masks, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.structures import Group, Member

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "qkv": {"kernel": jax.random.normal(keys[0], (3, 9))},
        "out": {"kernel": jax.random.normal(keys[1], (3, 2))},
        "cell": {"kernel": jax.random.normal(keys[2], (3, 3))},
        "bias": jnp.arange(2.0),
    }


def _groups():
    fused = Member("qkv/kernel", 1, (0, 1, 2, 0, 1, 2, -1, -1, -1))
    return jp.Groups(
        (
            Group("a", 3, (fused, Member("out/kernel", 0, (2, 1, 0)))),
            Group("b", 3, (Member("cell/kernel", 0, range(3)),
                           Member("cell/kernel", 1, range(3)))),
        )
    )  # fmt: skip


def _numpy_sums(params):
    qkv, out, cell = (np.asarray(params[n]["kernel"]) for n in ("qkv", "out", "cell"))
    a = [qkv[:, [u, u + 3]].sum() + out[2 - u].sum() for u in range(3)]
    return {"a": a, "b": [cell[u].sum() + cell[:, u].sum() for u in range(3)]}


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sums_are_over_all_slices_of_a_unit(run):
    params = _params()
    found = run(_groups().sums)(params)
    for name, wanted in _numpy_sums(params).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)
    ones = jax.tree.map(jnp.ones_like, params)
    for name, number in _groups().weights(params).items():
        np.testing.assert_array_equal(number, _groups().sums(ones)[name])


def test_a_weight_is_kept_where_all_of_its_units_are():
    kept = {"a": jnp.array([True, False, True]), "b": jnp.array([False, True, True])}
    found = _groups().masks(_params(), kept)
    assert found["bias"] is None
    np.testing.assert_array_equal(
        found["qkv"]["kernel"][0], [1, 0, 1, 1, 0, 1, 1, 1, 1]
    )
    np.testing.assert_array_equal(found["out"]["kernel"][:, 0], [1, 0, 1])
    np.testing.assert_array_equal(
        found["cell"]["kernel"], [[0, 0, 0], [0, 1, 1], [0, 1, 1]]
    )


def test_values_of_several_units_add_up():
    values = {"a": jnp.array([1.0, 2.0, 4.0]), "b": jnp.array([1.0, 2.0, 4.0])}
    found = _groups().spread(_params(), values)
    np.testing.assert_array_equal(found["qkv"]["kernel"], [[1, 2, 4, 1, 2, 4, 0, 0, 0]])
    np.testing.assert_array_equal(found["out"]["kernel"], [[4], [2], [1]])
    np.testing.assert_array_equal(
        found["cell"]["kernel"], [[2, 3, 5], [3, 4, 6], [5, 6, 8]]
    )


def test_alive_is_what_masks_leave():
    params = _params()
    kept = {"a": jnp.array([True, False, True]), "b": jnp.array([True, True, False])}
    # Not where a mask would not reach: what belongs to no unit does not keep one alive.
    masked = jp.masks.apply(params, _groups().masks(params, kept))
    for name, wanted in kept.items():
        np.testing.assert_array_equal(_groups().alive(masked)[name], wanted)


def test_groups_are_data():
    assert _groups() == _groups() and hash(_groups()) == hash(_groups())
    assert _groups().sizes == {"a": 3, "b": 3}
    assert _groups().paths == ("qkv/kernel", "out/kernel", "cell/kernel")
    along = jp.Groups.along({"h": {"cell/kernel": (0, -1)}}, _params())
    assert along.groups[0].members == _groups().groups[1].members


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_a_mesh_changes_nothing(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 12)), "v": jnp.ones((4, 8))}
    groups = jp.Groups(
        (
            Group("w", 4, (Member("w", 1, [u // 3 for u in range(12)]),
                           Member("v", 0, range(4)))),
        )
    )  # fmt: skip
    sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
    placed = jax.tree.map(lambda x: jax.device_put(x, sharding), params)
    kept = {"w": jnp.array([True, False, True, False])}

    def run(params):
        masks = groups.masks(params, kept)
        return groups.sums(params), jp.masks.apply(params, masks)

    with jax.set_mesh(mesh):
        sums, masked = jax.jit(run)(placed)
    plain_sums, plain = run(params)
    np.testing.assert_allclose(sums["w"], plain_sums["w"], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, masked, plain)
    assert masked["w"].sharding.is_equivalent_to(sharding, 2)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)
        return nn.Dense(3)(x.mean(1))


def _traced():
    net, x = _Net(), jnp.ones((2, 4, 4, 1))
    params = net.init(jax.random.key(0), x)
    return net, params, jp.structured.trace(net.apply, params, x)


def test_a_graph_gives_its_groups():
    _, params, graph = _traced()
    groups = graph.as_groups(kinds=("channel", "head"), ignore="batch_stats/*")
    groups.check(params)
    by_name = {g.name: {(m.path, m.axis) for m in g.members} for g in groups.groups}
    assert by_name["Conv_0/kernel:3"] == {
        ("Conv_0/kernel", 3), ("Conv_0/bias", 0), ("Conv_1/kernel", 2),
        ("BatchNorm_0/scale", 0), ("BatchNorm_0/bias", 0),
    }  # fmt: skip
    (heads,) = (g for g in groups.groups if g.size == 2)
    assert {m.path.split("/")[1] for m in heads.members} == {
        "query", "key", "value", "out",
    }  # fmt: skip


def test_integers_are_no_members():
    def fn(params, x):
        return jax.nn.relu(x @ (params["int8"] * params["scale"])) @ params["down"]

    params = {"int8": jnp.ones((2, 4), jnp.int8), "scale": jnp.ones(4),
              "down": jnp.ones((4, 3), jnp.bfloat16)}  # fmt: skip
    graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
    assert len(graph.groups[0].members) == 3
    assert graph.as_groups().paths == ("down", "scale")


def test_without_readers_no_weight_lies_twice():
    _, params, graph = _traced()
    groups = graph.as_groups(kinds=("channel", "neuron", "head"), readers=False)
    found = [m.path for g in groups.groups for m in g.members]
    assert len(found) == len(set(found))
    heads = next(g for g in groups.groups if g.size == 2)
    assert not any("out" in m.path for m in heads.members)


def test_zero_invariant_groups_do_nothing_when_they_are_zero():
    """What puts out zeros may be cut with all that reads it: the function is the same."""
    net, params, graph = _traced()
    params = jax.tree.map(lambda x: x + 0.1, params)
    names = ("Conv_0/kernel:3", "Conv_1/kernel:3")
    groups = graph.as_groups(kinds=("channel",), readers=False)
    assert set(names) >= set(groups.sizes)
    kept = {n: jnp.arange(size) % 3 != 1 for n, size in groups.sizes.items()}
    zeroed = jp.masks.apply(params, groups.masks(params, kept))
    plan = jp.structured.planned(
        graph, {n: np.flatnonzero(k) for n, k in groups.alive(zeroed).items()}
    )
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    small = plan.rewrite(net.apply)(plan.shrink(zeroed), x)
    np.testing.assert_allclose(small, net.apply(zeroed, x), rtol=1e-5, atol=1e-5)
    assert plan.after.parameters < plan.before.parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.Groups(()), "at least one group"),
        (lambda: jp.Groups(_groups().groups * 2), "each name once"),
        (lambda: Group("a", 2, (Member("w", 0, (0, 2)),)), "each of the 2 units of a"),
        (lambda: Group("a", 2, ()), "a has no members"),
        (lambda: jp.Groups.along({"h": {"nowhere": 0}}, _params()), "no leaf nowhere"),
        (lambda: jp.Groups.along({"h": {"bias": 1}}, _params()), "and no axis 1"),
        (
            lambda: jp.Groups.along({"h": {"bias": 0, "cell/kernel": 0}}, _params()),
            "the axes of h have the lengths",
        ),
        (
            lambda: _groups().check({**_params(), "out": {"kernel": jnp.ones((2, 2))}}),
            "out/kernel has the shape",
        ),
        (lambda: _traced()[2].as_groups(kinds=("expert",)), "no group is left"),
        (lambda: _traced()[2].as_groups(ignore="nothing*"), "matches no leaf"),
    ],
)
def test_bad_groups_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
