"""Perplexity, greedy completions, and how fast they come."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from smollm2 import model

Logits = Callable[..., Float[Array, "b s vocab"]]


def losses(
    logits: Logits,
    params: Any,
    windows: Int[np.ndarray, "count length"],
    *,
    title: str,
) -> Float[np.ndarray, "count"]:
    """The mean loss of each window, of all its tokens but the first.

    Args:
        logits: A pure function of params and ids, `[1, length]`, under `jax.jit`: passed
            again, it is not compiled again.
        params: Its params.
        windows: Token ids.
        title: The text beside the progress bar.
    """
    found = []
    hidden = not rich.get_console().is_terminal  # in a log, empty lines would be left
    with rich.progress.Progress(transient=True, disable=hidden) as progress:
        for ids in progress.track(windows, description=title):
            found.append(float(loss(logits(params, ids[None])[0], ids)))
    return np.array(found)


def perplexity(losses: Float[np.ndarray, "count"]) -> float:
    """exp of the mean over all tokens; windows are as long as each other."""
    return float(np.exp(losses.mean()))


@jax.jit
def loss(logits: Float[Array, "s vocab"], ids: Int[Array, "s"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:-1], ids[1:]).mean()


def completer(
    static: nnx.GraphDef, prompts: Sequence[Sequence[int]], *, length: int
) -> Callable[..., Int[Array, "prompts length"]]:
    """A compiled function of the params: the prompts, greedily filled up to `length`.

    Prompts are read one token at a time as well, so that there is one program for both.
    """
    known = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(known, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])

    @jax.jit
    def complete(params):
        lm: model.SmolLM = nnx.merge(static, params)

        def step(carry, at):
            ids, caches = carry
            logits, caches = lm.step(ids, caches, at)
            best = logits.argmax(-1)
            ids = jnp.where(at + 1 < lengths, jnp.asarray(known)[:, at + 1], best)
            return (ids, caches), ids

        first = jnp.asarray(known[:, 0]), lm.caches(len(prompts), length)
        _, rest = lax.scan(step, first, jnp.arange(length - 1))
        return jnp.concatenate([first[0][:, None], rest.T], axis=1)

    return complete


def tokens_per_second(complete: Callable, params, *, repeats: int = 3) -> float:
    """The rate of a compiled `completer`, all prompts together; the best of some runs."""
    tokens = complete(params).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        complete(params).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return tokens.shape[0] * (tokens.shape[1] - 1) / best
