"""Users' own modules at the sizes of a plan: NNX attributes, linen interception."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))
SEQUENCES = jax.random.normal(KEY, (2, 5, 7))
IDS = jax.random.randint(KEY, (2, 5), 0, 11)


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.norms = nnx.List(
            [nnx.LayerNorm(16, rngs=rngs), nnx.RMSNorm(16, rngs=rngs)]
        )
        self.attention = nnx.MultiHeadAttention(
            4, 16, num_kv_heads=2, decode=False, rngs=rngs
        )
        self.up = nnx.LinearGeneral(16, (4, 8), rngs=rngs)
        self.down = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)
        self.mix = nnx.Einsum("btc,cd->btd", (16, 16), (16,), rngs=rngs)
        self.lora = nnx.LoRALinear(16, 16, lora_rank=4, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.embed.attend(self.lora(nnx.tanh(self.mix(x))))


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm2 = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.grouped = nnx.Conv(16, 12, (1, 1), feature_group_count=2, rngs=rngs)
        self.norm3 = nnx.InstanceNorm(12, rngs=rngs)
        self.up = nnx.ConvTranspose(12, 6, (2, 2), (2, 2), rngs=rngs)
        self.up2 = nnx.ConvTranspose(6, 4, (2, 2), transpose_kernel=True, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.depthwise(x)))
        x = nnx.relu(self.norm3(self.grouped(x)))
        return self.head(nnx.relu(self.up2(nnx.relu(self.up(x)))).mean((1, 2)))


class Recurrent(nnx.Module):
    def __init__(self, cell, rngs):
        self.rnn = nnx.RNN(cell(7, 8, rngs=rngs))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.rnn(x)))


NNX = {
    "transformer": (Transformer, IDS),
    "conv_net": (ConvNet, IMAGES),
    **{
        cell.__name__: (lambda rngs, cell=cell: Recurrent(cell, rngs), SEQUENCES)
        for cell in (nnx.LSTMCell, nnx.GRUCell)
    },
}


def kinds_kept(graph):
    """All groups but those whose sizes are in constants of a module's code."""
    return [g.name for g in graph.groups if g.kind not in ("head_dim", "row", "layer")]


def traced(model, x):
    graphdef, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    return fn, state, structured.trace(fn, state, x)


@pytest.mark.parametrize("name", NNX)
def test_nnx_modules_at_new_sizes(name, half, random_params):
    make, x = NNX[name]
    model = make(nnx.Rngs(0))
    model.eval()
    nnx.update(model, random_params(nnx.state(model)))
    fn, state, graph = traced(model, x)
    plan = half(graph, kinds_kept(graph))
    before = {"/".join(map(str, p)): dict(vars(m)) for p, m in nnx.iter_graph(model)
              if isinstance(m, nnx.Module)}  # fmt: skip
    small, patch = structured.nnx_module(plan, model, x)
    expected = plan.rewrite(fn, removed="absent")(plan.shrink(state), x)
    np.testing.assert_allclose(small(x), expected, rtol=1e-4, atol=1e-5)
    for path, names in patch.changes.items():
        for attribute, (old, new) in names.items():
            assert before[path][attribute] == old != new
            assert f"{path}: {attribute} {old} -> {new}" in str(patch)
    assert jax.tree.map(jnp.shape, nnx.state(model)) == jax.tree.map(jnp.shape, state)
    if name == "transformer":
        assert patch.changes["attention"] == {
            "num_heads": (4, 1), "num_kv_heads": (2, 1), "qkv_features": (16, 4),
            "in_features": (16, 8), "in_kv_features": (16, 8), "out_features": (16, 8),
        }  # fmt: skip
        assert patch.changes["up"]["out_features"] == ((4, 8), (2, 4))
        assert patch.changes["lora/lora"]["in_features"] == (16, 8)
        assert small.lora.lora.lora_a.shape == (8, 2)
    if name == "conv_net":
        assert patch.changes["norm2"]["num_groups"] == (4, 1)
        assert patch.changes["depthwise"]["feature_group_count"][1] < 8


def test_a_module_trains_at_the_new_sizes(half):
    model = ConvNet(nnx.Rngs(0))
    _, _, graph = traced(model, IMAGES)
    small, _ = structured.nnx_module(half(graph), model, IMAGES)
    grads = nnx.grad(lambda m: jnp.sum(m(IMAGES) ** 2))(small)
    assert grads["conv1"]["kernel"].shape == small.conv1.kernel.shape


def test_nnx_models_that_cannot_be_given_back_are_refused(half):
    model = Transformer(nnx.Rngs(0))
    _, _, graph = traced(model, IDS)
    widths = [g.name for g in graph.groups if g.kind == "head_dim"]
    with pytest.raises(
        ValueError, match="differs .* root of a head's width.* plan.rewrite"
    ):
        structured.nnx_module(half(graph, widths), model, IDS)

    model = Recurrent(nnx.GRUCell, nnx.Rngs(0))
    _, _, graph = traced(model, SEQUENCES)
    with pytest.raises(ValueError, match="dropout draws other numbers"):
        structured.nnx_module(half(graph), model, SEQUENCES)
    small, _ = structured.nnx_module(
        half(graph), model, SEQUENCES, call=lambda m, x: m.head(m.rnn(x))
    )
    assert small.head.in_features == 4

    model = ConvNet(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    graph = structured.trace(
        lambda p, x: nnx.merge(graphdef, p, rest)(x), params, IMAGES
    )
    with pytest.raises(ValueError, match="variable norm1/mean is not in the plan"):
        structured.nnx_module(half(graph), model, IMAGES)
    with pytest.raises(ValueError, match="model: there is no leaf conv1/bias"):
        structured.nnx_module(half(graph), Transformer(nnx.Rngs(0)), IMAGES)

    class Written(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = (
                nnx.Linear(3, 8, rngs=rngs),
                nnx.Linear(4, 3, rngs=rngs),
            )

        def __call__(self, x):
            return self.down(self.up(x).reshape(2, 8, 8, 2, 4).sum(-2))

    model = Written(nnx.Rngs(0))
    _, _, graph = traced(model, IMAGES)
    with pytest.raises(ValueError, match="does not run at the new sizes.*plan.rewrite"):
        structured.nnx_module(half(graph), model, IMAGES)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h)
        h = nn.DenseGeneral((4, 8))(nn.RMSNorm()(x))
        return x + nn.DenseGeneral(16, axis=(-2, -1))(nn.gelu(h)), None


class Language(nn.Module):
    def setup(self):
        self.embed = nn.Embed(11, 16)
        self.blocks = nn.scan(
            nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=2
        )()

    def __call__(self, ids):
        return self.embed.attend(self.blocks(self.embed(ids), None)[0])


class Vision(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(16, (3, 3), feature_group_count=8)(x)
        x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=4)(nn.Conv(8, (1, 1))(x)))
        x = nn.relu(nn.ConvTranspose(6, (2, 2), (2, 2))(x))
        x = nn.relu(nn.ConvTranspose(6, (2, 2), transpose_kernel=True)(x))
        x = nn.tanh(nn.Einsum((6, 5), "nhwc,cd->nhwd")(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Sequence(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(self.cell(8))(x))


LINEN = {
    "language": (Language(), IDS), "vision": (Vision(), IMAGES),
    **{
        cell.__name__: (Sequence(cell), SEQUENCES)
        for cell in (nn.OptimizedLSTMCell, nn.SimpleCell)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_at_new_sizes(name, half, random_params):
    module, x = LINEN[name]
    variables = random_params(module.init(KEY, x))
    graph = structured.trace(module.apply, variables, x)
    plan = half(graph, kinds_kept(graph))
    apply, patch = structured.linen_apply(plan, module, variables, x)
    small = plan.shrink(variables)
    expected = plan.rewrite(module.apply, removed="absent")(small, x)
    np.testing.assert_allclose(apply(small, x), expected, rtol=1e-4, atol=1e-5)
    assert jax.grad(lambda v: apply(v, x).sum())(small).keys() == small.keys()
    if name == "language":
        assert patch.changes["blocks/MultiHeadDotProductAttention_0"] == {
            "num_heads": (4, 2)
        }  # fmt: skip
        assert patch.changes["embed"] == {"features": (16, 8)}
    if name == "vision":
        assert patch.changes["GroupNorm_0"] == {"num_groups": (4, 2)}
        assert patch.changes["GroupNorm_1"] == {"group_size": (4, 2)}
        assert "Conv_0: features 8 -> " in str(patch)


def test_linen_modules_in_training_mode(half):
    module = Vision()
    variables = module.init(KEY, IMAGES)
    plan = half(structured.trace(module.apply, variables, IMAGES))
    apply, _ = structured.linen_apply(
        plan, module, variables, IMAGES, train=True, mutable=["batch_stats"]
    )
    small = plan.shrink(variables)
    _, new = apply(small, IMAGES, train=True, mutable=["batch_stats"])
    assert new["batch_stats"]["BatchNorm_0"]["mean"].shape == (2,)
    assert apply(small, IMAGES).shape == (2, 3)


def test_linen_modules_that_cannot_be_applied_are_refused(half):
    module = Language()
    variables = module.init(KEY, IDS)
    graph = structured.trace(module.apply, variables, IDS)
    widths = [g.name for g in graph.groups if g.kind == "head_dim"]
    with pytest.raises(
        ValueError, match="differs .* root of a head's width.* plan.rewrite"
    ):
        structured.linen_apply(half(graph, widths), module, variables, IDS)
    layers = [g.name for g in graph.groups if g.kind == "layer"]
    with pytest.raises(ValueError, match="does not run at the new sizes.*plan.rewrite"):
        structured.linen_apply(half(graph, layers), module, variables, IDS)
