"""Training with block-sparse weights against dense training on a CPU: the whole step.

90 % of the 64 x 64 blocks of every linear layer are pruned at random; `accelerate` packs
the rest, and adamw sees nothing but the values that are left. Two models in float32: an
MLP 1024-2048-2048-2048-1024 on batches of 256, and a transformer of 4 layers, width 768,
on 4 x 128 tokens. Variants take turns; a figure is the median over turns of dense time /
sparse time. The losses are compared with those of masked dense training.

    python benchmarks/block_sparse_training.py [--rounds 9]

Expected before measuring: the MLP 3 to 4 times, as its products alone; the transformer 2
times, since attention, norms and embeddings stay as they are.
"""

import argparse
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp

SIZES = (1024, 2048, 2048, 2048, 1024)
WIDTH, LAYERS, HEADS, TOKENS, VOCABULARY = 768, 4, 12, (4, 128), 256
BLOCK, SPARSITY, STEPS = jp.Block(64, 64), 0.9, 5


def mlp_params(key):
    keys = jax.random.split(key, len(SIZES))
    return [
        {"kernel": jax.random.normal(k, s) / s[0] ** 0.5, "bias": jnp.zeros(s[1])}
        for k, s in zip(keys, itertools.pairwise(SIZES), strict=False)
    ]


def mlp_loss(params, batch):
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x @ params[-1]["kernel"] + params[-1]["bias"] - y) ** 2)


def transformer_params(key):
    shapes = {
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    keys = iter(jax.random.split(key, 1 + LAYERS * len(shapes)))
    embedding = 0.02 * jax.random.normal(next(keys), (VOCABULARY, WIDTH))
    layers = [
        {
            name: {"kernel": jax.random.normal(next(keys), s) / s[0] ** 0.5}
            for name, s in shapes.items()
        }
        for _ in range(LAYERS)
    ]
    return {"embedding": embedding, "layers": layers}


def transformer_loss(params, batch):
    tokens, wanted = batch
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        h = jax.nn.standardize(x) @ layer["qkv"]["kernel"]
        q, k, v = jnp.split(h.reshape(*h.shape[:2], 3 * HEADS, -1), 3, axis=2)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + h @ layer["out"]["kernel"]
        h = jax.nn.gelu(jax.nn.standardize(x) @ layer["up"]["kernel"])
        x = x + h @ layer["down"]["kernel"]
    logits = jax.nn.standardize(x) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def trainer(loss, params, tx):
    """A step, and what it starts from."""

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    # Copies, since they are donated.
    return jax.jit(step, donate_argnums=0), jax.tree.map(
        jnp.copy, (params, tx.init(params))
    )


def measure(name, loss, params, batch, where, rounds):
    random = jp.scores.random(params, key=jax.random.key(1))
    params, masks = jp.prune(
        params, SPARSITY, score=random, structure=BLOCK, where=where
    )
    fast, packed, report = jp.accelerate(loss, params, masks, batch)
    if not all(choice.go for choice in report.choices):
        raise RuntimeError(f"not all layers were packed:\n{report}")
    adamw = optax.adamw(1e-3)
    variants = {
        "dense": trainer(loss, params, adamw),
        "masked": trainer(loss, params, jp.masked(adamw, masks)),
        "packed": trainer(
            lambda values, batch: fast(jp.formats.with_values(packed, values), batch),
            jp.formats.values(packed), adamw,
        ),
    }  # fmt: skip
    nbytes = {
        k: sum(x.nbytes for x in jax.tree.leaves(carry))
        for k, (_, carry) in variants.items()
    }
    losses, spent = {}, {k: [] for k in variants}
    carries = {}
    for kind, (step, carry) in variants.items():
        losses[kind] = []
        for _ in range(STEPS):
            carry, value = step(carry, batch)
            losses[kind].append(float(value))
        carries[kind] = carry
    for _ in range(rounds):
        for kind, (step, _) in variants.items():
            start = time.perf_counter()
            carries[kind] = jax.block_until_ready(step(carries[kind], batch))[0]
            spent[kind].append(time.perf_counter() - start)
    apart = np.abs(np.subtract(losses["packed"], losses["masked"])).max()
    for kind in ("masked", "packed"):
        ratio = statistics.median(
            a / b for a, b in zip(spent["dense"], spent[kind], strict=True)
        )
        difference = f"{apart / losses['masked'][0]:.1e}" if kind == "packed" else "-"
        print(f"| {name} | {kind} | {ratio:.2f} | "
              f"{nbytes[kind] / nbytes['dense']:.2f} | {difference} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=9, help="steps of each that count"
    )
    args = parser.parse_args()
    key = jax.random.key(0)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| model | weights | dense / this | weights and optimizer state / dense | "
          f"loss against masked, {STEPS} steps |")  # fmt: skip
    print("|---|---|---|---|---|")
    x = jax.random.normal(key, (256, SIZES[0]))
    measure("MLP", mlp_loss, mlp_params(key), (x, jnp.tanh(x)), None, args.rounds)
    tokens = jax.random.randint(key, TOKENS, 0, VOCABULARY)
    measure(
        "transformer", transformer_loss, transformer_params(key),
        (tokens, jnp.roll(tokens, 1, 1)), "layers/*", args.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
