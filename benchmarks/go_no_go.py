"""Whether `accelerate` chooses well: 40 layers on a CPU, dense and packed products timed.

Layers of mixed sizes, blocks and sparsities, drawn with a fixed seed; some masks have no
structure at all. For each, these take turns: the dense product, and the packed ones in the
blocks that are predicted to be best, in each N:M that the mask allows, and as a bitmap. The
choice is made without timing.

The model's constants were set with other layers, of seeds 0 to 2.

    taskset -c 0 python benchmarks/go_no_go.py [--rounds 15]

Expected before measuring: the choice within a tenth of the best one in 36 of 40, and
never more than a tenth slower than dense.
"""

import argparse
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.acceleration import _packing, _products


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
    """Turn by turn, the median ratio of the time of the first to that of each."""
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
    return [
        statistics.median(a / b for a, b in zip(spent[0], x, strict=True))
        for x in spent
    ]


def packings(mask, choice):
    """The blocks that the model likes most, whether they pay or not, and all the others."""
    seconds = {c.format: c.seconds for c in choice.candidates}
    found = _packing.allowed(mask, [((-2,), (-1,))])
    blocks = [p for p in found if isinstance(p.structure, jp.Block)]
    best = min(blocks, key=lambda p: seconds[p.name])
    return [best, *(p for p in found if p not in blocks)]


def layer(params, x):
    return x @ params["w"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each layer")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {cores} cores\n")
    print("| M | K | N | blocks | sparsity | choice | predicted | measured dense / packed | "
          "chosen / best |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    near = slow = 0
    dense, packed_product = jax.jit(jnp.dot), jax.jit(_products.product)
    for m, k, n, block, sparsity, mask in layers():
        key = jax.random.key(0)
        w = jnp.where(mask, jax.random.normal(key, (k, n)), 0)
        x = jax.random.normal(key, (m, k))
        _, _, report = jp.accelerate(layer, {"w": w}, {"w": jnp.asarray(mask)}, x)
        (choice,) = report.choices
        tried = packings(mask, choice)
        calls = [functools.partial(dense, x, w)]
        calls += [functools.partial(packed_product, x, p(w, mask)) for p in tried]
        names = ["dense", *(p.name for p in tried)]
        ratios = dict(zip(names, times(calls, args.rounds), strict=True))
        chosen = 1 / ratios[choice.format]  # in units of the dense time
        worse = chosen * max(ratios.values())
        near += worse <= 1.1
        slow += chosen > 1.1
        measured = ", ".join(f"{name} {r:.2f}" for name, r in [*ratios.items()][1:])
        print(f"| {m} | {k} | {n} | {block} | {sparsity:.0%} | {choice.format} | "
              f"{choice.speedup:.2f} | {measured} | {worse:.2f} |", flush=True)  # fmt: skip
    print(f"\n{near} of 40 within a tenth of the best one; {slow} slower than dense by "
          "more than a tenth.")  # fmt: skip


if __name__ == "__main__":
    main()
