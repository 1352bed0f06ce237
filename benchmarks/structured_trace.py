"""How long it takes to find the groups of large language models, from shapes alone.

Llama-2's 7B, its layers one after the other, and its 70B, with layers in a scan and one
after the other: grouped queries, rotary positions, gated neurons. Time is that of
`jaxprune.structured.trace`, the median of five; the bytes are those that arrays on the
device have grown by.

    python benchmarks/structured_trace.py

Expected before measuring: a second for the 7B, half of it in tracing the function itself;
a tenth of one for the scan.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import llama_shapes
import numpy as np

from jaxprune import structured

ROUNDS, LENGTH = 5, 512


MODELS = {
    "7B": (llama_shapes.MODELS["7B"], False),
    "70B, scanned": (llama_shapes.MODELS["70B"], True),
    "70B": (llama_shapes.MODELS["70B"], False),
}


def shapes(c: llama_shapes.Config, scanned: bool) -> Any:
    """Parameters, as shapes."""
    layer = {
        "n1": (c.width,), "n2": (c.width,),
        "q": (c.width, c.heads, c.head), "k": (c.width, c.kv_heads, c.head),
        "v": (c.width, c.kv_heads, c.head), "o": (c.heads, c.head, c.width),
        "gate": (c.width, c.hidden), "up": (c.width, c.hidden),
        "down": (c.hidden, c.width),
    }  # fmt: skip
    stacked = {name: (c.layers, *shape) for name, shape in layer.items()}
    tree = {
        "embed": (c.vocabulary, c.width), "norm": (c.width,),
        "head": (c.width, c.vocabulary),
        "layers": stacked if scanned else [layer] * c.layers,
    }  # fmt: skip
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


def norm(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def rotated(x: Any) -> Any:
    """Rotary positions; x `[batch, tokens, heads, head_dim]`."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    turned = jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], -1)
    return turned.astype(x.dtype)


def block(x: Any, w: Any) -> Any:
    h = norm(x, w["n1"])
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, w[n]) for n in "qkv")
    mixed = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + jnp.einsum("bthe,hed->btd", mixed, w["o"])
    h = norm(x, w["n2"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def forward(scanned: bool, p: Any, ids: Any) -> Any:
    x = p["embed"][ids]
    if scanned:
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, p["layers"])
    else:
        for w in p["layers"]:
            x = block(x, w)
    return norm(x, p["norm"]) @ p["head"]


def held() -> int:
    """Bytes of all arrays on the device."""
    return sum(x.nbytes for x in jax.live_arrays())


def row(name: str, c: llama_shapes.Config, scanned: bool) -> str:
    """A line of the table."""
    params = shapes(c, scanned)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    before = held()

    def traced() -> tuple[float, structured.Graph]:
        jax.clear_caches()
        start = time.perf_counter()
        # A new function each time, so that none of it is remembered.
        graph = structured.trace(lambda p, x: forward(scanned, p, x), params, ids)
        return time.perf_counter() - start, graph

    spent, graphs = zip(*(traced() for _ in range(ROUNDS)), strict=True)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    cells = [
        name, f"{count / 1e9:.1f}", str(len(graphs[0].groups)),
        f"{statistics.median(spent):.2f}", f"{max(spent):.2f}",
        f"{held() - before}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    columns = (
        "model", "10⁹ parameters", "groups", "seconds, median", "slowest", "bytes held",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, (config, scanned) in MODELS.items():
        print(row(name, config, scanned), flush=True)


if __name__ == "__main__":
    main()
