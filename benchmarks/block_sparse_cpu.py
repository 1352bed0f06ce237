"""Block-sparse products on a CPU against `jnp.dot`, forward and backward, in one run.

K = N = 2048 in float32. The variants of a cell take turns, and each figure is the median
over turns of dense time / sparse time. *Balanced*: as many blocks in every column;
*unbalanced*: by chance. *Known*: the function closes over the pattern, as in training with
masks that stay; *run-time*: the pattern is an argument.

    python benchmarks/block_sparse_cpu.py [--rounds 15]

Expected before measuring: 2 to 3.5 times at 80 %, 3 to 5 at 90 %, 4 to 8 at 95 % (the
ideal is 5, 10 and 20): the products themselves run as fast as large ones from blocks of 64
on, so what is lost is transposing x and y, and starting a product a step.
"""

import argparse
import dataclasses
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

EXTENT = 2048
WANTED = {"forward": (1.8, 2.5, 3.5), "forward + backward": (1.5, 2.0, 2.8)}
SPARSITIES = (0.8, 0.9, 0.95)


def mask_of(size: int, sparsity: float, balanced: bool) -> np.ndarray:
    random = np.random.default_rng(0)
    along = EXTENT // size
    if balanced:
        kept = max(1, round((1 - sparsity) * along))
        order = random.random((along, along)).argsort(0)
        blocks = order < kept
    else:
        blocks = random.random((along, along)) >= sparsity
    return np.kron(blocks, np.ones((size, size), bool))


def closing_over(packed):
    def product(x, values):
        whole = dataclasses.replace(packed, values=values)
        return jp.kernels.block_sparse_matmul(x, whole)

    return product


def forward(product):
    return jax.jit(lambda x, w, dy: product(x, w))


def both(product):
    def f(x, w, dy):
        y, back = jax.vjp(product, x, w)
        return y, *back(dy)

    return jax.jit(f)


def ratio(found, operands, rounds: int) -> float:
    """Median of the first's time over the second's."""
    spent = []
    for f, x in zip(found, operands, strict=True):
        jax.block_until_ready(f(*x))
    for _ in range(rounds):
        turn = []
        for f, x in zip(found, operands, strict=True):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                jax.block_until_ready(f(*x))
                times.append(time.perf_counter() - start)
            turn.append(statistics.median(times))
        spent.append(turn[0] / turn[1])
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns in each cell")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 64, 512])
    args = parser.parse_args()
    random = np.random.default_rng(1)
    w = jnp.asarray(random.standard_normal((EXTENT, EXTENT)), jnp.float32)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| pattern | columns | M | block | " + " | ".join(
        f"{what}, {s:.0%}" for what in WANTED for s in SPARSITIES) + " |")  # fmt: skip
    print("|---" * (4 + 2 * len(SPARSITIES)) + "|")
    missed = 0
    for known, balanced, m, size in itertools.product(
        (True, False), (True, False), args.m, (64, 128)
    ):
        x, dy = (
            jnp.asarray(random.standard_normal((m, EXTENT)), jnp.float32) for _ in "xy"
        )
        cells = []
        for what, wrap in (("forward", forward), ("forward + backward", both)):
            dense = wrap(jnp.dot)
            for sparsity, wanted in zip(SPARSITIES, WANTED[what], strict=True):
                mask = mask_of(size, sparsity, balanced)
                packed = jp.formats.pack(w, jnp.asarray(mask), jp.Block(size, size))
                product, held = jp.kernels.block_sparse_matmul, packed
                if known:
                    product, held = closing_over(packed), packed.values
                found = ratio(
                    (dense, wrap(product)), ((x, w * mask, dy), (x, held, dy)),
                    args.rounds,
                )  # fmt: skip
                missed += found < wanted
                cells.append(f"{found:.1f}" + ("" if found >= wanted else " (missed)"))
        kind = "balanced" if balanced else "unbalanced"
        pattern = "known" if known else "run-time"
        print(
            f"| {pattern} | {kind} | {m} | {size} | " + " | ".join(cells) + " |",
            flush=True,
        )
    print(f"\n{missed} cells below what was asked.")


if __name__ == "__main__":
    main()
