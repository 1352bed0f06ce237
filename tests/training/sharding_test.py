"""The same masks on one device and on a mesh, found without moving the weights."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = [
    pytest.param(AxisType.Explicit, id="explicit"),
    pytest.param(AxisType.Auto, id="auto"),
]

# Large enough to be sampled and folded; stacked; and one whose first axis does not hold
# whole bytes in every shard.
LAYOUT = {
    "large": ((256, 512), P("data", "model")),
    "stack": ((2, 64, 128), P(None, "model", "data")),
    "ragged": ((40, 24), P("model", None)),
}
OTHER_LAYOUTS = {
    "both-on-rows": ((64, 16), P(("data", "model"), None)),
    "both-on-columns": ((16, 64), P(None, ("data", "model"))),
    "no-whole-bytes": ((12, 4), P("data", "model")),
    "replicated": ((16, 8), P()),
    "bias": ((8,), P("data")),
}

RAMP = {"begin": 0, "end": 2}
METHODS = {
    "gmp": jp.gmp(0.5, **RAMP),
    "gmp-global": jp.gmp(0.5, allocation="global", **RAMP),
    "gmp-nm": jp.gmp(0.5, structure=jp.NM(2, 4), **RAMP),
    "gmp-block": jp.gmp(0.5, structure=jp.Block(4, 4), **RAMP),
    "gmp-channel": jp.gmp(0.5, structure=jp.Channel(), **RAMP),
    "rigl": jp.rigl(0.5, key=jax.random.key(0), allocation="uniform", every=1, **RAMP),
    "granet": jp.granet(0.5, every=1, allocation="global", **RAMP),
    "pdp": jp.pdp(0.5, harden=3, allocation="uniform", **RAMP),
    "top_kast": jp.top_kast(0.5, backward=0.25, every=1),
    "neuroprune": jp.neuroprune(
        0.5, roles=jp.Roles(mlp_in="*/kernel"), end=1, every=1, reading="inverse"
    ),
}
# The score of a channel, and the degree of a neuron, are sums over devices.
LARGEST = {"gmp-channel": 512, "neuroprune": 512}


def make_params(layout):
    return {
        name: {"kernel": jax.random.normal(jax.random.key(i), shape)}
        for i, (name, (shape, _)) in enumerate(layout.items())
    }


def place(tree, layout, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return {
        name: jax.tree.map(
            lambda x, spec=layout[name][1]: jax.device_put(
                x, NamedSharding(mesh, spec)
            ),
            leaf,
        )
        for name, leaf in tree.items()
    }


def make_masks(params):
    return jax.tree.map(
        lambda x: jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), params
    )


def initialise(tx, params, kind):
    # Inside jit, types do not say how arrays lie on an auto mesh.
    return (jax.jit(tx.init) if kind is AxisType.Explicit else tx.init)(params)


def step(tx, params, state):
    return tx.update(jax.tree.map(jnp.cos, params), state, params)


@functools.cache
def on_one_device(name):
    params = make_params(LAYOUT)
    tx = jp.masked(optax.adam(0.1), METHODS[name])
    run = jax.jit(functools.partial(step, tx))
    updates, state = run(params, run(params, jax.jit(tx.init)(params))[1])
    return updates, jp.get_masks(state), jp.get_info(state)


def check_shardings(tree, params):
    jax.tree.map(
        lambda x, p: _assert_equivalent(x.sharding, p.sharding, p.ndim), tree, params
    )


def _assert_equivalent(a, b, ndim):
    assert a.is_equivalent_to(b, ndim), (a, b)


def check_program(text, largest=8):
    """Nothing is sorted, and between devices there move only a few counts."""
    shapes = {}
    for line in text.splitlines():
        if found := re.search(r"= (.*?) ([a-z-]+?)(-start)?\(", line):
            shapes.setdefault(found[2], set()).add(found[1])
    assert shapes["parameter"]  # the search sees what it should
    for name in ("sort", "all-gather", "all-to-all", "collective-permute", "topk"):
        assert name not in shapes, (name, shapes[name])
    for shape in shapes.get("all-reduce", ()):
        for size in re.findall(r"\[([\d,]*)\]", shape):
            assert np.prod([int(n) for n in size.split(",") if n]) <= largest, shape
    return shapes


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in METHODS])
def test_a_mesh_gives_the_masks_of_one_device(name, kind):
    params = place(make_params(LAYOUT), LAYOUT, kind)
    tx = jp.masked(optax.adam(0.1), METHODS[name])
    state = initialise(tx, params, kind)
    check_shardings(_bits(state), params)

    update = jax.jit(functools.partial(step, tx)).lower(params, state).compile()
    shapes = check_program(update.as_text(), LARGEST.get(name, 8))
    assert "all-reduce" in shapes
    updates, state = update(params, update(params, state)[1])
    check_shardings(updates, params)
    check_shardings(_bits(state), params)
    check_shardings(jp.get_masks(state), params)

    plain_updates, masks, info = on_one_device(name)
    assert jp.get_info(state) == info
    jax.tree.map(np.testing.assert_array_equal, jp.get_masks(state), masks)
    # The optimizer's own arithmetic may be fused in another way.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        updates, plain_updates,
    )  # fmt: skip


def _avals(jaxpr):
    """Types of all that a program computes, in its branches and loops too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if _is_program(inner):
                yield from _avals(getattr(inner, "jaxpr", inner))


def _is_program(x):
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in METHODS])
def test_nothing_as_large_as_a_leaf_lies_whole_on_each_device(name):
    params = place(make_params(LAYOUT), LAYOUT, AxisType.Explicit)
    tx = jp.masked(optax.adam(0.1), METHODS[name])
    state = jax.eval_shape(tx.init, params)
    program = jax.make_jaxpr(functools.partial(step, tx))(params, state)
    leaf = math.prod(LAYOUT["stack"][0])
    large = [x for x in _avals(program.jaxpr) if x.size >= leaf]
    assert large
    for x in large:
        assert any(s is not None for s in x.sharding.spec), x


@pytest.mark.parametrize("kind", MESHES)
def test_topology_on_a_mesh(kind):
    """CHTs gathers masks for its products; nothing else moves, and masks are the same."""
    layout = {"kernel": ((64, 32), P("data", "model"))}
    plain = make_params(layout)
    tx = jp.masked(optax.sgd(0.1), jp.chts(0.5, key=jax.random.key(0), end=9, every=1))
    run = jax.jit(functools.partial(step, tx))
    _, expected = run(plain, jax.jit(tx.init)(plain))
    params = place(plain, layout, kind)
    _, state = run(params, initialise(tx, params, kind))
    check_shardings(jp.get_masks(state), params)
    jax.tree.map(
        np.testing.assert_array_equal, jp.get_masks(state), jp.get_masks(expected)
    )


@pytest.mark.parametrize("kind", MESHES)
def test_heads_on_a_mesh(kind):
    """No more than the weights of one head move at a time, to be compared with others."""
    inward, outward = P("data", "model"), P("model", "data")
    layout = dict.fromkeys(("query", "key", "value"), ((64, 64), inward))
    layout |= {"out": ((64, 64), outward), "up": ((64, 128), inward)}
    plain = make_params(layout)
    roles = jp.Roles(**{n: f"{n}/kernel" for n in ("query", "key", "value", "out")},
                     mlp_in="up/kernel", heads=4)  # fmt: skip
    tx = jp.masked(optax.adam(0.1), jp.neuroprune(
        0.5, roles=roles, end=1, every=1, head_every=1, theta=None, theta_rel=2.0))  # fmt: skip
    run = jax.jit(functools.partial(step, tx))
    _, expected = run(plain, run(plain, jax.jit(tx.init)(plain))[1])
    assert not next(iter(expected.method.own.alive.values())).all()

    params = place(plain, layout, kind)
    state = initialise(tx, params, kind)
    update = run.lower(params, state).compile()
    moved = re.findall(r"= (.*?) (?:all-|collective-)[a-z-]+\(", update.as_text())
    assert moved
    for shape in re.findall(r"\[([\d,]+)\]", " ".join(moved)):
        assert math.prod(map(int, shape.split(","))) <= 64 * 16, shape
    _, state = update(params, update(params, state)[1])
    check_shardings(jp.get_masks(state), params)
    # Scores hold sums of rows, which agree to rounding; here no weight is that close.
    jax.tree.map(
        np.testing.assert_array_equal, jp.get_masks(state), jp.get_masks(expected)
    )


def _bits(state):
    return jax.tree.map(
        lambda m: m.bits, state.method.masks, is_leaf=lambda x: hasattr(x, "bits")
    )


@pytest.mark.parametrize("kind", MESHES)
def test_layouts(kind):
    """Masks lie as the weights do, packed along an axis with whole bytes, if there is."""
    params = place(make_params(OTHER_LAYOUTS), OTHER_LAYOUTS, kind)
    fixed = make_masks(make_params(OTHER_LAYOUTS))
    fixed = place(fixed, OTHER_LAYOUTS, kind)
    tx = jp.masked(optax.adam(0.1), fixed)
    state = initialise(tx, params, kind)
    update = jax.jit(functools.partial(step, tx)).lower(params, state).compile()
    check_program(update.as_text())
    updates, state = update(params, state)
    check_shardings(updates, params)
    check_shardings(_bits(state), params)
    jax.tree.map(np.testing.assert_array_equal, jp.get_masks(state), fixed)
    axes = {name: state.method.masks[name]["kernel"].axis for name in OTHER_LAYOUTS}
    assert axes["no-whole-bytes"] is None
    assert None not in [
        axes[n] for n in ("both-on-rows", "both-on-columns", "replicated")
    ]


@pytest.mark.parametrize("kind", MESHES)
def test_prune_on_a_mesh(kind):
    plain = make_params(LAYOUT)
    wanted = jp.prune(plain, 0.5, allocation="global")
    params = place(plain, LAYOUT, kind)
    pruned, masks = jp.prune(params, 0.5, allocation="global")
    check_shardings(masks, params)
    check_shardings(pruned, params)
    jax.tree.map(np.testing.assert_array_equal, (pruned, masks), wanted)
