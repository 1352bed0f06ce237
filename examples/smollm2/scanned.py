"""The same model in linen, its layers stacked and scanned over."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smollm2 import model


class Attention(nn.Module):
    """Causal attention with rotary positions and shared keys and values (GQA)."""

    config: model.Config

    @nn.compact
    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        config, places = self.config, jnp.arange(x.shape[1])
        shared = config.kv_heads * config.head_dim
        q = nn.Dense(config.width, use_bias=False, name="query")(x)
        k = nn.Dense(shared, use_bias=False, name="key")(x)
        v = nn.Dense(shared, use_bias=False, name="value")(x)
        heads = (*x.shape[:2], -1, config.head_dim)  # [b, s, heads, d]
        y = jax.nn.dot_product_attention(
            model.rotary(q.reshape(heads), places, config.theta),
            model.rotary(k.reshape(heads), places, config.theta),
            v.reshape(heads),
            is_causal=True,
        )
        return nn.Dense(config.width, use_bias=False, name="out")(y.reshape(x.shape))


class MLP(nn.Module):
    """SwiGLU."""

    config: model.Config

    @nn.compact
    def __call__(self, x: Float[Array, "b s w"]) -> Float[Array, "b s w"]:
        gate = nn.Dense(self.config.ff, use_bias=False, name="gate")(x)
        up = nn.Dense(self.config.ff, use_bias=False, name="up")(x)
        down = nn.Dense(self.config.width, use_bias=False, name="down")
        return down(jax.nn.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm decoder layer, as the body of a scan."""

    config: model.Config

    @nn.compact
    def __call__(self, x: Float[Array, "b s w"], _: None):
        eps = self.config.eps
        y = nn.RMSNorm(epsilon=eps, name="attn_norm")(x)
        x = x + Attention(self.config, name="attn")(y)
        y = nn.RMSNorm(epsilon=eps, name="mlp_norm")(x)
        return x + MLP(self.config, name="mlp")(y), None


class SmolLM(nn.Module):
    """The decoder; each leaf under `layers` has the layers as its first axis."""

    config: model.Config

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s vocab"]:
        config = self.config
        embed = nn.Embed(config.vocab, config.width, name="embed")
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.layers,
        )
        x, _ = layers(config, name="layers")(embed(ids), None)
        return embed.attend(nn.RMSNorm(epsilon=config.eps, name="norm")(x))


def stack(params: Any) -> dict[str, Any]:
    """The params of the NNX model, or its masks, as those of this one."""
    pure = nnx.to_pure_dict(nnx.State(params))
    layers = [layer for _, layer in sorted(pure["layers"].items())]
    return pure | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The params of this model, or its masks, as those of the NNX model."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {
        i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)
    }
    return params | {"layers": layers}
