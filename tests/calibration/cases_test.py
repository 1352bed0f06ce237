"""Statistics equal those of hooks written by hand, in every form a model may have."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import calibration, tracing

pytestmark = pytest.mark.usefixtures("quick_compilation")
ALL = ("square", "mean", "variance", "gram")
GRAM = ("gram",)  # compiles faster
KEYS = iter(jax.random.split(jax.random.key(0), 200))


def normal(*shape):
    return jax.random.normal(next(KEYS), shape)


X = normal(5, 8)


def expected(matrices):
    """Inputs by definition, in float64: `matrices[stack][batch]` are rows `[T, K]`."""
    found = []
    for batch in matrices:
        for rows in batch:
            rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
            n = max(len(rows), 1)
            mean = rows.sum(0) / n
            apart = rows - mean
            found.append(
                (len(rows), (rows**2).sum(0) / n, mean, (apart**2).sum(0) / n,
                 rows.T @ rows / n)
            )  # fmt: skip
    shape = len(matrices), len(matrices[0])
    arrays = [np.stack(x) for x in zip(*found, strict=True)]
    return calibration.Inputs(*(x.reshape(*shape, *x.shape[1:]) for x in arrays))


def check(fn, params, args, hooks, tol=2e-5, statistics=GRAM, **options):
    """Compares statistics of all leaves with hooks: `{path: [matrices, ...]}`."""
    stats = calibration.calibrate(fn, params, [args], statistics=statistics, **options)
    assert {p: len(stats[p]) for p in stats} == {p: len(h) for p, h in hooks.items()}
    for path, uses in hooks.items():
        for use, rows in zip(stats[path], uses, strict=True):
            for name, a, b in zip(
                use.inputs._fields, use.inputs, expected(rows), strict=True
            ):
                if a is None:
                    assert name not in statistics
                    continue
                scale = max(np.abs(b).max(), 1e-3)
                np.testing.assert_allclose(
                    np.asarray(a, np.float64) / scale, b / scale,
                    atol=tol, rtol=0, err_msg=f"{path}: {name}",
                )  # fmt: skip
    return stats


def same_activation(stats, *paths):
    return len({use.site.activation for p in paths for use in stats[p]}) == 1


def layers(fn, weights, x):
    """Inputs of each layer, one after the other."""
    found = []
    for w in weights:
        found.append([x])
        x = fn(x @ w)
    return found


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_dense(jit):
    module = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    params = module.init(jax.random.key(0), X)
    h = nn.relu(nn.Dense(6).apply({"params": params["params"]["layers_0"]}, X))
    fn = jax.jit(module.apply) if jit else module.apply
    hooks = {"layers_0/kernel": [[[X]]], "layers_2/kernel": [[[h]]]}
    check(fn, params, (X,), hooks, statistics=ALL)


class Attention(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), dtype=self.dtype, name=n)(x) for n in "qkv")
        h = jnp.tanh(q) * k + v
        self.sow("intermediates", "h", h)
        return nn.DenseGeneral(8, axis=(-2, -1), dtype=self.dtype, name="out")(h)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_attention_with_two_contracted_axes(dtype):
    module, x = Attention(dtype), normal(2, 5, 8)
    params = module.init(jax.random.key(0), x)
    _, kept = module.apply(params, x, mutable="intermediates")
    h = kept["intermediates"]["h"][0].astype(jnp.float32).reshape(-1, 8)
    seen = x.astype(dtype).astype(jnp.float32)
    hooks = {f"{n}/kernel": [[[seen]]] for n in "qkv"} | {"out/kernel": [[[h]]]}
    # The compiler may keep what a bfloat16 value had before it was rounded.
    tol = 2e-5 if dtype == jnp.float32 else 2e-2
    stats = check(module.apply, params, (x,), hooks, tol)
    assert same_activation(stats, "q/kernel", "k/kernel", "v/kernel")
    assert stats["out/kernel"][0].site.axes == ((), (), (0, 1), (2,))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8, use_bias=False, name="d")(x)), None


class Scanned(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        stack = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_linen_scan(remat):
    module = Scanned(remat)
    params = module.init(jax.random.key(0), X)
    w = params["params"]["layers"]["d"]["kernel"]
    stats = check(
        jax.jit(module.apply),
        params,
        (X,),
        {"layers/d/kernel": [layers(jnp.tanh, w, X)]},
        statistics=ALL,
    )
    site = stats["layers/d/kernel"][0].site
    assert site.matrix == (3, 1, 8, 8) and site.axes == ((0,), (), (1,), (2,))
    assert [(x.length, x.sliced) for x in site.loops] == [(3, True)]
    np.testing.assert_array_equal(site.to_matrix(w)[:, 0], w)


def test_nnx_scan_and_split():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return nnx.Linear(8, 8, use_bias=False, rngs=rngs)

            self.first = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return jnp.tanh(layer(x))

            return run(self.first(x), self.layers)

    graphdef, state = nnx.split(Stack(nnx.Rngs(0)))
    pure = nnx.to_pure_dict(state)
    hooks = {
        "first/kernel": [[[X]]],
        "layers/kernel": [
            layers(jnp.tanh, pure["layers"]["kernel"], X @ pure["first"]["kernel"])
        ],
    }
    check(lambda s, x: nnx.merge(graphdef, s)(x), state, (X,), hooks)


def by_scan(p, x):
    return lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=3)[0]


def by_fori_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)


def by_while(p, x):
    def step(state):
        return state[0] + 1, jnp.tanh(state[1] @ p["w"])

    return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]


@pytest.mark.parametrize("fn", [by_scan, by_fori_loop, by_while])
def test_one_layer_many_times(fn):
    w = normal(8, 8) * 0.3
    rows = np.concatenate([x[0] for x in layers(jnp.tanh, [w] * 3, X)])
    stats = check(fn, {"w": w}, (X,), {"w": [[[rows]]]}, statistics=ALL)
    assert stats["w"][0].site.times == (None if fn is by_while else 3)


def test_loops_in_loops():
    """A stack used by an outer loop, and in each round a shared matrix twice."""
    p = {"a": normal(3, 8, 8) * 0.3, "b": normal(8, 8) * 0.3}

    def fn(p, x):
        def outer(x, a):
            def inner(i, x):
                return jnp.tanh(x @ p["b"] + x @ a)

            return lax.fori_loop(0, 2, inner, x), None

        return lax.scan(outer, x, p["a"])[0]

    seen, x = [], X
    for a in p["a"]:
        seen.append([])
        for _ in range(2):
            seen[-1].append(x)
            x = jnp.tanh(x @ p["b"] + x @ a)
    stacked = [[np.concatenate(rows)] for rows in seen]
    together = [[np.concatenate([r for rows in seen for r in rows])]]
    check(fn, p, (X,), {"a": [stacked], "b": [together]}, statistics=ALL)


@pytest.mark.parametrize("taken", [0, 1])
def test_branch_that_is_not_taken(taken):
    p = {"a": normal(8, 4), "b": normal(8, 4)}

    def fn(p, x, i):
        return lax.switch(i, [lambda x: x @ p["a"], lambda x: x @ p["b"]], x)

    none = np.zeros((0, 8))
    hooks = {n: [[[X if i == taken else none]]] for i, n in enumerate("ab")}
    check(fn, p, (X, jnp.int32(taken)), hooks, statistics=ALL)


def test_cond_inside_a_scan_counts_the_layers_that_ran():
    p = {"w": normal(3, 8, 8)}

    def fn(p, x):
        def step(carry, w):
            i, x = carry
            x = lax.cond(i != 1, lambda x: jnp.tanh(x @ w), lambda x: x, x)
            return (i + 1, x), None

        return lax.scan(step, (0, x), p["w"])[0][1]

    last = jnp.tanh(X @ p["w"][0])
    check(fn, p, (X,), {"w": [[[X], [np.zeros((0, 8))], [last]]]})


def test_tied_embedding():
    tokens = jnp.arange(10).reshape(2, 5) % 7
    p = {"table": normal(7, 8)}

    def fn(p, tokens):
        return jnp.tanh(p["table"][tokens]) @ p["table"].T

    stats = check(fn, p, (tokens,), {"table": [[[jnp.tanh(p["table"][tokens])]]]})
    assert stats.untraced == {"table": ("gather",)}
    assert stats["table"][0].site.axes == ((), (), (1,), (0,))


@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (1, {"window_strides": (2, 2), "padding": "SAME"}),
        (1, {"window_strides": (1, 1), "padding": "VALID"}),
        (1, {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)}),
        (
            1,
            {
                "window_strides": (1, 2),
                "padding": ((1, 0), (0, 2)),
                "lhs_dilation": (1, 2),
            },
        ),
        (4, {"window_strides": (1, 1), "padding": "VALID"}),
        (8, {"window_strides": (2, 1), "padding": "SAME"}),
    ],
    ids=["stride", "valid", "dilated", "transposed", "grouped", "depthwise"],
)
@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_convolution(groups, options, order):
    """The energy of a change of the weights, from the Gram matrix and from running it."""
    x = normal(2, 7, 6, 8) if order == "NHWC" else normal(2, 8, 7, 6)
    numbers = (order, "HWIO" if order == "NHWC" else "OIHW", order)
    shape = (3, 2, 8 // groups, 16) if order == "NHWC" else (16, 8 // groups, 3, 2)

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], dimension_numbers=numbers, feature_group_count=groups, **options
        )

    p, change = {"w": normal(*shape)}, {"w": normal(*shape)}
    stats = calibration.calibrate(fn, p, [x], statistics=ALL)
    ((site, inputs),) = stats["w"]
    assert site.matrix == (1, groups, 8 // groups * 6, 16 // groups)
    assert stats.untraced == {}
    d = site.to_matrix(change["w"])
    energy = jnp.einsum("sbkn,sbkl,sbln,sb->", d, inputs.gram, d, inputs.count)
    np.testing.assert_allclose(energy, jnp.sum(fn(change, x) ** 2), rtol=1e-5)
    # Means are linear: the mean output is the mean input times the weights.
    axes = (0, 1, 2) if order == "NHWC" else (0, 2, 3)
    mean = jnp.einsum("sbk,sbkn->bn", inputs.mean, site.to_matrix(p["w"])).ravel()
    np.testing.assert_allclose(mean, fn(p, x).mean(axes), atol=1e-5)
    diagonal = jnp.diagonal(inputs.gram, axis1=-2, axis2=-1)
    np.testing.assert_allclose(inputs.square, diagonal, rtol=1e-5)
    np.testing.assert_allclose(
        inputs.variance, diagonal - inputs.mean**2, rtol=1e-4, atol=1e-5
    )
    assert site.from_matrix(d, p["w"]).tolist() == change["w"].tolist()


def moe(p, x):
    gate = jax.nn.softmax(x @ p["router"])
    routed = jnp.einsum("td,te->etd", x, (gate > 0.25).astype(x.dtype))
    h = jax.nn.silu(jnp.einsum("etd,edf->etf", routed, p["w1"]))
    return jnp.einsum("etf,efd,te->td", h, p["w2"], gate)


def test_experts_by_einsum():
    p = {"router": normal(8, 4), "w1": normal(4, 8, 6), "w2": normal(4, 6, 8)}
    gate = jax.nn.softmax(X @ p["router"])
    routed = jnp.einsum("td,te->etd", X, (gate > 0.25).astype(X.dtype))
    h = jax.nn.silu(jnp.einsum("etd,edf->etf", routed, p["w1"]))
    weighted = jnp.einsum("etf,te->etf", h, gate)
    # Experts that are summed over: one matrix for all, or one for each.
    joint = jnp.concatenate(list(weighted), -1)
    alone = {"router": [[[X]]], "w1": [[list(routed)]]}
    stats = calibration.calibrate(moe, p, [X], statistics=("gram",))
    site, inputs = stats["w2"][0]
    d = site.to_matrix(p["w2"])[0, 0]
    energy = jnp.einsum("kn,kl,ln->", d, inputs.gram[0, 0], d) * inputs.count[0, 0]
    np.testing.assert_allclose(energy, jnp.sum(moe(p, X) ** 2), rtol=1e-4)
    assert site.matrix == (1, 1, 24, 8) and joint.shape == (5, 24)
    hooks = {**alone, "w2": [[list(weighted)]]}
    check(moe, p, (X,), hooks, batch_axes={"w2": 0})


def test_empty_slots_of_experts_are_no_rows():
    """Counts are those of the router; means are over the tokens that were routed."""
    p = {"router": normal(8, 4), "w1": normal(4, 8, 6), "w2": normal(4, 6, 8)}
    sent = np.asarray(jax.nn.softmax(X @ p["router"]) > 0.25)  # [tokens, experts]
    stats = calibration.calibrate(
        moe, p, [X], statistics=ALL, empty_rows="w1", where="w1"
    )
    ((site, inputs),) = stats["w1"]
    assert site.path == "w1" and 0 < sent.sum() < sent.size
    wanted = expected([[X[sent[:, e]] for e in range(4)]])
    for a, b in zip(inputs, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert inputs.count[0].tolist() == sent.sum(0).tolist()


def test_ragged_product():
    p = {"w1": normal(4, 8, 6), "w2": normal(4, 6, 8)}
    sizes = jnp.array([1, 2, 0, 1])  # and the last row is of no group

    def fn(p, x, sizes):
        h = jax.nn.silu(lax.ragged_dot(x, p["w1"], sizes))
        return lax.ragged_dot(h, p["w2"], sizes)

    h = jax.nn.silu(lax.ragged_dot(X, p["w1"], sizes))
    cut = [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 4)]
    hooks = {"w1": [[[X[c] for c in cut]]], "w2": [[[h[c] for c in cut]]]}
    check(fn, p, (X, sizes), hooks, statistics=ALL)


def test_empty_rows_of_a_ragged_product():
    params, x = {"w": normal(2, 8, 6)}, X.at[1].set(0)
    sizes = jnp.array([2, len(X) - 2])

    def fn(p, x):
        return lax.ragged_dot(x, p["w"], sizes)

    (use,) = calibration.calibrate(fn, params, [x], empty_rows="w")["w"]
    assert use.inputs.count[0].tolist() == [1, len(X) - 2]
    np.testing.assert_allclose(use.inputs.square[0, 0], X[0] ** 2, rtol=1e-6)


def test_fused_projection_split_on_the_parameter():
    p = {"qkv": normal(8, 24)}

    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        return jnp.tanh(jnp.tanh(x @ q) @ k) @ v

    x2 = jnp.tanh(X @ p["qkv"][:, :8])
    x3 = jnp.tanh(x2 @ p["qkv"][:, 8:16])
    stats = check(fn, p, (X,), {"qkv": [[[X]], [[x2]], [[x3]]]})
    leaf = p["qkv"]
    for i, use in enumerate(stats["qkv"]):
        assert not use.site.whole
        np.testing.assert_array_equal(
            use.site.to_matrix(leaf)[0, 0], p["qkv"][:, 8 * i : 8 * i + 8]
        )
        leaf = use.site.from_matrix(jnp.full((1, 1, 8, 8), float(i)), leaf)
    np.testing.assert_array_equal(leaf[0], np.repeat(np.arange(3.0), 8))


def test_layers_picked_from_a_stack():
    p = {"w": normal(3, 8, 8)}
    hooks = layers(jnp.tanh, p["w"], X)

    def by_number(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i])
        return x

    def by_traced_number(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    stats = check(by_number, p, (X,), {"w": [[h] for h in hooks]})
    assert [use.site.offset for use in stats["w"]] == [0, 64, 128]
    stats = check(by_traced_number, p, (X,), {"w": [hooks]})
    np.testing.assert_array_equal(stats["w"][0].site.to_matrix(p["w"])[:, 0], p["w"])


def test_vmapped_parameters():
    p, x = {"w": normal(3, 8, 8)}, normal(3, 5, 8)
    fn = jax.vmap(lambda p, x: jnp.tanh(x @ p["w"]))
    check(fn, p, (x,), {"w": [[list(x)]]})


def test_fused_gate_and_up():
    p = {"gu": normal(8, 2, 6), "down": normal(6, 8)}

    def fn(p, x):
        gate, up = jnp.einsum("td,dcf->ctf", x, p["gu"])
        return (jax.nn.silu(gate) * up) @ p["down"]

    h = jax.nn.silu(X @ p["gu"][:, 0]) * (X @ p["gu"][:, 1])
    check(fn, p, (X,), {"gu": [[[X]]], "down": [[[h]]]})


def test_lora_beside_and_merged():
    p = {"w": normal(8, 8), "a": normal(8, 2), "b": normal(2, 8)}
    hooks = {"w": [[[X]]], "a": [[[X]]], "b": [[[X @ p["a"]]]]}
    stats = check(lambda p, x: x @ p["w"] + x @ p["a"] @ p["b"], p, (X,), hooks)
    assert same_activation(stats, "w", "a")
    stats = check(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), p, (X,), {"w": [[[X]]]})
    assert stats["w"][0].site.wraps == ("add",)
    assert stats.untraced == dict.fromkeys("ab", ("dot_general with another leaf",))


def test_elementwise_wraps():
    mask = jnp.arange(64).reshape(8, 8) % 2 == 0
    p = {
        "masked": normal(8, 8), "where": normal(8, 8), "scale": jnp.ones(8),
        "int8": jnp.arange(64, dtype=jnp.int8).reshape(8, 8), "square": normal(8, 8),
    }  # fmt: skip

    def fn(p, x):
        x = x @ (p["masked"] * mask)
        x = jnp.tanh(x @ jnp.where(mask, p["where"], 0))
        x = jnp.tanh(x @ (p["int8"].astype(jnp.float32) * p["scale"]))
        return x @ (p["square"] * p["square"])

    x1 = X @ (p["masked"] * mask)
    x2 = jnp.tanh(x1 @ jnp.where(mask, p["where"], 0))
    x3 = jnp.tanh(x2 @ p["int8"].astype(jnp.float32))
    hooks = {"masked": [[[X]]], "where": [[[x1]]], "int8": [[[x2]]], "square": [[[x3]]]}
    stats = check(fn, p, (X,), hooks)
    wraps = {n: stats[n][0].site.wraps for n in stats}
    assert wraps == {
        "masked": ("mul",), "where": ("select_n",), "int8": ("mul",), "square": ("mul",)
    }  # fmt: skip
    assert stats.untraced == {"scale": ("mul",)}


def test_positions_added_to_activations_are_not_followed():
    p = {"pos": normal(5, 8), "w": normal(8, 4)}
    stats = check(
        lambda p, x: (x + p["pos"]) @ p["w"], p, (X,), {"w": [[[X + p["pos"]]]]}
    )
    assert stats.untraced == {"pos": ("add with an activation",)}


def test_stacked_and_concatenated_leaves():
    p = {n: normal(8, 8) for n in "abcdef"}

    def fn(p, x):
        stack = jnp.stack([p["a"], p["b"]])
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]
        x = x @ jnp.concatenate([p["c"], p["d"]], 1)
        return x @ jnp.concatenate([p["e"].T, p["f"]], 0)

    (xa,), (xb,) = layers(jnp.tanh, [p["a"], p["b"]], X)
    xc = jnp.tanh(xb @ p["b"])
    wide = jnp.concatenate([xc @ p["c"], xc @ p["d"]], 1)
    rows = {"a": xa, "b": xb, "c": xc, "d": xc, "e": wide[:, :8], "f": wide[:, 8:]}
    stats = check(fn, p, (X,), {n: [[[x]]] for n, x in rows.items()})
    assert same_activation(stats, "c", "d") and same_activation(stats, "a", "b")
    np.testing.assert_array_equal(stats["e"][0].site.to_matrix(p["e"])[0, 0], p["e"].T)


def test_functions_with_derivatives_of_their_own():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy, kept[1]))

    @jax.custom_jvp
    def other(x, w):
        return jnp.tanh(x @ w)

    other.defjvp(lambda primals, tangents: (other(*primals), tangents[0]))
    p = {"a": normal(8, 8), "b": normal(8, 8), "c": normal(8, 8)}

    def fn(p, x):
        x = jax.checkpoint(lambda x, w: jax.nn.relu(x @ w))(x, p["c"])
        return other(product(x, p["a"]), p["b"])

    h = jax.nn.relu(X @ p["c"])
    check(fn, p, (X,), {"a": [[[h]]], "b": [[[h @ p["a"]]]], "c": [[[X]]]})


def test_what_is_not_traced_is_reported():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    names = "gather shard pallas unused carry out twice noise".split()
    p = {n: normal(8, 8) for n in names}

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(p, x, noise):
        y = jnp.einsum("td,tdf->tf", x, p["gather"].reshape(2, 4, 8)[jnp.arange(8) % 2]
                       .repeat(2, 1))  # fmt: skip
        y = jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")
        )(y, p["shard"])
        shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        y = pl.pallas_call(kernel, out_shape=shape, interpret=True)(y, p["pallas"])
        y = y @ lax.fori_loop(0, 2, lambda i, w: w * 2, p["carry"])
        return y @ p["twice"] @ p["twice"] @ (p["noise"] + noise), p["out"]

    stats = calibration.calibrate(fn, p, [(normal(8, 8), normal(8, 8))])
    assert stats.paths == ("twice",) and len(stats["twice"]) == 2
    assert stats.untraced == {
        "carry": ("the carry of a scan",),
        "gather": ("gather",),
        "noise": ("add with an activation",),
        "out": ("the output",),
        "pallas": ("pallas_call",),
        "shard": ("shard_map",),
        "unused": ("not used",),
    }
    with pytest.raises(KeyError, match="shard has no site: it is used by shard_map"):
        stats["shard"]
    with pytest.raises(KeyError, match="lost has no site: the leaves are twice"):
        stats["lost"]


def test_a_rule_for_a_primitive():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...].T

    def fn(p, x):
        shape = jax.ShapeDtypeStruct((5, 4), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])

    def rule(params, x, w):
        assert x.shape == (5, 8) and w.shape == (4, 8)
        return [tracing.Contraction(leaf=1, x=0, leaf_axes=(1,), x_axes=(1,))]

    p = {"w": normal(4, 8)}
    stats = check(fn, p, (X,), {"w": [[[X]]]}, rules={"pallas_call": rule})
    assert stats.untraced == {}
    assert stats["w"][0].site.primitive == "pallas_call"


def sharded_model(p, x):
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return jnp.einsum("td,dhk->thk", x, p["heads"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("layers_spec", "heads_spec"),
    [(P(), P()), (P(None, None, "model"), P(None, "model", None))],
    ids=["data", "data and parameters"],
)
def test_on_a_mesh(kind, layers_spec, heads_spec):
    p = {"layers": normal(2, 8, 8), "heads": normal(8, 4, 2)}
    x = normal(16, 8)
    rows = layers(jnp.tanh, p["layers"], x)
    hooks = {"layers": [rows], "heads": [[[jnp.tanh(rows[1][0] @ p["layers"][1])]]]}
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    if kind == AxisType.Explicit and layers_spec != P():
        # A product must say how its output is sharded where both sides are.
        layers_spec, heads_spec = P(), P(None, "model", None)
    with jax.set_mesh(mesh):
        p = {
            "layers": jax.device_put(p["layers"], NamedSharding(mesh, layers_spec)),
            "heads": jax.device_put(p["heads"], NamedSharding(mesh, heads_spec)),
        }
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        stats = check(sharded_model, p, (x,), hooks)
    for inputs in stats.inputs:
        assert inputs.gram.sharding.is_fully_replicated


def test_an_explicit_mesh_that_arrays_bring_along():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    x = normal(16, 8)
    p = {"w": normal(8, 4)}
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    w = jax.device_put(p["w"], NamedSharding(mesh, P()))
    check(lambda p, x: x @ p["w"], {"w": w}, (placed,), {"w": [[[x]]]})


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float16, jnp.float8_e4m3fn], ids=str)
def test_activations_of_other_types(dtype):
    x = (X * 10).astype(dtype)
    p = {"w": jnp.ones((8, 4), dtype)}

    def fn(p, x):
        return lax.dot(x, p["w"], preferred_element_type=jnp.float32)

    wide = np.asarray(x.astype(jnp.float32))
    check(fn, p, (x,), {"w": [[[wide]]]}, statistics=("square", "gram"))


def test_sites_cost_no_run():
    def fn(p, x):
        return x @ p["w"]

    shapes = {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((5, 8), jnp.bfloat16)
    (site,) = tracing.sites(fn, shapes, x).sites
    assert site.rows == 5 and site.matrix == (1, 1, 8, 4)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_outputs_stay_the_same(jit):
    p = {"w": normal(3, 8, 8) * 0.3}

    def fn(p, x):
        x, ys = lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["w"])
        return lax.cond(ys[0] > 0, lambda x: x @ p["w"][0], lambda x: x, x)

    closed = jax.make_jaxpr(fn)(p, X)
    trace = tracing.of_jaxpr(closed, p)
    taps = {
        i: tracing.Tap(
            r.place, lambda eqn, operands, indices: jnp.sum(operands[0]), jnp.add,
            jax.ShapeDtypeStruct((), jnp.float32), r.loops,
        )
        for i, r in enumerate(trace.readings)
    }  # fmt: skip
    run = functools.partial(tracing.tap, taps=taps)
    if jit:
        run = jax.jit(lambda *args: tracing.tap(closed, args, taps))
        (out,), states = run(p["w"], X)
    else:
        (out,), states = run(closed, [p["w"], X])
    np.testing.assert_allclose(out, fn(p, X), rtol=1e-5, atol=1e-6)
    seen = [rows[0].sum() for rows in layers(jnp.tanh, p["w"], X)]
    np.testing.assert_allclose(states[0], seen, rtol=1e-4, atol=1e-5)
