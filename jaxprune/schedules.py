"""When, and how far: sparsity as a function of the training step."""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Moves from `initial` to `final` between two steps, and says when to update masks.

    Calling it with a step (0-based int32, traced or not) gives the sparsity, float32.
    Between two updates the value stands still. Counts are not computed from that float32
    but from `fraction`, so that they are exact at both ends however large the leaf.

    Attributes:
      initial: value up to `begin`.
      final: value from `end` on.
      begin: step of the first update.
      end: step of the last update; always one, whether or not `every` meets it.
      every: steps from one update to the next.
      curve: share of the way gone, as a function of the share of time gone.
    """

    initial: float | Fraction
    final: float | Fraction
    begin: int
    end: int
    every: int
    curve: Callable[[Array], Array]

    def __post_init__(self) -> None:
        for name in ("begin", "end", "every"):
            steps = getattr(self, name)
            if not hasattr(steps, "__index__"):
                raise TypeError(
                    f"{name}: got {steps!r}; expected a whole number of training steps, "
                    "written as an int."
                )
            if steps >= 2**31:
                raise ValueError(
                    f"{name}: got {steps}; expected below 2**31, as steps are int32."
                )
        if not 0 <= self.begin <= self.end:
            raise ValueError(
                f"begin, end: got begin={self.begin}, end={self.end}; expected "
                "0 <= begin <= end, in training steps."
            )
        if self.every < 1:
            raise ValueError(f"every: got {self.every}; expected at least 1 step.")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The value at `step`."""
        initial, final = float(self.initial), float(self.final)
        value = initial + (final - initial) * self.fraction(step)
        # Exact at the ends, which the rounded sum above need not be.
        step = jnp.asarray(step)
        value = jnp.where(step < self.begin, initial, value)
        return jnp.where(step >= self.end, final, value).astype(jnp.float32)

    def fraction(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Share of the way from `initial` to `final` that is gone, in [0, 1]."""
        step = jnp.asarray(step)
        since = jnp.maximum(step - self.begin, 0)
        since = since // self.every * self.every
        time = since.astype(jnp.float32) / max(self.end - self.begin, 1)
        gone = jnp.clip(self.curve(jnp.clip(time, 0, 1)), 0, 1)
        gone = jnp.where(step < self.begin, 0, gone)
        return jnp.where(step >= self.end, 1, gone).astype(jnp.float32)

    def due(self, step: Int[Array, ""] | int) -> Bool[Array, ""]:
        """Whether masks are updated at `step`."""
        step = jnp.asarray(step)
        inside = (step >= self.begin) & (step <= self.end)
        return inside & (((step - self.begin) % self.every == 0) | (step == self.end))


def constant(value: float) -> Schedule:
    """The same value from the first step on; one update, at step 0.

    Example:
      >>> float(jp.schedules.constant(0.5)(7))
      0.5
    """
    return Schedule(value, value, 0, 0, 1, jnp.ones_like)


def one_shot(final: float, at: int) -> Schedule:
    """0 before step `at`, `final` from there on.

    Example:
      >>> [float(jp.schedules.one_shot(0.5, at=3)(t)) for t in (2, 3)]
      [0.0, 0.5]
    """
    return Schedule(0.0, final, at, at, 1, jnp.ones_like)


def cubic(
    final: float | Fraction,
    begin: int,
    end: int,
    every: int = 1,
    initial: float | Fraction = 0.0,
) -> Schedule:
    """The cubic ramp of gradual magnitude pruning: fast at first, slow at the end.

    `s(t) = final + (initial - final) (1 - (t - begin) / (end - begin))**3`

    Example:
      >>> s = jp.schedules.cubic(0.9, begin=0, end=100, every=10)
      >>> [round(float(s(t)), 4) for t in (0, 50, 59, 100, 200)]
      [0.0, 0.7875, 0.7875, 0.9, 0.9]

    References:
      Zhu & Gupta, To Prune, or Not to Prune, arXiv 1710.01878, Eq. (1).
    """
    return Schedule(initial, final, begin, end, every, _cubic)


def window(
    final: float, total: int, every: int = 1, *, start: float = 0.25, stop: float = 0.75,
    initial: float = 0.0,
) -> Schedule:  # fmt: skip
    """The cubic ramp over a window of the training run.

    Args:
      final: sparsity at the end.
      total: training steps in all.
      every: steps between mask updates.
      start: share of the run at which the ramp begins.
      stop: share of the run at which it ends.
      initial: sparsity before.

    Example:
      >>> s = jp.schedules.window(0.9, total=100)
      >>> s.begin, s.end
      (25, 75)

    Raises:
      ValueError: unless 0 <= start <= stop <= 1.
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(
            f"start, stop: got {start}, {stop}; expected 0 <= start <= stop <= 1, as "
            "shares of the run."
        )
    return cubic(final, round(start * total), round(stop * total), every, initial)


def cosine(
    final: float | Fraction,
    begin: int,
    end: int,
    every: int = 1,
    initial: float | Fraction = 0.0,
) -> Schedule:
    """Half a cosine from `initial` to `final`; falls as well as rises.

    Example:
      >>> s = jp.schedules.cosine(0.0, begin=0, end=100, initial=0.3)
      >>> [round(float(s(t)), 4) for t in (0, 50, 100)]
      [0.3, 0.15, 0.0]

    References:
      The decay of the drop fraction in Evci et al., Rigging the Lottery,
      arXiv 1911.11134, section 3 (update schedule).
    """
    return Schedule(initial, final, begin, end, every, _cosine)


def linear(
    final: float | Fraction,
    begin: int,
    end: int,
    every: int = 1,
    initial: float | Fraction = 0.0,
) -> Schedule:
    """A straight line from `initial` to `final`.

    Example:
      >>> s = jp.schedules.linear(0.0, begin=0, end=100, initial=1.0)
      >>> [float(s(t)) for t in (0, 50, 100)]
      [1.0, 0.5, 0.0]
    """
    return Schedule(initial, final, begin, end, every, _linear)


def exponential(rate: float, end: int, begin: int = 0) -> Schedule:
    """`exp(-rate (t - begin))`, from 1 at `begin` downwards, and 0 from `end` on.

    Args:
      rate: per step, above 0.
      end: step at which what is left drops to 0.
      begin: step up to which the value is 1.

    Example:
      >>> s = jp.schedules.exponential(0.01, end=500)
      >>> [round(float(s(t)), 4) for t in (0, 100, 499, 500)]
      [1.0, 0.3679, 0.0068, 0.0]

    Raises:
      ValueError: unless `rate` is above 0.
    """
    if not rate > 0:
        raise ValueError(f"rate: got {rate}; expected a number above 0, such as 1e-4.")
    curve = functools.partial(_exponential, rate=rate * (end - begin))
    return Schedule(1.0, 0.0, begin, end, 1, curve)


def sigmoid(
    final: float | Fraction,
    begin: int,
    end: int,
    every: int = 1,
    initial: float | Fraction = 0.0,
    steepness: float = 6.0,
) -> Schedule:
    """A logistic curve from `initial` to `final`: slow, fast, slow.

    The argument of the logistic function runs from `-steepness` to `steepness`; its
    values are stretched so that the ends are met exactly.

    Example:
      >>> s = jp.schedules.sigmoid(0.9, begin=0, end=100, initial=0.5)
      >>> [round(float(s(t)), 4) for t in (0, 10, 50, 100)]
      [0.5, 0.5023, 0.7, 0.9]

    References:
      Zhang et al., Brain network science modelling of sparse neural networks enables
      Transformers and LLMs to perform as fully connected, arXiv 2501.19107, the density
      decay of CHTss.
    """
    curve = functools.partial(_sigmoid, steepness=steepness)
    return Schedule(initial, final, begin, end, every, curve)


def _cubic(time: Array) -> Array:
    return 1 - (1 - time) ** 3


def _cosine(time: Array) -> Array:
    return (1 - jnp.cos(math.pi * time)) / 2


def _linear(time: Array) -> Array:
    return time


def _exponential(time: Array, *, rate: float) -> Array:
    return 1 - jnp.exp(-rate * time)


def _sigmoid(time: Array, *, steepness: float) -> Array:
    # The logistic function is (1 + tanh(x / 2)) / 2.
    return (1 + jnp.tanh(steepness * (time - 0.5)) / math.tanh(steepness / 2)) / 2
