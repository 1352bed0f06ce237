"""Modules of linen, NNX and Equinox: every group found, and shrunk equal to masked."""

import collections

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))
SEQUENCES = jax.random.normal(KEY, (2, 5, 7))
IDS = jax.random.randint(KEY, (2, 5), 0, 11)


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=4, dropout_rate=0.1, deterministic=not train
        )(h)
        h = nn.gelu(nn.Dense(32)(nn.LayerNorm(use_fast_variance=False)(x)))
        return x + nn.Dense(16)(nn.Dropout(0.1, deterministic=not train)(h))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(), (1, 1, 16))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("position", nn.initializers.normal(0.1), (1, x.shape[1], 16))
        for _ in range(2):
            x = TransformerBlock()(x, train)
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class ResidualBlock(nn.Module):
    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        strides = self.stride, self.stride
        y = nn.relu(norm(nn.Conv(self.channels, (3, 3), strides, use_bias=False)(x)))
        y = norm(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), strides)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))
        x = ResidualBlock(16, 2)(ResidualBlock(8)(nn.relu(x), train), train)
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(
            nn.Conv(16, (3, 3), feature_group_count=16)(nn.Conv(16, (1, 1))(x))
        )
        s = nn.sigmoid(nn.Dense(16)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        x = nn.Conv(24, (3, 3), feature_group_count=4)(x * s[:, None, None, :])
        x = nn.hard_swish(nn.GroupNorm(num_groups=4)(x))
        x = nn.avg_pool(nn.ConvTranspose(8, (2, 2), (2, 2))(x), (2, 2), (2, 2))
        return nn.Dense(5)(x.mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3))(y)], -1)
        a, b = jnp.split(x, 2, -1)
        return nn.Dense(5)((a * nn.sigmoid(b)).mean((1, 2)))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return TransformerBlock()(x), None


class ScannedTransformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True},
            length=3,
        )  # fmt: skip
        x, _ = blocks()(nn.Dense(16)(x), None)
        return nn.Dense(3)(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.GRUCell(6))(nn.RNN(nn.OptimizedLSTMCell(8))(x)))


LINEN = {
    "vit": (ViT(), IMAGES, {"embedding": 1, "neuron": 2, "head": 2, "head_dim": 4}),
    "resnet": (ResNet(), IMAGES, {"channel": 4}),
    "mobilenet": (MobileNet(), IMAGES, {"channel": 4, "neuron": 1}),
    "densenet": (DenseNet(), IMAGES, {"channel": 4}),
    "scanned": (
        ScannedTransformer(),
        SEQUENCES,
        {"embedding": 1, "neuron": 1, "head": 1, "head_dim": 2, "layer": 1},
    ),
    "recurrent": (Recurrent(), SEQUENCES, {"neuron": 2}),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name, check, random_params):
    module, x, kinds = LINEN[name]
    graph = check(module.apply, random_params(module.init(KEY, x)), x)
    assert collections.Counter(g.kind for g in graph.groups) == kinds
    assert all(not g.notes for g in graph.groups if g.kind != "layer")


def test_training_mode_has_the_same_dropout(check, random_params):
    variables = random_params(ViT().init(KEY, IMAGES))

    def fn(variables, x, key):
        return ViT().apply(variables, x, True, rngs={"dropout": key})

    check(fn, variables, IMAGES, jax.random.key(1))


def test_updated_batch_statistics_come_out_smaller(random_params, half):
    from jaxprune import structured

    variables = random_params(ResNet().init(KEY, IMAGES))

    def fn(variables, x):
        return ResNet().apply(variables, x, True, mutable=["batch_stats"])

    def loss(variables, x):
        return fn(variables, x)[0]

    plan = half(structured.trace(loss, variables, IMAGES))
    _, updated = plan.rewrite(fn)(plan.shrink(variables), IMAGES)
    expected = plan.shrink(
        fn(plan.mask(variables), IMAGES)[1] | {"params": variables["params"]}
    )
    for a, b in zip(
        jax.tree.leaves(updated), jax.tree.leaves(expected["batch_stats"]), strict=True
    ):
        assert jnp.allclose(a, b, atol=1e-5)


class NNXBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 32, rngs=rngs)
        self.down = nnx.Linear(32, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(16, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(16, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class NNXConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm2 = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (1, 1), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        y = self.conv2(nnx.relu(self.norm2(self.depthwise(x))))
        return self.head((x + y).mean((1, 2)))


class NNXRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(7, 8, rngs=rngs))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


NNX = {
    "transformer": (
        NNXTransformer,
        IDS,
        {"embedding": 1, "neuron": 2, "head": 2, "head_dim": 4},
    ),
    "conv_net": (NNXConvNet, IMAGES, {"channel": 2}),
    "recurrent": (NNXRecurrent, SEQUENCES, {"neuron": 1}),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name, check, random_params):
    module, x, kinds = NNX[name]
    graphdef, state = nnx.split(module(nnx.Rngs(0)))
    graph = check(lambda s, x: nnx.merge(graphdef, s)(x), random_params(state), x)
    assert collections.Counter(g.kind for g in graph.groups) == kinds
    assert not any(g.notes for g in graph.groups)


def test_equinox(check):
    mlp = eqx.nn.MLP(7, 3, 8, 2, key=KEY)
    params, static = eqx.partition(mlp, eqx.is_array)
    graph = check(
        lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, SEQUENCES[0]
    )
    assert [(g.name, g.kind) for g in graph.groups] == [
        ("layers/0/weight:0", "neuron"), ("layers/1/weight:0", "neuron"),
    ]  # fmt: skip


def test_boxes_of_partitioned_parameters(check):
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Sequential([nn.Dense(8, kernel_init=boxed), nn.relu, nn.Dense(3)])
    variables = module.init(KEY, SEQUENCES)
    graph = check(module.apply, variables, SEQUENCES)
    assert [g.name for g in graph.groups] == ["layers_0/kernel:1"]
