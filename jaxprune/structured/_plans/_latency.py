"""How long a function takes at the sizes of a plan, predicted or measured."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxprune._tree import PyTree
from jaxprune.structured._plans._costs import Counter, Roofline
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._reading._graph import Graph

Clock = Callable[[Plan], float]
"""Seconds that a function takes at the sizes of a plan."""


def predicted(graph: Graph, roofline: Roofline) -> Clock:
    """Seconds by a model of the device: the sum over all products of the function.

    All else is taken to be done beside the products, and products one after the other. So
    the number is a lower bound for a real device; what it says well is which axes are
    worth pruning, and at what sizes.

    Args:
      graph: of `trace`, with the example that counts: one token and a cache is another
        function than a batch of sequences.
      roofline: peak rates and tile sizes of the device.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((256, 1024)), "down": jnp.ones((1024, 256))}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((64, 256)))
      >>> device = jp.structured.Roofline(1e12, 1e11, tile=(8, 128, 128))
      >>> clock = jp.structured.predicted(graph, device)
      >>> scores = jp.structured.score_groups(graph, params)
      >>> target = jp.structured.Target(latency=0.6, clock=clock)
      >>> plan = jp.structured.plan(graph, scores, target=target, round_to=128)
      >>> len(plan.groups["down:0"].kept)
      512
    """
    counter = Counter(graph)

    def seconds(plan: Plan) -> float:
        kept = {name: g.left for name, g in plan.groups.items()}
        return counter.seconds(roofline, kept)

    return seconds


def measured(
    fn: Callable[..., Any], params: PyTree, *args: Any, repeats: int = 20
) -> Clock:
    """Seconds on this machine: the median of runs of the rewritten function.

    It is compiled for each plan that it is asked about. The time is that of the host
    until the result is there, so it counts what dispatch takes.

    Args:
      fn: the function that counts, of `params` and `args`.
      params: of full size.
      *args: of full size.
      repeats: runs, behind the first one, which compiles.

    Raises:
      ValueError: if `repeats` is not 1 or more.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats!r}; expected 1 or more.")

    def seconds(plan: Plan) -> float:
        run = jax.jit(plan.rewrite(fn))
        small, rest = plan.shrink(params), plan.shrink_inputs(*args)
        jax.block_until_ready(run(small, *rest))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(small, *rest))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return seconds
