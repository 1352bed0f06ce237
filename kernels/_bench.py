"""Times of products beside the dense one, in the same run, for `bench.py` of each kernel."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

_ROUNDS = 7
_LEAST = 2e-3  # seconds that are timed together


class Case(NamedTuple):
    """A product and the dense one that it stands for.

    Attributes:
      name: of the row in the table.
      product: of `x` and `weights`.
      dense: of `x` and `matrix`.
      x: the input of both.
      weights: packed, or whatever else `product` takes.
      matrix: with the zeros.
    """

    name: str
    product: Callable
    dense: Callable
    x: jax.Array
    weights: Any
    matrix: jax.Array


def table(title: str, cases: Iterable[Case]) -> None:
    """Writes a row a case: microseconds of both, and the median of their ratios."""
    sys.stdout.write(
        f"{title} on {jax.devices()[0].device_kind}, JAX {jax.__version__}\n"
    )
    sys.stdout.write(
        "\n| product | µs | dense µs | times as fast |\n|---|---|---|---|\n"
    )
    for case in cases:
        calls = (
            (jax.jit(case.product), (case.x, case.weights)),
            (jax.jit(case.dense), (case.x, case.matrix)),
        )
        took = _times(calls)
        ratio = statistics.median(b / a for a, b in zip(*took, strict=True))
        ours, dense = (1e6 * statistics.median(t) for t in took)
        sys.stdout.write(f"| {case.name} | {ours:.0f} | {dense:.0f} | {ratio:.2f} |\n")
        sys.stdout.flush()


def _times(calls) -> list[list[float]]:
    """Seconds of each call, in rounds in which they take turns."""
    repeats = []
    for f, operands in calls:
        jax.block_until_ready(f(*operands))
        start = time.perf_counter()
        jax.block_until_ready(f(*operands))
        repeats.append(max(1, math.ceil(_LEAST / (time.perf_counter() - start))))
    found = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for (f, operands), count, times in zip(calls, repeats, found, strict=True):
            start = time.perf_counter()
            jax.block_until_ready([f(*operands) for _ in range(count)][-1])
            times.append((time.perf_counter() - start) / count)
    return found
