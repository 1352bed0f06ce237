"""What `masked` does to the optimizer that it wraps, whatever the method decides."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.training import Method, MethodState
from jaxprune.training._method import (
    advance,
    mask_gradients,
    masked_view,
    replace_masks,
    start,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SWITCH = 3


def make_params():
    kernel, bias = jax.random.split(jax.random.key(0))
    return {
        "layer": {
            "kernel": jax.random.normal(kernel, (16, 8)),
            "bias": jax.random.normal(bias, (8,)),
        }
    }


def make_mask(seed):
    return jax.random.bernoulli(jax.random.key(seed), 0.5, (16, 8))


def switching(first=1, second=2):
    """Fixed masks up to step `SWITCH`, others from there on: weights go and come back."""

    def init(params):
        return start(jax.tree.map(lambda _: make_mask(first), params), params)

    def update(grads, state: MethodState, params):
        return lax.cond(
            state.step == SWITCH,
            lambda s: replace_masks(s, [make_mask(second)], params),
            lambda s: s,
            advance(grads, state, params),
        )

    return Method(init, update, mask_gradients, None, masked_view)


def gradients(params, step=0):
    return jax.tree.map(lambda p: jnp.cos(7 * p + step), params)


def _kernel(tree):
    return np.asarray(tree["layer"]["kernel"])


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "decayed-sgd": lambda: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
    ),
    "lion": lambda: optax.lion(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "adafactor-unfactored": lambda: optax.adafactor(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "prodigy": lambda: optax.contrib.prodigy(),
    "schedule-free": lambda: optax.contrib.schedule_free(
        optax.adamw(0.1, weight_decay=0.1), learning_rate=0.1, b1=0.9
    ),
}
NAMES = [pytest.param(name, id=name) for name in OPTIMIZERS]


def _moments(state, like):
    """The arrays of `state` that lie under a weight's path and have its shape."""
    wanted = _kernel(like).shape
    return [
        (jax.tree_util.keystr(path), np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if "['kernel']" in jax.tree_util.keystr(path) and x.shape == wanted
    ]


@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_and_their_moments(name):
    inner = OPTIMIZERS[name]()
    tx = jp.masked(inner, switching())
    params = make_params()

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(2 * SWITCH):
        old = params
        params, state = step(params, state, i)
        mask = _kernel(jp.get_masks(state))
        np.testing.assert_array_equal(mask, make_mask(1 if i < SWITCH else 2))
        assert not _kernel(params)[~mask].view(np.uint32).any()  # 0, and not -0
        if name == "schedule-free":
            evaluated = optax.contrib.schedule_free_eval_params(state.inner, params)
            assert not _kernel(evaluated)[~mask].any()
        if i == SWITCH:
            flipped = mask ^ np.asarray(make_mask(1))
            info = jp.get_info(state)
            assert info["changed"] and info["flipped"] == flipped.sum()
            _check_moments(name, inner, state, old, mask, flipped)
    assert np.count_nonzero(_kernel(params)[mask]) == mask.sum()


def _check_moments(name, inner, state, old, mask, flipped):
    """Those of weights just pruned are as in a fresh state, in spite of the step."""
    moments = _moments(state.inner, old)
    assert bool(moments) == (name != "adafactor")  # whose moments are factored
    fresh = _moments(inner.init(jp.masks.apply(old, jp.get_masks(state))), old)
    for (path, now), (_, x0) in zip(moments, fresh, strict=True):
        gone = flipped & ~mask
        # Adafactor adds 1e-30 to every squared gradient.
        np.testing.assert_allclose(
            now[gone], x0[gone], rtol=0, atol=1e-29, err_msg=path
        )
        assert not np.array_equal(now[mask], x0[mask]), path


@pytest.mark.parametrize("name", NAMES)
def test_regrown_weights_begin_with_fresh_moments(name):
    """The inner optimizer is stopped at the switch, so that its state shows the reset."""
    plain = OPTIMIZERS[name]()

    def update(updates, state, params=None):
        new_updates, new = plain.update(updates, state["plain"], params)
        stop = state["count"] == SWITCH
        new = jax.tree.map(lambda a, b: jnp.where(stop, a, b), state["plain"], new)
        return new_updates, {"plain": new, "count": state["count"] + 1}

    inner = optax.GradientTransformation(
        lambda params: {"plain": plain.init(params), "count": jnp.int32(0)}, update
    )
    tx = jp.masked(inner, switching())
    params = make_params()
    step = jax.jit(tx.update)
    state = tx.init(params)
    for i in range(SWITCH + 1):
        old, before = params, state
        updates, state = step(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    flipped = np.asarray(make_mask(2) ^ make_mask(1))
    fresh = plain.init(jp.masks.apply(old, jp.get_masks(state)))
    for (path, now), (_, then), (_, x0) in zip(
        _moments(state.inner, params),
        _moments(before.inner, params),
        _moments(fresh, params),
        strict=True,
    ):
        np.testing.assert_array_equal(now, np.where(flipped, x0, then), err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ones_changes_nothing(name):
    inner = OPTIMIZERS[name]()
    ones = {"layer": {"kernel": jnp.ones((16, 8), bool), "bias": None}}
    tx = jp.masked(inner, ones)
    jitted, jitted_inner = jax.jit(tx.update), jax.jit(inner.update)
    params = make_params()
    state, inner_state = tx.init(params), inner.init(params)
    for i in range(3):
        grads = gradients(params, i)
        ours, new_state = tx.update(grads, state, params)
        plain, new_inner_state = inner.update(grads, inner_state, params)
        jax.tree.map(np.testing.assert_array_equal, ours, plain)
        jax.tree.map(np.testing.assert_array_equal, new_state.inner, new_inner_state)
        # Under jit other operations are fused: 2 ulps of the leaf's largest weight.
        fused = jitted(grads, state, params)[0]
        fused_plain = jitted_inner(grads, inner_state, params)[0]
        jax.tree.map(_assert_within_two_ulps, fused, fused_plain, params)
        params = optax.apply_updates(params, ours)
        state, inner_state = new_state, new_inner_state


def _assert_within_two_ulps(a, b, weight):
    atol = 2 * np.spacing(np.max(np.abs(weight)))
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_moments_of_a_leaf_without_mask_are_left_alone():
    """Though its path ends like that of a masked leaf of the same shape."""
    params = {
        "kernel": jnp.arange(16.0).reshape(4, 4),
        "head": {"kernel": jnp.ones((4, 4))},
    }
    tx = jp.masked(optax.adam(0.1), jp.gmp(0.5, begin=2, end=2), where="kernel")
    plain = optax.adam(0.1)
    state, other = tx.init(params), plain.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
        _, other = plain.update(params, other, params)
    assert jp.masks.sparsity(jp.get_masks(state)) == 0.5
    np.testing.assert_array_equal(state.inner[0].mu["head"]["kernel"],
                                  other[0].mu["head"]["kernel"])  # fmt: skip
    assert (state.inner[0].mu["kernel"][:2] == 0).all()


class _Root(eqx.Module):
    """A module whose only weight has the name of what NNX variables hold."""

    value: jax.Array
    scale: jax.Array


def test_moments_of_a_root_attribute_called_value():
    params = _Root(jnp.arange(16.0).reshape(4, 4), jnp.ones((4, 4)))
    tx = jp.masked(optax.adam(0.1), jp.gmp(0.5, begin=2, end=2), where="value")
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    assert (state.inner[0].mu.value[:2] == 0).all()
    assert (state.inner[0].mu.scale > 0).all()


def test_extra_arguments_reach_the_inner_optimizer():
    inner = optax.chain(
        optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    )
    tx = optax.chain(optax.identity(), jp.masked(inner, switching()))
    params = make_params()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(params, state, params, value=jnp.float32(1.0))
    scale = optax.tree.get(state, "scale")
    assert 0 < float(scale) < 1
    np.testing.assert_array_equal(
        updates["layer"]["bias"], -scale * params["layer"]["bias"]
    )


def test_injected_hyperparameters_can_be_set():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    tx = jp.masked(inner, switching())
    params = make_params()
    state = optax.tree.set(tx.init(params), learning_rate=jnp.float32(0.25))
    updates, _ = jax.jit(tx.update)(params, state, params)
    np.testing.assert_array_equal(
        updates["layer"]["bias"], -0.25 * params["layer"]["bias"]
    )


def test_frozen_subtrees():
    """Kernels, too, can be frozen, and then have no mask."""
    params = {"body": make_params()["layer"], "head": make_params()["layer"]}
    tx = optax.partition(
        {
            "train": jp.masked(optax.adam(0.1), jp.static(0.5)),
            "keep": optax.set_to_zero(),
        },
        {"body": "train", "head": "keep"},
    )
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates["head"])
    found = jp.get_masks(state)
    assert found["head"] is None
    assert jp.get_info(state)["kept"] == {"body/kernel": 64}
    new = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, new, jp.masks.apply(new, found))


def test_two_methods_side_by_side():
    params = {"body": make_params()["layer"], "head": make_params()["layer"]}
    tx = optax.partition(
        {
            "body": jp.masked(optax.adam(0.1), jp.static(0.5)),
            "head": jp.masked(optax.sgd(0.1), jp.static(0.25)),
        },
        {"body": "body", "head": "head"},
    )
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert jp.get_info(state)["kept"] == {"body/kernel": 64, "head/kernel": 96}
    assert jp.get_info(state)["density"] == 160 / 256
    new = optax.apply_updates(params, updates)
    found = jp.get_masks(state)
    jax.tree.map(np.testing.assert_array_equal, new, jp.masks.apply(new, found))
    sparse = jp.sparse_params(params, state)
    jax.tree.map(np.testing.assert_array_equal, sparse, jp.masks.apply(params, found))


def test_gradients_pass_through_sparse_params():
    params = make_params()
    state = jp.masked(optax.sgd(0.1), switching()).init(params)

    def loss(params):
        return jnp.sum(jp.sparse_params(params, state)["layer"]["kernel"] * 3)

    grads = jax.jit(jax.grad(loss))(params)
    seen = jp.sparse_params(params, state)
    np.testing.assert_array_equal(_kernel(seen) != 0, _kernel(jp.get_masks(state)))
    # Pruned weights too: a method that regrows must see their gradients.
    np.testing.assert_array_equal(_kernel(grads), 3)
    tangent = jax.jvp(loss, (params,), (params,))[1]
    np.testing.assert_allclose(tangent, 3 * jnp.sum(_kernel(params)), rtol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param((jnp.ones((4, 2)), [jnp.ones((2, 8)), jnp.ones(2)]), id="tuple"),
        pytest.param(jnp.ones((4, 2)), id="array"),
        pytest.param({"a": None, "w": jnp.ones((4, 2))}, id="none"),
        pytest.param(
            {"a": jnp.arange(8).reshape(4, 2), "w": jnp.ones((4, 2))}, id="int"
        ),
    ],
)
def test_trees_without_names(params):
    tx = jp.masked(optax.adam(0.1), jp.static(0.5))
    state = jax.jit(tx.init)(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert jp.get_info(state)["density"] == 0.5
    floats = [x for x in jax.tree.leaves(new) if x.dtype == jnp.float32 and x.ndim > 1]
    assert all(int(jnp.sum(x == 0)) == x.size // 2 for x in floats)


def test_scanned_layers():
    """`nn.scan` stacks kernels to three axes and biases to two."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    stack = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = jnp.ones((2, 8))
    params = stack.init(jax.random.key(0), x, None)
    tx = jp.masked(optax.adam(0.1), jp.static(0.5, structure=jp.NM(2, 4)))
    state = tx.init(params)
    found = jp.get_masks(state)["params"]["Dense_0"]
    assert found["bias"] is None
    groups = found["kernel"].reshape(3, 2, 4, 8)
    assert (groups.sum(2) == 2).all()


@pytest.mark.parametrize(
    "pack", [jp.masks.pack, lambda masks: masks], ids=["packed", "bool"]
)
def test_fixed_masks_outlive_a_donated_state(pack):
    params = {"odd": jnp.ones((3, 5)), "layer": make_params()["layer"]}
    fixed = pack(
        {"odd": jnp.ones((3, 5), bool), "layer": {"kernel": make_mask(1), "bias": None}}
    )
    tx = jp.masked(optax.sgd(0.1), fixed)
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):
        _, state = update(params, tx.init(params), params)
    np.testing.assert_array_equal(_kernel(jp.get_masks(state)), make_mask(1))


def test_where_chooses_leaves():
    params = {"a": make_params()["layer"], "b": make_params()["layer"]}
    tx = jp.masked(optax.sgd(0.1), jp.static(0.5), where=["*/kernel", "!b/*"])
    assert jp.get_info(tx.init(params))["kept"] == {"a/kernel": 64}


def test_state_does_not_hold_what_the_masks_do_not_need():
    params = {"kernel": jax.ShapeDtypeStruct((4096, 1000), jnp.bfloat16)}
    tx = jp.masked(optax.sgd(0.1), jp.gmp(0.5, end=10))
    state = jax.eval_shape(tx.init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size <= 4096 * 1000 // 8 + 100


# Bad input.


def test_update_needs_params():
    tx = jp.masked(optax.sgd(0.1), switching())
    params = make_params()
    with pytest.raises(ValueError, match=r"params: got None.*tx\.update\(grads"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        pytest.param(
            {"layer": {"kernel": jnp.ones((16, 8), bool)}},
            r"structure is not that of params.*layer/bias",
            id="structure",
        ),
        pytest.param(
            {"layer": {"kernel": jnp.ones((8, 16), bool), "bias": None}},
            r"layer/kernel has shape \(8, 16\).*float32\[16, 8\]",
            id="shape",
        ),
        pytest.param(
            {"layer": {"kernel": jnp.ones((16, 8)), "bias": None}},
            r"layer/kernel is float32\[16, 8\]; expected a boolean array",
            id="dtype",
        ),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(ValueError, match=message):
        jp.masked(optax.sgd(0.1), masks).init(make_params())


def test_masks_that_mask_nothing():
    with pytest.raises(ValueError, match=r"masks: every leaf is None"):
        jp.masked(optax.sgd(0.1), {"layer": None}).init(make_params())


@pytest.mark.parametrize("given", [jp.gmp, 0.9], ids=["function", "number"])
def test_what_is_neither_method_nor_masks(given):
    with pytest.raises(TypeError, match=r"method_or_masks: got .*jaxprune\.gmp\(0\.9"):
        jp.masked(optax.sgd(0.1), given)


def test_masks_and_where():
    ones = {"layer": {"kernel": jnp.ones((16, 8), bool), "bias": None}}
    with pytest.raises(ValueError, match="fixed masks already say"):
        jp.masked(optax.sgd(0.1), ones, where="*")


@pytest.mark.parametrize(
    ("method", "where", "message"),
    [
        pytest.param(
            jp.static(0.5),
            "*/weight",
            r"'\*/weight' matches no.*layer/kernel",
            id="where",
        ),
        pytest.param(
            jp.gmp(0.4, end=3, structure=jp.NM(3, 5)),
            None,
            r"layer/kernel: NM\(n=3, m=5.*length 16.*multiple of 5",
            id="nm",
        ),
        pytest.param(
            jp.gmp(0.5, end=3, structure=jp.Block(5, 4)),
            None,
            r"layer/kernel: Block\(rows=5.*rows=5 against length 16",
            id="block",
        ),
        pytest.param(
            jp.gmp(0.9, end=3, structure=jp.NM(2, 4)),
            None,
            r"layer/kernel: sparsity 0\.9 contradicts NM\(n=2, m=4.*0\.5",
            id="nm-sparsity",
        ),
    ],
)
def test_methods_that_do_not_fit(method, where, message):
    with pytest.raises(ValueError, match=message):
        jp.masked(optax.sgd(0.1), method, where=where).init(make_params())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"sparsity": 0.9}, "end: got None", id="no-end"),
        pytest.param(
            {"sparsity": 1.0, "end": 3}, r"sparsity: got 1\.0.*\[0, 1\)", id="one"
        ),
        pytest.param({"sparsity": 90, "end": 3}, "sparsity: got 90", id="percent"),
        pytest.param(
            {"sparsity": 0.9, "end": 3, "initial": -0.1},
            r"initial: got -0\.1",
            id="initial",
        ),
        pytest.param(
            {"sparsity": 0.9, "begin": 5, "end": 3}, "begin=5, end=3", id="backwards"
        ),
        pytest.param(
            {"sparsity": 0.9, "end": 3, "every": 0}, "every: got 0", id="every"
        ),
        pytest.param(
            {"sparsity": jp.schedules.cubic(0.9, 0, 3), "end": 3},
            "a Schedule together with",
            id="schedule",
        ),
    ],
)
def test_schedules_that_do_not_make_sense(options, message):
    with pytest.raises(ValueError, match=message):
        jp.gmp(**options)


def test_sparsity_is_needed():
    with pytest.raises(ValueError, match="sparsity: got None; expected a number"):
        jp.static()


def test_sparsity_of_the_wrong_type():
    with pytest.raises(TypeError, match="sparsity: got 'half'"):
        jp.gmp("half", end=3)


@pytest.mark.parametrize("read", [jp.get_masks, jp.get_info])
def test_no_state_to_find(read):
    with pytest.raises(ValueError, match="holds no state of jaxprune.masked"):
        read(optax.adam(0.1).init(make_params()))


@pytest.mark.parametrize(
    ("inner", "method", "message"),
    [
        (jp.gmp(0.5, end=9), optax.sgd(0.1), "inner: got a method; expected an optax"),
        (optax.sgd, jp.gmp(0.5, end=9), "inner: got sgd; expected an optax optimizer"),
        (optax.sgd(0.1), optax.sgd(0.1), "method_or_masks: got an optax optimizer"),
    ],
)
def test_arguments_in_the_wrong_place(inner, method, message):
    with pytest.raises(TypeError, match=message):
        jp.masked(inner, method)


def test_a_score_that_is_no_function():
    tx = jp.masked(optax.sgd(0.1), jp.gmp(0.5, initial=0.1, end=3, score="magnitude"))
    with pytest.raises(TypeError, match="score: got str; expected a function of one"):
        tx.init({"kernel": jnp.ones((4, 4))})


@pytest.mark.parametrize(
    "method",
    [
        jp.static(0.5),
        jp.gmp(0.5, begin=0, end=8, every=2, structure=jp.NM(2, 4)),
        jp.rigl(0.5, begin=0, end=8, every=2, key=jax.random.key(0)),
    ],
    ids=["static", "gmp", "rigl"],
)
def test_nothing_begins_before_the_gradient_of_its_leaf(method):
    """Else XLA unpacks masks while the activations of the forward pass fill the memory."""
    params = make_params()
    tx = jp.masked(optax.adamw(0.1), method)
    args = gradients(params), tx.init(params), params
    traced = jax.make_jaxpr(tx.update)(*args).jaxpr
    early = set()
    for (path, _), given in zip(
        jax.tree.leaves_with_path(args), traced.invars, strict=True
    ):
        name = jax.tree_util.keystr(path)
        if ".masks" in name or name.startswith("[2]") and "kernel" in name:
            early |= {e.primitive.name for e in traced.eqns if given in e.invars}
    assert early == {"optimization_barrier"}


def test_an_update_takes_less_than_half_a_leaf():
    """On a CPU; masks that are made to bits in slices took a whole leaf more."""
    structure = jp.NM(2, 4)
    params = {"kernel": jax.ShapeDtypeStruct((1792, 1792), jnp.float32)}
    method = jp.gmp(begin=0, end=8, every=2, structure=structure)
    tx = jp.masked(optax.sgd(0.1), method)
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = update.lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1792 * 1792 * 4 / 2
