"""Models written as plain functions: every group found, and shrunk equal to masked."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, E, H, KV, D, F, V, X = 2, 5, 16, 4, 2, 8, 24, 11, 4
KEYS = iter(jax.random.split(jax.random.key(0), 1000))
MODELS = {}


def model(**kinds):
    """Registers `() -> (fn, params, *args)` with how many groups of each kind it has."""

    def register(build):
        MODELS[build.__name__] = build, kinds
        return build

    return register


def normal(*shape):
    return 0.4 * jax.random.normal(next(KEYS), shape)


def conv(x, kernel, groups=1, stride=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def rms(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(
        x.var(-1, keepdims=True) + 1e-6
    ) * scale + bias


def angles(x):
    d = x.shape[-1]
    frequencies = 1.0 / 10000 ** (jnp.arange(0, d, 2) / d)
    t = jnp.arange(x.shape[1])[:, None] * frequencies
    return jnp.cos(t)[None, :, None], jnp.sin(t)[None, :, None]


def rope_halves(x):
    (c, s), (a, b) = angles(x), jnp.split(x, 2, -1)
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def rope_pairs(x):
    (c, s), a, b = angles(x), x[..., ::2], x[..., 1::2]
    return jnp.stack([a * c - b * s, b * c + a * s], -1).reshape(x.shape)


def attend(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)


def llama_layer(p, x, rope=rope_halves):
    h = rms(x, p["n1"])
    q, k, v = ((h @ p[n]).reshape(B, T, -1, D) for n in ("wq", "wk", "wv"))
    k, v = (jnp.repeat(y, H // KV, axis=2) for y in (rope(k), v))
    x = x + attend(rope(q), k, v).reshape(B, T, H * D) @ p["wo"]
    h = rms(x, p["n2"])
    return x + (jax.nn.silu(h @ p["wg"]) * (h @ p["wu"])) @ p["wd"]


def llama_params(*layers):
    sizes = {
        "n1": (E,), "n2": (E,), "wq": (E, H * D), "wk": (E, KV * D), "wv": (E, KV * D),
        "wo": (H * D, E), "wg": (E, F), "wu": (E, F), "wd": (F, E),
    }  # fmt: skip
    return {n: normal(*layers, *s) + (n[0] == "n") for n, s in sizes.items()}


IDS = jax.random.randint(jax.random.key(1), (B, T), 0, V)


@model(neuron=2)
def mlp():
    def fn(p, x):
        h = jax.nn.gelu(x @ p["w1"] + p["b1"])
        return jax.nn.sigmoid(h @ p["w2"] + p["b2"]) @ p["w3"]

    sizes = {"w1": (8, 16), "b1": (16,), "w2": (16, 12), "b2": (12,), "w3": (12, 3)}
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(4, 8)


@model(embedding=1, neuron=2, kv_group=2, head=2, head_dim=4)
def llama_tied():
    def fn(p, ids):
        x = p["emb"][ids]
        for layer in p["layers"]:
            x = llama_layer(layer, x)
        return rms(x, p["nf"]) @ p["emb"].T

    layers = [llama_params(), llama_params()]
    return fn, {"emb": normal(V, E), "nf": 1 + normal(E), "layers": layers}, IDS


@model(neuron=1, kv_group=1, head=1, head_dim=2)
def llama_rope_pairs():
    return lambda p, x: llama_layer(p, x, rope_pairs), llama_params(), normal(B, T, E)


@model(embedding=1, neuron=1, kv_group=1, head=1, head_dim=2, layer=1)
def llama_scanned():
    def fn(p, ids):
        def step(x, layer):
            return jax.checkpoint(llama_layer)(layer, x), None

        x, _ = lax.scan(step, p["emb"][ids], p["layers"])
        return rms(x, p["nf"]) @ p["emb"].T

    return (
        fn,
        {"emb": normal(V, E), "nf": 1 + normal(E), "layers": llama_params(3)},
        IDS,
    )


@model(embedding=1, head=1, head_dim=1, neuron=1)
def gpt_fused():
    def fn(p, x):
        x = x @ p["win"] + p["pos"]
        h = layer_norm(x, p["g1"], p["b1"])
        q, k, v = jnp.moveaxis((h @ p["qkv"] + p["bias"]).reshape(B, T, 3, H, D), 2, 0)
        x = x + attend(q, k, v).reshape(B, T, -1) @ p["wo"]
        h = layer_norm(x, p["g2"], p["b2"])
        return (x + jax.nn.gelu(h @ p["w1"]) @ p["w2"]) @ p["head"]

    sizes = {
        "win": (6, E), "pos": (T, E), "g1": (E,), "b1": (E,), "qkv": (E, 3 * H * D),
        "bias": (3 * H * D,), "wo": (H * D, E), "g2": (E,), "b2": (E,), "w1": (E, F),
        "w2": (F, E), "head": (E, 3),
    }  # fmt: skip
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, T, 6)


@model(head=1, head_dim=2, rank=2)
def gpt2_split():
    def fn(p, x):
        q, k, v = jnp.split(x @ p["win"] @ p["qkv"], 3, -1)
        q, k, v = (y.reshape(B, T, H, D) for y in (q, k, v))
        return attend(q, k, v).reshape(B, T, H * D) @ p["wo"] @ p["head"]

    sizes = {"win": (6, E), "qkv": (E, 3 * H * D), "wo": (H * D, E), "head": (E, 3)}
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, T, 6)


@model(kv_group=1, head=1, head_dim=2)
def library_attention():
    def fn(p, x):
        q, k, v = ((x @ p[n]).reshape(B, T, -1, D) for n in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return y.reshape(B, T, H * D) @ p["o"]

    sizes = {"q": (E, H * D), "k": (E, KV * D), "v": (E, KV * D), "o": (H * D, 3)}
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, T, E)


@model(expert=1, rank=2, neuron=1)
def moe_soft():
    def fn(p, x):
        x = x @ p["win"]
        gates = jax.nn.softmax(x @ p["router"], -1)
        h = jax.nn.relu(jnp.einsum("bte,xef->btxf", x, p["w1"]))
        return jnp.einsum("btxf,xfe,btx->bte", h, p["w2"], gates) @ p["head"]

    return fn, moe_params(), normal(B, T, 6)


def moe_params():
    sizes = {
        "win": (6, E), "router": (E, X), "w1": (X, E, F), "w2": (X, F, E), "head": (E, 3),
    }  # fmt: skip
    return {n: normal(*s) for n, s in sizes.items()}


@model(neuron=1)
def gru():
    def fn(p, x):
        def cell(h, xt):
            z, r, n = jnp.split(xt @ p["wi"] + h @ p["wh"], 3, -1)
            z, r = jax.nn.sigmoid(z), jax.nn.sigmoid(r)
            return (1 - z) * jnp.tanh(n * r) + z * h, None

        h, _ = lax.scan(cell, jnp.zeros((len(x), 8)), x.swapaxes(0, 1))
        return h @ p["wo"]

    return (
        fn,
        {"wi": normal(6, 24), "wh": normal(8, 24), "wo": normal(8, 3)},
        normal(B, T, 6),
    )


@model(neuron=1)
def lstm():
    def fn(p, x):
        def cell(state, xt):
            h, c = state
            i, f, g, o = jnp.split(xt @ p["wi"] + h @ p["wh"] + p["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((len(x), 8))
        _, y = lax.scan(cell, (zeros, zeros), x.swapaxes(0, 1))
        return y @ p["wo"]

    sizes = {"wi": (6, 32), "wh": (8, 32), "b": (32,), "wo": (8, 3)}
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, T, 6)


@model(channel=1, neuron=1)
def mamba():
    def fn(p, x):
        u, z = x @ p["x"], x @ p["z"]
        u = lax.conv_general_dilated(
            u, p["conv"], (1,), [(2, 0)], feature_group_count=8,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        u = jax.nn.silu(u)
        step = jax.nn.softplus(u @ p["dt"] + p["dt_bias"])

        def scan(h, t):
            u, dt, b, c = t
            h = jnp.exp(-dt[..., None] * jnp.exp(p["A"])) * h
            h += (dt * u)[..., None] * b[:, None]
            return h, (h * c[:, None]).sum(-1)

        inputs = [y.swapaxes(0, 1) for y in (u, step, u @ p["B"], u @ p["C"])]
        _, y = lax.scan(scan, jnp.zeros((B, 8, 4)), inputs)
        return ((y.swapaxes(0, 1) + u * p["D"]) * jax.nn.silu(z)) @ p["out"]

    sizes = {
        "x": (6, 8), "z": (6, 8), "conv": (3, 1, 8), "dt": (8, 8), "dt_bias": (8,),
        "A": (8, 4), "B": (8, 4), "C": (8, 4), "D": (8,), "out": (8, 6),
    }  # fmt: skip
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, T, 6)


@model(channel=3)
def resnet_padded_shortcut():
    def fn(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        short = jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 6)))
        return jax.nn.relu(conv(h, p["b"], stride=2) + short).mean((1, 2)) @ p["w"]

    params = {"a": normal(3, 3, 3, 8), "b": normal(3, 3, 8, 16), "w": normal(16, 3)}
    return fn, params, normal(B, 8, 8, 3)


@model(channel=5)
def shufflenet_v2():
    def shuffle(x):
        b, h, w, c = x.shape
        return x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)

    def fn(p, x):
        x = conv(x, p["stem"])
        for u in p["units"]:
            a, b = jnp.split(x, 2, -1)
            b = conv(jax.nn.relu(conv(b, u["p1"])), u["dw"], 8)
            x = shuffle(jnp.concatenate([a, jax.nn.relu(conv(b, u["p2"]))], -1))
        return x.mean((1, 2)) @ p["w"]

    def unit():
        return {
            "p1": normal(1, 1, 8, 8),
            "dw": normal(3, 3, 1, 8),
            "p2": normal(1, 1, 8, 8),
        }

    params = {
        "stem": normal(1, 1, 3, 16),
        "units": [unit(), unit()],
        "w": normal(16, 3),
    }
    return fn, params, normal(B, 4, 4, 3)


@model(embedding=1, rank=1, head=1, head_dim=1, row=1)
def swin_block():
    index = np.random.default_rng(0).integers(0, 9, (4, 4))

    def fn(p, x):
        x = x @ p["emb"]
        b, h, w, c = x.shape
        skip, x = (
            x,
            jnp.roll((x - x.mean(-1, keepdims=True)) * p["g"], (-1, -1), (1, 2)),
        )
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        q, k, v = (
            (x.reshape(-1, 4, c) @ p["qkv"])
            .reshape(-1, 4, 3, 4, 4)
            .transpose(2, 0, 3, 1, 4)
        )
        a = q @ k.swapaxes(-1, -2) + p["relative"][index].transpose(2, 0, 1)
        o = (jax.nn.softmax(a, -1) @ v).swapaxes(1, 2).reshape(-1, 4, 16) @ p["o"]
        o = o.reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        x = skip + jnp.roll(o.reshape(b, h, w, c), (1, 1), (1, 2))
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        merged = jnp.concatenate(parts, -1) * p["scale"] @ p["merge"]
        return merged.mean((1, 2)) @ p["w"]

    sizes = {
        "emb": (3, 16), "g": (16,), "qkv": (16, 48), "relative": (9, 4), "o": (16, 16),
        "scale": (64,), "merge": (64, 32), "w": (32, 3),
    }  # fmt: skip
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, 4, 4, 3)


@model(channel=3, rank=1)
def unet_film():
    def fn(p, x):
        a = jax.nn.relu(conv(x, p["c1"]))
        b = jax.nn.relu(conv(a[:, ::2, ::2], p["c2"]))
        u = jnp.concatenate([jnp.repeat(jnp.repeat(b, 2, 1), 2, 2), a], -1)
        scale, shift = jnp.split(jax.nn.silu(p["t"]) @ p["tw"], 2)
        return conv(jax.nn.relu(conv(u, p["c3"]) * (1 + scale) + shift), p["c4"])

    sizes = {
        "c1": (3, 3, 3, 8), "c2": (3, 3, 8, 12), "c3": (3, 3, 20, 8), "t": (6,),
        "tw": (6, 16), "c4": (3, 3, 8, 3),
    }  # fmt: skip
    return fn, {n: normal(*s) for n, s in sizes.items()}, normal(B, 8, 8, 3)


@model(channel=3, rank=2)
def transposed_shuffled_dropout():
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        x = lax.conv_transpose(x, p["k1"], (2, 2), "SAME", dimension_numbers=numbers)
        x = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.9, x.shape), x, 0)
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, c // 2).swapaxes(-1, -2).reshape(b, h, w, c)
        x = jax.image.resize(conv(x, p["k2"]), (b, 4, 4, 6), "bilinear")
        x = (
            x.reshape(b, 2, 2, 2, 2, -1)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, 2, 2, -1)
        )
        return jax.vmap(lambda t: t.mean((0, 1)) @ p["w"])(x)

    params = {"k1": normal(3, 3, 3, 8), "k2": normal(3, 3, 8, 6), "w": normal(24, 5)}
    return fn, params, normal(B, 4, 4, 3)


@model(channel=2)
def linear_view_conv():
    def fn(p, x):
        x = jax.nn.relu(x @ p["l"]).reshape(-1, 4, 4, 16)
        return conv(x, p["k"]).reshape(len(x), -1) @ p["w"]

    params = {"l": normal(5, 256), "k": normal(3, 3, 16, 8), "w": normal(128, 3)}
    return fn, params, normal(B, 5)


def small(fn, *shapes, x=(5, 4)):
    return fn, {n: normal(*s) for n, s in zip("abcd", shapes, strict=False)}, normal(*x)


@model(rank=1, neuron=1)
def lora():
    def fn(p, x):
        return jax.nn.relu(x @ (p["a"] + p["b"] @ p["c"])) @ p["d"]

    return small(fn, (4, 8), (4, 2), (2, 8), (8, 3))


@model(rank=1)
def bilinear_pooling():
    def fn(p, x):
        h = x @ p["a"]
        return jnp.einsum("bi,bj->bij", h, h).reshape(5, -1) @ p["b"]

    return small(fn, (4, 6), (36, 3))


@model(neuron=1, expert=1)
def ensemble():
    def one(q, x):
        return jax.nn.relu(x @ q["a"]) @ q["b"]

    return small(
        lambda p, x: jax.vmap(one, (0, None))(p, x).mean(0), (5, 4, 8), (5, 8, 3)
    )


@model(neuron=1)
def softmax_over_units():
    return small(lambda p, x: jax.nn.softmax(x @ p["a"], -1) @ p["b"], (4, 8), (8, 3))


@model(neuron=1)
def sum_of_sigmoids():
    return small(lambda p, x: jax.nn.sigmoid(x @ p["a"]).sum(-1), (4, 12))


@model(neuron=1)
def constant_of_the_size():
    scale = jnp.arange(8.0)
    return small(lambda p, x: jnp.tanh(x @ p["a"]) * scale @ p["b"], (4, 8), (8, 3))


@model(neuron=1)
def branches():
    def fn(p, x):
        return lax.cond(x.sum() > 0, jnp.tanh, lambda h: h * 2, x @ p["a"]) @ p["b"]

    return small(fn, (4, 8), (8, 3))


@model(neuron=1)
def loop():
    def fn(p, x):
        steps = 3 + x.astype(int).sum() * 0
        h = lax.fori_loop(0, steps, lambda _, h: jnp.tanh(h @ p["b"]), x @ p["a"])
        return h @ p["c"]

    return small(fn, (4, 8), (8, 8), (8, 3))


@model(rank=2)
def ragged():
    sizes = jnp.array([2, 3], jnp.int32)

    def fn(p, x):
        return lax.ragged_dot(x @ p["a"], p["b"], sizes) @ p["c"]

    return small(fn, (4, 6), (2, 6, 8), (8, 3))


@model(row=1, rank=1)
def constant_permutation():
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    return small(lambda p, x: (x @ p["a"])[:, order] @ p["b"], (4, 8), (8, 3))


@model(neuron=1)
def quantized():
    def fn(p, x):
        return jax.nn.relu(x @ (p["q"].astype(jnp.float32) * p["scale"])) @ p["b"]

    q = jnp.round(50 * normal(4, 8)).astype(jnp.int8)
    return fn, {"q": q, "scale": jnp.abs(normal(8)), "b": normal(8, 3)}, normal(5, 4)


@model(rank=1)
def scattered_rows():
    return small(lambda p, x: (x @ p["a"]).at[2].set(1.0) @ p["b"], (4, 8), (8, 3))


@pytest.mark.parametrize("name", MODELS)
def test_shrunk_equals_masked(name, check):
    build, kinds = MODELS[name]
    fn, params, *args = build()
    graph = check(fn, params, *args)
    assert not graph.unknown
    assert collections.Counter(g.kind for g in graph.groups) == kinds
    assert all(not g.notes for g in graph.groups if g.kind != "layer")


@pytest.mark.parametrize("name", ["mlp", "llama_scanned", "moe_soft", "lstm"])
def test_each_group_by_itself(name, check):
    fn, params, *args = MODELS[name][0]()
    check(fn, params, *args, each=True)


@pytest.mark.parametrize("name", ["llama_scanned", "gpt_fused", "gru", "moe_soft"])
def test_gradients_are_those_of_the_masked_function(name, half):
    """In float64, where sums in another order cannot hide anything."""
    with jax.enable_x64(True):
        fn, params, *args = jax.tree.map(_doubled, MODELS[name][0]())
        plan = half(jp.structured.trace(fn, params, *args))
        small_fn = plan.rewrite(fn)

        def loss(f):
            return lambda p: jnp.sum(jnp.sin(f(p, *args)))

        found = jax.grad(loss(small_fn))(plan.shrink(params))
        masked = jax.grad(lambda p: loss(fn)(plan.mask(p)))(params)
        for a, b in zip(
            jax.tree.leaves(found), jax.tree.leaves(plan.shrink(masked)), strict=True
        ):
            assert a.dtype == b.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def _doubled(x):
    is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(x, jnp.float64) if is_float else x
