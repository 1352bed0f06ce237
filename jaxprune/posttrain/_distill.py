"""Losses that bring a pruned model back to its dense teacher."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.posttrain import _given


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


def _counted(x: Array, weights: Array | None) -> Array:
    """In at least float32, and 0 at tokens left out: there may be anything, NaN too."""
    x = _given.wide(x)
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
