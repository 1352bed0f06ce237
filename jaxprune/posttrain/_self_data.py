"""Text that a dense model writes, for its pruned self to be trained on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxprune._tree import PyTree
from jaxprune.posttrain import _given


class SelfData(NamedTuple):
    """What a teacher wrote.

    Attributes:
      tokens: the prompts and what follows them.
      weights: float32, 1 for tokens that the teacher wrote, the stop token among them.
    """

    tokens: Int[Array, "batch length"]
    weights: Float[Array, "batch length"]


def self_data(
    fn: Callable[[PyTree, Array], Float[Array, "batch length vocab"]],
    params: PyTree,
    tokens: Int[Array, "batch length"],
    given: Int[Array, "batch"],
    *,
    temperature: float = 1.0,
    stop: int | None = None,
    key: Key[Array, ""] | None = None,
) -> SelfData:
    """Targets for self-data distillation: the dense model writes on from prompts.

    The recipe: put the question, and in the paper its written answer with the request to
    say it in own words, into the prompts; let the dense model answer; where the answer
    can be checked and is wrong, keep the written one; fine-tune the pruned model on the
    questions and these answers, with `cross_entropy(logits[:, :-1], tokens[:, 1:],
    weights=weights[:, 1:])`. Any other way to sample from the teacher will do as well:
    this one runs `fn` on the whole length for each token, and needs no cache.

    Args:
      fn: the dense model, `fn(params, tokens)`, causal: its logits at a place say what
        follows, and depend on what is not behind it.
      params: its parameters.
      tokens: prompts from the left, and anything behind them.
      given: how many tokens of each row are prompt, 1 or more.
      temperature: of the sampling; 0 takes the likeliest token.
      stop: a token that ends the text and fills what is left of the row.
      key: needed unless `temperature` is 0.

    Raises:
      ValueError: if shapes do not fit, a temperature is below 0, or the key is missing.
      TypeError: if tokens are no integers.

    Example:
      >>> def fn(params, tokens):
      ...     return 9.0 * jax.nn.one_hot(tokens + 1, 10)
      >>> tokens = jnp.array([[2, 0, 0, 0, 0], [5, 6, 7, 0, 0]])
      >>> found = jp.posttrain.self_data(
      ...     fn, None, tokens, jnp.array([1, 3]), temperature=0.0, stop=4
      ... )
      >>> found.tokens.tolist()
      [[2, 3, 4, 4, 4], [5, 6, 7, 8, 9]]
      >>> found.weights.tolist()
      [[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]]

    References:
      Thangarasa et al., Self-Data Distillation for Recovering Quality in Pruned Large
      Language Models, arXiv 2410.09982; Yang et al., Self-Distillation Bridges
      Distribution Gap in Language Model Fine-Tuning, arXiv 2402.13669.
    """
    tokens, given = jnp.asarray(tokens), jnp.asarray(given)
    if tokens.ndim != 2 or given.shape != tokens.shape[:1]:
        raise ValueError(
            f"self_data: got tokens of {tokens.shape} and given of {given.shape}; expected "
            "[batch, length] and [batch]."
        )
    for name, x in (("tokens", tokens), ("given", given)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"self_data: {name} holds {x.dtype}; expected integers.")
    if not temperature >= 0:
        raise ValueError(
            f"self_data: got temperature={temperature}; expected 0 or more."
        )
    if temperature and key is None:
        raise ValueError(
            "self_data: got key=None; expected one, such as jax.random.key(0), to sample, "
            "or temperature=0.0."
        )

    def write(i, state):
        tokens, weights, done = state
        logits = lax.dynamic_index_in_dim(fn(params, tokens), i - 1, 1, keepdims=False)
        logits = _given.wide(logits)
        if key is None or not temperature:
            new = jnp.argmax(logits, axis=-1)
        else:
            draw = jax.random.fold_in(key, i)
            new = jax.random.categorical(draw, logits / temperature)
        new = new.astype(tokens.dtype)
        is_new = i >= given
        if stop is not None:
            new = jnp.where(done, jnp.asarray(stop, tokens.dtype), new)
        tokens = tokens.at[:, i].set(jnp.where(is_new, new, tokens[:, i]))
        weights = weights.at[:, i].set(is_new & ~done)
        if stop is not None:
            done |= is_new & (new == stop)
        return tokens, weights, done

    start = tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(given.shape, bool)
    tokens, weights, _ = lax.fori_loop(1, tokens.shape[1], write, start)
    return SelfData(tokens, weights)
