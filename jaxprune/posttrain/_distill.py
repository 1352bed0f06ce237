"""Losses that bring a pruned model back to its dense teacher, and data from the teacher."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxprune._tree import PyTree


def cross_entropy(
    logits: Float[Array, "*tokens vocab"],
    labels: Int[Array, "*tokens"],
    *,
    weights: Array | None = None,
) -> Float[Array, ""]:
    """Mean of `-log softmax(logits)[label]` over tokens, in at least float32.

    Args:
      logits: of the model.
      labels: integers in [0, vocab). One outside makes the loss NaN where it counts.
      weights: of the tokens, or booleans; 0 leaves a token out. The mean is over their
        sum, and 0 where that is 0.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if labels are no integers.

    Example:
      >>> logits = jnp.zeros((3, 4))
      >>> round(jp.posttrain.cross_entropy(logits, jnp.array([0, 3, 1])).item(), 4)
      1.3863
    """
    _check_labels("cross_entropy", logits, labels)
    _check_weights("cross_entropy", weights, jnp.shape(labels))
    logs = jax.nn.log_softmax(_counted(logits, weights), axis=-1)
    # A negative index would count from the end.
    places = jnp.where(labels < 0, logs.shape[-1], labels)[..., None]
    found = jnp.take_along_axis(logs, places, axis=-1, mode="fill")
    return _mean(-found[..., 0], weights)


def distill_logits(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    *,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    top_k: int | None = None,
    weights: Array | None = None,
) -> Float[Array, ""]:
    """Knowledge distillation: `τ² KL` of the softmax of logits over `τ`, mean over tokens.

    Forward is `KL(teacher ‖ student)`, which covers all that the teacher does; reverse is
    `KL(student ‖ teacher)`, which avoids what the teacher does not do. `τ²` keeps the
    size of the gradients as `τ` grows. No gradient reaches the teacher.

    Args:
      student: logits of the pruned model.
      teacher: logits of the dense one.
      temperature: `τ`, above 0.
      direction: which of the two divergences.
      top_k: compares the teacher's `top_k` tokens one by one and all others as one, which
        never exceeds the whole divergence; `None` compares all.
      weights: of the tokens; see `cross_entropy`.

    Raises:
      ValueError: if shapes do not fit, or a number or direction is out of range.

    Example:
      >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))
      >>> round(jp.posttrain.distill_logits(student, teacher).item(), 4)
      0.1308

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531;
      Gu et al., MiniLLM, arXiv 2306.08543, for the reverse divergence.
    """
    name = "distill_logits"
    _check_pair(name, student, teacher)
    _check_weights(name, weights, jnp.shape(student)[:-1])
    if not temperature > 0:
        raise ValueError(f"{name}: got temperature={temperature}; expected it above 0.")
    if direction not in ("forward", "reverse"):
        raise ValueError(
            f"{name}: got direction={direction!r}; expected 'forward', KL(teacher ‖ "
            "student), or 'reverse'."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"{name}: got top_k={top_k}; expected at least 1, or None.")
    teacher = lax.stop_gradient(_counted(teacher, weights)) / temperature
    student = _counted(student, weights) / temperature
    if top_k is not None and top_k < student.shape[-1]:
        student, teacher = _grouped(student, teacher, top_k)
    logs, others = (jax.nn.log_softmax(x, axis=-1) for x in (teacher, student))
    if direction == "reverse":
        logs, others = others, logs
    # Tokens that a mask forbids to both have -inf in both.
    there = jnp.isfinite(logs)
    ratio = jnp.where(there, logs, 0) - jnp.where(there, others, 0)
    parts = jnp.exp(jnp.where(there, logs, -jnp.inf)) * ratio
    return _mean(jnp.sum(parts, axis=-1) * temperature**2, weights)


def distill(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    labels: Int[Array, "*tokens"],
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    weights: Array | None = None,
) -> Float[Array, ""]:
    """`(1 - α) cross_entropy + α distill_logits`, of labels and teacher together.

    Args:
      student: logits of the pruned model, or of one trained on pruned data.
      teacher: logits of the dense one, trained on all data.
      labels: the right tokens or classes.
      alpha: `α` in [0, 1]. The less data is left, and the better the teacher, the larger.
      temperature: of the second part.
      weights: of the tokens; see `cross_entropy`.

    Raises:
      ValueError: as its two parts; and if `alpha` is outside [0, 1].

    Example:
      >>> logits, labels = jnp.zeros((1, 2)), jnp.array([0])
      >>> round(jp.posttrain.distill(logits, logits, labels, alpha=0.5).item(), 4)
      0.3466

    References:
      Ben-Baruch et al., Distilling the Knowledge in Data Pruning, arXiv 2403.07854;
      Hinton et al., arXiv 1503.02531.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill: got alpha={alpha}; expected a share in [0, 1].")
    soft = distill_logits(student, teacher, temperature=temperature, weights=weights)
    return (1 - alpha) * cross_entropy(student, labels, weights=weights) + alpha * soft


def distill_hidden(
    student: Float[Array, "*tokens width"],
    teacher: Float[Array, "*tokens width"],
    *,
    relative: bool = False,
    weights: Array | None = None,
) -> Float[Array, ""]:
    """Mean squared difference of hidden states, or of attention maps, over tokens.

    Args:
      student: of the pruned model; a width that was shrunk is projected first.
      teacher: of the dense one; no gradient reaches it.
      relative: divides by the teacher's mean square, so that layers count alike.
      weights: of the tokens, which are all axes but the last; see `cross_entropy`.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])
      >>> jp.posttrain.distill_hidden(student, teacher).item()
      2.0

    References:
      Romero et al., FitNets, arXiv 1412.6550 (hints); Jiao et al., TinyBERT,
      arXiv 1909.10351 (hidden states and attention).
    """
    _check_pair("distill_hidden", student, teacher)
    _check_weights("distill_hidden", weights, jnp.shape(student)[:-1])
    teacher = lax.stop_gradient(_counted(teacher, weights))
    change = _counted(student, weights) - teacher
    error = _mean(jnp.mean(change**2, axis=-1), weights)
    if not relative:
        return error
    size = _mean(jnp.mean(teacher**2, axis=-1), weights)
    return error / jnp.where(size > 0, size, 1)


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
        logits = _wide(logits)
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


def _grouped(student: Array, teacher: Array, k: int) -> tuple[Array, Array]:
    """Logits of the teacher's `k` first tokens, and one for all others together."""
    _, places = lax.top_k(teacher, k)
    first = jnp.put_along_axis(
        jnp.zeros(teacher.shape, bool), places, True, axis=-1, inplace=False
    )

    def group(x):
        rest = jax.nn.logsumexp(x, axis=-1, where=~first, keepdims=True)
        return jnp.concatenate([jnp.take_along_axis(x, places, axis=-1), rest], axis=-1)

    return group(student), group(teacher)


def _wide(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _counted(x: Array, weights: Array | None) -> Array:
    """In at least float32, and 0 at tokens left out: there may be anything, NaN too."""
    x = _wide(x)
    return x if weights is None else jnp.where(weights[..., None] != 0, x, 0)


def _mean(x: Array, weights: Array | None) -> Float[Array, ""]:
    if weights is None:
        return jnp.mean(x)
    weights = jnp.asarray(weights, x.dtype)
    total = jnp.sum(weights)
    # A label that does not count may be none.
    counted = jnp.where(weights != 0, x, 0) * weights
    return jnp.sum(counted) / jnp.where(total > 0, total, 1)


def _check_pair(caller: str, student: Any, teacher: Any) -> None:
    shapes = jnp.shape(student), jnp.shape(teacher)
    if not shapes[0] or shapes[0] != shapes[1]:
        raise ValueError(
            f"{caller}: student has the shape {shapes[0]} and teacher {shapes[1]}; expected "
            "the same, with at least one axis."
        )


def _check_labels(caller: str, logits: Any, labels: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(
            f"{caller}: labels hold {jnp.result_type(labels)}; expected integers. For "
            "probabilities, give their logarithms to distill_logits."
        )
    if not jnp.shape(logits) or jnp.shape(labels) != jnp.shape(logits)[:-1]:
        raise ValueError(
            f"{caller}: labels have the shape {jnp.shape(labels)}; expected "
            f"{jnp.shape(logits)[:-1]} for logits of {jnp.shape(logits)}."
        )


def _check_weights(caller: str, weights: Any, shape: tuple[int, ...]) -> None:
    if weights is not None and jnp.shape(weights) != shape:
        raise ValueError(
            f"{caller}: weights have the shape {jnp.shape(weights)}; expected {shape}, one "
            "for each token."
        )
