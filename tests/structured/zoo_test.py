"""More architectures in linen and plain JAX: shrunk equals masked."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))
SEQUENCES = jax.random.normal(KEY, (2, 6, 7))
IDS = jax.random.randint(KEY, (2, 6), 0, 11)
MODELS = {}


def module(x, **kinds):
    """Registers a module with its inputs, and how many groups of each kind it has."""

    def register(cls):
        MODELS[cls.__name__] = cls(), x if isinstance(x, tuple) else (x,), kinds
        return cls

    return register


def norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


@module(IMAGES, channel=4, neuron=1)
class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in (6, 8):
            x = nn.relu(nn.Conv(n, (3, 3))(x))
            x = nn.max_pool(nn.relu(nn.Conv(n, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(nn.relu(nn.Dense(10)(x.reshape(len(x), -1))))


@module(IMAGES, channel=7)
class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        a = nn.relu(nn.Conv(4, (1, 1))(x))
        b = nn.relu(nn.Conv(6, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x))))
        c = nn.relu(nn.Conv(4, (1, 1))(nn.avg_pool(x, (3, 3), padding="SAME")))
        x = norm(jnp.concatenate([a, b, c], -1))
        x = nn.relu(nn.Conv(6, (3, 1))(nn.relu(nn.Conv(6, (1, 3))(x))))
        return nn.Dense(3)(x.mean((1, 2)))


@module(IMAGES, channel=6)
class SqueezeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            s = nn.relu(nn.Conv(4, (1, 1))(x))
            x = jnp.concatenate([nn.Conv(6, (1, 1))(s), nn.Conv(6, (3, 3))(s)], -1)
            x = nn.relu(x)
        return nn.Conv(3, (1, 1))(x).mean((1, 2))


@module(IMAGES, embedding=1, neuron=2)
class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x)
        for i in range(2):
            h = nn.LayerNorm()(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            h = nn.Dense(8)(nn.gelu(nn.Dense(16)(h)))
            x = x + h * self.param(f"scale{i}", nn.initializers.ones, (8,))
        return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


@module(IMAGES, channel=6, neuron=1)
class EfficientNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(norm(nn.Conv(6, (3, 3), (2, 2))(x)))
        for _ in range(2):
            h = nn.silu(norm(nn.Conv(12, (1, 1))(x)))
            h = nn.silu(norm(nn.Conv(12, (3, 3), feature_group_count=12)(h)))
            s = nn.Conv(12, (1, 1))(
                nn.silu(nn.Conv(4, (1, 1))(h.mean((1, 2), keepdims=True)))
            )
            x = x + norm(nn.Conv(6, (1, 1))(h * nn.sigmoid(s)))
        x = nn.silu(norm(nn.Conv(8, (1, 1))(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(5)(x.mean((1, 2)))))


@module(IMAGES, channel=5)
class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3))(x)))
        b = nn.relu(nn.Conv(12, (3, 3), (2, 2))(a))
        u = nn.ConvTranspose(8, (2, 2), (2, 2))(b)
        return nn.Conv(3, (1, 1))(
            nn.relu(nn.Conv(8, (3, 3))(jnp.concatenate([u, a], -1)))
        )


@module(IMAGES, channel=2)
class PixelShuffle(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Conv(16, (3, 3))(x), 0.2)
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        x = nn.tanh(nn.Conv(4, (3, 3))(x.reshape(b, 2 * h, 2 * w, c // 4)))
        return nn.Conv(3, (3, 3), kernel_dilation=2)(x)


@module(SEQUENCES, channel=4)
class WaveNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, skips = nn.Conv(8, (1,))(x), 0
        for d in (1, 2):
            h = nn.Conv(12, (2,), kernel_dilation=d, padding=((d, 0),))(x)
            a, g = jnp.split(h, 2, -1)
            h = jnp.tanh(a) * nn.sigmoid(g)
            skips, x = skips + nn.Conv(5, (1,))(h), x + nn.Conv(8, (1,))(h)
        return nn.Conv(3, (1,))(nn.relu(skips))


@module(SEQUENCES, embedding=1, neuron=2)
class MLPMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        h = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(10)(h))).swapaxes(1, 2)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


def attention(x, y, heads=4, width=16, bias=None):
    def project(x):
        return nn.DenseGeneral((heads, width // heads), use_bias=False)(x)

    s = jnp.einsum("bthd,bshd->bhts", project(x), project(y))
    s = nn.softmax(s if bias is None else s + bias)
    h = jnp.einsum("bhts,bshd->bthd", s, project(y))
    return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False)(h)


@module((IDS, IDS), embedding=1, head=3, head_dim=6, neuron=2, row=1)
class T5(nn.Module):
    @nn.compact
    def __call__(self, source, target):
        table = nn.Embed(11, 16)
        buckets = np.clip(np.arange(6)[:, None] - np.arange(6), -2, 2) + 2

        def feed_forward(x):
            h = nn.RMSNorm()(x)
            gate = nn.gelu(nn.Dense(24, use_bias=False)(h))
            return x + nn.Dense(16)(gate * nn.Dense(24, use_bias=False)(h))

        def relative():
            w = self.param("relative", nn.initializers.normal(), (5, 4))
            return w[buckets].transpose(2, 0, 1)

        x, y = table(source), table(target)
        bias = relative()
        h = nn.RMSNorm()(x)
        x = nn.RMSNorm()(feed_forward(x + attention(h, h, bias=bias)))
        h = nn.RMSNorm()(y)
        y = y + attention(h, h, bias=jnp.where(jnp.tri(6) > 0, 0.0, -1e9))
        y = feed_forward(y + attention(nn.RMSNorm()(y), x))
        return table.attend(nn.RMSNorm()(y) / 4.0)


@module(IDS, embedding=1, head=1, head_dim=2, neuron=1, rank=1, row=3)
class BERT(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16)(ids) + nn.Embed(6, 16)(jnp.arange(6))
        x = nn.LayerNorm()(x + nn.Embed(2, 16)(ids * 0))
        mask = jnp.where(ids[:, None, None] > 2, 0.0, -1e9)
        x = nn.LayerNorm()(x + attention(x, x, bias=mask))
        h = nn.Dense(16)(nn.gelu(nn.Dense(32)(x), approximate=False))
        x = nn.LayerNorm()(x + h)
        return nn.Dense(2)(nn.Dense(9)(x[:, 0]))


@module(IDS, embedding=1, head=1, head_dim=2, neuron=1, row=1)
class ALBERT(nn.Module):
    """The same layer three times: its parameters go round as constants of a scan."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8)(ids)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.LayerNorm()(x + attention(x, x, 2, 8))
                return nn.LayerNorm()(x + nn.Dense(8)(nn.relu(nn.Dense(12)(x)))), None

        shared = nn.scan(
            Layer, variable_broadcast="params", split_rngs={"params": False}, length=3
        )
        x, _ = shared()(x, None)
        return nn.Dense(3)(x)


@module(SEQUENCES, neuron=1, head=1, head_dim=2, rank=2)
class Perceiver(nn.Module):
    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", nn.initializers.normal(), (5, 16))
        z = jnp.tile(latents, (len(x), 1, 1))
        z = nn.LayerNorm()(z + attention(z, nn.Dense(12)(x)))
        return nn.Dense(3)(z.reshape(len(x), -1))


@module(SEQUENCES, head_dim=2, head=1)
class MultiQuery(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((4, 6))(x)
        k, v = nn.Dense(6)(x), nn.Dense(6)(x)
        s = nn.softmax(jnp.einsum("bthd,bsd->bhts", q, k) / np.sqrt(6))
        h = jnp.einsum("bhts,bsd->bthd", s, v)
        return nn.DenseGeneral(3, axis=(-2, -1))(h)


@module(SEQUENCES, neuron=3)
class DeepSets(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8)(nn.relu(nn.Dense(10)(x))))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(h.max(1) + h.sum(1))))


@module(SEQUENCES, neuron=2)
class GraphConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        sender, receiver = (
            np.array([0, 1, 2, 3, 4, 5, 0]),
            np.array([1, 2, 3, 4, 5, 0, 3]),
        )
        for n in (8, 6):
            messages = nn.Dense(n)(x)[:, sender]
            x = nn.relu(jnp.zeros((*x.shape[:2], n)).at[:, receiver].add(messages))
        return nn.Dense(3)(x.mean(1))


@module((SEQUENCES, SEQUENCES), neuron=2)
class Siamese(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        encode = nn.Sequential([nn.Dense(10), nn.relu, nn.Dense(8)])
        a, b = encode(x).mean(1), encode(y).mean(1)
        return (a * b).sum(-1) + jnp.square(a - b).sum(-1)


@module(SEQUENCES, neuron=1, rank=1)
class LinearRecurrence(nn.Module):
    @nn.compact
    def __call__(self, x):
        u = nn.Dense(8)(x)
        decay = jnp.exp(
            -nn.softplus(self.param("decay", nn.initializers.normal(), (8,)))
        )

        def join(a, b):
            return a[0] * b[0], a[1] * b[0] + b[1]

        a = jnp.broadcast_to(decay, u.shape)
        _, h = lax.associative_scan(join, (a, u), axis=1)
        return nn.Dense(3)(nn.gelu(nn.Dense(6)(h)))


@module(SEQUENCES, neuron=2)
class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean, log = jnp.split(nn.Dense(8)(x), 2, -1)
        z = mean + jnp.exp(log / 2) * jax.random.normal(jax.random.key(1), mean.shape)
        return nn.Dense(7)(nn.relu(nn.Dense(10)(z)))


@pytest.mark.parametrize("name", MODELS)
def test_shrunk_equals_masked(name, check, random_params):
    model, inputs, kinds = MODELS[name]
    params = random_params(model.init(KEY, *inputs))
    graph = check(functools.partial(_apply, model), params, *inputs)
    assert not graph.unknown
    assert collections.Counter(g.kind for g in graph.groups) == kinds
    assert not any(g.notes for g in graph.groups)


def _apply(model, variables, *inputs):
    return model.apply(variables, *inputs)
