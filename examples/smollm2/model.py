"""SmolLM2 (Ben Allal et al., arXiv 2502.02737), a Llama of 135M parameters, in NNX."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of a Llama; the defaults are those of SmolLM2-135M."""

    vocab: int = 49152
    layers: int = 30
    width: int = 576
    ff: int = 1536
    heads: int = 9
    kv_heads: int = 3  # each serves heads / kv_heads queries
    theta: float = 1e5  # base of the wavelengths of the rotary embedding
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of one layer."""

    key: Float[Array, "b length kv d"]
    value: Float[Array, "b length kv d"]


class Attention(nnx.Module):
    """Causal attention with rotary positions and shared keys and values (GQA)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        inner, shared = config.width, config.kv_heads * config.head_dim
        self.config = config
        self.query = _linear(config.width, inner, rngs)
        self.key = _linear(config.width, shared, rngs)
        self.value = _linear(config.width, shared, rngs)
        self.out = _linear(inner, config.width, rngs)

    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.reshape(x.shape))

    def step(
        self, x: Float[Array, "b 1 w"], cache: Cache, at: Int[Array, ""]
    ) -> tuple[Float[Array, "b 1 w"], Cache]:
        """The same for one token, at the place `at`, after those in the cache."""
        q, k, v = self._project(x, at[None])
        cache = Cache(
            lax.dynamic_update_slice_in_dim(cache.key, k, at, axis=1),
            lax.dynamic_update_slice_in_dim(cache.value, v, at, axis=1),
        )
        seen = jnp.arange(cache.key.shape[1]) <= at
        y = jax.nn.dot_product_attention(
            q, cache.key, cache.value, mask=seen[None, None, None]
        )
        return self.out(y.reshape(x.shape)), cache

    def _project(self, x: Float[Array, "b s w"], places: Int[Array, "s"]):
        heads = (*x.shape[:2], -1, self.config.head_dim)  # [b, s, heads, d]
        q, k, v = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        theta = self.config.theta
        return rotary(q, places, theta), rotary(k, places, theta), v


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = _linear(config.width, config.ff, rngs)
        self.up = _linear(config.width, config.ff, rngs)
        self.down = _linear(config.ff, config.width, rngs)

    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attn_norm = nnx.RMSNorm(config.width, epsilon=config.eps, rngs=rngs)
        self.attn = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=config.eps, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Float[Array, "b 1 w"], cache: Cache, at: Int[Array, ""]):
        y, cache = self.attn.step(self.attn_norm(x), cache, at)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class SmolLM(nnx.Module):
    """The decoder; its embedding is also the matrix of its logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.width, rngs=rngs)
        self.layers = nnx.List(Layer(config, rngs) for _ in range(config.layers))
        self.norm = nnx.RMSNorm(config.width, epsilon=config.eps, rngs=rngs)

    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s vocab"]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))

    def caches(self, batch: int, length: int) -> list[Cache]:
        """Room for `length` tokens in every layer."""
        shape = (batch, length, self.config.kv_heads, self.config.head_dim)
        empty = jnp.zeros(shape, self.embed.embedding.dtype)
        return [Cache(empty, empty) for _ in self.layers]

    def step(
        self, ids: Int[Array, "b"], caches: list[Cache], at: Int[Array, ""]
    ) -> tuple[Float[Array, "b vocab"], list[Cache]]:
        """The logits after one more token, which stands at the place `at`."""
        x, new = self.embed(ids[:, None]), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, cache, at)
            new.append(cache)
        return self.embed.attend(self.norm(x))[:, 0], new


def rotary(
    x: Float[Array, "b s heads d"], places: Int[Array, "s"], theta: float
) -> Float[Array, "b s heads d"]:
    """Turns each pair of neighbours `(2 i, 2 i + 1)` by `place * theta ** (-2 i / d)`.

    Published Llama checkpoints pair `(i, i + d / 2)` instead, and GGUF files have their
    rows of query and key in this order; the scores of attention are the same.

    References:
        Su et al., RoFormer, arXiv 2104.09864, equation 34.
    """
    half = x.shape[-1] // 2
    speed = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (places[:, None] * speed)[:, None]  # [s, 1, half]
    cos, sin = (f(angle).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    pairs = x.reshape(*x.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def abstract(config: Config) -> SmolLM:
    """A model of these sizes with shapes in place of arrays; costs nothing."""
    return nnx.eval_shape(lambda: SmolLM(config, rngs=nnx.Rngs(0)))


def _linear(rows: int, columns: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(rows, columns, use_bias=False, rngs=rngs)
