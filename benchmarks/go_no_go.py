"""Whether `accelerate` chooses well: 40 layers on a CPU, dense and sparse both timed.

Layers of mixed sizes, blocks and sparsities, drawn with a fixed seed; some masks have no
structure at all. For each, the dense product and the block-sparse one (with the blocks of
the format that was predicted to be best) take turns; the choice is made without timing.

The model's constants were set with other layers, of seeds 0 to 2.

    python benchmarks/go_no_go.py [--rounds 15]

Expected before measuring: the choice within a tenth of the better one in 36 of 40, and
never more than a tenth slower than dense.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.acceleration import _cost


def layers(seed=3, number=40):
    random = np.random.default_rng(seed)
    for i in range(number):
        m = int(random.choice([1, 4, 16, 48, 128, 400, 1024]))
        k, n = (int(x) for x in random.choice([256, 384, 768, 1024, 2048, 3072], 2))
        block = int(random.choice([16, 32, 64, 128]))
        sparsity = float(random.uniform(0.2, 0.97))
        if i % 8 == 7:
            block = 1
        grid = random.random((-(-k // block), -(-n // block))) >= sparsity
        yield m, k, n, block, sparsity, np.kron(grid, np.ones((block, block), bool))


def times(calls, rounds):
    """Seconds of each, turn by turn, and the median ratio of the first to the second."""
    for call in calls:
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(calls[0]())
    repeats = max(1, round(5e-3 / (time.perf_counter() - start)))
    spent = [[] for _ in calls]
    for _ in range(rounds):
        for call, mine in zip(calls, spent, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(call())
            mine.append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(*spent, strict=True))


def best_block(mask, m, k, n):
    """The blocks that the model likes most, whether they pay or not."""
    found = []
    for size in _cost.BLOCKS:
        if size <= min(k, n):
            padded = np.pad(mask, ((0, -k % size), (0, -n % size)))
            grid = padded.reshape(
                padded.shape[0] // size, size, padded.shape[1] // size, size
            )
            density = float(grid.any((1, 3)).mean())
            found.append(
                (_cost.speedup(m, k, n, size, density, jnp.float32, "cpu"), size)
            )
    return max(found)[1]


def layer(params, x):
    return x @ params["w"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each layer")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| M | K | N | blocks | sparsity | choice | predicted | measured dense / sparse | "
          "chosen / better |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    near = slow = 0
    for m, k, n, block, sparsity, mask in layers():
        key = jax.random.key(0)
        w = jnp.where(mask, jax.random.normal(key, (k, n)), 0)
        x = jax.random.normal(key, (m, k))
        _, _, report = jp.accelerate(layer, {"w": w}, {"w": jnp.asarray(mask)}, x)
        (choice,) = report.choices
        size = best_block(mask, m, k, n)
        packed = jp.formats.pack(w, jnp.asarray(mask), jp.Block(size, size))
        dense, sparse = jax.jit(jnp.dot), jax.jit(jp.kernels.block_sparse_matmul)
        ratio = times(
            [
                functools.partial(dense, x, w),
                functools.partial(sparse, x, packed),
            ],
            args.rounds,
        )
        # In units of the dense time.
        chosen = 1 / ratio if choice.go else 1.0
        worse = chosen / min(1.0, 1 / ratio)
        near += worse <= 1.1
        slow += chosen > 1.1
        print(f"| {m} | {k} | {n} | {block} | {sparsity:.0%} | {choice.format} | "
              f"{choice.speedup:.2f} | {ratio:.2f} | {worse:.2f} |", flush=True)  # fmt: skip
    print(f"\n{near} of 40 within a tenth of the better one; {slow} slower than dense by "
          "more than a tenth.")  # fmt: skip


if __name__ == "__main__":
    main()
