"""A Llama-like transformer at full size, as shapes on a mesh of chips that are not there.

Layers stand in one scan. Weights are sharded over `fsdp` and `tensor` and gathered over
`fsdp` where a layer uses them; the batch is sharded over `data` and `fsdp`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads


MODELS = {
    "7B": Config(32, 4096, 32, 32, 11008, 32000),
    "70B": Config(80, 8192, 64, 8, 28672, 32000),
    "405B": Config(126, 16384, 128, 8, 53248, 128256),
}

# How each leaf of a layer lies, without the axis of the stack.
LAYER = {
    "q": P("fsdp", "tensor", None),
    "k": P("fsdp", "tensor", None),
    "v": P("fsdp", "tensor", None),
    "o": P("tensor", None, "fsdp"),
    "gate": P("fsdp", "tensor"),
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
    "attention_scale": P(None),
    "mlp_scale": P(None),
}
TOP = {"embed": P("tensor", "fsdp"), "scale": P(None), "head": P("fsdp", "tensor")}
# What a leaf is contracted over, for structures; the last match decides.
CONTRACTED = {
    "*": -2,
    "layers/[qkv]": -3,
    "layers/o": (-3, -2),
}


def mesh(
    devices: Any, shape: tuple[int, int, int], kind: AxisType = AxisType.Explicit
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor."""
    devices = np.array(devices).reshape(shape)
    return Mesh(devices, (*BATCH, "tensor"), axis_types=(kind,) * 3)


def params(c: Config, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    """Parameters, as shapes with their shardings."""

    def leaf(shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    layer = {
        "q": (c.width, c.heads, c.head),
        "k": (c.width, c.kv_heads, c.head),
        "v": (c.width, c.kv_heads, c.head),
        "o": (c.heads, c.head, c.width),
        "gate": (c.width, c.hidden),
        "up": (c.width, c.hidden),
        "down": (c.hidden, c.width),
        "attention_scale": (c.width,),
        "mlp_scale": (c.width,),
    }
    top = {
        "embed": (c.vocabulary, c.width),
        "scale": (c.width,),
        "head": (c.width, c.vocabulary),
    }
    layers = {
        name: leaf((c.layers, *shape), P(None, *LAYER[name]))
        for name, shape in layer.items()
    }
    return {"layers": layers} | {n: leaf(s, TOP[n]) for n, s in top.items()}


def tokens(mesh: Mesh, length: int) -> jax.ShapeDtypeStruct:
    """A batch, one sequence for each shard of it."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, P(BATCH, None))
    return jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)


def gathered(w: jax.Array, spec: P) -> jax.Array:
    """A weight in bfloat16, whole along `fsdp`."""
    return lie(w.astype(jnp.bfloat16), *(None if a == "fsdp" else a for a in spec))


def lie(x: jax.Array, *spec: Any) -> jax.Array:
    """`x` divided over the mesh, of either kind."""
    if is_explicit():
        return jax.reshard(x, P(*spec))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def product(formula: str, x: jax.Array, w: jax.Array, *spec: Any) -> jax.Array:
    """A contraction whose result is divided so."""
    if is_explicit():
        return jnp.einsum(formula, x, w, out_sharding=P(*spec))
    return lie(jnp.einsum(formula, x, w), *spec)


def is_explicit() -> bool:
    """Whether types say how arrays lie on the present mesh."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square norm."""
    wide = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
    return (wide * size).astype(x.dtype) * scale.astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of `[batch, length, heads, head]`."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-jnp.arange(half) / half)
    angle = (jnp.arange(x.shape[1])[:, None] * speed)[:, None]  # [length, 1, half]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def block(layer: Any, x: jax.Array) -> jax.Array:
    """One layer on `[batch, length, width]`."""
    w = {n: gathered(a, LAYER[n]) for n, a in layer.items() if a.ndim > 1}
    rows = BATCH, None
    h = norm(x, layer["attention_scale"])
    q, k, v = (
        product("btd,dhk->bthk", h, w[n], *rows, "tensor", None)
        for n in ("q", "k", "v")
    )
    h = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + product("bthk,hkd->btd", h, w["o"], *rows, None)
    h = norm(x, layer["mlp_scale"])
    gate = product("btd,df->btf", h, w["gate"], *rows, "tensor")
    up = product("btd,df->btf", h, w["up"], *rows, "tensor")
    return x + product("btf,fd->btd", jax.nn.silu(gate) * up, w["down"], *rows, None)


def loss(c: Config, params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    rows = BATCH, None
    words = jax.nn.one_hot(tokens, c.vocabulary, dtype=jnp.bfloat16)
    words = lie(words, *rows, "tensor")
    x = product(
        "btv,vd->btd", words, gathered(params["embed"], TOP["embed"]), *rows, None
    )
    run = jax.checkpoint(block)
    x, _ = jax.lax.scan(lambda x, w: (run(w, x), None), x, params["layers"])
    x = norm(x, params["scale"])
    logits = product(
        "btd,dv->btv", x, gathered(params["head"], TOP["head"]), *rows, "tensor"
    )
    logits = logits.astype(jnp.float32)
    # The last token has no next one: it gets the first, which costs the same.
    wanted = jax.nn.one_hot(jnp.roll(tokens, -1, 1), c.vocabulary, dtype=jnp.float32)
    right = jnp.sum(logits * lie(wanted, *rows, "tensor"), -1)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - right)
